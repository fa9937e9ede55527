"""A trial measures task metrics at its rungs, and trains the same adapter as without them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from engine.command_answers import AdapterEvaluation
from engine.config.parsing import to_json
from engine.data.views import load_data
from engine.errors import InputError, Interrupted
from engine.evaluation import decoding, task_metrics
from engine.evaluation.reevaluate import evaluate_adapter
from engine.evaluation.task_metrics import TaskScores, check_metrics
from engine.scoring.answers_file import read_answers, write_answers
from engine.scoring.scorer import Scores
from engine.training.loop import train
from tests.support.trials import build, run, same_numbers

METRICS = {"exact_match": True, "token_f1": True, "max_new_tokens": 6, "max_samples": 5, "at": "every"}


def with_metrics(tiny_config, **metrics):
    return build({**tiny_config, "metrics": {**METRICS, **metrics}})


def scored_as(monkeypatch, *values):
    """Let the metrics of successive rungs be these exact matches."""
    coming = iter(values)

    def measure(self, before_each):
        before_each()
        value = next(coming)
        means = {} if value is None else {"exact_match": value}
        return TaskScores(means, None if value else "no score", (), "0" * 16, 0.1)

    monkeypatch.setattr(task_metrics.TaskMetrics, "measure", measure)


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_metrics_are_in_reports_and_files_and_change_no_number_of_training(tiny_config, tmp_path, base):
    plain = run(build(tiny_config), tmp_path / "plain", base)
    measured = run(with_metrics(tiny_config), tmp_path / "measured", base)
    without = [{**r.to_dict(), "metrics": {}, "metrics_error": None} for r in measured]
    assert same_numbers(plain, [type(r).from_dict(values) for r, values in zip(measured, without, strict=True)])
    ours, theirs = weights(tmp_path / "measured"), weights(tmp_path / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [list(report.metrics) for report in measured] == [["exact_match", "token_f1"]] * 3
    for report in measured:
        found = read_answers(tmp_path / "measured", report.rung)
        assert len(found.answers) == 5 and report.metrics_s > 0
        for name, mean in report.metrics.items():
            assert -found.costs(name, -1.0).mean == pytest.approx(mean)
    assert found.answers[0].reference.startswith("It is ") and "plus" in found.answers[0].prompt


def test_at_says_which_rungs_measure(tiny_config, tmp_path, base):
    for at, rungs in (("last", [3]), ([1, 3], [1, 3]), ("finalists", [])):
        reports = run(with_metrics(tiny_config, at=at), tmp_path / str(at), base)
        assert [report.rung for report in reports if report.metrics] == rungs
    with pytest.raises(InputError, match="metrics.at"):
        with_metrics(tiny_config, at=[4])


@pytest.mark.parametrize(
    ("scores", "kept"),
    [((0.2, 0.8, 0.5), 2), ((0.5, 0.5, 0.5), 3), ((None, 0.0, None), 2), ((None, None, None), 3)],
)  # fmt: skip
def test_the_adapter_that_is_kept_is_the_best_by_the_metric_that_decides(
    scores, kept, tiny_config, tmp_path, base, monkeypatch
):
    config = with_metrics(tiny_config, choose_by="exact_match")
    scored_as(monkeypatch, *scores)
    at_rung = {}
    for report in train(config, tmp_path, base=base):
        at_rung[report.rung] = weights(tmp_path)["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert report.eval_loss == report.best_eval_loss, "the loss must fall, for the last rung to win by it"
    final = at_rung[3]
    assert torch.equal(final, at_rung[kept])
    assert all(not torch.equal(final, at_rung[rung]) for rung in range(1, kept))


def test_a_stop_inside_a_generation_resumes_to_the_same_numbers(tiny_config, tmp_path, base, monkeypatch):
    config = with_metrics(tiny_config)
    whole = run(config, tmp_path / "whole", base)
    pick, steps = decoding._Generation._pick, []
    monkeypatch.setattr(decoding._Generation, "_pick", lambda self, *given: steps.append(None) or pick(self, *given))
    with pytest.raises(Interrupted):
        list(train(config, tmp_path / "cut", base=base, interrupted=lambda: len(steps) == 9))  # in the second rung
    assert len(steps) == 9, "a later step was taken"
    rest = run(config, tmp_path / "cut", base)
    assert same_numbers(rest, whole[len(whole) - len(rest) :]) and len(rest) < 3
    for rung in (1, 2, 3):
        assert read_answers(tmp_path / "cut", rung) == read_answers(tmp_path / "whole", rung)


KILLED = """
import json, os, signal, sys
from pathlib import Path
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.evaluation import decoding
from engine.training.loop import train

pick, steps = decoding._Generation._pick, []

def killed(self, logits_BV, draws_B):
    steps.append(None)
    if len(steps) == 9:  # in the second rung
        os.kill(os.getpid(), signal.SIGKILL)
    return pick(self, logits_BV, draws_B)

decoding._Generation._pick = killed
list(train(parse(TrainConfig, json.loads(sys.argv[1])), Path(sys.argv[2])))
"""


def test_a_worker_that_is_killed_inside_a_generation_goes_on_to_the_same_numbers(tiny_config, tmp_path, base):
    config = with_metrics(tiny_config)
    whole, cut = run(config, tmp_path / "whole", base), tmp_path / "cut"
    cut.mkdir()
    died = subprocess.run([sys.executable, "-c", KILLED, to_json(config), str(cut)], timeout=240)
    assert died.returncode == -signal.SIGKILL
    assert len((cut / "reports.jsonl").read_text().splitlines()) == 1 and not (cut / "answers" / "0002.jsonl").exists()
    rest = run(config, cut, base)
    assert same_numbers(rest, whole[1:])
    assert all(read_answers(cut, rung) == read_answers(tmp_path / "whole", rung) for rung in (1, 2, 3))


def test_a_running_average_is_scored_if_it_is_the_better_one(tiny_config, tmp_path, base):
    config = build({**tiny_config, "metrics": METRICS}, optim={"ema_horizon": 0.2})
    reports = run(config, tmp_path / "whole", base)
    again = evaluate_adapter(config, tmp_path / "whole" / "adapter", 2)
    kept = min(reports, key=lambda report: report.eval_loss)
    assert again.metrics == pytest.approx(kept.metrics)


def test_the_second_measurement_scores_base_and_adapter_and_shows_their_answers(tiny_config, tmp_path, base):
    config = with_metrics(tiny_config, at="last")
    reports = run(config, tmp_path, base)
    found = evaluate_adapter(config, tmp_path / "adapter", 2)
    assert found.metrics == pytest.approx(reports[-1].metrics) and set(found.base_metrics) == set(found.metrics)
    answers = read_answers(tmp_path, 3).answers
    assert [one["adapter"] for one in found.examples] == [one.answer for one in answers[:2]]
    assert AdapterEvaluation.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_no_memory_for_one_answer_is_a_line_and_the_trial_goes_on(tiny_config, tmp_path, base, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(task_metrics, "generate", full)
    reports = run(with_metrics(tiny_config), tmp_path, base)
    assert len(reports) == 3 and all(not report.metrics and "ran out of memory" in report.metrics_error for report in reports)


@pytest.mark.parametrize(
    ("metrics", "field"),
    [
        ({"exact_match": "total"}, "metrics.exact_match"), ({"choice_accuracy": True, "choices": "options"}, "metrics.choices"),
        ({"choice_accuracy": True, "choices": ["a", "b"]}, "metrics.choice_accuracy"), ({"mine": "nowhere:f"}, "metrics.mine"),
        ({"json_equal": True}, "metrics.json_equal"),  # no reference is JSON, so no answer could have a score
    ],
)  # fmt: skip
def test_what_the_samples_or_functions_lack_is_one_line_before_a_trial(metrics, field, tiny_config, base):
    config = with_metrics(tiny_config, **metrics)
    with pytest.raises(InputError) as error:
        check_metrics(config, load_data(config.data, base.tokenizer)[1], base.tokenizer)
    assert error.value.field == field and "\n" not in str(error.value)


def test_fields_belong_to_their_own_sample_and_choices_are_judged_by_likelihood(tiny_config, tmp_path, base):
    rows = [
        {"prompt": f"What is {i} plus {i}?", "completion": f" It is {2 * i}.", "total": f"It is {2 * i}.",
         "options": [f"It is {2 * i + 1}.", f"It is {2 * i}.", "No idea at all, really."]}
        for i in range(40)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "rows.jsonl")}
    metrics = {"exact_match": "total", "choice_accuracy": True, "choices": "options", "token_f1": False}
    config = build({**tiny_config, "metrics": {**METRICS, **metrics}}, data=data)
    reports = run(config, tmp_path / "trial", base)
    answers = read_answers(tmp_path / "trial", 3).answers
    assert set(reports[-1].metrics) == {"exact_match", "choice_accuracy"}
    for one in answers:
        number = int(one.prompt.split()[2])
        assert one.reference.strip() == f"It is {2 * number}." and one.choice != "No idea at all, really."
        assert one.scores["choice_accuracy"] == float(one.choice == f"It is {2 * number}.")
        assert one.scores["exact_match"] == float(one.answer.strip() == f"It is {2 * number}.")


@pytest.mark.parametrize("odd", [None, [], [None], {"text": "a"}])
def test_a_field_without_anything_to_compare_with_is_one_line(odd, tiny_config, tmp_path, base):
    rows = [{"prompt": f"What is {i}?", "completion": " a", "field": "a" if i else odd} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = build({**tiny_config, "metrics": {**METRICS, "exact_match": "field"}}, data={"train": str(tmp_path / "rows.jsonl")})
    with pytest.raises(InputError, match=r"^metrics.exact_match = 'field': must be a text, .* has [n\[{]"):
        check_metrics(config, load_data(config.data, base.tokenizer)[0], base.tokenizer)


def test_files_of_answers_that_are_damaged_are_one_line(tmp_path):
    assert read_answers(tmp_path, 1) is None
    scores = TaskScores({"exact_match": 1.0}, None, (), "0" * 16, 0.0)
    write_answers(tmp_path, scores.at(1))
    for text in ("", "{}", '{"rung": 2, "samples_digest": "x"}\n{"prompt": "a", "reference": "b", "answer": "c"}\n', "[" * 10**5):
        (tmp_path / "answers" / "0001.jsonl").write_text(text)
        with pytest.raises(InputError, match="must hold the answers of rung 1"):
            read_answers(tmp_path, 1)


def test_means_are_of_all_samples():
    assert Scores({"a": [1.0, 0.0, 0.5], "b": []}).means == {"a": 0.5}
