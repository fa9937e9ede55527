"""Compute a frozen linear layer whose weight is packed NF4 or plain.

The layer dequantises at each use, in the forward pass and again in the backward pass: a saved
16-bit copy would cost four times the packed weight. It saves no activation, because a frozen weight
needs no gradient.

Shape letters: D input features, O output features; ... any leading shape.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import InputError
from engine.kernels import ops
from engine.quant.bnb import dequantized_nf4

if TYPE_CHECKING:
    from engine.quant.int8_weight import Int8Group


class FrozenLinear(nn.Module):
    """Compute y = x W^T + b with W frozen.

    It takes over the weight of an `nn.Linear` or a bitsandbytes `Linear4bit` without a copy. `int8`,
    if it is set, computes products in INT8 while the layer trains.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        self._nf4: ops.Nf4State | None = None
        self.int8: Int8Group | None = None
        self._plain: Tensor | None = None

    @property
    def is_packed(self) -> bool:
        """Return True if the weight is NF4, so that every use makes a 16-bit copy."""
        return getattr(self.weight, "quant_state", None) is not None

    @property
    def nf4(self) -> ops.Nf4State:
        """Return views of the packed weight's parts. The weight must have its device by the first call."""
        if self._nf4 is None:
            self._nf4 = ops.nf4_state(self.weight)
        return self._nf4

    def scaled(self, factors_O: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the weight with each row times its factor, as a new tensor in `dtype`, or in `out`. factors_O: fp32."""
        if self.is_packed and self.weight.is_cuda:
            return ops.dequantize_nf4(self.nf4, dtype, out, factors_O)
        return torch.mul(self.dequantized(dtype), factors_O.to(dtype)[:, None], out=out)

    def dequantized(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the weight [O, D] in `dtype`.

        For NF4 it is a new tensor, or `out` (contiguous [O, D]) if given. A plain weight that
        already has `dtype` is returned itself.
        """
        if not self.is_packed:
            return self.weight.to(dtype)
        if self._plain is not None and self._plain.dtype == dtype and out is None:
            return self._plain
        if self.weight.is_cuda:
            return ops.dequantize_nf4(self.nf4, dtype, out)
        weight_OD = dequantized_nf4(self.weight).to(dtype)
        return weight_OD if out is None else out.copy_(weight_OD)

    @torch.no_grad()
    def row_lengths(self, a_RD: Tensor, b_OR: Tensor, scaling: float, out: Tensor | None = None) -> Tensor:
        """Return the lengths of the rows of W + scaling * B A, fp32 [O]; into `out`, if given. b_OR: fp32."""
        return ops.row_lengths(self.operand(), a_RD, b_OR, scaling, out)

    def operand(self) -> ops.Nf4State | Tensor:
        """Return the weight as the kernels over its rows read it: packed on CUDA, else plain."""
        if not self.is_packed:
            return self.weight.detach()
        return self.nf4 if self.weight.is_cuda else self.dequantized(torch.float32)

    def unpack(self, dtype: torch.dtype) -> None:
        """Replace the packed weight by the dequantised one, for many uses of few tokens each."""
        self.weight, self._nf4 = nn.Parameter(self.dequantized(dtype), requires_grad=False), None

    def keep_plain(self, dtype: torch.dtype | None) -> None:
        """Hold a dequantised copy next to the packed weight, for steps of few tokens; None drops it."""
        self._plain = None
        if dtype is not None and self.is_packed:
            self._plain = self.dequantized(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenMatmul.apply(x, self)

    def extra_repr(self) -> str:
        kind = "nf4" if self.is_packed else str(self.weight.dtype)
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, weight={kind}"


class _FrozenMatmul(torch.autograd.Function):
    """Compute x [..., D] -> [..., O], and dx = dy W in the backward pass.

    It keeps the module, not a tensor, for the backward pass. Each product is in INT8 if the module
    says so.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: FrozenLinear) -> Tensor:
        ctx.module, ctx.int8 = module, module.int8 if module.training else None
        bias = None if module.bias is None else module.bias.to(x.dtype)
        if ctx.int8 is not None and ctx.int8.mode.is_int8_forward:
            return _of_rows(ctx.int8.product, x, "forward", bias_N=bias)
        return F.linear(x, module.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.int8 is not None and ctx.int8.mode.is_int8_backward:
            return _of_rows(ctx.int8.product, grad, "backward"), None
        return grad @ ctx.module.dequantized(grad.dtype), None


def _of_rows(product: Callable[..., Tensor], x: Tensor, *others: Any, **options: Any) -> Tensor:
    """Call a product of rows [T, K] with x [..., K]."""
    y_TN = product(x.reshape(-1, x.shape[-1]).contiguous(), *others, **options)  # a gradient may be an expanded number
    return y_TN.view(*x.shape[:-1], y_TN.shape[-1])


def is_known_linear(module: nn.Module) -> bool:
    """Return True for the layers that FrozenLinear can stand for: plain ones, and bitsandbytes' NF4.

    A subclass may compute anything: a router returns scores, an 8-bit layer needs its scales.
    """
    if type(module) is not nn.Linear and type(module).__name__ != "Linear4bit":
        return False
    is_packed = getattr(module.weight, "quant_type", None) == "nf4"
    return is_packed or (module.weight.is_floating_point() and module.weight.dtype.itemsize >= 2)


def odd_linears(model: nn.Module, skipped: Container[int] = ()) -> dict[str, nn.Linear]:
    """Return the linear layers whose weights are quantised in a way that is not known, by name. skipped: ids of modules."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in skipped}
    unknown = {n: m for n, m in linears.items() if not is_known_linear(m)}
    return {n: m for n, m in unknown.items() if not m.weight.is_floating_point() or m.weight.dtype.itemsize < 2}


def freeze_linears(model: nn.Module, skip: Iterable[nn.Module] = ()) -> list[str]:
    """Replace every known linear layer of `model` by a FrozenLinear and return their names.

    skip: layers to leave as they are, such as the head. A subclass of nn.Linear stays as it is if
    its weight is an ordinary one. Raises InputError if it is quantised in a way that is not known.
    """
    skipped = {id(module) for module in skip}
    for name, module in odd_linears(model, skipped).items():
        kind = f"{name} is a {type(module).__name__} of {str(module.weight.dtype).removeprefix('torch.')}"
        raise InputError("model.path", kind, "must hold its weights in 16 or 32 bits, or as bitsandbytes NF4")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in skipped and is_known_linear(m)]
    for name in names:
        model.set_submodule(name, FrozenLinear(model.get_submodule(name)))
    return names
