"""Compute the experts of a mixture with NF4 weights, and adapters on them, in place of the library's module.

The library's decoder layer and router call it as they call their own experts: hidden states, the
experts chosen for each token, and their weights. Tokens are sorted by expert once. Weights are
dequantised at each use. The input and what the gate reads are saved; the backward pass writes there.

Until `is_library` is set to False, the library's own code computes, on weights dequantised expert by
expert: ours is compared with it. A gate that the kernels do not know is the library's own code.

Shape letters: T tokens, K experts a token, S = T * K rows sorted by expert, E experts, D hidden, F
expert hidden, R rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.kernels import ops
from engine.kernels.experts import expert_ops
from engine.kernels.experts.grouped_dense import dense_bytes
from engine.kernels.experts.packed_experts import PackedLayout, dequantize_experts, pack, unpack_state
from engine.kernels.nf4_state import Nf4State, nf4_state
from engine.quant.bnb import quantize_nf4
from engine.quant.experts_pass import DOWN as DOWN
from engine.quant.experts_pass import UP as UP
from engine.quant.experts_pass import ExpertsPass

NAME = "experts"  # of the module, in every family


class ExpertAdapter(Protocol):
    """What an adapter on one weight of all experts offers (engine/adapter/expert_lora.py)."""

    lora_a: Tensor
    lora_b: Tensor

    def by_expert(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A [E, R, D] and scaling * B [E, O, R]."""

    def as_stored(self, da_ERD: Tensor, db_EOR: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of lora_a and lora_b from those of what `by_expert` returns."""


class FrozenExperts(nn.Module):
    """Stand for a library's experts: same name, same call, weights in NF4 under the same names.

    adapters: parameter name -> its adapter, while one is attached. room: bytes that experts may take while
    they are dequantised, 0 to dequantise them in tiles. is_unread: nothing reads the output of the next
    pass, which is made again for its gradients alone.
    """

    def __init__(self, library: nn.Module, double_quantization: bool = True, stored: torch.dtype = torch.uint8) -> None:
        """Take over the library's module. Its weights may be on the meta device: the quantiser packs them as they are read.

        stored: dtype of the weights that are going to be read, to which transformers (5.17) casts them.
        """
        super().__init__()
        self.is_transposed = library.is_transposed
        self.shapes = expert_shapes(library)
        self.num_experts = self.shapes[UP][0]
        device = getattr(library, UP).device
        for name, shape in self.shapes.items():
            size = PackedLayout(shape, double_quantization).num_bytes
            setattr(self, name, nn.Parameter(torch.empty(size, dtype=stored, device=device), requires_grad=False))
            delattr(library, name)
            setattr(library, name, _Rows(self, name))
        for name in [n for n, _ in library.named_parameters()]:
            self.register_parameter(name, getattr(library, name).requires_grad_(False))
        self.double_quantization, self.is_library, self.room = double_quantization, True, 0
        self.is_unread = False
        self.activation = _known_activation(library)
        self.clamped = (library.limit, library.alpha) if type(library).__name__ == "GptOssExperts" else None
        self.replaced = (library,)  # in a tuple, so that it is not a child
        self.adapters: dict[str, ExpertAdapter] = {}
        self._states: dict[str, tuple[Tensor, Nf4State]] = {}

    @classmethod
    def of(cls, library: nn.Module, double_quantization: bool) -> FrozenExperts:
        """Return packed experts with the values of a library's module, which keeps its own weights."""
        experts = cls(_without_weights(library), double_quantization)
        for name in experts.shapes:
            setattr(experts, name, nn.Parameter(experts.packed(name, getattr(library, name).detach()), requires_grad=False))
        return experts

    def again(self) -> FrozenExperts:
        """Return a second module over the same weights, without adapters."""
        other = copy.copy(self)
        other.adapters, other.is_library = {}, True
        return other

    def packed(self, name: str, weight: Tensor) -> Tensor:
        """Return the bytes of the library's parameter `name`, quantised on its device."""
        weight_EOD = weight.transpose(1, 2).contiguous() if self.is_transposed else weight
        parameter = quantize_nf4(weight_EOD, self.double_quantization)
        return pack(nf4_state(parameter), self.shapes[name])

    def state(self, name: str) -> Nf4State:
        """Return views of one packed weight's parts, of shape [E, O, D]."""
        weight, known = getattr(self, name), self._states.get(name)
        if known is None or known[0] is not weight:
            known = self._states[name] = weight, unpack_state(weight.data, self.shapes[name])
        return known[1]

    def dequantized(self, name: str, expert: int, dtype: torch.dtype) -> Tensor:
        """Return one expert's weight in `dtype`, as the library lays it out."""
        weight_OD = dequantize_experts(self.state(name), expert, expert + 1, dtype)[0]
        return weight_OD.T if self.is_transposed else weight_OD

    def bias(self, name: str) -> Tensor | None:
        """Return the bias [E, O] of a weight, or None."""
        return getattr(self, f"{name}_bias", None)

    def can_use(self, room: int) -> bool:
        """Return True if all experts of each weight can be dequantised in `room` bytes, one weight at a time."""
        return room >= max(map(dense_bytes, self.shapes.values()))

    def gate(self, gate_up: Tensor) -> Tensor:
        """Return the library's activation of gate and up: [S, 2 F] -> [S, F]."""
        if self.activation is not None and gate_up.is_meta:  # sizes are measured: the kernel has no temporaries
            return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        if self.activation is not None:
            return ops.glu(*gate_up.chunk(2, dim=1), self.activation)
        if self.clamped and (hidden := expert_ops.clamped_gate(gate_up, *self.clamped)) is not None:
            return hidden
        return self.replaced[0]._apply_gate(gate_up)

    def gate_backward(self, gate_up: Tensor, dhidden: Tensor) -> Tensor:
        """Return the gradient of gate and up [S, 2 F] from that of the activation; it may take their place."""
        if self.activation is not None:
            if not gate_up.is_meta:
                ops.glu_backward_(dhidden.contiguous(), *gate_up.chunk(2, dim=1), self.activation)
            return gate_up
        if self.clamped and expert_ops.clamped_gate_backward_(gate_up, dhidden, *self.clamped):
            return gate_up
        leaf = gate_up.detach().requires_grad_()
        with torch.enable_grad():
            hidden = self.replaced[0]._apply_gate(leaf)
        return torch.autograd.grad(hidden, leaf, dhidden)[0]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts [T, D]."""
        if self.is_library:
            return self._library_forward(hidden_states, top_k_index, top_k_weights)
        adapters = [p for layer in self.adapters.values() for p in (layer.lora_a, layer.lora_b)]
        return ExpertsPass.apply(hidden_states, top_k_weights, self, top_k_index, *adapters)

    def _library_forward(self, *inputs: Tensor) -> Tensor:
        library = self.replaced[0]
        for name, parameter in self.named_parameters(recurse=False):
            if name not in self.shapes:
                setattr(library, name, parameter)
        for name in self.shapes:
            getattr(library, name).dtype = inputs[0].dtype
        return type(library).forward.__wrapped__(library, *inputs)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}=nf4 {list(shape)}" for name, shape in self.shapes.items())


def _known_activation(library: nn.Module) -> str | None:
    """Return the name that the kernels have for act(gate) * up, or None for another activation."""
    from transformers.integrations import moe

    if type(library)._apply_gate is not getattr(moe, "_default_apply_gate", None):
        return None
    return {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh"}.get(type(library.act_fn).__name__)


def _without_weights(library: nn.Module) -> nn.Module:
    """Return a copy of a library's experts that shares its biases, and whose weights take no memory."""
    other = copy.copy(library)
    other._parameters = dict(library._parameters)
    for name in (UP, DOWN):
        other._parameters[name] = nn.Parameter(torch.empty_like(getattr(library, name), device="meta"), requires_grad=False)
    return other


class _Rows:
    """Give the library's code one expert's weight at a time."""

    def __init__(self, experts: FrozenExperts, name: str) -> None:
        self.experts, self.name, self.dtype = experts, name, torch.float32

    def __getitem__(self, expert: Any) -> Tensor:
        return self.experts.dequantized(self.name, int(expert), self.dtype)


def expert_shapes(library: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Return [E, O, D] of the weights of a library's experts, however it lays them out."""
    found = {}
    for name in (UP, DOWN):
        experts, height, width = getattr(library, name).shape
        found[name] = (experts, width, height) if library.is_transposed else (experts, height, width)
    return found


def packable(module: nn.Module) -> bool:
    """Return True for a library's experts that FrozenExperts can stand for.

    They carry the marks of transformers' experts interface: gated, two weights of 3 dimensions.
    """
    marks = "is_transposed", "has_bias", "has_gate", "_apply_gate"
    has_norm = getattr(module, "has_post_expert_norm", False)  # newer than the other marks
    if not all(hasattr(module, mark) for mark in marks) or not module.has_gate or has_norm:
        return False
    weights = [module._parameters.get(name) for name in (UP, DOWN)]
    biases = {f"{name}_bias" for name in (UP, DOWN)} if module.has_bias else set()
    others = {name for name, _ in module.named_parameters()} - {UP, DOWN}
    return all(w is not None and PackedLayout.fits(tuple(w.shape)) for w in weights) and others == biases


def packable_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the experts of a library's model that can be packed, by name."""
    return {n: m for n, m in model.named_modules() if n.rpartition(".")[2] == NAME and packable(m)}


@torch.no_grad()
def pack_values(model: nn.Module) -> dict[str, FrozenExperts]:
    """Give a library's experts the values that they have in NF4; return the packed ones by name."""
    packed = {}
    for name, module in packable_experts(model).items():
        packed[name] = experts = FrozenExperts.of(module, double_quantization=False)
        for weight in experts.shapes:
            parameter = getattr(module, weight)
            for expert in range(experts.num_experts):
                parameter[expert] = experts.dequantized(weight, expert, parameter.dtype)
    return packed


def frozen_experts(model: nn.Module) -> Iterator[tuple[str, FrozenExperts]]:
    """Yield the packed experts of a model with their names."""
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, FrozenExperts))


def freeze_experts(model: nn.Module) -> list[str]:
    """Have our code compute the packed experts of a model; return the names of their weights."""
    names = []
    for name, module in frozen_experts(model):
        module.is_library = False
        names += [f"{name}.{weight}" for weight in module.shapes]
    return names
