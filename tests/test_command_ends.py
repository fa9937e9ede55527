"""Every command ends in one way, whatever it raised: engine.system.command_line.run."""

import importlib
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from engine.errors import InputError, StorageError
from engine.system.command_line import CLOSED_PIPE, run

COMMANDS = {
    "engine.__main__": ["inspect", "config.json"], "engine.export.__main__": ["folder", "--out", "out"],
    "engine.chat": ["folder"], "engine.bench.__main__": [], "engine.bench.table": ["file"], "sweep.__main__": [],
    "sweep.report.__main__": ["folder"], "sweep.ui": ["folder"],
}  # fmt: skip
ENDS = [
    (InputError("model.path", "x", "must be there"), 2, "error: model.path = 'x': must be there\n"),
    (StorageError("the disk is full"), 1, "error: the disk is full\n"),
    (FileNotFoundError(2, "No such file or directory", "nowhere.json"), 2, "error: nowhere.json: No such file or directory\n"),
    (ConnectionResetError("reset by the peer"), 2, "error: file: reset by the peer\n"),
    (BrokenPipeError(32, "Broken pipe"), 2, "error: file: Broken pipe\n"),  # not that of stdout
]


PRINTS = """
import sys
from engine.system.command_line import run
sys.exit(run(lambda: print("x" * int(sys.argv[1])) or 0))
"""


def raising(error):
    def command(*_):
        raise error

    return command


@pytest.mark.parametrize(("error", "code", "line"), ENDS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_user_can_act_on_is_one_line_in_every_command(name, error, code, line, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "_inspect" if name == "engine.__main__" else "_main", raising(error))
    assert module.main(COMMANDS[name]) == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_is_a_line_and_130_in_every_command_and_a_bug_shows(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    inner = "_inspect" if name == "engine.__main__" else "_main"
    monkeypatch.setattr(module, inner, raising(KeyboardInterrupt()))
    assert module.main(COMMANDS[name]) == 130
    assert capsys.readouterr().err.startswith("\nstopped")
    monkeypatch.setattr(module, inner, raising(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        module.main(COMMANDS[name])


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
        (["-m", "sweep.report", "--help"], CLOSED_PIPE, ""),
        (["-m", "sweep", "--help"], 0, ""),  # a sweep goes on without a reader
    ],
    ids=["much", "little", "unbuffered", "engine", "report", "sweep"],
)  # fmt: skip
def test_a_closed_pipe_ends_a_command_without_a_word(arguments, code, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([sys.executable, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (code, "")
