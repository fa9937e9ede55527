"""Curves are recorded from real trials, on a tiny model here, and can be read back."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.search import design, library_text, made_requests, record
from tests.search.curve_files import CURVES, merge, read_curves, read_lines, write_curves
from tests.search.design import MAIN, REPEATED, planned, shard
from tests.search.recorded_trial import Failures
from tests.search.tasks import LATER, TASKS, write

LENGTHS = {name: task.lengths for name, task in TASKS.items()}


def test_the_design_is_the_one_that_was_recorded_and_its_beginning_spreads_too():
    assert design.digest() == "fbd3194a3070"  # recorded trials are named by its points
    first = design.points(24)
    assert first == design.points()[:24]
    assert {point["lora.rank"] for point in first} == set(design.RANKS)
    assert {point["lora.target_modules"] for point in first} == set(design.TARGETS)
    rates = sorted(point["optim.learning_rate"] for point in first)
    assert 1e-5 <= rates[0] < 2e-5 and 5e-3 < rates[-1] <= 1e-2


def test_every_task_has_its_points_and_twins_and_any_beginning_has_all_early_tasks():
    order = planned(LENGTHS, LATER)
    assert len({trial.id for trial in order}) == len(order)
    count = Counter((trial.task, trial.variant) for trial in order)
    assert set(count) == {(task, variant) for task in TASKS for variant in (MAIN, *REPEATED)}
    assert all(number == (112 if variant == MAIN else 31) for (_, variant), number in count.items())
    early = Counter(trial.task for trial in order[:30])
    assert early == {name: 10 for name in TASKS if name not in LATER}


def test_twins_come_before_the_later_task_and_what_was_recorded_before_the_design_grew_is_still_in_it():
    ids = [trial.id for trial in planned(LENGTHS, LATER)]
    first_later = ids.index("dialogue-000-cosine-0")
    assert sum(name.endswith("cosine-1") for name in ids[:first_later]) == 3 * 21
    assert ids.index("dialogue-063-cosine-0") == first_later + 63
    for file in CURVES.glob("*.gz"):
        assert {trial.id for trial in read_curves(file).trials} <= {*ids}


def test_shards_share_the_trials_out_and_keep_twins_together():
    order = planned(LENGTHS, LATER)
    shards = [shard(order, index, 5) for index in range(5)]
    assert sorted(trial.id for part in shards for trial in part) == sorted(trial.id for trial in order)
    for trial in order:
        if trial.variant in REPEATED:
            of = [index for index, part in enumerate(shards) if any(other.group == trial.group for other in part)]
            assert len(of) == 1


def test_what_was_recorded_before_is_shared_out_no_more(tmp_path, capsys):
    done = tmp_path / "done.jsonl"
    lines = [{"kind": "trial", "id": f"docs-{i:03d}-cosine-0", "outcome": "FAILED" if i == 7 else "COMPLETE"} for i in range(112)]
    done.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = []
    for index in ("0/2", "1/2"):
        record.main(["--dry-run", "--task", "docs", "--done", str(done), "--shard", index])
        shown.append([line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]])
    assert shown[0][0] == "docs-007-cosine-0"  # it failed
    assert len(shown[0]) == 31 and len(shown[1]) == 32 and not {*shown[0]} & {*shown[1]}


def test_a_task_s_file_says_what_was_recorded_and_new_lines_join_it(tmp_path):
    file = CURVES / "docs.json.gz"
    before = read_curves(file)
    again = merge([file])["docs"]
    write_curves(tmp_path / "docs.json.gz", again)
    assert (tmp_path / "docs.json.gz").read_bytes() == file.read_bytes()
    facts = {key: value for key, value in before.task.items() if key != "sample_targets"}
    twin = {**vars(before.trials[0]), "id": "docs-999-cosine-1", "config": 999, "seed": 1}
    lines = [{"kind": "header", "shard": 3, "card": "another"}, {"kind": "task", **facts, "base_eval_loss": 3.3}]
    lines += [{"kind": "trial", "task": "docs", "sample_targets": before.task["sample_targets"], **twin}]
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps(line) + "\n" for line in lines))
    both = merge([file, more])["docs"]
    assert both.task == before.task and [one["card"] for one in both.recorded][-1] == "another"
    assert len(both.trials) == len(before.trials) + 1 and len(both.of("cosine", 1)) == len(before.of("cosine", 1)) + 1
    assert merge([file, more, file])["docs"] == both


def test_no_trial_of_a_task_s_file_is_recorded_again(capsys):
    record.main(["--dry-run", "--done", *map(str, sorted(CURVES.glob("*.gz")))])
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]]
    known = {trial.id for file in CURVES.glob("*.gz") for trial in read_curves(file).trials}
    assert known and {*shown} == {trial.id for trial in planned(LENGTHS, LATER)} - known


def test_alphas_are_what_their_names_say():
    assert [design.alpha_of(name, 64) for name in design.ALPHAS] == [(64, False), (128, False), (16, False), (8, True)]


def test_the_made_requests_are_the_same_each_time_and_evaluation_is_not_in_training(monkeypatch):
    monkeypatch.setattr(made_requests, "NUM_TRAIN", 300)
    train, held_out = made_requests.request_rows()
    assert (train, held_out) == made_requests.request_rows()
    assert len(train) == 300 and not {key(row) for row in train} & {key(row) for row in held_out}
    orders = [row["messages"] for row in train if row["messages"][0]["content"].startswith("Extract")]
    for request, answer in orders:
        for value in json.loads(answer["content"]).values():
            assert isinstance(value, float) or str(value) in request["content"]


def key(row: dict) -> str:
    return row["messages"][0]["content"]


LIBRARY = {
    f"{name}.py": f'"""The module {name} of a made library, for tests."""\n\n'
    f'class Thing:\n    """A thing of {name}, which does nothing but be here for a test."""\n\n'
    f'    def act(self, how, *, twice=False):\n        """Act in the way of {name}, once or twice."""\n'
    f'        for _ in range(2 if twice else 1):\n            how("{name}", self)\n        return how\n'
    for name in ("alder", "birch", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine", "rowan", "yew")
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    for name, text in LIBRARY.items():
        (tmp_path / name).write_text(text)
    found = library_text.definitions(tmp_path)
    monkeypatch.setattr(library_text, "definitions", lambda: found)


@pytest.mark.parametrize("rows_of", [library_text.doc_rows, library_text.code_rows, library_text.dialogue_rows])
def test_library_texts_hold_modules_out(library, rows_of):
    train, held_out = (json.dumps(rows) for rows in rows_of())
    modules = {name.removesuffix(".py") for name in LIBRARY}
    trained, evaluated = ({module for module in modules if module in part} for part in (train, held_out))
    assert trained and evaluated and not trained & evaluated
    assert trained | evaluated == modules


def test_a_function_is_its_head_its_documentation_and_its_body(library):
    (row, *_), _ = library_text.code_rows()
    question, answer = (message["content"] for message in row["messages"])
    assert "def act(self, how, *, twice=False):" in question and "once or twice" in question
    assert answer.startswith("for _ in range(2 if twice else 1):\n    how(") and answer.endswith("return how")


@pytest.fixture
def few_samples(monkeypatch, tmp_path):
    """Record tasks of few samples: Python's whole library takes seconds to read."""
    rows = [library_text._chat(f"{i} + 1?", f"{i + 1}") for i in range(90)]
    monkeypatch.setattr("tests.search.tasks.NUM_EVALUATED", 20)
    folder = tmp_path / "samples"
    folder.mkdir()
    for name, task in TASKS.items():
        monkeypatch.setitem(TASKS, name, type(task)(task.about, lambda: (rows[:70], rows[70:]), task.lengths, task.data))
    write(folder, "docs")
    monkeypatch.setattr("tests.search.recorded_trial.data_of", lambda name: (folder / "train.jsonl", folder / "eval.jsonl"))


def test_trials_are_recorded_again_only_where_they_are_missing_and_merge_into_a_file(few_samples, tiny_model_dir, tmp_path):
    out = tmp_path / "shard0.jsonl"
    common = ["--out", str(out), "--tiny", "--device", "cpu", "--model", str(tiny_model_dir), "--scratch", str(tmp_path / "s")]
    common += ["--task", "docs", "--task", "code"]
    assert record.main([*common, "--limit", "2"]) == 0
    with out.open("a") as file:
        file.write('{"kind":"trial","id":"docs-001')  # a killed process
    assert record.main([*common, "--limit", "3"]) == 0
    lines = read_lines(out)
    assert [line["kind"] for line in lines] == ["header", "task", "trial", "task", "trial", "header", "trial"]
    assert record.main(["--merge", str(out), "--curves", str(tmp_path / "curves")]) == 0
    curves = read_curves(tmp_path / "curves" / "docs.json.gz")
    assert [trial.config for trial in curves.main()] == [0, 1] and not curves.of("constant", 0)
    assert curves.task["num_rungs"] == 4 and len(curves.recorded) == 1
    for trial in curves.main():
        assert trial.outcome == "COMPLETE" and len(trial.loss) == len(trial.tokens) == len(trial.elapsed_s) == 4
        assert trial.tokens[-1] >= curves.task["max_tokens"] > trial.tokens[-2]
        targets = curves.task["sample_targets"]
        kept = min(loss[trial.sample_rung - 1] for loss in (trial.loss, trial.average))
        sums = [mean * count for mean, count in zip(trial.sample_losses_e4, targets)]
        assert 1e-4 * sum(sums) / sum(targets) == pytest.approx(kept, abs=1e-4) and kept == min(*trial.loss, *trial.average)
    assert {trial.loss[-1] for trial in curves.main()} != {curves.task["base_eval_loss"]}


def test_a_trial_that_diverges_is_recorded_and_the_next_one_goes_on(few_samples, tiny_model_dir, tmp_path, monkeypatch):
    from engine.errors import DivergedError

    real, calls = record.record_trial.__globals__["train"], []

    def train(config, folder, **others):
        calls.append(config)
        if len(calls) == 1:
            raise DivergedError("loss is nan, gradient norm is nan")
        return real(config, folder, **others)

    monkeypatch.setattr("tests.search.recorded_trial.train", train)
    out = tmp_path / "out.jsonl"
    arguments = ["--out", str(out), "--tiny", "--device", "cpu", "--model", str(tiny_model_dir), "--task", "code", "--limit", "2"]
    assert record.main([*arguments, "--scratch", str(tmp_path / "s")]) == 0
    first, second = (line for line in read_lines(out) if line["kind"] == "trial")
    assert (first["outcome"], first["loss"], second["outcome"]) == ("DIVERGED", [], "COMPLETE")
    assert "nan" in first["error"]


def test_no_trial_begins_when_the_time_is_over(few_samples, tiny_model_dir, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = ["--out", str(out), "--tiny", "--device", "cpu", "--model", str(tiny_model_dir), "--scratch", str(tmp_path / "s")]
    assert record.main([*arguments, "--budget-s", "0"]) == 0
    assert [line["kind"] for line in read_lines(out)] == ["header"]


def test_files_of_other_samples_do_not_merge(tmp_path):
    trial = {"kind": "trial", "task": "docs", "sample_targets": None}
    for name, digest in (("a", "1"), ("b", "2")):
        facts = {"kind": "task", "name": "docs", "train_digest": digest, "base_eval_loss": 1.0}
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in (facts, trial)))
    with pytest.raises(ValueError, match="docs: the files differ in train_digest"):
        merge([tmp_path / "a", tmp_path / "b"])


def test_trials_that_all_fail_end_the_process():
    failures = Failures()
    for outcome in ("FAILED", "FAILED", "COMPLETE", "FAILED", "FAILED"):
        failures.note({"outcome": outcome, "error": "a broken card"})
    with pytest.raises(RuntimeError, match="3 trials in a row failed, the last with: a broken card"):
        failures.note({"outcome": "FAILED", "error": "a broken card"})
