"""Look at an MLflow store in an SQLite file without MLflow, which takes seconds to load."""

from __future__ import annotations

import importlib.util
import os
import re
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from sweep.config.absolute_paths import SQLITE, sqlite_file, sqlite_uri

PATIENCE_S = 5.0
OLD = "has the tables of an older MLflow; make a copy of it, then run `mlflow db upgrade` with this address"
NEW = "has the tables of a newer MLflow; install that version"
ADDRESSES = (
    ("experiments", "artifact_location"), ("runs", "artifact_uri"), ("model_versions", "source"),
    ("model_versions", "storage_location"),
)  # fmt: skip
REVISION = re.compile(r"^(down_)?revision\s*=\s*[\"'](\w+)[\"']", re.MULTILINE)


def local_uri(folder: Path) -> str:
    """Return the default store: `mlflow.db` in `folder`, with artifacts next to it."""
    return sqlite_uri(folder / "mlflow.db")


def database_file(uri: str) -> Path | None:
    """Return the file of an SQLite store, or None for any other store."""
    return sqlite_file(uri).absolute() if uri.startswith(SQLITE) else None


def artifact_folder(file: Path) -> str:
    """Return where artifacts lie: next to the database."""
    return (file.parent / "mlartifacts").as_uri()


def follow_move(file: Path) -> None:
    """Have a database that was moved or copied name the artifacts that lie next to it.

    MLflow stores absolute addresses. Without this, a resume of a copy would write into the original.
    """
    if not file.is_file() or not os.access(file, os.W_OK):
        return
    new = artifact_folder(file)
    with suppress(sqlite3.Error), closing(sqlite3.connect(file, timeout=PATIENCE_S)) as database, database:
        found = database.execute("select distinct artifact_location from experiments where artifact_location like 'file:///%'")
        for old in [old for (old,) in found if old.endswith("/mlartifacts") and old != new]:
            for table, column in ADDRESSES:
                is_below = f"{column} = ? or substr({column}, 1, ?) = ?"
                changed = f"update {table} set {column} = ? || substr({column}, ?) where {is_below}"
                database.execute(changed, [new, len(old) + 1, old, len(old) + 1, f"{old}/"])


def find_fault(file: Path, experiment: str) -> str | None:
    """Return why MLflow cannot write this experiment to the file, or None.

    The file may not exist yet, or be busy for a while.
    """
    if not file.exists():
        parent = next(folder for folder in file.parents if folder.exists())
        return None if parent.is_dir() and os.access(parent, os.W_OK) else f"cannot be made in {parent}"
    if not file.is_file():
        return "must be a database, not a folder"
    if not os.access(file, os.W_OK) or not os.access(file.parent, os.W_OK):
        return "must be writable, and so must its folder"
    try:
        with closing(sqlite3.connect(file, timeout=PATIENCE_S, isolation_level=None)) as database:
            return _find_fault_inside(database, experiment)
    except sqlite3.Error as error:
        return None if "database is locked" in str(error) else f"cannot be used ({error})"


def _find_fault_inside(database: sqlite3.Connection, experiment: str) -> str | None:
    tables = {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
    if tables and not {"experiments", "alembic_version"} <= tables:
        return "is the database of another program"
    database.execute("begin immediate")
    database.execute("rollback")
    if not tables:
        return None
    versions = {version for (version,) in database.execute("select version_num from alembic_version")}
    newest, older = schemas()
    if newest is not None and versions != {newest}:
        return OLD if versions & older else NEW
    query = "select experiment_id from experiments where name = ? and lifecycle_stage = 'deleted'"
    deleted = database.execute(query, [experiment]).fetchone()
    return None if deleted is None else deleted_fault(experiment, deleted[0])


def deleted_fault(experiment: str, number: object) -> str:
    return f"has the experiment '{experiment}' as deleted; `mlflow experiments restore --experiment-id {number}` brings it back"


def schemas() -> tuple[str | None, set[str]]:
    """Return the version of the tables that the installed MLflow works with, and all older ones.

    None if that is unclear. Each migration names itself and the one before it; the newest is before
    no other.
    """
    package = importlib.util.find_spec("mlflow")
    if package is None or not package.submodule_search_locations:
        return None, set()
    folder = Path(package.submodule_search_locations[0], "store", "db_migrations", "versions")
    found = [match for file in folder.glob("*.py") for match in REVISION.findall(file.read_text(encoding="utf-8"))]
    older = {revision for down, revision in found if down}
    newest = {revision for down, revision in found if not down} - older
    return (newest.pop() if len(newest) == 1 else None), older
