"""What is checked before launch has every pair of values that a model's layers may rule out together."""

from __future__ import annotations

import itertools

import pytest

from engine.config.targets import layer_ranks, layer_scalings, resolve_targets
from engine.errors import InputError
from sweep.config.sweep import parse_sweep_config
from sweep.plan.sweep_plan import make_sweep_plan

NAMES = ["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"]


def probes_of(space, monkeypatch):
    monkeypatch.setattr("sweep.cluster.slots.count_gpus", lambda: 0)
    values = {
        "model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 400, "num_reports": 4}, "space": space,
        "sampler": {"name": "tpe"}, "sweep": {"num_trials": 3},
    }  # fmt: skip
    return [probe.lora for probe in make_sweep_plan(parse_sweep_config(values)).probes()]


def test_a_start_is_checked_with_the_largest_rank_on_every_choice_of_targets(monkeypatch):
    targets = {"choices": {"attention": ["q_proj"], "mlp": ["up_proj"]}}
    starts, ranks = {"choices": ["default", "pissa"]}, {"choices": {"small": 4, "large": 64, "usual": 8}}
    probes = probes_of({"lora.target_modules": targets, "lora.start": starts, "lora.rank": ranks}, monkeypatch)
    started = {(lora.target_modules, lora.rank) for lora in probes if lora.start == "pissa"}
    assert started >= {(("q_proj",), 64), (("up_proj",), 64)}


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_key_that_fits_some_targets_alone_is_found_with_the_others(field, monkeypatch):
    space = {
        "lora.target_modules": {"choices": {"attention": ["q_proj"], "mlp": ["up_proj"]}},
        f"lora.{field}": {"choices": {"same": {}, "q": {"q_proj": 8}}},
    }
    probes = probes_of(space, monkeypatch)
    assert {(lora.target_modules, tuple(getattr(lora, field))) for lora in probes} >= set(
        itertools.product([("q_proj",), ("up_proj",)], [(), ("q_proj",)])
    )
    with pytest.raises(InputError, match=f"lora.{field} = 'q_proj': matches no layer that lora.target_modules picks"):
        for lora in probes:
            layer_scalings(lora, layer_ranks(lora, resolve_targets(NAMES, lora.target_modules)))
