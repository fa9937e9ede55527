"""Find a model's verdict from its config: once for each process, and once for each machine.

The cache keeps a verdict by everything that it depends on: the config, how the model is held, this
machine's kind of CPU, the libraries, and the code of the rooms that compute a model. A refusal is
not kept. Nor is anything of a model with code of its own.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.adapter.peft_fit import misplaced_layers
from engine.config.trial import ModelConfig
from engine.errors import InputError
from engine.model.guard import Make, choose_route, plain_linears
from engine.model.pretrained import forget_quantization, model_factory, read_config, without_weights
from engine.model.route import ModelVerdict, Route, pattern_of
from engine.quant.frozen_experts import expert_shapes, packable_experts
from engine.system.shared_cache import remembered

ENGINE = Path(__file__).resolve().parents[1]
ROOMS = ("adapter", "data", "kernels", "layers", "model", "quant", "shape", "vocabulary")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "numpy")
# Kernels of other packages that transformers takes if they are there.
KERNELS = ("flash-linear-attention", "causal-conv1d", "mamba-ssm", "kernels")


def verdict_of(config: ModelConfig) -> ModelVerdict:
    """Return how to compute the model. It reads config.json only. Raises InputError."""
    found = read_config(config)
    values = json.loads(found.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)  # where the folder lies changes nothing
    return _verdict(config, json.dumps(values, sort_keys=True), type(found).__name__)


@functools.lru_cache(maxsize=32)
def _verdict(config: ModelConfig, content: str, kind: str) -> ModelVerdict:
    if config.trust_remote_code:
        return _find(config)
    given = [config.quantization, config.layers, kind, content, platform.machine()]
    digest = hashlib.sha256(json.dumps([given, computed_by()], sort_keys=True).encode("utf-8", "surrogatepass"))
    return _read(remembered(f"verdict-{digest.hexdigest()[:24]}", lambda: asdict(_find(config))))


def _find(config: ModelConfig) -> ModelVerdict:
    """Return the verdict of a tiny model, and of PEFT on a model without weights."""
    found, make = model_parts(config)
    verdict = choose_route(found, config, make)
    return with_export(verdict, lambda: without_weights(copy.deepcopy(found), config))


def with_rows_of(config: ModelConfig, verdict: ModelVerdict, device: torch.device) -> ModelVerdict:
    """Return the verdict with rows shared if a tiny model on this device proves that samples stay apart there.

    Kernels that keep them apart in recurrences and convolutions exist for CUDA only.
    """
    route = verdict.route
    if route.shares_rows or not route.packed_attention or not any(map(_version, KERNELS)):
        return verdict
    found, make = model_parts(config)
    try:
        there = choose_route(found, config, make, device).route
    except InputError:
        return verdict
    if not there.shares_rows or replace(there, shares_rows=False, boundaries=False) != route:
        return verdict
    return replace(verdict, route=there)


def model_parts(config: ModelConfig) -> tuple[Any, Make]:
    """Return the config of the 16-bit model, and what makes a model from such a config."""
    found = read_config(config)
    forget_quantization(found)
    factory = model_factory(found)

    def make(small: Any, attention_name: str) -> nn.Module:
        options = {"trust_remote_code": config.trust_remote_code, "attn_implementation": attention_name}
        return factory.from_config(small, **options)

    return found, make


def with_export(verdict: ModelVerdict, make: Callable[[], nn.Module]) -> ModelVerdict:
    """Return the verdict with the layers that PEFT would not load again. make: a new model on the meta device."""
    made = [make()]
    layers = {n: (m.out_features, m.in_features) for n, m in plain_linears(made[0]).items() if verdict.adapts(n)}
    layers |= expert_features(made[0], verdict)
    lost = misplaced_layers(lambda: made.pop() if made else make(), layers, pattern_of)
    return replace(verdict, not_exported=tuple(sorted(lost)))


def expert_features(model: nn.Module, verdict: ModelVerdict) -> dict[str, tuple[int, int]]:
    """Return (out, in) features of the weights of all experts that an adapter may target, summed over experts.

    Then rank * (out + in) counts an adapter's values, as for a linear layer.
    """
    if not verdict.experts:
        return {}
    found = {f"{n}.{weight}": shape for n, m in packable_experts(model).items() for weight, shape in expert_shapes(m).items()}
    return {name: (num * height, num * width) for name, (num, height, width) in found.items() if verdict.adapts(name)}


def _read(values: dict[str, Any]) -> ModelVerdict:
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return ModelVerdict(**values | lists | {"route": Route(**values["route"])})


def computed_by() -> dict[str, str | None]:
    """Return the libraries and the code that a verdict holds for."""
    return {name: _version(name) for name in (*LIBRARIES, *KERNELS)} | {"engine": _code_digest()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@functools.cache
def _code_digest() -> str:
    """Return a digest of the code of the rooms that compute a model."""
    state = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (ENGINE / room).rglob("*.py")):
        state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()
