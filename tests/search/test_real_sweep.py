"""Real sweeps of two kinds get the same hours or tokens, and the table compares their second measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sweep.cluster.slots import Hardware
from sweep.config.compose import compose
from sweep.config.sweep import parse_sweep_config
from sweep.plan.sweep_plan import SweepPlan, make_sweep_plan
from tests.search import real_sweep
from tests.search.real_sweep import HOURS, OTHER, OURS, TOKENS, Race, left_of, overrides, table
from tests.search.recorded_trial import FULL


@pytest.fixture(autouse=True)
def samples(monkeypatch, tmp_path):
    files = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    for file, numbers in zip(files, (range(70), range(70, 90))):
        rows = [[{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": f"{i + 1}"}] for i in numbers]
        file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    monkeypatch.setattr(real_sweep, "data_of", lambda task: files)


def plan(system: str, equal: str = TOKENS) -> SweepPlan:
    options = real_sweep._arguments(["--json", "x"])
    words = overrides(Race("docs", 4, 1, system, FULL.max_tokens, equal), FULL, Path("out"), options)
    return make_sweep_plan(parse_sweep_config(compose(words)), lambda cluster: Hardware(1, 16))


def test_both_sweeps_differ_in_how_they_search_alone():
    ours, other = plan(OURS).config, plan(OTHER).config
    assert (ours.pauses_trials, other.pruner.reduction_factor, other.effective_pruner.name) == (True, 4, "successive_halving")
    assert ours.model_copy(update={"sampler": other.sampler, "pruner": other.pruner}) == other
    assert ours.sweep.budget.full_trials == 4 and (ours.train.seed, ours.sweep.seed) == (1, 1)
    assert len(ours.train.report_grid()) == 16 and len(plan(OURS).space.dimensions) == 5


def test_with_equal_hours_the_tokens_of_ours_alone_are_limited():
    ours, other = plan(OURS, HOURS).config, plan(OTHER, HOURS).config
    assert (ours.sweep.budget.full_trials, other.sweep.budget.full_trials) == (4, 64)


def test_a_pair_with_equal_hours_runs_together_or_not_at_all():
    races = [Race("docs", 4, seed, system, 100, HOURS) for seed in (0, 1) for system in (OURS, OTHER)]
    rows = [row(OURS, 0, 2.3, equal=HOURS), row(OURS, 1, 2.3, equal=HOURS), row(OTHER, 1, 2.3, equal=HOURS)]
    assert left_of(races, rows) == races[:2]
    assert left_of(races, [*rows, {**row(OTHER, 0, 2.3, equal=HOURS), "error": "broke"}]) == races[:2]
    assert left_of([Race("docs", 4, 0, system, 100) for system in (OURS, OTHER)], [row(OURS, 0, 2.3)])[0].system == OTHER


def row(system: str, seed: int, loss: float, budget: float = 4, **more) -> dict:
    return {"task": "docs", "budget": budget, "seed": seed, "system": system, "max_tokens": 100, "eval_loss": loss,
            "outcomes": {"COMPLETE": 2, "PAUSED": 3}, "tokens": 400, "gpu_s": 10.0, "sweep_s": 12.0, **more}  # fmt: skip


def test_the_table_compares_seed_by_seed_and_shows_failures():
    rows = [row(OTHER, 0, 2.310), row(OURS, 0, 2.300), row(OURS, 1, 2.304), row(OTHER, 1, 2.302), row(OURS, 2, 2.0)]
    rows += [{**row(OTHER, 2, 0.0), "error": "broke"}]
    lines = table(rows)
    losses = "2.3000 (seed 0), 2.3040 (seed 1), 2.0000 (seed 2) | 2.2013"
    assert f"| docs, 4 of 100 tokens, tokens | freeze_thaw | {losses} | 5.0 | 400 | 10.0 | 12.0 |" in lines
    assert "| docs, 4 of 100 tokens, tokens | random_asha | failed: broke | | | | | |" in lines
    assert lines[-1] == "docs, 4 of 100 tokens, tokens: random_asha is above freeze_thaw by +10.0, -2.0 e-3 nats, mean +4.0"


def test_no_sweep_starts_when_the_time_is_over(tmp_path, capsys):
    assert real_sweep.main(["--json", str(tmp_path / "rows"), "--scratch", str(tmp_path / "s"), "--budget-s", "0"]) == 0
    assert capsys.readouterr().out.count("--budget-s is used up") == 12 and not (tmp_path / "rows").exists()


@pytest.mark.faults
def test_two_tiny_sweeps_run_and_are_compared_and_not_run_again(tmp_path, tiny_model_dir, monkeypatch, capsys):
    monkeypatch.setattr(real_sweep, "RANKS", (2, 4))
    words = ["--json", str(tmp_path / "rows"), "--scratch", str(tmp_path / "s"), "--tiny", "--device", "cpu", "--budgets", "2"]
    words += ["--seeds", "0", "--at-once", "1", "--model", str(tiny_model_dir)]
    words += ["--equal", TOKENS]
    assert real_sweep.main(words) == 0
    rows = real_sweep.read_rows(tmp_path / "rows")
    assert [one["system"] for one in rows] == [OURS, OTHER] and not any("error" in one for one in rows), rows
    for one in rows:
        assert 1024 <= one["tokens"] <= 2 * 1024 + 256 and 0 < one["gpu_s"] <= one["sweep_s"] < one["wall_s"]
        assert one["eval_loss"] < one["base_eval_loss"]
    assert "is above freeze_thaw by" in capsys.readouterr().out
    assert real_sweep.main(words) == 0 and len(real_sweep.read_rows(tmp_path / "rows")) == 2


@pytest.mark.faults
def test_the_other_sweep_gets_the_hours_that_ours_took(tmp_path, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(real_sweep, "RANKS", (2, 4))
    words = ["--json", str(tmp_path / "rows"), "--scratch", str(tmp_path / "s"), "--tiny", "--device", "cpu", "--budgets", "2"]
    assert real_sweep.main([*words, "--seeds", "0", "--at-once", "2", "--model", str(tiny_model_dir)]) == 0
    ours, other = sorted(real_sweep.read_rows(tmp_path / "rows"), key=lambda one: one["system"])
    assert (ours["system"], ours["equal"], other["system"]) == (OURS, HOURS, OTHER) and "error" not in ours | other
    assert ours["gpu_s"] <= other["gpu_s"]
