"""The adapter: LoRA (Hu et al., arXiv:2106.09685) on named frozen linear layers, put on and taken off a resident base.

Parameters are fp32 and cast to the activations' dtype at use; gradients and optimizer states are therefore fp32 too.
Shape letters: D input features, O output features, R rank; ... any leading shape.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import ALL_LINEAR, LoraConfig
from engine.errors import InputError
from engine.quant import FrozenLinear


class LoraLinear(nn.Module):
    """y = base(x) + scaling * B A dropout(x). A is Kaiming-uniform, B zero: the untrained adapter changes nothing."""

    def __init__(self, base: FrozenLinear, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout = base, config.scaling, config.lora_dropout
        device = base.weight.device
        bound = 1.0 / math.sqrt(base.in_features)  # kaiming_uniform_(a=sqrt(5)), as PEFT does
        a_RD = torch.empty(config.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a_RD.to(device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        self.casts: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        u = F.dropout(x, self.dropout, self.training) if self.dropout else x
        low_rank = F.linear(F.linear(u, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))
        return self.base(x) + self.scaling * low_rank

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and scaling * B in `dtype`, without autograd: views of the copy that `FlatAdapter` keeps, where there is one."""
        if self.casts is not None and self.casts[0].dtype == dtype:
            return self.casts
        return self.lora_a.detach().to(dtype), (self.lora_b.detach() * self.scaling).to(dtype)


class FlatAdapter:
    """All A and B of an adapter as one parameter, with one gradient and one 16-bit copy: every A, then every B.

    An adapter is hundreds of small tensors: on an H100, 8-bit AdamW over 360 of them was 58 ms of launches for 1.4 ms of work.
    Here the optimizer, the gradient norm, zeroing and casting are one or two launches each; the layers hold views. Layers that
    read the same input follow each other in a model, so their A lie in memory as one matrix, which one matmul reads.
    """

    def __init__(self, layers: dict[str, LoraLinear], dtype: torch.dtype) -> None:
        """dtype: of the activations."""
        parts = [layer.lora_a for layer in layers.values()] + [layer.lora_b for layer in layers.values()]
        self.parameter = nn.Parameter(torch.cat([p.detach().flatten() for p in parts]))
        self.parameter.grad = torch.zeros_like(self.parameter)
        self._cast = torch.empty_like(self.parameter, dtype=dtype, requires_grad=False)
        self._num_a = sum(layer.lora_a.numel() for layer in layers.values())
        self._scaling = next(iter(layers.values())).scaling  # one config, one scaling
        views, start = [], 0
        for p in parts:
            part = slice(start, start + p.numel())
            p.data, p.grad = self.parameter.data[part].view_as(p), self.parameter.grad[part].view_as(p)
            views.append(self._cast[part].view_as(p))
            start = part.stop
        for i, layer in enumerate(layers.values()):
            layer.casts = (views[i], views[len(layers) + i])
        self.refresh()

    def refresh(self) -> None:
        """Bring the copy of A and scaling * B up to date, after the parameter has changed."""
        values = self.parameter.detach()
        self._cast[: self._num_a].copy_(values[: self._num_a])
        torch.mul(values[self._num_a :], self._scaling, out=self._cast[self._num_a :])

    def zero_grad(self) -> None:
        self.parameter.grad.zero_()


def resolve_targets(linear_names: list[str], target_modules: str | tuple[str, ...]) -> list[str]:
    """Full names of the layers that `target_modules` picks.

    `all-linear`: every one. A list: each entry matches a whole name or its dotted end (`q_proj`, `mlp.up_proj`). A string with
    other characters than those of a name: a regular expression over the whole name, as in PEFT.
    """
    if target_modules == ALL_LINEAR:
        return list(linear_names)
    if isinstance(target_modules, str) and not re.fullmatch(r"[\w.\-]+", target_modules):
        return _regex_targets(linear_names, target_modules)
    entries = (target_modules,) if isinstance(target_modules, str) else target_modules
    chosen: set[str] = set()
    for entry in entries:
        hits = [name for name in linear_names if name == entry or name.endswith(f".{entry}")]
        if not hits:
            raise InputError("lora.target_modules", entry, _near(entry, linear_names))
        chosen.update(hits)
    return [name for name in linear_names if name in chosen]


def attach(model: nn.Module, linear_names: list[str], config: LoraConfig, seed: int) -> dict[str, LoraLinear]:
    """Put a fresh adapter on `model`; returns layer name -> LoraLinear. Each layer draws from its own seeded stream on the
    CPU, so that it starts the same on every device and whatever else is targeted."""
    layers: dict[str, LoraLinear] = {}
    for name in resolve_targets(linear_names, config.target_modules):
        generator = torch.Generator().manual_seed(_stream_seed(seed, name))
        layers[name] = LoraLinear(_frozen(model, name), config, generator)
    for name, layer in layers.items():
        _replace(model, name, layer)
    return layers


def detach(model: nn.Module, layers: dict[str, LoraLinear]) -> None:
    """Take the adapter off again: the base is as it was before `attach`."""
    for name, layer in layers.items():
        _replace(model, name, layer.base)


def trainable_parameters(layers: dict[str, LoraLinear]) -> list[nn.Parameter]:
    """A and B of every layer, in the layers' order."""
    return [p for layer in layers.values() for p in (layer.lora_a, layer.lora_b)]


def adapter_state(layers: dict[str, LoraLinear]) -> dict[str, Tensor]:
    """Name -> fp32 tensor; names are `<layer>.lora_A.weight` [R, D] and `<layer>.lora_B.weight` [O, R]."""
    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        state[f"{name}.lora_A.weight"] = layer.lora_a.detach()
        state[f"{name}.lora_B.weight"] = layer.lora_b.detach()
    return state


def load_adapter_state(layers: dict[str, LoraLinear], state: dict[str, Tensor], where: str) -> None:
    """Copy `state` into `layers`; names and shapes must agree exactly."""
    own = adapter_state(layers)
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        raise InputError(where, odd[0], f"must hold exactly this config's {len(own)} tensors; {len(odd)} differ")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise InputError(where, f"{name} {tuple(state[name].shape)}", f"must have shape {tuple(tensor.shape)}")
        tensor.copy_(state[name])


def _regex_targets(linear_names: list[str], pattern: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError("lora.target_modules", pattern, f"must be a valid regular expression ({error})") from None
    hits = [name for name in linear_names if compiled.fullmatch(name)]
    if not hits:
        raise InputError("lora.target_modules", pattern, f"must match whole layer names such as {linear_names[0]!r}")
    return hits


def _near(entry: str, linear_names: list[str]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in linear_names})
    near = difflib.get_close_matches(entry.rpartition(".")[2], ends, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"matches no linear layer; {hint}allowed: all-linear, {', '.join(ends)}"


def _stream_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def _frozen(model: nn.Module, name: str) -> FrozenLinear:
    layer = model.get_submodule(name)
    if not isinstance(layer, FrozenLinear):
        raise RuntimeError(f"{name} is a {type(layer).__name__}; an adapter is still attached")
    return layer


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    layer.train(model.training)
    model.set_submodule(name, layer)
