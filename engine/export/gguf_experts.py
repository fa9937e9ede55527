"""Bring a mixture's experts, and adapters on them, into the layout of llama.cpp.

llama.cpp has gate, up and down of all experts of a layer in three tensors, `blk.N.ffn_gate_exps.weight`
and so on. A model folder holds each expert's matrices on their own, or gate and up of all experts in
one tensor: one after the other, or in gpt-oss row by row.

Shape letters: E experts, O output features, D input features, F expert hidden, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import gguf
import torch
from torch import Tensor

from engine.config.targets import is_expert
from engine.config.trial import ModelConfig
from engine.export.expert_parts import ExpertPart, expert_parts
from engine.model.pretrained import read_config, without_weights
from engine.quant.frozen_experts import DOWN

KINDS = {"gate": gguf.MODEL_TENSOR.FFN_GATE_EXP, "up": gguf.MODEL_TENSOR.FFN_UP_EXP, "down": gguf.MODEL_TENSOR.FFN_DOWN_EXP}
LAYER = re.compile(r"\.layers\.(\d+)\.")
BIAS = "_bias"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file. make: returns its values, in any floating dtype."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def expert_tensors(
    model: ModelConfig, keys: Iterable[str], read: Callable[[str], Tensor], arch: gguf.MODEL_ARCH
) -> tuple[list[GgufTensor], set[str]]:
    """Return the experts' tensors of a model folder, and the keys that hold them.

    keys: of all tensors in the folder. read: returns one of them.
    """
    skeleton, keys = without_weights(read_config(model), model), list(keys)
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters() if is_expert(name.removesuffix(BIAS))}
    parts = expert_parts([name for name in shapes if not name.endswith(BIAS)], keys, model)
    found: list[GgufTensor] = []
    for name, shape in shapes.items():
        if name.endswith(BIAS):
            held = {name: ExpertPart(name)}
        else:
            held = {key: part for key, part in parts.items() if part.layer == name}
        is_transposed = next(iter(held.values())).is_transposed
        whole = (shape[0], shape[2], shape[1]) if is_transposed else shape
        for kind in kinds_of(name):
            own = whole if kind == "down" else (whole[0], whole[1] // 2, *whole[2:])
            make = _Maker(kind, held, read, arch == gguf.MODEL_ARCH.GPT_OSS)
            found.append(GgufTensor(gguf_name(name, kind), own, make))
    return found, {*parts, *(name for name in shapes if name.endswith(BIAS))}


def kinds_of(name: str) -> tuple[str, ...]:
    """Return llama.cpp's kinds of matrices in a weight or bias of experts."""
    return ("down",) if DOWN in name.rpartition(".")[2] else ("gate", "up")


def gguf_name(name: str, kind: str) -> str:
    """Return llama.cpp's name of one kind of matrix, or its bias, in a weight or bias of experts."""
    number = int(LAYER.search(name)[1])
    return f"{gguf.TENSOR_NAMES[KINDS[kind]].format(bid=number)}.{'bias' if name.endswith(BIAS) else 'weight'}"


def half(values: Tensor, kind: str, is_interleaved: bool, dim: int) -> Tensor:
    """Return gate's or up's share of output features, which lie along `dim`; all of them for down.

    is_interleaved: gate and up take turns, as in gpt-oss.
    """
    if kind == "down":
        return values
    index = torch.arange(values.shape[dim])
    own = index[kind == "up" :: 2] if is_interleaved else index.chunk(2)[kind == "up"]
    return values.index_select(dim, own)


@dataclass(frozen=True)
class _Maker:
    """Read one kind of matrix of all experts [E, O, D], or its bias [E, O]."""

    kind: str
    held: dict[str, ExpertPart]
    read: Callable[[str], Tensor]
    is_interleaved: bool

    def __call__(self) -> Tensor:
        key, part = next(iter(self.held.items()))
        if part.expert is None:
            values = self.read(key).transpose(1, 2) if part.is_transposed else self.read(key)
            return half(values, self.kind, self.is_interleaved, 1)
        number = 1 if self.kind == "up" else 0
        keys = {part.expert: key for key, part in self.held.items() if part.part == number}
        return torch.stack([self.read(keys[expert]) for expert in sorted(keys)])


def adapter_tensors(name: str, pair: tuple[Tensor, Tensor], rank: int, arch: gguf.MODEL_ARCH) -> Iterator[tuple[str, Tensor]]:
    """Yield an adapter on a weight of experts: lora_a [E, R, D] and lora_b [E, O, R] for each kind of matrix in it.

    pair: A [R * E, D] and B [O, R * E] as in PEFT. Gate and up have the same A.
    """
    a_RD, b_OR = pair
    a_ERD, b_EOR = a_RD.view(-1, rank, a_RD.shape[1]), b_OR.view(b_OR.shape[0], rank, -1).permute(2, 0, 1)
    for kind in kinds_of(name):
        yield f"{gguf_name(name, kind)}.lora_a", a_ERD
        yield f"{gguf_name(name, kind)}.lora_b", half(b_EOR, kind, arch == gguf.MODEL_ARCH.GPT_OSS, 1)
