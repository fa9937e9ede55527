"""The engine's answers as plain data: they are themselves again, keep their keys, and what is none is one line."""

from __future__ import annotations

import json

import pytest

from engine.command_answers import AdapterEvaluation, Facts, PreparedFacts, VisibleCard
from engine.errors import InputError
from engine.planning.model_shape import ModelShape

SHAPE = ModelShape(2, 64, 128, 4, 2, 16, 256, sliding_window=32)
CARD = VisibleCard("NVIDIA L4", 22.5)
PREPARED = PreparedFacts(
    shape=SHAPE, card=CARD, host_gib=3.5, model_path="m", layers="2 of 2", num_train_samples=8, num_eval_samples=2,
    num_dropped_samples=0, num_trainable=[64, 128], data={"training": "ab", "evaluation": "cd"},
)  # fmt: skip
EXAMPLE = {"prompt": "p", "expected": "e", "base": "b", "adapter": "a"}
EVALUATED = AdapterEvaluation(2.5, 1.25, 7, [EXAMPLE], 0.5)


@pytest.mark.parametrize("answer", [Facts(), Facts(shape=SHAPE, card=CARD, host_gib=1.0), PREPARED, EVALUATED,
                                    AdapterEvaluation(2.5, 1.25, 7),
                                    AdapterEvaluation(2.5, 1.25, 7, examples_error="no")])  # fmt: skip
def test_an_answer_is_itself_again_after_json(answer):
    assert type(answer).from_dict(json.loads(json.dumps(answer.to_dict()))) == answer


def test_the_commands_json_has_the_keys_it_always_had():
    assert set(Facts().to_dict()) == {"shape", "card", "host_gib"}
    assert set(PREPARED.to_dict()) == {
        "shape", "card", "host_gib", "model_path", "layers", "num_train_samples", "num_eval_samples", "num_dropped_samples",
        "num_trainable", "data", "num_train_tokens"}  # fmt: skip
    assert PREPARED.to_dict()["card"] == {"name": "NVIDIA L4", "memory_gib": 22.5}
    losses = {"base_eval_loss", "eval_loss", "num_eval_target_tokens"}
    assert set(AdapterEvaluation(2.5, 1.25, 7).to_dict()) == losses
    assert set(EVALUATED.to_dict()) == losses | {"examples", "examples_s"}


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (Facts, 5, "facts = 5"),
        (Facts, {"card": {"name": "x"}}, "card.memory_gib = None: required, but missing"),
        (Facts, {"shape": {**vars(SHAPE), "num_layers": "2"}}, "shape.num_layers = '2'"),
        (PreparedFacts, Facts().to_dict(), "facts.model_path = None: required, but missing"),
        (AdapterEvaluation, {"base_eval_loss": 1.0}, "evaluation.eval_loss = None: required, but missing"),
    ],
)
def test_an_answer_that_is_none_is_one_line(kind, values, said):
    with pytest.raises(InputError, match=said) as error:
        kind.from_dict(values)
    assert "\n" not in str(error.value)
