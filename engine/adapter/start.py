"""Start a trial from a trained adapter, `lora.start_from`: a folder in PEFT's format.

The trial's first step sees the adapter's own product. Another scaling is folded into B, and a
smaller rank is filled up: the new rows of A are the seed's, as in a new adapter, and the new columns
of B are zero. Zeros in both would stay zeros, because each one's gradient is a multiple of the other.

Shape letters: D input features, O output features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from engine.adapter.expert_lora import LoraExperts, used_rank
from engine.adapter.lora import AnyLora, LoraLinear, attach, detach
from engine.adapter.made_start import start_made
from engine.adapter.peft_files import CONFIG
from engine.adapter.portable import Adapter, read_adapter
from engine.config.targets import is_expert
from engine.config.trial import LoraConfig, TrainConfig
from engine.errors import InputError
from engine.sources.identity import refuse_other_start
from engine.system.user_path import user_path

FIELD = "lora.start_from"


def read_start(config: LoraConfig) -> Adapter | None:
    """Return the adapter that the trial starts from, None for a new one.

    Raises InputError if it cannot be read, holds more than LoRA on linear layers, or is not the one of
    `lora.start_digest`.
    """
    if config.start_from is None:
        return None
    refuse_other_start(config)
    try:
        adapter = read_adapter(user_path(config.start_from))
        if adapter.magnitudes:
            raise InputError(CONFIG, "use_dora", "cannot be exported: a start has A and B alone")
        return adapter
    except InputError as error:
        why = error.allowed.removeprefix("cannot be exported: ").partition("; or: ")[0]
        allowed = f"must be a plain LoRA adapter in PEFT's format ({error.field}: {why})"
        raise InputError(FIELD, config.start_from, allowed) from None


def check_start(
    adapter: Adapter, config: LoraConfig, ranks: Mapping[str, int], features: Mapping[str, tuple[int, int]]
) -> None:
    """Raise InputError if the adapter is not one of these layers, or has a larger rank.

    ranks: layer -> rank, of all that the trial adapts. features: layer -> (out, in) of all linear layers.
    """
    for name, (a_RD, b_OR) in adapter.layers.items():
        number = a_RD.shape[0] // adapter.rank if is_expert(name) else 1
        if features.get(name) != (number * b_OR.shape[0], number * a_RD.shape[1]):
            has = f"this model's is {features[name]}" if name in features else "this model has no such layer"
            allowed = f"adapts {name} of (out, in) features {(b_OR.shape[0], a_RD.shape[1])}, and {has}: take its own base model"
            raise InputError(FIELD, config.start_from, allowed)
    odd = sorted(adapter.layers.keys() ^ ranks.keys())
    if odd:
        whose = "it does not adapt" if odd[0] in ranks else "it adapts too"
        ends = sorted({name.rpartition(".")[2] for name in adapter.layers})
        allowed = f"must adapt what lora.target_modules picks, and {odd[0]} is one that {whose}; it adapts [{','.join(ends)}]"
        raise InputError(FIELD, config.start_from, allowed)
    for name, pair in adapter.layers.items():
        rank = used_rank(*pair, pair[0].shape[0] // adapter.rank if is_expert(name) else 1)
        if rank > ranks[name]:
            own = f"lora.rank = {config.rank}" if ranks[name] == config.rank else f"{ranks[name]} of lora.rank_pattern"
            raise InputError(FIELD, config.start_from, f"has rank {rank} in {name}, above {own}: take that rank or more")


def attach_started(model: nn.Module, linear_names: list[str], config: TrainConfig) -> dict[str, AnyLora]:
    """Attach an adapter as `engine.adapter.lora.attach` does, and put its start into it: `lora.start` or `lora.start_from`.

    Raises InputError as `start_from` and `start_made` do; the model is then as it was.
    """
    layers = attach(model, linear_names, config.lora, config.train.seed)
    try:
        start_made(layers, config)
        start_from(layers, config.lora)
        _set_lengths(layers)
    except BaseException:
        detach(model, layers)
        raise
    return layers


@torch.no_grad()
def _set_lengths(layers: Mapping[str, AnyLora]) -> None:
    """Have DoRA's magnitudes be the lengths that the rows have with the start, as in PEFT."""
    for layer in layers.values():
        if isinstance(layer, LoraLinear) and layer.magnitude is not None:
            layer.magnitude.copy_(layer.weight_norm())


@torch.no_grad()
def start_from(layers: Mapping[str, AnyLora], config: LoraConfig) -> None:
    """Put the adapter of `lora.start_from` into newly attached layers; without one they stay as they are.

    Raises InputError as `read_start` and `check_start` do.
    """
    adapter = read_start(config)
    if adapter is None:
        return
    ranks = {name: layer.rank for name, layer in layers.items()}
    check_start(adapter, config, ranks, {name: layer.features for name, layer in layers.items()})
    for name, (a_RD, b_OR) in adapter.layers.items():
        layer = layers[name]
        factor = adapter.scaling / layer.scaling
        if isinstance(layer, LoraExperts):
            layer.start_from(a_RD, b_OR * factor)
            continue
        used = _used(a_RD, b_OR)
        rows = used.nonzero()[:, 0].to(layer.lora_a.device)
        layer.lora_a[rows] = a_RD[used].to(layer.lora_a)
        layer.lora_b[:, rows] = (b_OR[:, used] * factor).to(layer.lora_b)


def _used(a_RD: torch.Tensor, b_OR: torch.Tensor) -> torch.Tensor:
    """Return which of the R are not zero in both: an adapter with a rank pattern comes filled up with zeros."""
    return a_RD.any(dim=1) | b_OR.any(dim=0)
