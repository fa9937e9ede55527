"""Draw what a trial of a drawn shape is asked: adapter, data, plan and the memory that it may use.

A setting is plain data, so that its line in a file is enough to measure it again.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from typing import Any

from torch import nn

from engine.bench.drawn_rows.drawn_samples import draw_lengths
from engine.bench.drawn_rows.drawn_shapes import UNFUSED, draw_shape
from engine.bench.shapes import SHAPES, linear_names, random_config
from engine.config.parsing import parse
from engine.config.trial import ModelConfig, TrainConfig
from engine.model.library_layers import with_library_bytes
from engine.shape.compute_limits import LENGTH_STEP
from engine.shape.layer_plan import can_record
from engine.shape.model_shape import ModelShape

CAPS_GIB = (7.5, 11.5, 15.5, 23.5)
SETTINGS_A_SHAPE = 2
LENGTHS, RANKS = (200, 6000), (2, 256)
STEP_TOKENS, LARGE, STEP_TOKENS_LARGE = (4096, 32_768), 2.5e9, (4096, 12_288)
"""Tokens in an optimizer step, and those of models of more than LARGE parameters, whose steps take long."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # the targets of layers that run unfused, if not all
POLICIES = (True, False, "selective", "offload")
MAX_TOKENS = 1_000_000

Values = dict[str, Any]


def draw(seed: int, number: int) -> Values:
    """Return setting `number` of a seed; it does not depend on how many are drawn."""
    generator, shape_number = random.Random(f"setting {seed} {number}"), number // SETTINGS_A_SHAPE
    shape = draw_shape(seed, shape_number)
    values = {"name": f"drawn-{seed}-{shape_number}", "seed": seed, "number": number, "shape": shape}
    size = plain_shape(values)
    lora, loop = _lora(generator, values), _loop(generator, size.num_parameters)
    loop["matmul"] = "bf16" if lora.get("use_dora") else generator.choices(("bf16", "int8_backward", "int8"), (6, 1, 1))[0]
    longest, evaluated = (_length(generator) for _ in range(2))
    data = {"max_seq_length": longest, "eval_max_seq_length": evaluated, "packing": generator.random() < 0.96}
    config = {"data": data, "lora": lora, "optim": _optim(generator), "train": loop}
    values |= {"config": config, "lengths": draw_lengths(generator)}
    if loop.get("cuda_graphs") and not can_record(train_config(values), size):
        del loop["cuda_graphs"]
    return values


def draw_all(seed: int, count: int) -> Iterator[Values]:
    """Yield the first `count` settings of a seed."""
    return (draw(seed, number) for number in range(count))


def train_config(values: Values) -> TrainConfig:
    """Return the TrainConfig of a setting, with all `auto` that it leaves open."""
    config = values["config"]
    model = {"path": values["name"], "embeddings": "device" if values["shape"]["model_type"] in UNFUSED else "auto"}
    loop = {"max_tokens": MAX_TOKENS, **config["train"]}
    return parse(TrainConfig, {**config, "model": model, "data": {"train": "random", **config["data"]}, "train": loop})


def plain_shape(values: Values) -> ModelShape:
    """Return `known_shape` without what the library's layers allocate, if the model runs on these."""
    SHAPES[values["name"]] = values["shape"]
    return ModelShape.of(random_config(values["name"]).to_dict(), values["name"])


def known_shape(values: Values) -> ModelShape:
    """Return the shape of a setting's model, which `engine.bench.shapes` knows by its name from now on."""
    SHAPES[values["name"]] = values["shape"]
    return _model_shape(values["name"], repr(values["shape"]))


@functools.lru_cache(maxsize=8)
def _model_shape(name: str, content: str) -> ModelShape:
    found = random_config(name)
    shape = ModelShape.of(found.to_dict(), name)
    return with_library_bytes(shape, ModelConfig(path=name), found, _unmade)


def _unmade(config: Any, attention_name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, attn_implementation=attention_name)


def _lora(generator: random.Random, values: Values) -> Values:
    found: Values = {"rank": _between(generator, *RANKS)}
    if generator.random() < 0.35:
        found["lora_dropout"] = round(generator.uniform(0.01, 0.2), 3)
    if generator.random() < 0.12:
        found["use_dora"] = True
    if generator.random() < 0.45:
        is_fused = values["shape"]["model_type"] not in UNFUSED
        names = [n for n in linear_names(values["name"]) if "per_layer" not in n] if is_fused else list(ATTENTION)
        qv = [name for name in names if name in ("q_proj", "v_proj", "qkv_proj")]
        attention = [name for name in names if name[0] in "qkvo" and name.endswith("_proj")]
        mlp = [name for name in names if name not in attention] or attention
        some = generator.sample(names, generator.randint(1, len(names)))
        found["target_modules"] = sorted(generator.choice([qv, attention, mlp, some]))
    return found


def _optim(generator: random.Random) -> Values:
    found: Values = {"name": generator.choices(("auto", "adamw", "lion_8bit", "muon"), (16, 2, 1, 1))[0]}
    if generator.random() < 0.08:
        found["ema_horizon"] = 0.2
    return found


def _loop(generator: random.Random, num_parameters: int) -> Values:
    """Return the train section: mostly as a sweep has it, with the plan left to the card."""
    tokens = STEP_TOKENS if num_parameters < LARGE else STEP_TOKENS_LARGE
    found: Values = {"tokens_per_step": _between(generator, *tokens), "memory_budget_gib": generator.choice(CAPS_GIB)}
    if generator.random() < 0.15:
        found["activation_checkpointing"] = generator.choice(POLICIES)
    if generator.random() < 0.1:
        found["micro_batch_size"] = generator.choice((1, 2))
    if generator.random() < 0.1:
        found["weight_cache_gib"] = 0.0
    if generator.random() < 0.08:
        found["neftune_noise_alpha"] = 5.0
    graphs = generator.choices((None, True, False), (8, 1, 1))[0]
    if graphs is False:
        found["cuda_graphs"] = False
    elif graphs and found.get("activation_checkpointing") != "offload":
        found |= {"cuda_graphs": True, "host_layers": 0}
    elif generator.random() < 0.1:
        found["host_layers"] = 0 if found.get("activation_checkpointing") is False else generator.choice((0, 4))
    return found


def _length(generator: random.Random) -> int:
    """Return a length of rows; every fifth is one of those for which attention has kernels of its own."""
    found = _between(generator, *LENGTHS)
    return LENGTH_STEP * max(1, round(found / LENGTH_STEP)) if generator.random() < 0.2 else found


def _between(generator: random.Random, low: int, high: int) -> int:
    """Return a whole number between the two, spread evenly over its logarithm."""
    return round(low * (high / low) ** generator.random())
