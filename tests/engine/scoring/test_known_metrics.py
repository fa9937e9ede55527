"""Each metric against values computed by hand."""

from __future__ import annotations

import re
from random import Random

import pytest

from engine.config.metrics_section import MetricsConfig
from engine.config.parsing import parse
from engine.scoring.own_function import Answered
from engine.scoring.scorer import score_answers
from engine.scoring.text_metrics import contains, exact_match, regex_match, rouge_l, token_f1
from engine.scoring.value_metrics import json_equal, json_valid, number_match

DEEP = "[" * 900 + "]" * 900


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "score"),
    [
        (exact_match, " Paris\n", "Paris", 1), (exact_match, "paris", "Paris", 0), (exact_match, "Pa ris", "Paris", 0),
        (contains, "It is\n 12 km away", "12 km", 1), (contains, "It is 12km away", "12 km", 0),
        # 2 of 3 words of the answer and 2 of 2 of the reference: 2 * (2/3 * 1) / (2/3 + 1)
        (token_f1, "The cat sat down!", "a cat sat", 0.8), (token_f1, "red red blue", "red", 0.5), (token_f1, "the", "a", 1),
        (token_f1, "dog", "", 0),
        # the longest common sequence is "the cat the mat": 4 of 5 and 4 of 6 words
        (rouge_l, "the cat lay the mat", "the cat on the red mat", 8 / 11), (rouge_l, "b a", "a b", 0.5), (rouge_l, "!", "a", 0),
        (rouge_l, "Über uns", "über UNS", 1), (rouge_l, "snake_case", "snake case", 1), (rouge_l, "कि", "का", 0),
        (rouge_l, "今天很好", "今天不好", 0.75), (rouge_l, "café", "cafe\u0301", 1),
        (number_match, "So 3 + 4 = 7.0 apples.", "#### 7", 1), (number_match, "1,234,567", "1234567", 1),
        (number_match, "3-4", "4", 1), (number_match, "is -4", "4", 0), (number_match, "none", "none", 0),
        (number_match, "1.5e3", "1500", 1), (number_match, "0.1", "0.10", 1), (number_match, "7 of 12", "7", 0),
        (number_match, "x = \u22125", "-5", 1), (number_match, "\u22125", "5", 0), (number_match, "-$1,250.00", "$-1250", 1),
        (number_match, "e4", "4", 1), (number_match, "1e10000", "10e9999", 1), (number_match, "1e10000", "0", 0),
        (json_equal, '{"b": 1, "a": [1, 2.0]}', '{"a":[1.0,2],"b":1}', 1), (json_equal, "[2, 1]", "[1, 2]", 0),
        (json_equal, "true", "1", 0), (json_equal, "{1}", "{1}", 0), (json_equal, "null", "null", 1), (json_equal, '"1"', "1", 0),
        (json_equal, "1e400", "1e500", 0), (json_equal, "9" * 5000, "9" * 5000, 1), (json_equal, DEEP, DEEP, 1),
        (json_equal, "12345678901234567890.0", "12345678901234567891", 0), (json_equal, '{"a": 1, "a": 2}', '{"a": 2}', 1),
        (json_equal, "[1] done", "[1]", 0), (json_equal, "[]", "{}", 0), (json_equal, "-0", "0.0", 1),
    ],
)  # fmt: skip
def test_scores_are_those_computed_by_hand(metric, answer, reference, score):
    assert metric(answer, reference) == pytest.approx(score)


def test_rouge_l_of_random_words_is_that_of_the_whole_table_and_of_rouge_score_s_words():
    random, alphabet = Random(0), "abc AB_1-2. "
    for _ in range(200):
        one, other = ("".join(random.choices(alphabet, k=random.randint(0, 60))) for _ in range(2))
        ours, theirs = (re.sub("[^a-z0-9]+", " ", text.lower()).split() for text in (one, other))
        row = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
        for i, word in enumerate(ours):
            for j, wanted in enumerate(theirs):
                row[i + 1][j + 1] = row[i][j] + 1 if word == wanted else max(row[i][j + 1], row[i + 1][j])
        assert rouge_l(one, other) == (2 * row[-1][-1] / (len(ours) + len(theirs)) if ours and theirs else 0.0)


def test_json_is_one_value_and_nothing_else():
    texts = ['{"a": 1}', " [1] ", "null", "{'a': 1}", '{"a": 1} done', "NaN", "", "[" * 100_000]
    assert [json_valid(text) for text in texts] == [1, 1, 1, 0, 0, 0, 0, 0]


def test_a_pattern_judges_the_answer_or_compares_its_group():
    assert regex_match("id: A-12", "whatever", r"[A-Z]-\d+") == 1
    assert regex_match("id: 12", "whatever", r"[A-Z]-\d+") == 0
    assert regex_match("Answer: B.", "... Answer: B", r"Answer: (\w)") == 1
    assert regex_match("Answer: C.", "... Answer: B", r"Answer: (\w)") == 0
    assert regex_match("Answer: B.", " B ", r"Answer: (\w)") == 1  # the reference is the group alone
    assert regex_match("B", "Answer: B", r"Answer: (\w)") == 0


def answered(answer, reference="7", **sample):
    return Answered("1 + 6 = ", reference, answer, sample)


def test_a_metric_compares_with_the_reference_or_a_field():
    config = parse(MetricsConfig, {"exact_match": True, "number_match": "extra.total", "contains": "unit"}, "metrics")
    samples = [answered("7", extra={"total": 8}, unit="kg"), answered("8 kg", extra={"total": 8}, unit="kg")]
    scores = score_answers(config, samples)
    assert scores.by_sample == {"exact_match": [1, 0], "contains": [0, 1], "number_match": [0, 1]}
    assert scores.means == {"exact_match": 0.5, "contains": 0.5, "number_match": 0.5} and not scores.errors


def test_the_best_of_several_references_counts_and_json_is_one_value():
    values = {"exact_match": "names", "number_match": "names", "json_equal": "names"}
    config = parse(MetricsConfig, {**values, "regex": r"is (\w+)", "regex_field": "names"}, "metrics")
    samples = [answered(text, names=["seven", 7]) for text in ("seven", "it is 7", '["seven", 7.0]')]
    assert score_answers(config, samples).by_sample == {
        "exact_match": [1, 0, 0], "number_match": [0, 1, 1], "json_equal": [0, 0, 1], "regex": [0, 1, 0],
    }  # fmt: skip


def test_a_pattern_without_end_is_an_error_in_one_line_and_leaves_the_others():
    config = parse(MetricsConfig, {"exact_match": True, "regex": "^(a+)+$", "function_timeout_s": 0.3}, "metrics")
    scores = score_answers(config, [answered("a" * 60 + "b", reference="7")])
    assert scores.means == {"exact_match": 0.0}
    assert scores.errors == {"regex": "metrics.regex = '^(a+)+$' gave no score: it takes more than 0.3 s"}
