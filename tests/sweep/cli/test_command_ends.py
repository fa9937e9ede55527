"""Every command of the sweep ends in the same way for the same error."""

import os
import subprocess
import sys

import pytest

from engine.system.command_line import CLOSED_PIPE
from tests.support.command_ends import ENDS, end_of

COMMANDS = [
    ("sweep.__main__", "_main", []), ("sweep.report.__main__", "_main", ["folder"]), ("sweep.ui.__main__", "_main", ["folder"]),
]  # fmt: skip


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


@pytest.mark.parametrize(
    ("arguments", "code", "unbuffered"),
    [
        (["-m", "sweep.report", "--help"], CLOSED_PIPE, ""),
        (["-m", "sweep", "--help"], 0, ""),  # a sweep goes on without a reader
    ],
    ids=["report", "sweep"],
)  # fmt: skip
def test_a_closed_pipe_ends_a_command_without_a_word(arguments, code, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([sys.executable, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (code, "")
