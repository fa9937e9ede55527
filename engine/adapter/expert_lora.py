"""Put LoRA on the experts of a mixture, in the form of PEFT's `target_parameters`.

PEFT adapts a weight of 3 dimensions with one A and one B for all experts: lora_A [R * E, D], expert
by expert, and lora_B [O, R * E], in which the expert is the inner index. Expert e computes

    y = W_e x + scaling * B_e A_e x.

Two weights of one module nest in PEFT, the later one outside: the first one's tensors are called
`base_layer.lora_A`. There is neither dropout nor DoRA, because PEFT
refuses them there.

Shape letters: E experts, D input features, O output features, R rank of each expert.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from engine.config.targets import is_expert
from engine.config.trial import LoraConfig
from engine.errors import InputError
from engine.kernels.experts import expert_ops
from engine.quant.frozen_experts import DOWN, UP, FrozenExperts

INNER = "base_layer"


class LoraExperts(nn.Module):
    """Hold the adapter of one weight of all experts. lora_a is [R * E, D], lora_b is [O, R * E]."""

    def __init__(
        self, base: FrozenExperts, weight: str, config: LoraConfig, generator: torch.Generator, number: int, rank: int
    ) -> None:
        """Draw A from `generator` as PEFT does, uniform in 1 / sqrt(D). weight: name of the parameter in `base`."""
        super().__init__()
        self.experts, self.weight_name, self.scaling, self.number = (base,), weight, config.scaling, number
        self.num_experts, self.out_features, self.in_features = base.shapes[weight]
        self.rank, self.dropout = rank, 0.0
        self.scale: Tensor | None = None  # of FlatAdapter's memory, as in LoraLinear
        self.magnitude, self.num_frozen = None, 0  # neither DoRA nor PiSSA's frozen pair
        device, bound = getattr(base, weight).device, 1.0 / math.sqrt(self.in_features)
        a_RD = torch.empty(rank * self.num_experts, self.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a_RD.to(device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank * self.num_experts, device=device))

    def parameters_of(self) -> tuple[nn.Parameter, ...]:
        """Return what is trained."""
        return self.lora_a, self.lora_b

    @property
    def features(self) -> tuple[int, int]:
        """Return (out, in) features, summed over the experts."""
        return self.num_experts * self.out_features, self.num_experts * self.in_features

    @property
    def factor(self) -> Tensor | float:
        """Return the scaling: what a recorded pass reads on the device, if there is a FlatAdapter."""
        return self.scaling if self.scale is None else self.scale

    @torch.no_grad()
    def start_from(self, a_RD: Tensor, b_OR: Tensor) -> None:
        """Put an adapter of at most this rank and of this scaling into the first ranks of each expert.

        What fills it up with zeros to a larger rank is left out.
        """
        own, used = a_RD.shape[0] // self.num_experts, used_rank(a_RD, b_OR, self.num_experts)
        a_ERD = self.lora_a.view(self.num_experts, self.rank, -1)
        a_ERD[:, :used] = a_RD.view(self.num_experts, own, -1)[:, :used].to(a_ERD)
        b_ORE = self.lora_b.view(self.out_features, self.rank, self.num_experts)
        b_ORE[:, :used] = b_OR.view(self.out_features, own, -1)[:, :used].to(b_ORE)

    def by_expert(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A [E, R, D] and scaling * B [E, O, R] in `dtype`, contiguous and without autograd.

        They are made at each use: next to the experts' products that costs little, and a copy of all would not.
        """
        a_ERD = self.lora_a.detach().to(dtype).view(self.num_experts, self.rank, self.in_features)
        b_JE = self.lora_b.detach().view(-1, self.num_experts)
        return a_ERD, expert_ops.b_by_expert(b_JE, self.factor, self.rank, dtype)

    def gradient_of_b(self, weight_gradient: Tensor) -> Tensor:
        """Return the gradient of lora_b [O, R * E] from that of the library's whole parameter."""
        grad_EOD = weight_gradient.transpose(1, 2) if self.experts[0].is_transposed else weight_gradient
        a_ERD = self.lora_a.detach().view(self.num_experts, self.rank, self.in_features)
        return self.scaling * torch.einsum("eod,erd->ore", grad_EOD, a_ERD).reshape(self.lora_b.shape)

    def as_stored(self, da_ERD: Tensor, db_EOR: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of lora_a and lora_b from those of what `by_expert` returns."""
        db_JE = expert_ops.b_as_stored(db_EOR, self.factor)
        return da_ERD.reshape(self.lora_a.shape).to(self.lora_a.dtype), db_JE.view(self.lora_b.shape)


def used_rank(a_RD: Tensor, b_OR: Tensor, num_experts: int = 1) -> int:
    """Return the rank of an adapter without what fills it up with zeros, in all of its experts."""
    rank = a_RD.shape[0] // num_experts
    a_ERD, b_ORE = a_RD.view(num_experts, rank, -1), b_OR.view(-1, rank, num_experts)
    used_R = a_ERD.any(dim=2).any(dim=0) | b_ORE.any(dim=2).any(dim=0)
    return max((i + 1 for i, is_used in enumerate(used_R.tolist()) if is_used), default=0)


def expert_weight(model: nn.Module, name: str) -> tuple[FrozenExperts, str] | None:
    """Return the packed experts and the weight that `name` means, or None if it is another layer's name."""
    path, _, weight = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return (module, weight) if isinstance(module, FrozenExperts) and weight in module.shapes else None


def check_experts(config: LoraConfig, names: list[str], optimizer: str = "auto") -> None:
    """Raise InputError for a setting that adapters on experts do not have, which are stacked in one A and one B.

    names: all that is adapted. optimizer: `optim.name`.
    """
    if (found := next(filter(is_expert, names), None)) is None:
        return
    for field, value, plain, why in (
        ("lora.lora_dropout", config.lora_dropout, 0.0, ", where PEFT has no dropout"),
        ("lora.use_dora", config.use_dora, False, ", where PEFT has no DoRA"),
        ("lora.start", config.start, "default", ""),
    ):
        if value != plain:
            allowed = f"must be {str(plain).lower().removesuffix('.0')} with adapters on experts ({found}){why}"
            raise InputError(field, value, f"{allowed}; or leave experts out of the targets")
    if optimizer == "muon":
        allowed = f"must be another optimizer with adapters on experts ({found}), whose matrices are stacked"
        raise InputError("optim.name", optimizer, f"{allowed}; or leave experts out of the targets")


def stored_path(name: str, names: set[str]) -> str:
    """Return the path under which PEFT's files hold an adapter. names: of all layers of the adapter.

    PEFT wraps a module once for each weight, in the order of its parameters.
    """
    if not is_expert(name):
        return name
    path, _, weight = name.rpartition(".")
    return f"{path}.{INNER}" if weight == UP and f"{path}.{DOWN}" in names else path
