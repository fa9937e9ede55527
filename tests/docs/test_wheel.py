"""`pip install .` installs every module and conf/, and its commands run from any folder."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Build the wheel without network and unpack it as pip does."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def files(root: Path, pattern: str) -> set[Path]:
    return {path.relative_to(root) for path in root.rglob(pattern) if path.is_file() and "__pycache__" not in path.parts}


def test_the_wheel_holds_every_module_and_all_of_conf(installed):
    for half in ("engine", "sweep"):
        assert files(installed / half, "*.py") == files(ROOT / half, "*.py")
    assert files(installed / "sweep" / "conf", "*") == files(ROOT / "conf", "*")
    page = Path("ui", "static")
    assert files(installed / "sweep" / page, "*") == files(ROOT / "sweep" / page, "*") != set()
    kept = Path("planning", "kept_cards")
    assert files(installed / "engine" / kept, "*.json") == files(ROOT / "engine" / kept, "*.json") != set()
    assert (installed / "sweep" / "conf" / "cluster" / "launch" / "slurm.sh").is_file()
    assert {path.parts[0] for path in files(installed, "*.py")} == {"engine", "sweep"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_console_command_calls_a_function_without_arguments(name):
    module, function = SCRIPTS[name].split(":")
    main = getattr(importlib.import_module(module), function)
    assert len(main.__defaults__ or ()) == main.__code__.co_argcount


def test_a_dry_run_from_another_folder_reads_the_installed_conf(installed, tmp_path):
    # the check of model and data would load torch and build the model
    code = (
        "import sys; from sweep import driver; from sweep.__main__ import main; driver.check_and_forecast = lambda *_: 0;"
        "sys.exit(main(['+experiment=quickstart', 'dry_run=true']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sweep      quickstart: 8 trials") and list(tmp_path.iterdir()) == []
    where = subprocess.run(
        [sys.executable, "-c", "import sweep.config.conf_files as files; print(files.conf_folder())"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.strip() == str(installed / "sweep" / "conf")
