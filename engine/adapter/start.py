"""Start a trial from a trained adapter, `lora.start_from`: a folder in PEFT's format.

The trial's first step sees the adapter's own product. Another scaling is folded into B, and a
smaller rank is filled up: the new rows of A are the seed's, as in a new adapter, and the new columns
of B are zero. Zeros in both would stay zeros, because each one's gradient is a multiple of the other.

Shape letters: D input features, O output features, R rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from engine.adapter.lora import LoraLinear
from engine.adapter.portable import Adapter, read_adapter
from engine.config.trial import LoraConfig
from engine.errors import InputError
from engine.system.user_path import user_path

FIELD = "lora.start_from"


def read_start(config: LoraConfig) -> Adapter | None:
    """Return the adapter that the trial starts from, None for a new one.

    Raises InputError if it cannot be read, or holds more than LoRA on linear layers.
    """
    if config.start_from is None:
        return None
    try:
        return read_adapter(user_path(config.start_from))
    except InputError as error:
        why = error.allowed.removeprefix("cannot be exported: ")
        allowed = f"must be a plain LoRA adapter in PEFT's format ({error.field}: {why})"
        raise InputError(FIELD, config.start_from, allowed) from None


def check_start(
    adapter: Adapter, config: LoraConfig, targets: Collection[str], features: Mapping[str, tuple[int, int]]
) -> None:
    """Raise InputError if the adapter is not one of these layers, or has a larger rank.

    targets: layers that the trial adapts. features: layer -> (out, in) of all linear layers.
    """
    for name, (a_RD, b_OR) in adapter.layers.items():
        if features.get(name) != (b_OR.shape[0], a_RD.shape[1]):
            has = f"this model's is {features[name]}" if name in features else "this model has no such layer"
            allowed = f"adapts {name} of (out, in) features {(b_OR.shape[0], a_RD.shape[1])}, and {has}: take its own base model"
            raise InputError(FIELD, config.start_from, allowed)
    odd = sorted(adapter.layers.keys() ^ set(targets))
    if odd:
        whose = "it does not adapt" if odd[0] in targets else "it adapts too"
        ends = sorted({name.rpartition(".")[2] for name in adapter.layers})
        allowed = f"must adapt what lora.target_modules picks, and {odd[0]} is one that {whose}; it adapts [{','.join(ends)}]"
        raise InputError(FIELD, config.start_from, allowed)
    if adapter.rank > config.rank:
        allowed = f"has rank {adapter.rank}, above lora.rank = {config.rank}: take that rank or more"
        raise InputError(FIELD, config.start_from, allowed)


@torch.no_grad()
def start_from(layers: Mapping[str, LoraLinear], config: LoraConfig) -> None:
    """Put the adapter of `lora.start_from` into newly attached layers; without one they stay as they are.

    Raises InputError as `read_start` and `check_start` do.
    """
    adapter = read_start(config)
    if adapter is None:
        return
    check_start(adapter, config, layers.keys(), {name: (layer.out_features, layer.in_features) for name, layer in layers.items()})
    factor = adapter.scaling / config.scaling
    for name, (a_RD, b_OR) in adapter.layers.items():
        layer = layers[name]
        used = a_RD.any(dim=1) | b_OR.any(dim=0)  # an adapter with a rank pattern comes filled up with zeros
        rows = used.nonzero()[:, 0].to(layer.lora_a.device)
        layer.lora_a[rows] = a_RD[used].to(layer.lora_a)
        layer.lora_b[:, rows] = (b_OR[:, used] * factor).to(layer.lora_b)
