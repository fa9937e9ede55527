"""Choose which functions a library's token mixers call: kernels of other packages, or torch's own.

transformers decides once, when it is imported: with flash-linear-attention installed it calls its
kernels, on the CPU too, and where they refuse this card or version. Only the modules of one model
change here; nothing is patched for others.

Shape letters: T tokens, D hidden.
"""

from __future__ import annotations

import inspect
import warnings
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from engine.errors import first_line

PROBED_TOKENS = {"cuda": 2048}
"""Tokens of the row that tries a kernel, by the kind of device. Kernels are tuned on the first row that they meet."""
FEW_TOKENS = 64
FLASH_LINEAR_ATTENTION = "fla"
"""The module of flash-linear-attention."""


def use_torch_functions(model: nn.Module) -> None:
    """Make the model call the library's torch functions where it would call another package's kernels."""
    for module in model.modules():
        if plain := _plain_functions(module):
            forward = inspect.unwrap(type(module).forward)
            names = {**forward.__globals__, **plain}
            own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
            own.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(own, module)


def replace_failing_kernels(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Let a kernel that raises in a forward or backward pass give way to torch's functions, with a warning.

    Some packages refuse a card only in the backward pass. The way is tried on one module of each
    class, so no trial meets it.
    """
    mixers = {type(module): module for module in model.modules() if _plain_functions(module)}
    if not mixers:
        return
    shape = (1, PROBED_TOKENS.get(device.type, FEW_TOKENS), model.config.get_text_config().hidden_size)
    x_1TD = torch.randn(shape, dtype=dtype, device=device)
    for kind, module in mixers.items():
        fault, before = _fault(module, x_1TD), [(part, part.__dict__.get("forward")) for part in module.modules()]
        if fault is None:
            continue
        use_torch_functions(module)
        if _fault(module, x_1TD) is None:
            for other in model.modules():
                if type(other) is kind:
                    use_torch_functions(other)
            warnings.warn(f"{kind.__name__} is computed by torch operations, several times slower: {fault}", stacklevel=2)
            continue
        for part, forward in before:  # the probe does not suit this module, so it says nothing of the kernels
            part.__dict__.pop("forward", None)
            if forward is not None:
                part.forward = forward


def lacks_kernels(model: nn.Module, package: str) -> bool:
    """Return True if the library calls torch operations because a package is not installed."""
    return any(_choice(function) == (False, package) for module in model.modules() for function in _called(module).values())


def calls_kernels(model: nn.Module, package: str) -> bool:
    """Return True if a module calls functions of another package, and torch's have not been put in their place."""
    return any(_choice(function) == (True, package) for module in model.modules() for function in _called_now(module).values())


def _fault(module: nn.Module, x_1TD: torch.Tensor) -> str | None:
    """Return why a pass through the module fails, or None."""
    leaf_1TD = x_1TD.detach().requires_grad_()
    try:
        with torch.enable_grad():
            out = module(leaf_1TD)
            torch.autograd.grad((out[0] if isinstance(out, tuple) else out).sum(), leaf_1TD)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a kernel may raise anything
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _called(module: nn.Module) -> dict[str, Any]:
    """Return what the names in a module's forward method stand for."""
    forward = inspect.unwrap(type(module).forward)
    return {name: forward.__globals__.get(name) for name in forward.__code__.co_names}


def _called_now(module: nn.Module) -> dict[str, Any]:
    """Return the same, for the forward method that this module has of its own, if any."""
    own = module.__dict__.get("forward")
    if not isinstance(own, MethodType):
        return _called(module)
    return {name: own.__func__.__globals__.get(name) for name in own.__func__.__code__.co_names}


def _plain_functions(module: nn.Module) -> dict[str, Any]:
    """Return the torch functions in whose place the module calls another package's, by name."""
    return {name: function.__wrapped__ for name, function in _called(module).items() if _choice(function)[0] is True}


def _choice(function: Any) -> tuple[bool | None, str | None]:
    """Return if transformers calls another package's function in this one's place, and the package."""
    if not inspect.isfunction(function) or not hasattr(function, "__wrapped__"):
        return None, None
    names = inspect.getclosurevars(function).nonlocals
    return names.get("is_new_implementation"), names.get("package")
