"""Find the frozen layers whose products are too far from exact in INT8: they stay in the working dtype.

Eight short samples go through the base model forward and backward. Each product is computed in both
ways, and the exact one goes on, so a layer's error is its own. Samples and limits are the same for
all trials of a base model. The answer depends on no trial. It is found once for each base, card, set
of versions and mode, and kept in the cache.

In SmolLM2-135M, layers are 0.5 to 1.3 % off forward and 1 to 5 % backward; the gradient below the
first attention, which no trial needs, is 10 % off.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from engine.config.matmul import Matmul
from engine.data.packing import Sample, collate
from engine.layers.swap import int8_groups
from engine.model.base import Base
from engine.model.comparison import LENGTHS, num_tokens, random_samples, text_samples
from engine.model.loaded_check import CHECKS
from engine.quant.int8_weight import Direction, ProbedGroup
from engine.system.shared_cache import remembered

NUM_SAMPLES = 8
LARGEST_ERRORS = {"forward": 0.05, "backward": 0.15}
"""Of a product, relative, in the mean over tokens. An error of 0.15 leaves a gradient a cosine of 0.99."""
NAME, MOST_NAMED = "exempt from INT8", 4
VERSION = 1  # of what the products are; raised when kernels or codes change


def exempt_layers(base: Base, mode: Matmul) -> tuple[str, ...]:
    """Return the names of linear layers that stay in the working dtype in this mode, sorted; warn if there are any.

    Call it before an adapter is attached. It may draw random numbers.
    """
    if mode is Matmul.BF16:
        return ()
    known = base.lasting.setdefault(NAME, {})
    if mode not in known:
        known[mode] = _remembered(base, mode)
        _name(base, mode, known[mode])
    return tuple(known[mode])


def _remembered(base: Base, mode: Matmul) -> dict[str, str]:
    """Return what `_reasons` found, by this process or an earlier one on this machine."""
    checks = base.lasting.get(CHECKS)
    kept = checks and checks.name("matmul", mode=mode.value, limits=LARGEST_ERRORS, samples=NUM_SAMPLES, version=VERSION)
    return remembered(kept, lambda: _reasons(base, mode)) if kept else _reasons(base, mode)


def _reasons(base: Base, mode: Matmul) -> dict[str, str]:
    """Return the layers that stay in the working dtype, sorted by name, each with its reason."""
    unfit = base.set_matmul(mode, kind=ProbedGroup)
    try:
        errors = _errors(base)
    finally:
        base.set_matmul(Matmul.BF16)
    reasons = dict.fromkeys(unfit, "its size or weights") | {
        name: ", ".join(f"{direction} {error:.0%} off" for direction, error in found.items())
        for name, found in errors.items()
        if any(not error <= LARGEST_ERRORS[direction] for direction, error in found.items())
    }
    return dict(sorted(reasons.items()))


def _name(base: Base, mode: Matmul, reasons: dict[str, str]) -> None:
    if reasons:
        named = [f"{name} ({reason})" for name, reason in list(reasons.items())[:MOST_NAMED]]
        more = f" and {len(reasons) - MOST_NAMED} more" if len(reasons) > MOST_NAMED else ""
        warnings.warn(f"train.matmul = {mode}: stay in {base.dtype}: {', '.join(named)}{more}", stacklevel=3)


def _errors(base: Base) -> dict[str, dict[Direction, float]]:
    """Return the errors of each layer's group by the layer's name."""
    hook = base.model.get_input_embeddings().register_forward_hook(_as_leaf)
    was_training = base.model.training
    base.model.train()
    try:
        with torch.enable_grad():
            for row in _rows(base):
                base.loss(collate(row).to(base.device)).backward()
    finally:
        base.model.train(was_training)
        hook.remove()
    return {name: probed.mean_errors() for names, probed in int8_groups(base.model) for name in names}


def _as_leaf(_: nn.Module, __: object, out: Tensor) -> Tensor:
    """Let gradients reach every layer."""
    return out.detach().requires_grad_()


def _rows(base: Base) -> list[list[Sample]]:
    """Return the samples, in one row if the base allows that."""
    vocab_size = num_tokens(base.model)
    samples = text_samples(base.tokenizer, vocab_size)
    while len(samples) < NUM_SAMPLES:
        samples += random_samples(vocab_size, seed=len(samples))
    return [samples] if base.shares_rows(max(LENGTHS)) else [[sample] for sample in samples]
