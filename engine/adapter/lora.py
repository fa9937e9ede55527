"""Attach LoRA (Hu et al., arXiv:2106.09685) to named frozen linear layers, and detach it.

Parameters are fp32 and are cast to the activations' dtype at use. Gradients and optimizer states
are therefore fp32 too.

Shape letters: D input features, O output features, R rank; ... any leading shape.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.adapter.expert_lora import LoraExperts, check_experts, expert_weight, stored_path
from engine.adapter.token_rows import SUFFIX, TokenRows, begin_rows
from engine.config.targets import layer_ranks, layer_scalings, resolve_targets
from engine.config.trial import LoraConfig
from engine.errors import InputError
from engine.kernels import ops
from engine.quant.frozen_linear import FrozenLinear

TILES = 4096  # more tiles of a row than there can be: streams of one layer's masks
MAGNITUDE = "lora_magnitude_vector"  # PEFT's name


class LoraLinear(nn.Module):
    """Compute y = base(x) + scaling * B A dropout(x), with x [..., D] and y [..., O].

    A starts Kaiming-uniform and B zero, so an untrained adapter does not change the model.

    With DoRA (Liu et al., arXiv:2402.09353) the weight W + scaling * B A has its rows brought to the
    lengths `magnitude` [O], which are trained and start as they are: y = gain * (W x + scaling * B A x)
    with gain = magnitude / norm. The norm of W + scaling * B A is a constant for the gradient, as in
    the paper's section 4.3. Under dropout, as in PEFT, what the gain adds is of dropout(x).
    """

    def __init__(
        self, base: FrozenLinear, config: LoraConfig, generator: torch.Generator, number: int = 0, rank: int | None = None
    ) -> None:
        """Draw A from `generator`.

        number: the layer's place in its adapter, for its own dropout masks. rank: None for the
        config's. The scaling is the config's at every rank; `attach` sets that of `lora.alpha_pattern`.
        """
        rank = rank or config.rank
        super().__init__()
        self.num_frozen = rank - rank // config.halves  # the last rows of A, and columns of B
        self.base, self.scaling, self.dropout, self.number = base, config.scaling, config.lora_dropout, number
        device = base.weight.device
        bound = 1.0 / math.sqrt(base.in_features)  # kaiming_uniform_(a=sqrt(5)), as PEFT does
        a_RD = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a_RD.to(device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        # views of FlatAdapter's memory: A and gain * scaling * B, the scaling, the dropout's seed and rate, DoRA's norm and gain
        self.casts: tuple[Tensor, Tensor] | None = None
        self.norm: Tensor | None = None
        self.gain: Tensor | None = None
        self._norm_of: tuple[tuple[int, int], Tensor] | None = None
        self.magnitude = nn.Parameter(self.weight_norm()) if config.use_dora else None
        self.scale: Tensor | None = None
        self.noise: Tensor | None = None
        self.masks_of_pass = False  # True: `drop` has the masks of that noise, not of torch's generator

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]

    @property
    def features(self) -> tuple[int, int]:
        """Return (out, in) features."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:
        """Return the frozen weight: some models read its device or dtype."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def gradient_of_b(self, weight_gradient_OD: Tensor) -> Tensor:
        """Return the gradient of B [O, R] from that of a whole weight."""
        return self.scaling * weight_gradient_OD @ self.lora_a.detach().T

    def forward(self, x: Tensor) -> Tensor:
        u = self.drop(x) if self.dropout else x
        low_rank = F.linear(F.linear(u, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))
        if self.magnitude is None:
            return self.base(x) + self.scaling * low_rank
        y = self.base(x)
        gain = (self.magnitude / self.pass_gain()[1]).to(x.dtype)
        scaled = y if u is x else self.base(u)
        scaled = scaled if self.bias is None else scaled - self.bias.to(x.dtype)
        return y + (gain - 1) * scaled + (self.scaling * gain) * low_rank

    def parameters_of(self) -> tuple[nn.Parameter, ...]:
        """Return A, B, and DoRA's magnitude if there is one."""
        return (self.lora_a, self.lora_b) if self.magnitude is None else (self.lora_a, self.lora_b, self.magnitude)

    @torch.no_grad()
    def weight_norm(self, out: Tensor | None = None) -> Tensor:
        """Return the lengths of the rows of W + scaling * B A, fp32 [O]; into `out`, if given."""
        a_RD = self.lora_a.detach() if self.casts is None else self.casts[0]
        return self.base.row_lengths(a_RD, self.lora_b.detach(), self.scaling, out)

    def drop(self, x: Tensor) -> Tensor:
        if self.masks_of_pass and self.training:
            return _Dropout.apply(x, self.noise, TILES * self.number)
        return F.dropout(x, self.dropout, self.training)

    def noise_of_pass(self) -> Tensor:
        """Return seed and rate of the pass, int64 [2] for `ops.dropout`.

        They are FlatAdapter's, which its owner draws anew before each pass. Without it the seed is
        from torch's CPU generator, so the host does not wait for a device.
        """
        if self.noise is not None:
            return self.noise
        seed, threshold = ops.noise_of(int(torch.randint(2**62, ())), self.dropout)
        noise = torch.full((2,), threshold, device=self.base.weight.device)
        noise[0].fill_(seed)
        return noise

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A [R, D] and scaling * B [O, R] in `dtype`, without autograd. DoRA's gain is in B.

        They are views of FlatAdapter's copy if that has this dtype, else new tensors.
        """
        if self.casts is not None and self.casts[0].dtype == dtype:
            return self.casts
        b_OR = self.lora_b.detach() * self.scaling
        if self.magnitude is not None:
            b_OR = b_OR * self.pass_gain()[0][:, None]
        return self.lora_a.detach().to(dtype), b_OR.to(dtype)

    def pass_gain(self) -> tuple[Tensor, Tensor]:
        """Return gain and norm, fp32 [O], of the present values, without autograd.

        FlatAdapter's if there is one; else they are kept until A or B change.
        """
        if self.gain is not None:
            return self.gain, self.norm
        versions = self.lora_a._version, self.lora_b._version
        if self._norm_of is None or self._norm_of[0] != versions:
            self._norm_of = versions, self.weight_norm()
        return self.magnitude.detach() / self._norm_of[1], self._norm_of[1]


class _Dropout(torch.autograd.Function):
    """Drop elements of x [..., D] as `ops.dropout` does; the backward pass makes the same mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, noise: Tensor, stream: int) -> Tensor:
        ctx.noise, ctx.stream = noise, stream
        return ops.dropout(x.reshape(-1, x.shape[-1]), noise, stream).view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        rows = dy.reshape(-1, dy.shape[-1])
        return ops.dropout(rows.contiguous(), ctx.noise, ctx.stream).view(dy.shape), None, None


AnyLora = LoraLinear | LoraExperts


def attach(model: nn.Module, linear_names: list[str], config: LoraConfig, seed: int) -> dict[str, AnyLora]:
    """Attach a new adapter and return layer name -> LoraLinear, or LoraExperts for a weight of experts.

    The trained tokens' modules come behind them.

    Each layer draws A from its own seeded stream on the CPU. It therefore starts the same on every
    device and with any other target layers.
    """
    layers: dict[str, AnyLora] = {}
    ranks = layer_ranks(config, resolve_targets(linear_names, config.target_modules))
    scalings = layer_scalings(config, ranks)
    check_experts(config, list(ranks))
    for number, (name, rank) in enumerate(ranks.items()):
        generator = torch.Generator().manual_seed(_stream_seed(seed, name))
        if (found := expert_weight(model, name)) is not None:
            layers[name] = LoraExperts(*found, config, generator, number, rank)
        else:
            layers[name] = LoraLinear(_frozen(model, name), config, generator, number, rank)
        layers[name].scaling = scalings[name]
    for name, layer in layers.items():
        _put(model, name, layer)
    layers |= begin_rows(model)
    return layers


def detach(model: nn.Module, layers: dict[str, AnyLora]) -> None:
    """Remove the adapter, which leaves the base model as it was before `attach`."""
    for name, layer in layers.items():
        if isinstance(layer, TokenRows):
            layer.end()
        elif isinstance(layer, LoraExperts):
            del layer.experts[0].adapters[layer.weight_name]
        else:
            _replace(model, name, layer.base)


def trainable_parameters(layers: dict[str, AnyLora]) -> list[nn.Parameter]:
    """Return what is trained of every layer, in the order of the layers, then the rows of trained tokens."""
    return [p for layer in layers.values() for p in layer.parameters_of()]


def adapter_state(layers: dict[str, AnyLora]) -> dict[str, Tensor]:
    """Return the fp32 tensors by name.

    The names are `<layer>.lora_A.weight` [R, D] and `<layer>.lora_B.weight` [O, R]; with DoRA also
    `<layer>.lora_magnitude_vector` [O]. Those of experts are as PEFT nests them. Rows of trained
    tokens have PEFT's names.
    """
    state: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if isinstance(layer, TokenRows):
            state[f"{name}.{SUFFIX}"] = layer.rows.detach()
            continue
        path = stored_path(name, set(layers)) if isinstance(layer, LoraExperts) else name
        state[f"{path}.lora_A.weight"] = layer.lora_a.detach()
        state[f"{path}.lora_B.weight"] = layer.lora_b.detach()
        if layer.magnitude is not None:
            state[f"{name}.{MAGNITUDE}"] = layer.magnitude.detach()
    return state


def host_arrays(layers: dict[str, AnyLora]) -> dict[str, np.ndarray]:
    """Return `adapter_state` on the host. A flat adapter comes in one copy: one each took 40 ms for 420 tensors."""
    state = adapter_state(layers)
    first = next(iter(state.values()))
    if len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) > 1:
        return {name: tensor.cpu().numpy() for name, tensor in state.items()}
    flat = torch.empty(0, dtype=first.dtype, device=first.device).set_(first.untyped_storage()).cpu().numpy()
    parts = ((name, t.shape, t.storage_offset()) for name, t in state.items())
    return {name: flat[start : start + shape.numel()].reshape(shape) for name, shape, start in parts}


def load_adapter_state(layers: dict[str, AnyLora], state: dict[str, Tensor], where: str) -> None:
    """Copy `state` into `layers`. Raises InputError, naming `where`, if names or shapes differ."""
    own = adapter_state(layers)
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        raise InputError(where, odd[0], f"must hold exactly this config's {len(own)} tensors; {len(odd)} names differ")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise InputError(where, f"{name} {tuple(state[name].shape)}", f"must have shape {tuple(tensor.shape)}")
        tensor.copy_(state[name])


def _stream_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def _frozen(model: nn.Module, name: str) -> FrozenLinear:
    layer = model.get_submodule(name)
    if not isinstance(layer, FrozenLinear):
        raise RuntimeError(f"{name} is a {type(layer).__name__}; an adapter is still attached")
    return layer


def _put(model: nn.Module, name: str, layer: AnyLora) -> None:
    if isinstance(layer, LoraExperts):
        layer.experts[0].adapters[layer.weight_name] = layer
    else:
        _replace(model, name, layer)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    layer.train(model.training)
    model.set_submodule(name, layer)
