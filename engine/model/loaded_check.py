"""Compare the losses of a loaded model with the library's own, on its real weights.

How far rounding may take them apart is measured: the library's own two attentions differ by rounding
alone. Over ten models in bf16 (135M on text, and random ones of 2 to 32 layers) our losses differed
from the library's by 0.9 to 1.25 times as much. Each side rounds every operation anew, so both
differences are that of two equally rounded computations.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.data.packing import Sample
from engine.errors import InputError, first_line
from engine.model.base import Base
from engine.model.comparison import library_losses, mean_difference, our_losses, own_attentions
from engine.model.pretrained import text_attention
from engine.model.route import OWN_ATTENTIONS
from engine.model.verdicts import computed_by
from engine.quant.bnb import keep_as_stored, right_scales
from engine.quant.shared_base import key
from engine.system.shared_cache import recall, remembered
from engine.units import counted

ROUNDINGS = 4.0  # times what rounding alone makes
LEAST = 0.01  # nats, mean of two samples: what is wrong differs by more
CHECKS = "checks"  # in base.lasting: the KnownChecks of a base loaded for training, or None
WITHOUT_MEASURE = {torch.float32: LEAST, torch.bfloat16: 0.25}  # nats, for a model with one attention only


@dataclass(frozen=True)
class LibraryLosses:
    """Hold the losses by the library alone.

    rounding: the mean difference of its own two attentions on the shortest sample. None if it has one,
    or in fp32, where rounding is far below LEAST.
    """

    samples: list[Sample]
    losses: list[Tensor]
    rounding: float | None = None

    def allowed(self, dtype: torch.dtype) -> float:
        """Return the largest mean difference in nats that rounding explains."""
        return WITHOUT_MEASURE[dtype] if self.rounding is None else max(LEAST, ROUNDINGS * self.rounding)


def loaded_losses(
    model: nn.Module, samples: list[Sample], given: str | None = None, measures: tuple[str, ...] = OWN_ATTENTIONS
) -> LibraryLosses:
    """Return the losses by the library alone on the real weights, with the library's own attention.

    given: the value of model.path, for the message. measures: its attentions that are right for the model.
    """
    keep_as_stored(model)
    before = model.config.get_text_config()._attn_implementation
    try:
        name, *others = [name for name in own_attentions(model) if name in measures]
        with right_scales(model):
            losses, rounding = _losses(model, name, samples), None
            if others and model.dtype != torch.float32:  # there it explains less than LEAST
                # One sample measures rounding, because the losses take most of the check's time.
                shortest = min(range(len(samples)), key=lambda i: len(samples[i].input_ids))
                rounding = mean_difference(_losses(model, others[0], [samples[shortest]]), [losses[shortest]])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, AssertionError) as error:
        allowed = f"transformers itself cannot compute its losses ({type(error).__name__}: {first_line(error)})"
        raise InputError("model.path", given, allowed) from error
    finally:
        model.set_attn_implementation(text_attention(model.config, before))
    if not all(bool(of_sample.isfinite().all()) for of_sample in losses):
        allowed = "has losses that are not finite, in transformers too: its weights hold NaN or infinity, or are too large"
        raise InputError("model.path", given, allowed)
    return LibraryLosses(samples, losses, rounding)


@torch.no_grad()
def require_finite_rows(model: nn.Module, given: str) -> None:
    """Raise InputError for NaN or infinity in the rows of a token, which the samples of a check need not have."""
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        rows_V = torch.zeros(0) if table is None else table.weight.sum(dim=1, dtype=torch.float32)
        if odd := torch.nonzero(~rows_V.isfinite()).flatten().tolist():
            allowed = f"holds NaN or infinity in the row of token {odd[0]} ({counted(len(odd), 'such row')}): download it again"
            raise InputError("model.path", given, allowed)


@torch.no_grad()
def _losses(model: nn.Module, attention: str, samples: list[Sample]) -> list[Tensor]:
    """Return the losses of each sample alone, with one of the library's attentions."""
    model.set_attn_implementation(text_attention(model.config, attention))
    return [library_losses(model, sample) for sample in samples]


def check_loaded(base: Base, theirs: LibraryLosses) -> Base:
    """Return the base with the rows that its real weights allow.

    theirs: what `loaded_losses` returned before any layer was replaced. Raises InputError if the
    losses of single samples differ by more than rounding explains.
    """
    allowed, samples = theirs.allowed(base.dtype), theirs.samples
    if base.route.shares_rows and mean_difference(our_losses(base, samples), theirs.losses) <= allowed:
        return base
    alone = [our_losses(base, [sample])[0] for sample in samples]
    if (gap := mean_difference(alone, theirs.losses)) > allowed:
        text = f"its losses differ from those of transformers by {gap:.2g} nats on average; allowed: {allowed:.2g}"
        raise InputError("model.path", base.config.path, f"{text}; try model.layers=original")
    return replace(base, route=replace(base.route, shares_rows=False, boundaries=False))


class KnownChecks:
    """Remember on this machine what checks of a loaded model have found, by all that its losses depend on."""

    def __init__(self, folder: Path | None, base: dict[str, Any], device: torch.device, is_copy: bool) -> None:
        """Name the checks.

        folder: the model's files, None if nothing is to be remembered. base: settings of the base.
        is_copy: its weights were read from the cache, whose copy is checked too.
        """
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        self._folder, self._made_of = folder, {"base": base, "card": card, **computed_by()}
        self._name = self.name("checked", is_copy=is_copy)

    def name(self, kind: str, **more: Any) -> str | None:
        """Return the name of a check in the cache, None if nothing is to be remembered. more: what else it depends on."""
        return None if self._folder is None else f"{kind}-{key(self._folder, {**self._made_of, **more})}"

    def known(self) -> dict[str, Any] | None:
        """Return the rows of an earlier check, or None."""
        return recall(self._name) if self._name else None

    def passed(self, base: Base) -> None:
        """Remember the rows of a base that has passed."""
        if self._name:
            remembered(self._name, lambda: asdict(base.route))
