"""Make a config's relative paths absolute, so that a sweep can be resumed from any folder."""

from __future__ import annotations

import glob
from pathlib import Path

from engine.config.trial import ON_TRAINING_SAMPLES
from sweep.config.sweep import SweepConfig

FIELDS = (("model", "path"), ("data", "train"), ("data", "eval"), ("data", "chat_template"))
SQLITE = "sqlite:///"


def with_absolute_paths(config: SweepConfig, folder: Path) -> SweepConfig:
    """Return the config with the paths of existing files and folders made absolute.

    folder: relative paths start here. A name that is no file or folder there stays as it is, since
    it may be a hub id.
    """
    changes: dict[str, dict[str, str | tuple[str, ...]]] = {}
    for section, field in FIELDS:
        value = getattr(getattr(config, section), field)
        if field == "chat_template" and not str(value).endswith(".jinja"):
            continue  # the name of a template, not a file
        if field == "eval" and value == ON_TRAINING_SAMPLES:
            continue
        if value is not None:
            names = (value,) if isinstance(value, str) else value
            found = tuple(_absolute(name, folder) for name in names)
            changes.setdefault(section, {})[field] = found[0] if isinstance(value, str) else found
    uri = config.tracking.uri
    if uri is not None and uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/"):
        changes["tracking"] = {"uri": f"{SQLITE}{folder / uri.removeprefix(SQLITE)}"}
    updated = {section: getattr(config, section).model_copy(update=fields) for section, fields in changes.items()}
    return config.model_copy(update=updated)


def _absolute(name: str, folder: Path) -> str:
    """Return the path of what is there, or of a pattern that fits something; else the name itself."""
    path = folder / Path(name).expanduser()
    return str(path) if path.exists() or (glob.has_magic(name) and next(glob.iglob(str(path), recursive=True), None)) else name
