"""Every command of the engine ends the same way for the same kind of error."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.errors import InputError
from engine.system.command_line import CLOSED_PIPE, run
from tests.support.command_ends import ENDS, end_of, raising

COMMANDS = [
    ("engine.__main__", "_inspect", ["inspect", "config.json"]), ("engine.export.__main__", "_main", ["folder", "--out", "out"]),
    ("engine.chat", "_main", ["folder"]), ("engine.bench.__main__", "_main", []), ("engine.bench.table", "_main", ["file"]),
]  # fmt: skip
PRINTS = """
import sys
from pathlib import Path
from engine.system.command_line import run
sys.exit(run(lambda: print("x" * int(sys.argv[1])) or 0))
"""


@pytest.mark.parametrize(("error", "code", "line"), ENDS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(("name", "inner", "arguments"), COMMANDS)
def test_what_a_user_can_act_on_is_one_line_in_every_command(name, inner, arguments, error, code, line, monkeypatch, capsys):
    assert end_of(name, inner, arguments, error, monkeypatch) == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize(("name", "inner", "arguments"), COMMANDS)
def test_ctrl_c_is_a_line_and_130_in_every_command_and_a_bug_shows(name, inner, arguments, monkeypatch, capsys):
    assert end_of(name, inner, arguments, KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err.startswith("\nstopped")
    with pytest.raises(ValueError, match="a bug"):
        end_of(name, inner, arguments, ValueError("a bug"), monkeypatch)


def test_the_end_is_told_inside_the_output_that_the_command_had(capsys):
    seen = []

    @contextmanager
    def output():
        seen.append("open")
        yield
        seen.append(capsys.readouterr().err)

    assert run(raising(InputError("a", 1, "b")), output=output) == 2
    assert seen == ["open", "error: a = 1: b\n"]


@pytest.mark.parametrize(
    ("arguments", "code", "unbuffered"),
    [
        (["-c", PRINTS, "1000000"], CLOSED_PIPE, ""), (["-c", PRINTS, "1"], CLOSED_PIPE, ""),
        (["-c", PRINTS, "1"], CLOSED_PIPE, "1"), (["-m", "engine", "plan", "--help"], CLOSED_PIPE, ""),
    ],
    ids=["much", "little", "unbuffered", "engine"],
)  # fmt: skip
def test_a_closed_pipe_ends_a_command_without_a_word(arguments, code, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([sys.executable, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_path_below_a_home_folder_that_does_not_exist_is_one_line(monkeypatch, capsys):
    def no_home(*path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(Path, "expanduser", no_home)
    assert run(lambda: Path("~/x").expanduser()) == 2
    assert capsys.readouterr().err.startswith("error: HOME = None: this user has no home folder")


def test_another_runtime_error_keeps_its_traceback(monkeypatch):
    def bug():
        raise RuntimeError("a bug about the home directory")

    with pytest.raises(RuntimeError, match="a bug"):
        run(bug)


def test_a_removed_current_folder_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(lambda: 0) == 2
    assert "was removed; change to another one" in capsys.readouterr().err
