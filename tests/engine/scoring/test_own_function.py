"""The user's own function: found by name, called under limits, its fault is one line."""

from __future__ import annotations

import os

import pytest

from engine.config.metrics_section import MetricsConfig
from engine.config.parsing import parse
from engine.errors import InputError
from engine.scoring.own_function import Answered, find_function
from engine.scoring.scorer import score_answers

MODULE = """
import os, time

def length(prompt: str, reference: str, answer: str, sample: dict) -> float:
    return len(answer) / sample["most"]

def ranks(prompts, references, answers, samples):
    return [sorted(answers).index(one) for one in answers]

def too_few(prompts, references, answers, samples):
    return [1.0]

def fails(prompt, reference, answer, sample):
    raise KeyError("no\\nsuch")

def hangs(prompt, reference, answer, sample):
    time.sleep(60)

def dies(prompt, reference, answer, sample):
    os._exit(3)

def nothing(prompt, reference, answer, sample):
    return float("nan")

def other_arguments(answer):
    return 1.0
"""
ANSWERS = [Answered("q", "r", "bb", {"most": 4}), Answered("q", "r", "a", {"most": 4})]


@pytest.fixture
def scores(tmp_path, monkeypatch):
    (tmp_path / "own_scores_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))

    def measure(function, **options):
        own = {"function": f"own_scores_of_a_test:{function}", **options}
        config = parse(MetricsConfig, {"exact_match": True, "mine": own, "function_timeout_s": 0.5}, "metrics")
        return score_answers(config, ANSWERS)

    return measure


def test_a_function_scores_each_answer_or_all_at_once(scores):
    assert scores("length").by_sample["mine"] == [0.5, 0.25]
    assert scores("ranks", batch=True).means["mine"] == 0.5


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("fails", "KeyError"), ("hangs", "takes more than 0.5 s"), ("dies", "crashed its process"),
        ("nothing", "must return a finite number"), ("missing", "has no attribute"),
    ],
)  # fmt: skip
def test_a_fault_of_the_function_is_one_line_and_leaves_the_others(scores, function, why):
    found = scores(function)
    assert found.means == {"exact_match": 0.0} and list(found.errors) == ["mine"]
    line = found.errors["mine"]
    assert f"own_scores_of_a_test:{function}" in line and why in line and "\n" not in line


def test_a_batch_function_must_return_one_score_for_each_answer(scores):
    assert "must return 2 scores" in scores("too_few", batch=True).errors["mine"]


@pytest.mark.parametrize(
    ("function", "allowed"),
    [
        ("no_such_package.scores:f", "cannot be imported"), ("own_scores_of_a_test:other_arguments", "takes (prompt"),
        ("own_scores_of_a_test:os", "must be a function"),
    ],
)  # fmt: skip
def test_what_is_no_such_function_is_refused(scores, function, allowed):
    config = parse(MetricsConfig, {"mine": function}, "metrics")
    with pytest.raises(InputError, match="metrics.mine") as error:
        find_function("mine", config.own["mine"])
    assert allowed in error.value.allowed and os.linesep not in str(error.value)


def test_functions_may_stand_under_their_own_names():
    short = parse(MetricsConfig, {"mine": "a.b:c", "other": {"function": "a:b", "direction": "minimize"}}, "metrics")
    assert short.names == ("mine", "other") and parse(MetricsConfig, short.model_dump(), "metrics") == short
    for taken in ("at", "eval_loss", "no-name"):
        with pytest.raises(InputError):
            parse(MetricsConfig, {"own": {taken: "a:b"}}, "metrics")
