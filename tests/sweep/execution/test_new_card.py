"""A card that is new on a machine is measured once, before its first trial, and never ends a sweep."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.system.child_python import own_environment
from sweep.execution import engine_commands, new_card
from sweep.execution.new_card import measure_new_card, measure_workers_card
from tests.support.measured import RTX_4090, keep, measured

ENGINE = """
import sys
print("[....] 0/1 matmul", flush=True)
{then}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(new_card, "_asked", set())
    return tmp_path


def engine_that(then: str, folder, monkeypatch) -> str:
    """Return the name of an engine's command that does this."""
    (folder / "their_engine.py").write_text(ENGINE.format(then=then))
    environment = {**own_environment(), "PYTHONPATH": f"{folder}"}
    monkeypatch.setattr(engine_commands, "own_environment", lambda: environment)
    return "their_engine"


def test_a_new_card_is_measured_with_its_progress_shown_and_then_known(tmp_path, monkeypatch):
    said = []
    engine = engine_that("print(*sys.argv[1:])", tmp_path, monkeypatch)
    assert measure_new_card(RTX_4090, engine, said.append) is None
    assert said[0].startswith(f"{RTX_4090} is new here") and said[1:] == ["[....] 0/1 matmul", "calibrate --if-missing"]
    assert measure_new_card(RTX_4090, "no such engine", said.append) is None and len(said) == 3


def test_a_card_that_is_known_is_not_measured():
    keep(measured())
    assert measure_new_card(RTX_4090, "no such engine", pytest.fail) is None


def test_a_card_that_an_older_version_measured_in_part_is_measured_again(tmp_path, monkeypatch):
    known = measured()
    keep(replace(known, rates=replace(known.rates, int8=None)))
    said = []
    assert measure_new_card(RTX_4090, engine_that("", tmp_path, monkeypatch), said.append) is None
    assert said[1:] == ["[....] 0/1 matmul"]


@pytest.mark.parametrize(("then", "line"), [
    ("sys.exit('error: card = None: no CUDA device')", "card = None: no CUDA device"),
    ("print('error: card: busy', file=sys.stderr); sys.exit(2)", "the card was not measured: card: busy"),
])  # fmt: skip
def test_a_failure_is_one_line(tmp_path, monkeypatch, then, line):
    fault = measure_new_card(RTX_4090, engine_that(then, tmp_path, monkeypatch), lambda said: None)
    assert fault.startswith("the card was not measured: ") and fault.endswith(line)


@pytest.mark.parametrize(("device", "asked"), [("cuda", True), ("cuda", False), ("cpu", True)])
def test_a_worker_measures_its_own_card_if_the_sweep_asks_for_it(monkeypatch, capsys, device, asked):
    import torch

    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: RTX_4090)
    monkeypatch.setattr(new_card, "measure_new_card", lambda *given: calls.append(given[:2]) or "it failed")
    measure_workers_card({"device": device, "calibrate": asked, "engine": {"command": "theirs"}})
    wanted = device == "cuda" and asked
    assert calls == ([(RTX_4090, "theirs")] if wanted else [])
    assert capsys.readouterr().out == ("WARNING: it failed\n" if wanted else "")


def test_a_flag_leaves_the_measurement_out(capsys):
    from sweep.__main__ import main

    assert main(["--cfg", "--no-calibrate", "data.train=x.jsonl"]) == 0
    assert "  calibrate: false\n" in capsys.readouterr().out
