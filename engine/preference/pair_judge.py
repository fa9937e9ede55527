"""Judge pairs by the losses of their answers: the preference loss of each pair, and its reward margin."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from engine.config.preference_section import IN_A_PAIR, PreferenceConfig
from engine.preference.pair_losses import pair_losses
from engine.sample_losses import SampleLosses


@dataclass(frozen=True)
class PairJudge:
    """Turn the losses of 2 P answers into those of P pairs.

    reference_N: see engine/preference/reference_logps.py; None for ORPO.
    """

    section: PreferenceConfig
    reference_N: np.ndarray | None

    def __call__(self, losses: SampleLosses) -> SampleLosses:
        """Return the loss of each pair, whose mean is the eval loss, with its margin.

        It is computed with preference.eval_beta, if given, and without label smoothing. Only losses of
        the same kind compare, so their digest tells the kind.
        """
        section = self.section.judged
        logp_N, count_N = -torch.tensor(losses.sums, dtype=torch.float64), torch.tensor(losses.num_targets)
        reference_N = None if self.reference_N is None else torch.from_numpy(self.reference_N)
        loss_P, margin_P = pair_losses(section, logp_N, count_N, reference_N)
        kind = f"{losses.evaluation_digest} {section.loss} {section.beta}"
        return SampleLosses(
            hashlib.sha256(kind.encode()).hexdigest()[:16],
            tuple(loss_P.tolist()),
            (1,) * len(loss_P),
            {name: number // IN_A_PAIR for name, number in losses.sets.items()},
            losses.weights,
            tuple(margin_P.tolist()),
        )
