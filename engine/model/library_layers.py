"""Measure what the decoder layers of a library allocate, on the meta device.

A layer that runs unfused is the library's code, and a config.json does not say what it keeps: a norm
may save its input in fp32, in 16 bits or not at all. So a few of the model's own layers, in their real
widths, take a forward and a backward pass without values, and each living storage is counted. Only two
parts are replaced. Attention keeps what flash attention keeps (Dao, arXiv:2307.08691), and dropout keeps
the mask of one byte that it has on CUDA.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.adapter.lora import AnyLora, LoraLinear, attach, detach
from engine.config.lora_section import ALL_LINEAR
from engine.config.targets import EXPERTS
from engine.config.trial import LoraConfig, ModelConfig
from engine.errors import EngineError
from engine.model.pretrained import forget_quantization
from engine.model.skeleton import layers_alike, with_few_layers
from engine.quant.expert_quantizer import place_experts
from engine.quant.frozen_experts import freeze_experts
from engine.quant.frozen_linear import freeze_linears
from engine.shape.layer_plan import runs_fused
from engine.shape.library_bytes import MEASURED_RANK, LibraryBytes, PassBytes
from engine.shape.model_shape import ModelShape

NAME = "sizes_only"
"""The name in transformers' registry of an attention that allocates and computes nothing."""
TOKENS = 8192
DROPOUT = 0.1
ATTENTION = re.compile("attn|attention", re.IGNORECASE)  # in the names of its linear layers
MAX_OPERATIONS = 100_000  # in a pass. Layers need a few thousand; a loop over 8,192 tokens takes minutes
Make = Callable[[Any, str], nn.Module]

logger = logging.getLogger(__name__)


def with_library_bytes(shape: ModelShape, config: ModelConfig, found: Any, make: Make) -> ModelShape:
    """Return the shape with the bytes of the library's layers, if the model runs on these.

    found: the model's config. make: (config, attention's name) -> model. If the library's code cannot
    run without values, the shape stays as it is, and its memory is estimated.
    """
    if not runs_unfused(shape, config) or shape.has_mixers:
        return shape
    try:
        return replace(shape, library=measure(found, make, shape.experts is not None and config.quantization == "nf4"))
    except Exception as error:  # a model's code may raise anything
        logger.info("the memory of this model's layers is estimated: %s", error)
        return shape


def runs_unfused(shape: ModelShape, config: ModelConfig) -> bool:
    """Return True if the model's layers are the library's."""
    return not runs_fused(config, shape)


def measure(found: Any, make: Make, packs_experts: bool = False) -> LibraryBytes:
    """Return the bytes a token. Raises whatever the model's code raises on the meta device.

    packs_experts: the model's experts are in NF4, and adapted like the linear layers.
    """
    _register()
    small = with_few_layers(found)
    forget_quantization(small)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = make(copy.deepcopy(small), NAME).to(torch.bfloat16).requires_grad_(False)
        if packs_experts:
            place_experts(model, double_quantization=True)
        names = freeze_linears(model, skip=[model.get_output_embeddings()]) + freeze_experts(model)
    weights, passes = _layer_weights(found), []
    whole = (ALL_LINEAR, EXPERTS) if packs_experts else ALL_LINEAR
    adapters = attach(model, names, LoraConfig(rank=MEASURED_RANK, target_modules=whole), 0)
    alone = _evaluate(model)
    for targets in (whole, None if packs_experts else tuple(filter(ATTENTION.search, names))):
        if not targets:
            continue
        if targets is not whole:
            detach(model, adapters)
            adapters = attach(model, names, LoraConfig(rank=MEASURED_RANK, target_modules=targets), 0)
        for case in itertools.product((True, False), (False, True), (False, True)):
            passes.append(replace(_train(model, adapters, weights, *case), attention_alone=targets is not whole))
    return LibraryBytes(tuple(passes), alone)


class Storages(TorchDispatchMode):
    """Count the bytes of living storages made while this mode is on, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.highest = self._operations = 0
        self._seen: dict[int, weakref.ref] = {}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._operations += 1
        if self._operations > MAX_OPERATIONS:
            raise EngineError("its code loops over tokens")
        out = func(*args, **(kwargs or {}))
        self._count_all(out)
        return out

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count `storage` as if it had been resized."""
        self.alive += size - self._sizes[storage._cdata]
        self._sizes[storage._cdata] = size
        self.highest = max(self.highest, self.alive)

    def _count_all(self, made: Any) -> None:
        if isinstance(made, Tensor):
            self._count(made)
        elif isinstance(made, tuple | list):
            for one in made:
                self._count_all(one)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or tensor.device.type != "meta":
            return
        self._seen[key], self._sizes[key] = weakref.ref(storage, lambda _: self._free(key)), 0
        self.resize(storage, size)

    def _free(self, key: int) -> None:
        del self._seen[key]
        self.alive -= self._sizes.pop(key)

    def ignore(self, *tensors: Tensor) -> None:
        """Leave out storages made earlier."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = weakref.ref(storage)


class _Attention(torch.autograd.Function):
    """Keep and allocate what flash attention does: tensors [T, H, K], and [T, H] in fp32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, sums = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, sums = ctx.saved_tensors
        repeated = [grad.contiguous(), *(torch.empty_like(q) for _ in range(0 if q.shape == k.shape else 2))]
        workspace = torch.empty_like(q, dtype=torch.float32), torch.empty_like(sums)
        grads = tuple(map(torch.empty_like, (q, k, v)))
        del repeated, workspace
        return grads


class _Mask(torch.autograd.Function):
    """Keep what dropout keeps on CUDA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(grad)


class _Gradient(torch.autograd.Function):
    """Stand for the loss: keep nothing, and make the gradient of the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.shape, ctx.kind = hidden.shape, {"dtype": hidden.dtype, "device": hidden.device}
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty(ctx.shape, **ctx.kind)


def _attend(module: nn.Module, q_1HTK: Tensor, k_1GTK: Tensor, v_1GTK: Tensor, mask: Any, **others: Any) -> tuple[Tensor, None]:
    return _Attention.apply(*(x.squeeze(0).transpose(0, 1) for x in (q_1HTK, k_1GTK, v_1GTK))).unsqueeze(0), None


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)


def _train(
    model: nn.Module, adapters: dict[str, AnyLora], weights: list[int], recomputes: bool, dropout: bool, dora: bool = False
) -> PassBytes:
    """Take a forward and a backward pass. weights: for each layer, how many of the real model are like it."""
    for adapter in adapters.values():
        adapter.drop, adapter.dropout = _Mask.apply, DROPOUT if dropout else 0.0
        if isinstance(adapter, LoraLinear):
            magnitude, adapter.gain, adapter.norm = (_lengths(adapter) if dora else None for _ in range(3))
            adapter.magnitude = None if magnitude is None else nn.Parameter(magnitude)
    _recompute(model, recomputes)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    layers, marks = _decoder_layers(model), []
    with Storages() as storages:
        storages.ignore(*model.parameters(), *model.buffers(), *(p.grad for p in trained))
        hooks = [layer.register_forward_pre_hook(lambda *_: marks.append(storages.alive)) for layer in layers]
        hooks += [layer.register_forward_hook(lambda *_: marks.append(storages.alive)) for layer in layers]
        hidden = _hidden(model)
        base, forward, after = marks[-1], storages.highest, storages.alive
        storages.highest = after
        loss = _Gradient.apply(hidden)
        del hidden
        loss.backward()
        backward = storages.highest
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    left = [marks[2 * i + 1] - marks[2 * i] for i in range(len(layers))]
    mean = sum(map(math.prod, zip(left, weights))) / sum(weights) if len(weights) == len(left) else max(left)
    sizes = (math.ceil(n / TOKENS) for n in (mean, after - base, forward - base, backward - base))
    return PassBytes(recomputes, dropout, *sizes, dora)


def _lengths(adapter: LoraLinear) -> Tensor:
    return torch.empty(adapter.out_features, device="meta")


def _evaluate(model: nn.Module) -> int:
    """Return the peak of a pass without gradients above the first layer's input, in bytes a token."""
    marks: list[int] = []
    with torch.no_grad(), Storages() as storages:
        storages.ignore(*model.parameters(), *model.buffers())
        hook = _decoder_layers(model)[0].register_forward_pre_hook(lambda *_: marks.append(storages.alive))
        model.eval()
        _hidden(model)
    hook.remove()
    return math.ceil((storages.highest - marks[0]) / TOKENS)


def _hidden(model: nn.Module) -> Tensor:
    """Return the final hidden states [1, T, D] of one row, computed as engine/model/base.py does."""
    positions = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    offsets = torch.zeros(2, dtype=torch.int32, device="meta")
    given = {"document_lengths": (TOKENS,), "document_offsets": offsets, "position_ids": positions, "use_cache": False}
    return model.get_decoder()(input_ids=torch.zeros_like(positions), **given).last_hidden_state


def _recompute(model: nn.Module, recomputes: bool) -> None:
    switch = "enable" if recomputes else "disable"
    methods = [getattr(model, f"{word}_checkpointing_{switch}", None) for word in ("activation", "gradient")]
    if getattr(model, "supports_gradient_checkpointing", True):
        next(filter(None, methods))(*([{"use_reentrant": False}] if recomputes else []))


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers: the longest list of modules of one class in the decoder."""
    lists = [list(m) for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m)]
    return max(lists, key=len)


def _layer_weights(found: Any) -> list[int]:
    """Return, for each layer of the small model, how many of the real model's layers it stands for.

    Two of a kind share them.
    """
    alike = layers_alike(found)
    kinds = list(map(tuple, alike.values()))
    return [len(kind) * 2 // kinds.count(kind) for kind in kinds]
