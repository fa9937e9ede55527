"""A steered sweep whose driver is killed at any write equals the undisturbed one, command by command."""

from __future__ import annotations

import itertools
import os

import pytest

from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger.steered_ledger import SteeredLedger
from sweep.study.kept_commands import read_commands

from .simulated import Script, killed_at, run, settings

POINT = "try lora.rank=16 optim.learning_rate=0.01"
# each command with the number of reports after which it is sent; some are refused, which is kept too
SCRIPT = (
    (1, "pause 0"), (3, POINT), (5, "go-on 0"), (5, "keep 2"), (7, "add 2"), (8, "clone 1 lora.rank=2"), (9, "stop 4"),
    (9, "pause 3"), (11, "go-on 3"), (12, "budget gpu_hours=900"), (13, "stop 99"), (13, "try lora.rank=3"), (15, "finish"),
)  # fmt: skip
OTHER = (
    (1, "keep 0"), (1, POINT), (2, "pause 1"), (2, "clone 0 lora.rank=4"), (3, "stop 0"), (4, "go-on 1"), (5, "pause 2"),
    (6, "stop 2"), (6, "budget full_trials=3"), (8, "keep 3"), (8, "finish"), (9, "add 3"), (11, "pause 3"),
)  # fmt: skip
# the parent runs, is paused, is a warm clone itself, or has ended; some are refused
WARM = (
    (1, "clone 0 --warm optim.learning_rate=0.0011"), (2, "clone 9 --warm"), (5, "pause 1"),
    (6, "clone 1 --warm optim.learning_rate=0.002"), (8, "stop 2"), (9, "go-on 1"), (10, "clone 0 --warm lora.rank=1"),
    (13, "clone 0 --warm"), (14, "clone 0 --warm"), (20, "keep 4"), (26, "finish"),
)  # fmt: skip
EQUAL = [
    ("tpe", "successive_halving", SCRIPT),
    ("tpe", "hyperband", SCRIPT),
    ("cmaes", "median", SCRIPT),
    ("random", "patient", OTHER),
    ("freeze_thaw", "none", SCRIPT),
    ("freeze_thaw", "none", OTHER),
    ("tpe", "successive_halving", WARM),
    ("tpe", "hyperband", WARM),
    ("freeze_thaw", "none", ((1, "budget full_trials=9"), *WARM)),
]


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def found(path, values: dict, script: Script) -> tuple:
    """Run the sweep to its end. Returns its trials, and what became of each command."""
    path.mkdir(exist_ok=True)
    trials = run(path, values, script)
    return trials, [one.text for one in read_commands(SweepFolder(path))]


def check(tmp_path, sampler: str, pruner: str, script: Script, step: int) -> int:
    values = settings(sampler, pruner, 1)
    undisturbed = found(tmp_path / "undisturbed", values, script)
    assert len(undisturbed[1]) > 7 and not list((tmp_path / "undisturbed" / "commands").iterdir())
    num_kills = 0
    for write in itertools.count(1, step):
        folders = {how: tmp_path / f"{write}-{how}" for how in ("before", "after", "torn")}
        for folder in folders.values():
            folder.mkdir()
        ways = [how for how, folder in folders.items() if killed_at(folder, values, write, how, script)]
        for how in ways:
            assert found(folders[how], values, script) == undisturbed, f"killed {how} write {write}"
            num_kills += 1
        if len(ways) < 3:
            return num_kills


@pytest.mark.parametrize(
    ("sampler", "pruner", "script", "step", "least"),
    [
        ("tpe", "successive_halving", SCRIPT, 17, 15),
        ("freeze_thaw", "none", SCRIPT, 13, 15),
        ("tpe", "successive_halving", WARM, 31, 12),
    ],
)
def test_a_kill_with_commands_in_between_changes_nothing(tmp_path, sampler, pruner, script, step, least):
    assert check(tmp_path, sampler, pruner, script, step) > least


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("sampler", "pruner", "script"), EQUAL)
def test_a_kill_at_every_write_with_commands_in_between_changes_nothing(tmp_path, sampler, pruner, script):
    assert check(tmp_path, sampler, pruner, script, step=1) > 180


@pytest.mark.faults
def test_the_check_bites_where_a_verdict_before_a_command_is_asked_for_again(tmp_path, monkeypatch):
    original = SteeredLedger._is_protected

    def forgets(self, number: int) -> bool:
        was, self._is_recovering = self._is_recovering, False
        try:
            return original(self, number)
        finally:
            self._is_recovering = was

    monkeypatch.setattr(SteeredLedger, "_is_protected", forgets)
    with pytest.raises(AssertionError, match="killed"):
        check(tmp_path, "freeze_thaw", "none", SCRIPT, step=1)


@pytest.mark.faults
def test_the_check_bites_where_a_command_acts_before_the_journal_has_it(tmp_path, monkeypatch):
    original = SteeredLedger._take_command

    def acts_first(self, command):
        self._study.commands.add, enter = (lambda one: None), self._study.commands.add
        original(self, command)
        enter(self._history.taken[-1])
        self._study.commands.add = enter

    monkeypatch.setattr(SteeredLedger, "_take_command", acts_first)
    with pytest.raises(AssertionError, match="killed"):
        check(tmp_path, "random", "none", SCRIPT, step=1)
