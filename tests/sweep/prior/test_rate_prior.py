"""The rate's prior has the published rule's values, and follows the adapter's scaling."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from engine.config.optim_section import OptimConfig
from engine.config.trial import LoraConfig
from engine.errors import InputError
from engine.shape.model_shape import ModelShape
from sweep.prior.rate_prior import FAMILY_WIDTH, OTHER_WIDTH, RatePrior, rate_prior
from tests.support.published_models import GEMMA2_9B, LLAMA_1B, LLAMA_8B, MISTRAL_7B, QWEN2_7B, QWEN3_8B

RULE = LoraConfig(rank=16, lora_alpha=32.0)


def prior_of(config: dict, **changes) -> RatePrior:
    return rate_prior(ModelShape.of({**config, **changes}, "config.json"))


def centre(prior: RatePrior, **lora) -> float:
    return math.exp(prior.of(LoraConfig(**lora))[0])


@pytest.mark.parametrize(
    ("config", "rate"),
    [
        (LLAMA_8B, 2.857e-4), (LLAMA_1B, 4.908e-4), ({**LLAMA_8B, "hidden_size": 3072}, 3.576e-4),
        ({**LLAMA_8B, "hidden_size": 8192}, 1.663e-4), ({**LLAMA_1B, "hidden_size": 576, "num_attention_heads": 9}, 1.322e-3),
        (QWEN2_7B, 4.779e-4), (QWEN3_8B, 4.730e-4), (MISTRAL_7B, 3.676e-4), (GEMMA2_9B, 3.893e-4),
    ],
)  # fmt: skip
def test_the_rule_gives_its_published_values_at_alpha_32(config, rate):
    """Llama 8B, 1B, 3B, 70B and SmolLM2-135M; Qwen2.5-7B and Qwen3-8B; two of no known exponent."""
    assert centre(prior_of(config), rank=16, lora_alpha=32.0) == pytest.approx(rate, rel=5e-4)


@pytest.mark.parametrize(("config", "part"), [
    (LLAMA_8B, "5e-05 * 10 * (2000 / 4096) ** 0.781, Llama's exponent"),
    (QWEN3_8B, "5e-05 * 10 * (2000 / 4096) ** 0.0775, Qwen's exponent"),
    (MISTRAL_7B, "5e-05 * 10 * (2000 / 4096) ** 0.4293, the mean exponent, none is known for mistral"),
])  # fmt: skip
def test_its_source_says_the_formula_and_whose_exponent(config, part):
    assert prior_of(config).source == part


def test_an_unknown_family_and_a_size_far_from_those_fitted_are_known_less_well():
    assert prior_of(LLAMA_8B).of(RULE)[1] == FAMILY_WIDTH
    assert prior_of(MISTRAL_7B).of(RULE)[1] == OTHER_WIDTH
    assert prior_of(LLAMA_1B, hidden_size=576, num_attention_heads=9).of(RULE)[1] == pytest.approx(0.915, abs=1e-3)
    assert prior_of(LLAMA_8B, hidden_size=16384).of(RULE)[1] > FAMILY_WIDTH


def test_with_a_fixed_alpha_the_rate_does_not_depend_on_the_rank_and_with_alpha_twice_the_rank_it_falls():
    prior = prior_of(LLAMA_8B)
    assert centre(prior, rank=8, lora_alpha=32.0) == pytest.approx(centre(prior, rank=256, lora_alpha=32.0))
    eight, hundred = centre(prior, rank=8), centre(prior, rank=128)  # alpha 16 and 256
    assert eight / hundred == pytest.approx(16**0.75)
    assert centre(prior, rank=16) == pytest.approx(2.857e-4, rel=5e-4)  # alpha 32


def test_rslora_counts_by_the_scaling_that_it_gives():
    prior = prior_of(QWEN3_8B)
    with_rslora = LoraConfig(rank=16, lora_alpha=8.0, use_rslora=True)  # scaling 8 / 4
    assert prior.of(with_rslora) == prior.of(LoraConfig(rank=16, lora_alpha=32.0))


def test_lora_plus_moves_the_rate_as_a_scaling_does_and_lion_needs_a_smaller_one():
    prior = prior_of(QWEN3_8B)
    assert prior.of(RULE, OptimConfig(loraplus_lr_ratio=16.0)) == prior.of(LoraConfig(rank=RULE.rank, lora_alpha=16 * RULE.alpha))
    (mean, width), (plain, plain_width) = prior.of(RULE, OptimConfig(name="lion_8bit")), prior.of(RULE)
    assert 3.0 < math.exp(plain - mean) < 10.0 and width > plain_width


def test_dropout_and_targets_change_nothing_and_a_far_scaling_is_known_less_well():
    prior = prior_of(LLAMA_8B)
    assert prior.of(RULE) == prior.of(LoraConfig(rank=16, lora_alpha=32.0, lora_dropout=0.1, target_modules=("q_proj",)))
    assert prior.of(LoraConfig(rank=128))[1] > prior.of(LoraConfig(rank=32))[1] > prior.of(RULE)[1]


def test_a_model_without_a_known_shape_has_no_prior():
    assert rate_prior(None) is None


def test_it_is_read_back_from_json_as_it_was_and_a_damaged_one_is_refused():
    prior = prior_of(LLAMA_8B)
    assert RatePrior.from_dict(json.loads(json.dumps(prior.to_dict()))) == prior
    with pytest.raises(InputError, match="rate_prior.width"):
        RatePrior.from_dict({**dataclasses.asdict(prior), "width": "wide"})
