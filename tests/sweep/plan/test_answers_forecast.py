"""The forecast says what a trial's answers take, and follows what makes them slow."""

from __future__ import annotations

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.planning.cards import CARDS
from engine.shape.model_shape import ModelShape
from sweep.plan.answers_forecast import answers_line, answers_seconds
from tests.support.prepared import prepared

LLAMA_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
SHAPE, CARD = ModelShape.of(LLAMA_8B, "m"), CARDS["rtx4090"]


def config(**metrics):
    values = {"model": {"path": "m"}, "data": {"train": "d"}, "train": {"max_tokens": 4000, "num_reports": 4}}
    return parse(TrainConfig, {**values, "metrics": {"exact_match": True, "max_new_tokens": 100, **metrics}})


def seconds(num_samples=64, longest=200, card=CARD, **metrics):
    return answers_seconds(config(**metrics), SHAPE, card, num_samples, longest)


def test_seconds_follow_steps_batches_and_the_card():
    one = seconds()
    assert 1.0 < one < 60.0
    assert seconds(longest=50, max_new_tokens=200) > 1.9 * seconds(longest=50)  # prompts take a share of their own
    assert seconds(longest=50, batch_size=16) > 1.9 * seconds(longest=50, batch_size=32)
    assert seconds(128) > 1.9 * one and seconds(card=CARDS["h100"]) < one < seconds(card=CARDS["l4"])
    assert seconds(0) == 0.0 and seconds(exact_match=False, choice_accuracy=True, choices=["a", "b"]) == 0.0


def test_a_small_model_waits_for_its_host_unless_its_steps_are_recorded():
    small = ModelShape.of({**LLAMA_8B, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
                           "num_key_value_heads": 3, "num_hidden_layers": 30}, "m")  # fmt: skip
    fused, plain = config(), config()
    plain = plain.model_copy(update={"model": plain.model.model_copy(update={"layers": "original"})})
    assert answers_seconds(plain, small, CARD, 64, 200) > 10 * answers_seconds(fused, small, CARD, 64, 200)


def test_the_line_counts_the_rungs_that_measure():
    facts = prepared(num_task_samples=64, longest_task_prompt=200)
    assert "64 samples, answers of up to 100 tokens, 1 of 4 rungs" in answers_line(config(), SHAPE, CARD, facts)
    assert "a trial: 64 samples" in answers_line(config(at="every"), SHAPE, CARD, facts)
    assert "at the end, for the best adapter" in answers_line(config(at="finalists"), SHAPE, CARD, facts)
    assert "no time is predicted here" in answers_line(config(), SHAPE, None, facts)
    assert answers_line(config(), SHAPE, CARD, prepared()) is None
