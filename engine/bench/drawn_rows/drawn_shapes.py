"""Draw the shape of a model around those of a real family: sizes that nobody published."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"
SIZES = ((0.1, 0.3), (1.6, 3.2), (0.3, 0.8), (5.0, 7.0), (0.8, 1.6), (3.2, 5.0), (0.3, 1.6), (7.0, 9.0))
"""Billions of parameters, in the order in which shapes are drawn: any first part of them is a mixture."""
WIDTH_STEP, NARROWEST, WIDEST = 64, 256, 6144
FEWEST_LAYERS, MOST_LAYERS = 8, 48

Values = dict[str, Any]


@dataclass(frozen=True)
class DrawnFamily:
    """What shapes of a family may have.

    - heads: features of a head. square: the heads' features are those of the hidden states.
    - shares: query heads for each key/value head; 0 for one key/value head in all.
    - mlp: least and most of the MLP's width over the hidden size.
    - vocabularies: sizes. tied: how often the head is the input embedding.
    - more: further values of the config, of (generator, values so far).
    """

    heads: tuple[int, ...] = (64, 128)
    square: bool = True
    shares: tuple[int, ...] = (1, 2, 3, 4, 7, 8)
    mlp: tuple[float, float] = (2.5, 4.5)
    vocabularies: tuple[int, ...] = (32_000, 49_152, 100_278, 128_256)
    tied: float = 0.5
    more: Callable[[random.Random, Values], Values] = lambda generator, values: {}


def _windows(*choices: int | None) -> Callable[[random.Random, Values], Values]:
    return lambda generator, values: {"sliding_window": generator.choice(choices)}


def _biased(generator: random.Random, values: Values) -> Values:
    return {"attention_bias": True, "mlp_bias": generator.random() < 0.5} if generator.random() < 0.3 else {}


def _pattern(generator: random.Random, values: Values) -> Values:
    """Return a window, and which layers have it: all but every n-th."""
    every, number = generator.choice((2, 3, 4, 6)), values["num_hidden_layers"]
    kinds = [FULL if i % every == every - 1 else SLIDING for i in range(number)]
    return {"sliding_window": generator.choice((256, 512, 1000, 1024, 2048, 4096)), "layer_types": kinds}


def _capped(generator: random.Random, values: Values) -> Values:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": values["head_dim"]}
    return {**_pattern(generator, values), **caps, "hidden_activation": "gelu_pytorch_tanh"}


def _gemma4(generator: random.Random, values: Values) -> Values:
    number = values["num_hidden_layers"]
    kinds = [FULL if i % 5 == 4 or i == number - 1 else SLIDING for i in range(number)]
    return {"sliding_window": 512, "layer_types": kinds, "global_head_dim": 512, "final_logit_softcapping": 30.0,
            "num_kv_shared_layers": generator.choice((0, number // 3)),
            "hidden_size_per_layer_input": generator.choice((0, 128, 256)),
            "vocab_size_per_layer_input": values["vocab_size"], "use_double_wide_mlp": False}  # fmt: skip


def _granite(generator: random.Random, values: Values) -> Values:
    factors = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}
    return {**factors, "attention_multiplier": 1.0 / values["head_dim"]}


def _half_turned(generator: random.Random, values: Values) -> Values:
    return {"attention_bias": generator.random() < 0.7, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}  # fmt: skip


def _seed(generator: random.Random, values: Values) -> Values:
    return {"attention_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0}


_GOOGLE: Values = {"heads": (128, 256), "square": False, "tied": 1.0, "vocabularies": (256_000, 262_144)}
_FREE: Values = {"square": False}
DRAWN: dict[str, DrawnFamily] = {
    "llama": DrawnFamily(heads=(64, 80, 96, 128), more=_biased),
    "qwen2": DrawnFamily(mlp=(3.5, 5.5), vocabularies=(151_646, 151_936, 152_064)),
    "qwen3": DrawnFamily(**_FREE, heads=(64, 128), mlp=(2.8, 3.8), vocabularies=(151_936,)),
    "gemma2": DrawnFamily(**_GOOGLE, shares=(1, 2, 4), mlp=(3.0, 6.0), more=_capped),
    "gemma3_text": DrawnFamily(**_GOOGLE, shares=(0, 2, 4), mlp=(4.0, 6.0), more=_pattern),
    "mistral": DrawnFamily(heads=(96, 128), vocabularies=(32_000, 32_768, 131_072), tied=0.1, more=_windows(None, 1000, 4096)),
    "phi3": DrawnFamily(heads=(64, 96, 128), vocabularies=(32_064, 100_352, 200_064), more=_windows(None, 2047)),
    "olmo2": DrawnFamily(heads=(64, 128), shares=(1, 2, 5), vocabularies=(100_278, 100_352), tied=0.1),
    "granite": DrawnFamily(vocabularies=(49_155, 49_159), tied=0.9, more=_granite),
    "smollm3": DrawnFamily(heads=(64, 128), mlp=(3.0, 5.5), tied=0.9, more=lambda g, v: {"no_rope_layer_interval": 4}),
    "glm4": DrawnFamily(**_FREE, heads=(128,), shares=(8, 16), mlp=(3.0, 3.5), vocabularies=(151_552,), tied=0.1,
                        more=_half_turned),
    "olmo3": DrawnFamily(heads=(128,), shares=(1, 5), vocabularies=(100_278,), tied=0.1, more=_pattern),
    "gemma": DrawnFamily(heads=(256,), square=False, shares=(0, 1), mlp=(5.0, 8.0), vocabularies=(256_000,), tied=1.0),
    "ministral": DrawnFamily(**_FREE, heads=(128,), vocabularies=(131_072,), tied=0.2, more=_pattern),
    "ministral3": DrawnFamily(**_FREE, heads=(128,), vocabularies=(131_072,)),
    "exaone4": DrawnFamily(**_FREE, heads=(64, 128), vocabularies=(102_400,), more=_pattern),
    "hunyuan_v1_dense": DrawnFamily(**_FREE, heads=(128,), vocabularies=(120_832,), tied=0.8),
    "ernie4_5": DrawnFamily(**_FREE, heads=(128,), vocabularies=(103_424,), tied=0.8),
    "helium": DrawnFamily(heads=(128,), vocabularies=(48_000, 64_000), tied=0.3),
    "glm": DrawnFamily(**_FREE, heads=(128,), shares=(4, 8, 16), vocabularies=(59_264, 151_552), tied=0.2, more=_half_turned),
    "seed_oss": DrawnFamily(**_FREE, heads=(128,), shares=(5, 8), vocabularies=(155_136,), tied=0.1, more=_seed),
    "cwm": DrawnFamily(heads=(128,), shares=(4, 6), tied=0.1, more=_pattern),
    "vaultgemma": DrawnFamily(heads=(256,), square=False, shares=(1, 2), mlp=(4.0, 6.0), vocabularies=(256_000,), tied=1.0,
                              more=_capped),
    "gemma4_text": DrawnFamily(heads=(256,), square=False, shares=(2, 4), mlp=(3.5, 4.5), vocabularies=(262_144,), tied=1.0,
                               more=_gemma4),
}  # fmt: skip
"""Families whose layers run fused, without mixtures of experts and mixers of a library."""
UNFUSED: dict[str, DrawnFamily] = {
    "olmo": DrawnFamily(heads=(64, 128), shares=(1,), vocabularies=(50_304,)),
    "starcoder2": DrawnFamily(heads=(128,), shares=(8, 12), mlp=(4.0, 4.0), vocabularies=(49_152,),
                              more=lambda g, v: {"sliding_window": None}),
    "cohere": DrawnFamily(heads=(128,), shares=(1, 4), vocabularies=(256_000,), tied=1.0,
                          more=lambda g, v: {"logit_scale": 0.125}),
}  # fmt: skip
UNFUSED_EVERY = 12
COMMON = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "olmo2", "granite", "smollm3", "glm4")


def draw_shape(seed: int, number: int) -> Values:
    """Return the values of a config.json, those that decide memory and speed. `number` counts from 0."""
    generator = random.Random(f"shape {seed} {number}")
    if number % UNFUSED_EVERY == UNFUSED_EVERY - 1:
        kind = generator.choice(sorted(UNFUSED))
        return _shape(generator, kind, UNFUSED[kind], SIZES[number % len(SIZES)])
    # every second shape is of a common family, so that each of them occurs early
    names = COMMON if number % 2 == 0 else [name for name in DRAWN if name not in COMMON]
    turn, place = divmod(number // 2, len(names))
    kind = random.Random(f"families {seed} {number % 2} {turn}").sample(list(names), len(names))[place]
    return _shape(generator, kind, DRAWN[kind], SIZES[number % len(SIZES)])


def _shape(generator: random.Random, kind: str, family: DrawnFamily, sizes: tuple[float, float]) -> Values:
    wanted = 1e9 * sizes[0] * (sizes[1] / sizes[0]) ** generator.random()
    head_dim, ratio = generator.choice(family.heads), generator.uniform(*family.mlp)
    wide = 1.0 if family.square else generator.uniform(0.6, 1.6)
    share, tied = generator.choice(family.shares), generator.random() < family.tied
    vocabulary = generator.choice((*family.vocabularies, generator.randrange(30_000, 262_144)))
    usual = 24.0 * (wanted / 1e9) ** 0.15
    layers = min(MOST_LAYERS, max(FEWEST_LAYERS, round(usual * generator.uniform(0.5, 1.6))))

    def size(one: Values) -> float:
        width, q, kv = one["hidden_size"], one["num_attention_heads"] * head_dim, one["num_key_value_heads"] * head_dim
        in_layer = width * (2 * q + 2 * kv + 3 * one["intermediate_size"])
        return layers * in_layer + (1 if tied else 2) * vocabulary * width

    step = math.lcm(WIDTH_STEP, max(1, share) * head_dim) if family.square else WIDTH_STEP
    widths = range(step * -(-NARROWEST // step), max(WIDEST, step) + 1, step)
    found = [_sizes(width, head_dim, ratio, wide, share) for width in widths]
    possible = [one for one in found if one["hidden_size"] % one["num_attention_heads"] == 0]  # some configs ask for it
    nearest = min(possible, key=lambda one: abs(size(one) - wanted))
    values = {"model_type": kind, "num_hidden_layers": layers, "vocab_size": vocabulary, "tie_word_embeddings": tied, **nearest}
    values |= family.more(generator, {**values, "head_dim": head_dim})
    return values if family.square else {**values, "head_dim": head_dim}


def _sizes(width: int, head_dim: int, ratio: float, wide: float, share: int) -> Values:
    groups = 1 if share == 0 else max(1, round(width * wide / head_dim / share))
    heads = groups * share if share else max(1, round(width * wide / head_dim))
    mlp = WIDTH_STEP * max(1, round(width * ratio / WIDTH_STEP))
    return {"hidden_size": width, "intermediate_size": mlp, "num_attention_heads": heads, "num_key_value_heads": groups}
