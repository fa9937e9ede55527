"""A sweep takes commands while it runs and while it rests, and refuses in one line what it cannot do."""

from __future__ import annotations

import json
import subprocess
import time

import pytest

from sweep.control import main, sender
from tests.support.fake_sweeps import fake_driver, results, rungs, start, sweep_folder

SLOW, FAST = 60.0, 0.02  # seconds a rung
SPACE = {"lora.rank": {"choices": [2, 4, 8, 16]}, "optim.eps": {"choices": [FAST, SLOW]}}


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def done(words: str) -> str:
    return f"done: {words} ({sender()})\n"


@pytest.mark.faults
def test_a_sweep_is_steered_while_it_runs_and_once_more_after_its_end(tmp_path, capsys):
    """Two trials would take minutes. Commands take their slots for others, and end the sweep."""

    def control(*words: str) -> str:
        code = main([str(folder), *words])
        out, err = capsys.readouterr()
        assert (code, err) == (0, ""), err
        return out

    def outcomes() -> dict[int, str]:
        return {number: result["outcome"] for number, result in results(folder).items()}

    slow = [{"lora.rank": rank, "optim.eps": SLOW} for rank in (2, 4)]
    process = start(
        tmp_path, space=SPACE, sweep={"num_trials": 2, "first_trials": slow, "prior": False}, pruner={"name": "none"}
    )
    wait_for(lambda: len(list((tmp_path / "sweeps").glob("*/trials/*/.training"))) == 2, process)
    folder = sweep_folder(tmp_path)
    assert "trial 2 with rank=16 eps=0.02" in control("try", "lora.rank=16", f"optim.eps={FAST}")
    assert control("pause", "0") == done("pause 0")
    wait_for(lambda: outcomes() == {0: "PAUSED", 2: "COMPLETE"}, process)
    assert "trial 3 with rank=8 eps=0.02" in control("clone", "2", "lora.rank=8")  # trial 1 keeps the sweep from its end
    assert control("stop", "1") == done("stop 1")
    wait_for(lambda: outcomes() == {0: "PAUSED", 1: "PRUNED", 2: "COMPLETE", 3: "COMPLETE"}, process)
    assert results(folder)[1]["error"] == f"stopped by {sender()}"
    process.wait(120)  # a trial that is paused by a command does not keep the sweep from its end
    out, err = process.communicate()
    assert process.returncode == 0 and err == "", err
    assert "1 trial paused by a command until `go-on`" in out and f"command    stop 1 ({sender()})" in out
    assert f"python -m sweep resume={folder} sweep.num_trials=8" in out  # twice the four that commands made of two

    assert f"python -m sweep resume={folder}" in control("stop", "0")
    assert control("clone", "3", "lora.rank=4").startswith("recorded: clone 3 lora.rank=4; no driver works")
    shown = control("status")
    assert "no driver works here now" in shown and "PAUSED (until go-on)" in shown and "waits for a driver" in shown, shown
    resumed = fake_driver("resume", str(folder))
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert not list((folder / "commands").iterdir())
    assert outcomes() == {0: "PRUNED", 1: "PRUNED", 2: "COMPLETE", 3: "COMPLETE", 4: "COMPLETE"}
    assert json.loads((folder / "sweep_config.json").read_text())["sweep"]["num_trials"] == 5
    assert rungs(folder, 0) == [] and rungs(folder, 4) == [1, 2, 3, 4]
