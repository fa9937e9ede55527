"""The engine's answers as plain data: they are themselves again, keep their keys, and what is none is one line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.command_answers import MUCH_LOST, AdapterEvaluation, Facts, PreparedFacts, VisibleCard
from engine.errors import InputError
from engine.sample_losses import SampleLosses
from engine.shape.layer_shapes import LayerShape
from engine.shape.mixer_shape import MixerShape
from engine.shape.model_shape import ModelShape
from tests.support.reports import make_account

SHAPE = ModelShape(2, 64, 128, 4, 2, 16, 256, sliding_window=32)
CARD = VisibleCard("NVIDIA L4", 22.5)
ACCOUNT = make_account()
PREPARED = PreparedFacts(
    shape=SHAPE, card=CARD, host_gib=3.5, model_path="m", layers="2 of 2", num_train_samples=8, num_eval_samples=2,
    num_dropped_samples=0, num_trainable=[64, 128], data={"training": "ab", "evaluation": "cd"},
    accounts=[ACCOUNT], day="2026-11-26",
)  # fmt: skip
EXAMPLE = {"prompt": "p", "expected": "e", "base": "b", "adapter": "a"}
EVALUATED = AdapterEvaluation(2.5, 1.25, 7, [EXAMPLE], 0.5)
BY_SAMPLE = SampleLosses("ab", (1.5, 2.0), (3, 4))


@pytest.mark.parametrize("answer", [Facts(), Facts(shape=SHAPE, card=CARD, host_gib=1.0), PREPARED, EVALUATED,
                                    AdapterEvaluation(2.5, 1.25, 7),
                                    AdapterEvaluation(2.5, 1.25, 7, examples_error="no"),
                                    AdapterEvaluation(2.5, 0.5, 7, None, None, None, BY_SAMPLE, BY_SAMPLE)])  # fmt: skip
def test_an_answer_is_itself_again_after_json(answer):
    assert type(answer).from_dict(json.loads(json.dumps(answer.to_dict()))) == answer


def test_the_commands_json_has_the_keys_it_always_had():
    assert set(Facts().to_dict()) == {"shape", "card", "host_gib"}
    assert set(PREPARED.to_dict()) == {
        "shape", "card", "host_gib", "model_path", "layers", "num_train_samples", "num_eval_samples", "num_dropped_samples",
        "num_trainable", "data", "accounts", "day", "model_notes", "num_task_samples", "longest_task_prompt"}  # fmt: skip
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


def test_a_shape_whose_layers_differ_is_itself_again_and_a_wrong_layer_is_one_line():
    mixer = MixerShape(2, 4, 16, 16, 4, has_kernels=True)
    layers = (
        LayerShape(16, 2, 128, "own", None, True), LayerShape(32, 1, 256, "shared", 0, False),
        LayerShape(16, 2, 128, "own", None, False, mixer))  # fmt: skip
    told = json.loads(json.dumps(replace(PREPARED, shape=replace(SHAPE, layers=layers)).to_dict()))
    assert PreparedFacts.from_dict(told).shape == replace(SHAPE, layers=layers)
    last = told["shape"]["layers"][2]
    for wrong, said in (({**told["shape"]["layers"][0], "head_dim": "16"}, "layers.1.head_dim = '16'"), (7, "layers.1 = 7"),
                        ({**last, "mixer": {**last["mixer"], "key_dim": "16"}}, "mixer.key_dim = '16'"),
                        ({**last, "mixer": 7}, "layers.1.mixer = 7")):  # fmt: skip
        with pytest.raises(InputError, match=said) as error:
            PreparedFacts.from_dict({**told, "shape": {**told["shape"], "layers": [told["shape"]["layers"][0], wrong]}})
        assert "\n" not in str(error.value)


def test_an_account_is_one_line_with_everything_and_warns_of_losses():
    assert ACCOUNT.line() == (
        "training at 512 tokens: 60 rows read (6 bad, 1 equal to others); 44 used as 50 samples; 2,000 tokens a pass, "
        "25.0% of them targets; 500 tokens lost (3 samples cut, 6 dropped); added EOS to 44"
    )
    rows, tokens = ACCOUNT.warnings()
    assert "lose 21% of their rows at 512 tokens" in rows and "lose 20% of their tokens" in tokens
    assert replace(ACCOUNT, num_bad=0, num_used=50, num_lost_tokens=9).warnings() == []
    told = replace(ACCOUNT, notes={"thoughts left out": 2}, bad_rows=["data.train line 3 = 'x': no"])
    assert told.line().endswith("; thoughts left out (2 rows)")
    assert "a bad row was skipped: data.train line 3 = 'x': no" in told.warnings()
    leaked = replace(ACCOUNT, part="evaluation", num_bad=0, num_chosen=3, num_used=3, num_lost_tokens=0, num_leaked=2)
    assert leaked.warnings() == ["2 of 3 evaluation rows are training rows too"]


@given(st.integers(1, 10**6), st.floats(0, 1), st.floats(0.001, 1), st.floats(0, 1))
def test_the_share_of_lost_rows_is_that_of_the_source_however_few_are_held_out(num_read, bad, part, used):
    """Bad rows are counted over the whole source, so two held-out rows do not lose 83 % to ten bad ones."""
    num_bad = int(bad * num_read)
    num_chosen = int(part * (num_read - num_bad))
    num_used = int(used * num_chosen)
    account = replace(ACCOUNT, num_read=num_read, num_bad=num_bad, num_chosen=num_chosen, num_used=num_used, num_lost_tokens=0)
    said = [line for line in account.warnings() if "of their rows" in line]
    lost = 1 - (1 - num_bad / num_read) * num_used / max(1, num_chosen)
    assert said == ([f"training data lose {lost:.0%} of their rows at 512 tokens (bad rows, or beyond the length: data.overlong)"]
                    if lost > MUCH_LOST else [])  # fmt: skip
    fewer = replace(account, num_chosen=num_used).warnings()  # the same share of bad rows, whatever is held out
    assert not num_used or bool([line for line in fewer if "of their rows" in line]) == (num_bad / num_read > MUCH_LOST)
