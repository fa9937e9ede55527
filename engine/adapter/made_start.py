"""Start A and B from the base model's weights: `lora.start` = pissa or loftq.

Neither changes the frozen base, which all trials of a node share.

- LoftQ (Li et al., arXiv:2310.08659), with one iteration: scaling * B A is the best approximation
  of W - NF4(W), so that the first step sees less of what NF4 lost. More iterations quantise the
  base anew for each rank, and are not offered.
- PiSSA (Meng et al., arXiv:2404.02948): A and B are the principal components of the weight as the
  trials hold it. PiSSA takes their product off the base. Here a second, frozen pair with -B does
  it, so that the start adds nothing. Trained values, gradients and losses are those of PiSSA on that
  base; QPiSSA's own NF4 weights of the residual are not made. The adapter holds both pairs, as PEFT's
  conversion of a PiSSA adapter to the original base does.

A start is made once for a base, its layers and their ranks, and kept in the cache.

Shape letters: D input features, O output features, R rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.adapter.lora import AnyLora, LoraLinear
from engine.adapter.original_weights import OriginalWeights
from engine.adapter.portable import Adapter
from engine.config.targets import layer_ranks
from engine.config.trial import TrainConfig
from engine.errors import InputError, StorageError
from engine.quant.bnb import nf4_error
from engine.quant.low_rank import principal_factors
from engine.sources.identity import identify_model
from engine.system.command_line import tell
from engine.system.files import writing
from engine.system.shared_cache import CACHE_VARIABLE, build_once, forget_old

FIELD = "lora.start"
VERSION, KIND, FILE, MOST = 1, "start", "factors.safetensors", 16
Factors = dict[str, tuple[Tensor, Tensor]]  # layer -> A [R, D], B [O, R], of scaling 1


def check_made(config: TrainConfig, ranks: Mapping[str, int], features: Mapping[str, tuple[int, int]]) -> None:
    """Raise InputError if the start cannot be made. ranks: layer -> rank held. features: layer -> (out, in)."""
    lora = config.lora
    if lora.start == "default":
        return
    name, most = min(((name, min(features[name])) for name in ranks), key=lambda found: found[1] / ranks[found[0]])
    if ranks[name] // lora.halves > most:
        allowed = f"needs a rank of at most {most}, the smaller side of {name}; or: default"
        raise InputError(FIELD, lora.start, allowed)
    if lora.start == "loftq":
        OriginalWeights(config.model).check(ranks)


@torch.no_grad()
def start_made(layers: Mapping[str, AnyLora], config: TrainConfig) -> None:
    """Put the start of `lora.start` into newly attached linear layers; `default` leaves them as they are.

    Raises InputError if the base model's files do not have what it is made of.
    """
    lora = config.lora
    if lora.start == "default":
        return
    linears = {name: layer for name, layer in layers.items() if isinstance(layer, LoraLinear)}
    ranks = {name: layer.rank // lora.halves for name, layer in linears.items()}
    for name, (a_RD, b_OR) in _cached(linears, ranks, config).items():
        layer, rank, root = linears[name], ranks[name], linears[name].scaling ** 0.5
        for half in range(lora.halves):
            rows = slice(half * rank, (half + 1) * rank)
            layer.lora_a[rows] = (a_RD / root).to(layer.lora_a)
            layer.lora_b[:, rows] = (b_OR / root if half == 0 else -b_OR / root).to(layer.lora_b)


@torch.no_grad()
def on_original_weights(adapter: Adapter, config: TrainConfig | None) -> Adapter:
    """Return the adapter for the base's original weights: of LoftQ without its start, at twice the rank.

    NF4(W) + start is about W, so an adapter that is merged into W, or runs on other roundings of
    it, adds only what it has learnt. Other adapters are returned as they are.
    """
    if config is None or config.lora.start != "loftq":
        return adapter
    original, found, root = OriginalWeights(config.model), {}, adapter.scaling**0.5
    ranks = layer_ranks(config.lora, adapter.layers)
    for done, (name, (a_RD, b_OR)) in enumerate(adapter.layers.items()):
        tell("finding the start of LoftQ", done, len(ranks))
        lost_OD = nf4_error(original.read(name), config.model.double_quantization)
        start_a, start_b = principal_factors(lost_OD, ranks[name])
        rest = adapter.rank - ranks[name]  # a smaller rank of a pattern comes filled up with zeros
        a, b = F.pad(start_a / root, (0, 0, 0, rest)), F.pad(-start_b / root, (0, rest))
        found[name] = torch.cat([a_RD, a]), torch.cat([b_OR, b], dim=1)
    rank, alpha = 2 * adapter.rank, 2 * adapter.lora_alpha
    values = adapter.peft_config | {"r": rank, "lora_alpha": alpha}
    return replace(adapter, layers=found, rank=rank, lora_alpha=alpha, peft_config=values)


def _cached(layers: Mapping[str, LoraLinear], ranks: Mapping[str, int], config: TrainConfig) -> Factors:
    """Return the factors, from this node's cache if a trial has made them."""
    made: list[Factors] = []

    def build(folder: Path) -> None:
        made.append(dict(_made(layers, ranks, config)))
        state = {f"{name}.{'AB'[i]}": pair[i].contiguous() for name, pair in made[0].items() for i in (0, 1)}
        with writing(folder):
            save_file(state, folder / FILE)

    device = next(iter(layers.values())).lora_a.device
    identity = identify_model(config.model)
    if not identity:  # a hub model without a known commit: nothing tells when it changes
        return dict(_made(layers, ranks, config))
    try:
        folder = build_once(f"{KIND}-{_key(identity, ranks, config, device)}", build)
    except (InputError, StorageError) as error:
        if isinstance(error, InputError) and error.field != CACHE_VARIABLE:
            raise
        print(f"WARNING: cannot keep the start of {config.lora.start}, so each trial makes it: {error}", file=sys.stderr)
        return made[0] if made else dict(_made(layers, ranks, config))
    with contextlib.suppress(OSError):  # another user's cache
        os.utime(folder)
    if not made:
        state = load_file(folder / FILE, device=str(device))
        made.append({name: (state[f"{name}.A"], state[f"{name}.B"]) for name in ranks})
    forget_old(KIND, MOST)
    return made[0]


def _key(identity: Mapping[str, str], ranks: Mapping[str, int], config: TrainConfig, device: torch.device) -> str:
    """Return 24 hex digits of all that the factors depend on."""
    model = config.model.model_dump(include={"quantization", "double_quantization", "dtype"})
    libraries = {name: version(name) for name in ("bitsandbytes", "torch")}
    parts = [VERSION, config.lora.start, model, libraries, device.type, dict(identity), dict(ranks)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _made(
    layers: Mapping[str, LoraLinear], ranks: Mapping[str, int], config: TrainConfig
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    original = OriginalWeights(config.model) if config.lora.start == "loftq" else None
    for name, layer in layers.items():
        weight_OD = layer.base.dequantized(torch.float32)
        if original is not None:
            weight_OD = original.read(name).to(weight_OD) - weight_OD
        yield name, principal_factors(weight_OD, ranks[name])
