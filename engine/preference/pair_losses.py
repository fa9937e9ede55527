"""Compute the DPO and ORPO losses of pairs from the log probabilities of their answers.

DPO: Rafailov et al., arXiv:2305.18290, equation 7; with label smoothing Mitchell's conservative DPO.
ORPO: Hong et al., arXiv:2403.07691, equations 4 to 7. Both take the tokens of the answer alone. TRL's
ORPO counts the prompt's tokens in the chosen answer's loss too; the paper does not.

The gradient is exact: torch gives each answer's coefficient, and each of its tokens takes that as its
weight (engine/vocabulary/loss.py). Sums are in fp64, because they are large and their differences small.

Shape letters: T tokens of a row, M targets, D documents, P pairs. Documents 2 p and 2 p + 1 are the
chosen and the rejected answer of pair p.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from engine.config.preference_section import PreferenceConfig
from engine.data.packing import Batch
from engine.kernels.ops import IGNORE

CERTAIN = -1e-9  # nats a token; at 0 the odds of an answer would be infinite


def pair_losses(
    section: PreferenceConfig, logp_D: Tensor, count_D: Tensor, reference_D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the loss and the reward margin of each pair [P], in nats and fp64.

    logp_D: summed log probability of each answer, in nats. count_D: its tokens. reference_D: logp_D of
    the reference model; None for ORPO. The margin is beta times the difference of the answers' log
    ratios; for ORPO of their mean log probabilities. Above 0 the model prefers the chosen answer.
    """
    beta = section.beta
    if section.loss == "dpo":
        ratio_D = logp_D - reference_D
        margin_P = beta * (ratio_D[0::2] - ratio_D[1::2])
        smoothing = section.label_smoothing
        return -(1.0 - smoothing) * logsigmoid(margin_P) - smoothing * logsigmoid(-margin_P), margin_P
    mean_D = logp_D / count_D.clamp(min=1)
    known_D = mean_D.clamp(max=CERTAIN)
    log_odds_D = known_D - torch.log(-torch.expm1(known_D))
    ratio_P = log_odds_D[0::2] - log_odds_D[1::2]
    return -mean_D[0::2] - beta * logsigmoid(ratio_P), beta * (mean_D[0::2] - mean_D[1::2])


def row_loss(section: PreferenceConfig, losses_M: Tensor, batch: Batch) -> Tensor:
    """Return the summed loss of the pairs in a row, an fp32 scalar in nats.

    losses_M: -log p at each of the row's `target_rows`. Documents without targets fill a row up; they
    count as no pair.
    """
    count_D = _document_sums((batch.labels_T != IGNORE).long(), batch)
    at_T = torch.zeros(batch.num_tokens, dtype=torch.float64, device=losses_M.device)
    logp_D = -_document_sums(at_T.index_copy(0, batch.target_rows, losses_M.double()), batch)
    loss_P, _ = pair_losses(section, logp_D, count_D, batch.reference)
    return torch.where(count_D[0::2] > 0, loss_P, 0.0).sum().float()


def _document_sums(values_T: Tensor, batch: Batch) -> Tensor:
    """Return the sum over each document [D]. Running sums in fp64 do not lose what the difference needs."""
    sums = torch.cat([values_T.new_zeros(1), values_T.cumsum(0)])
    ends = sums.index_select(0, batch.document_offsets.long())
    return ends[1:] - ends[:-1]
