"""The driver starts its own engine, and tells it what the driver's config says."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.__main__ import main
from engine.command_answers import AdapterEvaluation
from engine.system.child_python import ROOT, own_environment, python_module
from sweep.execution import engine_commands
from tests.support.trials import build


def test_a_folder_named_engine_where_the_user_stands_does_not_take_our_place(tmp_path, monkeypatch):
    theirs = tmp_path / "ran"
    for name in ("engine", "sweep"):
        (tmp_path / name).mkdir()
        for file in ("__init__.py", "__main__.py"):
            (tmp_path / name / file).write_text(f"open({str(theirs)!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(engine_commands.CommandFailed, match=r"^file = 'none\.json'"):  # ours answers
        engine_commands._run(["engine", "plan", "none.json", "--card", "rtx4090"], [])
    assert not theirs.exists()
    subprocess.run([sys.executable, "-m", "engine"], check=True)  # twin: without our care theirs runs
    assert theirs.exists()


def test_an_empty_entry_of_the_module_path_would_be_the_users_folder():
    given = {"PYTHONPATH": os.pathsep.join(["", "/theirs", "", ROOT]), "HOME": "/h"}
    given["OMP_WAIT_POLICY"] = "ACTIVE"
    assert own_environment(given) == {**given, "PYTHONPATH": os.pathsep.join([ROOT, "/theirs"])}
    assert python_module("engine", "plan")[1:] == ["-P", "-m", "engine", "plan"]


@pytest.fixture
def started(monkeypatch) -> list[SimpleNamespace]:
    """Start nothing; keep each command with the config that it was given, and answer an evaluation."""
    kept: list[SimpleNamespace] = []

    def start(command, **_):
        given = command[command.index("-m") + 2 :]
        kept.append(SimpleNamespace(command=command, config=json.loads(Path(given[1]).read_text())))
        if "--inputs" in given:
            kept[-1].inputs = json.loads(Path(given[given.index("--inputs") + 1]).read_text())
        Path(given[given.index("--answer") + 1]).write_text(json.dumps(AdapterEvaluation(1.0, 2.0, 3).to_dict()))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(engine_commands.subprocess, "run", start)
    return kept


@pytest.mark.parametrize("is_trusted", [True, False])
def test_permission_comes_from_the_drivers_config_and_not_from_the_trials_folder(tmp_path, tiny_config, started, is_trusted):
    config = build(tiny_config, model={"trust_remote_code": is_trusted})
    adapter = tmp_path / "trial" / "adapter"
    adapter.mkdir(parents=True)
    edited = build(tiny_config, model={"trust_remote_code": not is_trusted}, data={"train": "theirs.jsonl"})
    (tmp_path / "trial" / "train_config.json").write_text(edited.model_dump_json())
    measured = engine_commands.evaluate(config, adapter, "engine", 2, {"weights": "then"})
    assert measured == AdapterEvaluation(1.0, 2.0, 3)
    assert started[0].config == config.model_dump(mode="json") and started[0].inputs == {"weights": "then"}
    assert ("--trust-remote-code" in started[0].command) is is_trusted
    engine_commands.evaluate(config, adapter, "engine")
    assert not hasattr(started[1], "inputs")


CHILD = """
import sys
print("a library's own line")
print('["tokenising rows", 512, 0]', flush=True)
print("x" * 200_000)  # more than a pipe holds
print('["tokenising rows", 1024, 0]', flush=True)
print("error: data.train = 'x': no such file", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("code", [0, 2])
def test_a_command_that_tells_how_far_it_is_is_shown_and_its_fault_is_one_line(monkeypatch, code):
    screen = Terminal()
    monkeypatch.setattr(engine_commands.sys, "stdout", screen)
    monkeypatch.setattr(engine_commands, "_command", lambda arguments, configs: [sys.executable, "-c", CHILD, arguments[-1]])
    if code:
        with pytest.raises(engine_commands.CommandFailed, match="^data.train = 'x': no such file$"):
            engine_commands._run_shown(["engine", "prepare", str(code)], [])
    else:
        engine_commands._run_shown(["engine", "prepare", str(code)], [])
    assert "tokenising rows 512 ..." in screen.getvalue() and "own line" not in screen.getvalue()
    assert screen.getvalue().endswith("\r\x1b[K")
def test_a_process_on_standby_evaluates_and_where_it_died_a_new_one_does(tmp_path, tiny_config):
    config, made = build(tiny_config), []

    class Counted(engine_commands.Standby):
        def has_run(self, command):
            made.append(super().has_run(command))
            return made[-1]

    place = tmp_path / "adapter"
    place.mkdir()
    for dies in (False, True):
        standby = Counted("tests.support.fake_engine")
        standby.start()
        if dies:
            standby._child.kill()
        found = engine_commands.evaluate(config, place, "tests.support.fake_engine", standby=standby)
        assert isinstance(found, AdapterEvaluation)
        standby.close()
    assert made == [True, False]
    idle = engine_commands.Standby("engine")
    idle.start()
    idle.close()
    assert idle._child.returncode is not None


def test_a_sweep_goes_on_where_no_process_on_standby_can_be_started(tmp_path, tiny_config, monkeypatch, started):
    def full(*_, **__):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(engine_commands.subprocess, "Popen", full)
    standby = engine_commands.Standby("engine")
    standby.start()
    assert isinstance(engine_commands.evaluate(build(tiny_config), tmp_path, "engine", standby=standby), AdapterEvaluation)
    standby.close()
    assert len(started) == 1


def test_standby_runs_the_command_of_its_line_and_ends_where_none_comes(capsys, monkeypatch):
    for line, code in (('["plan", "none.json", "--card", "rtx4090"]\n', 2), ("", 0)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(line))
        assert main(["standby"]) == code
    assert capsys.readouterr().err.startswith("error: file = 'none.json'")
