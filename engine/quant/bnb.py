"""Call bitsandbytes: NF4 weights with double quantisation, AdamW with 8-bit states, and Lion.

NF4 is from Dettmers et al., arXiv:2305.14314.

Shape letters: D input features, O output features.
"""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.kernels import ops
from engine.quant.host_states import StatesOnHost

# What the library's import would load, and the engine never uses. `kernels` fetches code from the hub and
# runs it on a CPU with avx512_bf16; that code multiplies by packed weights, and here a layer unpacks them
# first. The compiler takes a second, for four functions of processors that the library has no code for.
UNUSED = ("kernels", "torch._inductor.compile_fx")


def load_library() -> None:
    """Import bitsandbytes, without a kernel from the hub, torch's compiler and its advice to install more.

    Call this before anything else imports bitsandbytes.
    """
    if "bitsandbytes" in sys.modules:
        return
    log, known = logging.getLogger("bitsandbytes.backends.cpu.ops"), {name: sys.modules.get(name) for name in UNUSED}
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        sys.modules.update(dict.fromkeys(UNUSED))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes  # noqa: F401
    finally:
        log.setLevel(level)
        for name, module in known.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def quantize_nf4(weight_OD: Tensor, double_quantization: bool) -> nn.Parameter:
    """Return the packed parameter that `FrozenLinear` dequantises, on the weight's device."""
    load_library()
    from bitsandbytes.nn import Params4bit

    packed = Params4bit(weight_OD, requires_grad=False, quant_type="nf4", compress_statistics=double_quantization)
    return packed.to(weight_OD.device)


def nf4_error(weight_OD: Tensor, double_quantization: bool) -> Tensor:
    """Return W - NF4(W) [O, D] in fp32: what the frozen base lacks of the weight."""
    packed = quantize_nf4(weight_OD, double_quantization)
    return weight_OD.float() - dequantized_nf4(packed).float()


def dequantized_nf4(packed: nn.Parameter) -> Tensor:
    """Return the weight [O, D] of a packed parameter, in the dtype that it was quantised from.

    On a CPU with AVX-512 the library (0.50.2) reads wrong block scales if rows hold parts of blocks,
    like rows of 96 values in blocks of 64. Our definition computes those.
    """
    state = packed.quant_state
    if _holds_parts_of_blocks(packed):
        return ops.dequantize_nf4(ops.nf4_state(packed), state.dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed.data, state)


def _holds_parts_of_blocks(packed: nn.Parameter) -> bool:
    """Return True for a weight on a CPU whose rows are no whole blocks."""
    return not packed.is_cuda and bool(packed.quant_state.shape[-1] % packed.quant_state.blocksize)


def library_linear(weight_OD: Tensor, compute_dtype: torch.dtype) -> nn.Linear:
    """Return bitsandbytes' own layer over the same NF4 weight.

    PEFT trains on this layer, so benchmarks use it for comparison.
    """
    load_library()
    from bitsandbytes.nn import Linear4bit

    features = {"input_features": weight_OD.shape[1], "output_features": weight_OD.shape[0]}
    layer = Linear4bit(**features, bias=False, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
    layer.weight = quantize_nf4(weight_OD, double_quantization=True)
    return layer


def keep_as_stored(model: nn.Module) -> None:
    """Have the library's own layers leave their weights as they are in a forward pass.

    In evaluation on a CPU with avx512_bf16 they would repack them for good, into a form that
    `FrozenLinear` cannot read, and multiply in bfloat16.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def right_scales(model: nn.Module) -> Iterator[None]:
    """Have the library's own layers compute with the weights of `dequantized_nf4` inside this context."""
    changed = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if getattr(weight, "quant_state", None) is not None and _holds_parts_of_blocks(weight):
            module.forward = functools.partial(_linear, module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    dtype = getattr(module, "compute_dtype", None) or x.dtype
    bias = None if module.bias is None else module.bias.to(dtype)
    return nn.functional.linear(x.to(dtype), dequantized_nf4(module.weight).to(dtype), bias).to(x.dtype)


def nf4_load_config(double_quantization: bool, compute_dtype: torch.dtype, keep: list[str] | None = None) -> Any:
    """Return the quantization_config for `from_pretrained`.

    keep: names of all layers to leave unquantised; None: the library's own choice.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=keep,  # despite its name, for 4 bits too
    )


def adamw_8bit(parameters: list[Any], **options: Any) -> torch.optim.Optimizer:
    """Return AdamW with block-wise 8-bit states (Dettmers et al., arXiv:2110.02861).

    parameters: parameters or groups of them. Small tensors keep 32-bit states.
    """
    return _without_waiting("AdamW8bit")(parameters, **options)


def lion(parameters: list[Any], *, eight_bit: bool, **options: Any) -> torch.optim.Optimizer:
    """Return Lion (Chen et al., arXiv:2302.06675), with one state in fp32 or in 8 bits.

    parameters: parameters or groups of them. options: lr, betas, weight_decay.
    """
    return _without_waiting("Lion8bit" if eight_bit else "Lion")(parameters, **options)


@functools.cache
def _without_waiting(name: str) -> type[torch.optim.Optimizer]:
    load_library()
    import bitsandbytes

    class WithoutWaiting(StatesOnHost, getattr(bitsandbytes.optim, name)):
        """Take the same step without waiting for the device. The states may be on the host.

        The library's `step` waits after each tensor, so the next step would start with an empty
        queue.
        """

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            if not self.initialized:
                self.check_overrides()
                self.to_gpu()
                self.initialized = True
            for i, group in enumerate(self.param_groups):
                for j, parameter in enumerate(group["params"]):
                    if parameter.grad is None:
                        continue
                    if not self.state[parameter]:
                        self.init_state(group, parameter, i, j)
                    self.update_step(group, parameter, i, j)

    return WithoutWaiting
