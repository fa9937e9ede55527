"""A command runs this program's modules and libraries, whatever the working folder holds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.paths import ENV

SAYS = "import sys; sys.stderr.write('FOREIGN')\n"


@pytest.mark.parametrize(
    "command", [["sweep", "--cfg", "+experiment=quickstart"], ["sweep.report", "none"], ["engine", "prepare", "none.json"]]
)
def test_files_of_the_working_folder_do_not_take_the_place_of_modules(command, tmp_path):
    for name in ("argparse", "json", "yaml", "pydantic", "hydra", "torch"):
        (tmp_path / f"{name}.py").write_text(SAYS)
    for name in ("conf", "cli", *([] if command[0] == "engine" else ["engine"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(SAYS)
    done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert "FOREIGN" not in done.stderr and "Traceback" not in done.stderr
    assert done.returncode == (0 if "--cfg" in command else 2), done.stderr
