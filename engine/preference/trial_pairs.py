"""Hold what a trial needs beyond its samples if these are pairs: the reference's log probabilities, and the judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from engine.config.trial import TrainConfig
from engine.data.view import AnyView
from engine.errors import InputError, Interrupted
from engine.model.base import Base
from engine.preference.pair_judge import PairJudge
from engine.preference.reference_logps import reference_logps, started_reference, wanted_samples
from engine.sample_losses import SampleLosses

ONE_SAMPLE = "this model computes one sample a row, and both answers of a pair belong into one; take another model"


@dataclass(frozen=True)
class TrialPairs:
    """Hold the reference of the training samples [N], None without one, and the judge of evaluation pairs."""

    reference_N: np.ndarray | None
    judge: PairJudge

    @classmethod
    def of(
        cls, config: TrainConfig, base: Base, train: AnyView, evaluation: AnyView, interrupted: Callable[[], bool]
    ) -> TrialPairs | None:
        """Return the trial's pairs, or None if its samples are none.

        The adapter must be attached as `lora.start_from` has it, and add nothing without. interrupted: called before each row
        of the reference. Raises Interrupted, and InputError for a model that takes one sample a row.
        """
        if not config.learns_pairs:
            return None
        if not base.shares_rows(config.data.max_seq_length):
            raise InputError("data.format", config.data.format, ONE_SAMPLE)
        if not config.preference.needs_reference:
            return cls(None, PairJudge(config.preference, None))

        def stop_if_asked() -> None:
            if interrupted():
                raise Interrupted("stopped on request in the pass of the reference model")

        judge = PairJudge(config.preference, reference_logps(config, base, evaluation, before_each=stop_if_asked))
        return cls(reference_logps(config, base, train, wanted_samples(config, train), stop_if_asked), judge)

    def reference_of(self, samples: Sequence[int]) -> np.ndarray | None:
        """Return the reference of these samples, None without one. RuntimeError for one that was not computed."""
        if self.reference_N is None:
            return None
        found = self.reference_N[samples]
        if np.isnan(found).any():
            raise RuntimeError("a pair is trained that the reference model has not seen")
        return found


def judged(config: TrainConfig, base: Base, evaluation: AnyView) -> Callable[[SampleLosses], SampleLosses]:
    """Return what turns the losses of evaluation samples into those of pairs, or leaves them if they are no pairs.

    The base must have no adapter now.
    """
    if not config.learns_pairs:
        return lambda losses: losses
    reference_N = started_reference(config, base, evaluation) if config.preference.needs_reference else None
    return PairJudge(config.preference, reference_N)
