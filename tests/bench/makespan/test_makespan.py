"""The makespan's rows, budget, parts and table; with `make faults`, a tiny sweep of ours on the CPU.

The peers' processes are small programs of the test's, which report what a trial reports.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import optuna
import pytest

from tests.bench.makespan import __main__ as makespan
from tests.bench.makespan import ours
from tests.bench.makespan.job import Job, modules, write_samples
from tests.bench.makespan.peers import Peers, share_gib
from tests.bench.makespan.table import table

JOB = Job(model="tiny", trials=4, report_at=(100, 200))
FACTS = {"card": "CPU", "git.commit": "0123456789abcdef", "version.torch": "2.13.0"}
TRIAL = """
import json, sys
task = json.load(open(sys.argv[1]))
number = int(task["folder"][-4:])
def report(line):
    with open(task["reports"], "a") as file:
        file.write(json.dumps(line) + "\\n")
report({"versions": {"trl": "9"}})
if number in LOST:
    sys.exit("ValueError: no such thing")
for rung, tokens in enumerate(task["report_at"], start=1):
    report({"rung": rung, "tokens": tokens + 1, "eval_loss": LOSSES[number]})
    if sys.stdin.readline() != "go\\n":
        break
report({"ended": True, "peak_gib": 1.0 + number})
"""


def peers(
    where: Path, losses: list[float], lost: tuple[int, ...] = (), timeout_s: float = 20.0, trial: str = TRIAL, at_once: int = 1
) -> Peers:
    child = where / "trial.py"
    child.write_text(f"nan = float('nan')\nLOSSES, LOST = {losses}, {lost}\n{trial}")
    return Peers("unsloth", JOB, where / "model", (where / "a", where / "b"), where, None, timeout_s, False, child, at_once)


def row(system: str, **found) -> dict:
    whole = {"wall_s": 10.0, "gpu_s": 8.0, "tokens": 1500, "trials_done": 4, "outcomes": {"COMPLETE": 1, "PRUNED": 3}, **found}
    return makespan.whole_record(JOB, system, whole, FACTS, None)


@pytest.mark.parametrize(("wrong", "said"), [
    ("--model nope", "known: tiny, smollm2-135m"), ("--trials 0", "at least 1"), ("--trials 97", "has 96 points"),
    ("--length 0", "at least 1"), ("--report-at 200 100", "ascend"), ("--report-at 0", "above 0"),
    ("--peers-at-once 0", "at least 1"), ("--cap-gib -1", "at least 0"), ("--cap-gib nan", "at least 0"),
    ("--budget-s 0", "above 0"), ("--peer-path nowhere", "must be a folder"), ("--child-timeout-s nan", "at least 1"),
])  # fmt: skip
def test_what_no_system_can_run_is_refused_before_anything_is_written(tmp_path, capsys, wrong, said):
    given = ["--json", str(tmp_path / "rows" / "a.jsonl"), "--scratch", str(tmp_path / "scratch"), "--model", "tiny"]
    with pytest.raises(SystemExit, match="2"):
        makespan.main([*given, *wrong.split()])
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {wrong.split()[0]} " in last and said in last and not list(tmp_path.iterdir())


def test_a_file_of_other_rows_is_named_with_its_line(tmp_path, capsys):
    for text in ('{"job":', '{"job": 1}', "[]", "7", json.dumps(row("ours"))[:-5]):
        (tmp_path / "a.jsonl").write_text(f"{json.dumps(row('ours'))}\n{text}\n")
        with pytest.raises(SystemExit):
            makespan.main(["--json", str(tmp_path / "a.jsonl"), "--table"])
        assert "line 2 is no row of this benchmark" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        makespan.main(["--json", str(tmp_path / "b.jsonl"), "--table"])
    assert "no such file" in capsys.readouterr().err.splitlines()[-1]


def test_trials_come_from_the_seed_alone_and_peers_get_the_modules():
    assert JOB.points() == Job(model="other", trials=4).points()
    assert JOB.points() != Job(trials=4, seed=1).points()
    assert all(set(point) == {"lora.rank", "lora.target_modules", "optim.learning_rate"} for point in JOB.points())
    assert modules("mlp") == ["gate_proj", "up_proj", "down_proj"] and len(modules("all-linear")) == 7


def test_samples_are_ragged_enough_for_one_pass_and_come_from_the_seed(tmp_path):
    (tmp_path / "again").mkdir()
    job = Job(report_at=(5_000, 20_000), eval_samples=5)
    train, held_out = write_samples(job, tmp_path)
    texts = [json.loads(line)["text"] for line in train.read_text().splitlines()]
    assert sum(min(len(text), job.length) for text in texts) > 20_000 and max(map(len, texts)) > 4 * min(map(len, texts))
    assert len(held_out.read_text().splitlines()) == 5
    assert write_samples(job, tmp_path / "again")[0].read_text() == train.read_text()


def test_the_better_half_goes_on_and_everything_is_counted(tmp_path):
    found = peers(tmp_path, [2.0, 3.0, 1.0, 2.5]).run(None)
    assert found["outcomes"] == {"COMPLETE": 2, "PRUNED": 2} and found["trials_done"] == 4
    assert found["tokens"] == 201 + 101 + 201 + 101 and found["best_eval_loss"] == 1.0
    assert 0.0 < found["gpu_s"] <= found["wall_s"] and found["peak_gib"] == 4.0 and found["version.trl"] == "9"


def test_a_trial_that_diverges_ends_and_is_counted(tmp_path):
    found = peers(tmp_path, [2.0, math.nan, 1.0, 2.5]).run(None)
    assert found["outcomes"] == {"COMPLETE": 2, "DIVERGED": 1, "PRUNED": 1} and found["best_eval_loss"] == 1.0
    assert found["trials_done"] == 4 and found["tokens"] == 201 + 101 + 201 + 101


def test_a_failing_first_trial_is_the_rows_reason_and_a_later_one_is_counted(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "later").mkdir()
    assert peers(tmp_path / "first", [1.0] * 4, lost=(0,)).run(None)["error"] == "ValueError: no such thing"
    found = peers(tmp_path / "later", [2.0, 1.0, 3.0, 4.0], lost=(2,)).run(None)
    assert found["outcomes"] == {"COMPLETE": 2, "FAILED": 1, "PRUNED": 1} and "error" not in found
    assert found["first_failure"] == "ValueError: no such thing" and found["trials_done"] == 3


def test_a_trial_that_hangs_is_killed(tmp_path):
    found = peers(tmp_path, [1.0] * 4, timeout_s=0.3, trial="import time\ntime.sleep(60)").run(None)
    assert found["error"] == "timed out after 0.3 s" and found["wall_s"] < 10.0


def test_a_cut_row_keeps_its_ended_trials_and_judges_the_rest_as_if_it_had_not_been_cut(tmp_path):
    whole = peers(tmp_path, [2.0, 3.0, 2.5, 1.0]).run(None)
    for number in (2, 3):
        (tmp_path / f"{number:04d}" / "ended.json").unlink()
    cut = peers(tmp_path, [9.0, 9.0, 2.5, 1.0]).run(0.0)  # these losses show if trials 0 and 1 run again
    assert cut["trials_done"] == 2 and cut["tokens"] == 302 and cut["wall_s"] >= cut["gpu_s"]
    record = makespan.whole_record(JOB, "unsloth", cut, FACTS, 0.0)
    assert not makespan.is_done(record) and "| unsloth | 2 of 4 (cut by the budget) |" in table([record])
    again = peers(tmp_path, [9.0, 9.0, 2.5, 1.0]).run(None)
    assert {**again, "wall_s": 0, "gpu_s": 0} == {**whole, "wall_s": 0, "gpu_s": 0} and again["gpu_s"] > cut["gpu_s"]


def test_processes_that_share_the_card_are_in_it_together_and_its_time_counts_once(tmp_path):
    """Each waits until the other of its pair has begun."""
    pair = """
import pathlib, time
me = int(json.load(open(sys.argv[1]))["folder"][-4:])
mates = [me ^ 1, me]
pathlib.Path(f"../began-{me}").touch()
while not all(pathlib.Path(f"../began-{mate}").exists() for mate in mates):
    time.sleep(0.01)
"""
    found = peers(tmp_path, [2.0, 3.0, 1.0, 2.5], trial=TRIAL.replace("number =", f"{pair}\nnumber =", 1), at_once=2).run(None)
    assert found["trials_done"] == 4 and 0.0 < found["gpu_s"] <= found["wall_s"] and found["cut_s"] == 0.0
    tasks = [json.loads((tmp_path / f"{number:04d}" / "task.json").read_text()) for number in range(4)]
    assert all(task["cap_gib"] == share_gib(JOB.cap_gib, 2) for task in tasks)
    assert peers(tmp_path, [9.0] * 4, at_once=2).run(None) == found  # nothing runs again


def test_shares_of_the_card_leave_room_for_contexts():
    assert share_gib(23.5, 1) == 23.5 and share_gib(None, 4) is None
    assert 4 * share_gib(23.5, 4) == pytest.approx(23.5 - 4 * 0.6)
    with pytest.raises(ValueError, match="--peers-at-once 8: 4 GiB do not hold the contexts"):
        share_gib(4.0, 8)


def test_a_row_with_another_number_of_processes_is_another_row():
    alone, four = row("unsloth"), row("unsloth", peers_at_once=4)
    assert makespan.wanted([JOB], [row("ours"), alone], None, 4) == [(JOB, "unsloth")]
    assert makespan.wanted([JOB], [row("ours"), four], None, 4) == [] != makespan.wanted([JOB], [row("ours"), four], None)
    assert "| unsloth, 4 at once | 4 of 4 |" in table([alone, four]) and "| unsloth | 4 of 4 |" in table([alone, four])


def test_a_running_trial_ends_at_its_next_rung_once_the_budget_is_used_up(tmp_path):
    trial = optuna.create_study(pruner=optuna.pruners.NopPruner()).ask()
    lines = [({"rung": rung, "eval_loss": 1.0}, deadline) for rung, deadline in ((0, None), (1, 0.0), (2, 0.0))]
    assert [peers(tmp_path, [])._verdict(trial, *line) for line in lines] == ["RUNNING", "STOPPED", "COMPLETE"]


def test_rows_that_are_there_are_skipped_and_peft_runs_where_unsloth_failed():
    assert makespan.wanted([JOB], [], None) == [(JOB, "ours"), (JOB, "unsloth")]
    assert makespan.wanted([JOB], [row("ours")], None) == [(JOB, "unsloth")]
    failed = makespan.whole_record(JOB, "unsloth", {"error": "no"}, FACTS, None)
    assert makespan.wanted([JOB], [row("ours"), failed], None) == [(JOB, "peft-trl")]
    assert makespan.wanted([JOB], [row("ours"), failed, row("peft-trl")], None) == []
    cut = row("ours", outcomes={"COMPLETE": 1, "STOPPED": 1}, trials_done=1)
    assert (JOB, "ours") in makespan.wanted([JOB], [cut], None)
    assert makespan.wanted([Job(model="tiny", seed=1)], [row("ours")], ["ours"]) != []


def test_a_used_up_budget_names_the_rows_not_run(tmp_path, monkeypatch, capsys):
    shares = []
    monkeypatch.setattr(makespan, "_facts", lambda *_: FACTS)
    monkeypatch.setattr(makespan, "_run", lambda job, system, options, scratch, budget_s, facts: shares.append(budget_s) or {})
    clock = iter([0.0, 20.0, 100.0])
    monkeypatch.setattr(makespan.time, "monotonic", lambda: next(clock))
    options = argparse.Namespace(systems=None, budget_s=100.0, peers_at_once=1)
    records = list(makespan.measure([JOB], [], options, tmp_path))
    assert [record["system"] for record in records] == ["ours"] and shares == [40.0]
    assert "--budget-s 100 is used up; rows not run:\n  tiny, unsloth" in capsys.readouterr().out


def test_rows_of_another_card_are_run_on_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(makespan, "_facts", lambda *_: {**FACTS, "card": "another"})
    monkeypatch.setattr(makespan, "_run", lambda *_: {})
    options = argparse.Namespace(systems=None, budget_s=None, peers_at_once=1)
    records = [row("ours"), {**row("unsloth"), "card": "another"}]
    assert [record["system"] for record in makespan.measure([JOB], records, options, tmp_path)] == ["ours"]


def test_the_table_shows_losses_and_failures_as_they_are():
    text = table([row("ours"), makespan.whole_record(JOB, "unsloth", {"error": "a | b"}, FACTS, None)])
    assert "| ours | 4 of 4 | 10.0 | 8.0 | 1,500 | 150 | 1 COMPLETE, 3 PRUNED |" in text
    assert "| unsloth | 0 of 4 |  |  |  |  | failed: a \\| b |" in text
    assert "ours: torch 2.13.0, commit 012345678" in text


def test_a_sweep_with_other_trials_is_refused(tmp_path):
    folder = tmp_path / "makespan-1" / "trials" / "0000"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"number": 0, "params": {"lora.rank": 3}, "outcome": "COMPLETE"}))
    with pytest.raises(RuntimeError, match="trial 0 of the sweep is"):
        ours._read(JOB, tmp_path)
    (folder / "result.json").write_text(json.dumps({"number": 4, "params": {"lora.rank": 3}, "outcome": "COMPLETE"}))
    with pytest.raises(RuntimeError, match="trial 4 of the sweep is .* but the job's is none"):
        ours._read(JOB, tmp_path)


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_our_side_runs_on_the_cpu(tmp_path):
    file, scratch = tmp_path / "rows.jsonl", tmp_path / "scratch"
    small = "--model tiny --trials 2 --report-at 600 1200 --length 256 --rows-per-step 2 --eval-samples 4 --systems ours"
    assert makespan.main([*small.split(), "--json", str(file), "--scratch", str(scratch), "--child-timeout-s", "120"]) == 0
    (record,) = makespan.read(file)
    assert "error" not in record and record["trials_done"] == 2 and record["tokens"] >= 1200
    assert 0.0 < record["gpu_s"] < record["wall_s"] and record["best_eval_loss"] < 8.0
    assert makespan.main([*small.split(), "--json", str(file), "--scratch", str(scratch)]) == 0
    assert len(makespan.read(file)) == 1
