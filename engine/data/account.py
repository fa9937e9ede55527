"""Count what became of a data set: read, left out, cut, used."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.command_answers import EVALUATION, TRAINING, DataAccount
from engine.config.data_section import ON_TRAINING_SAMPLES, DataConfig
from engine.data.row_pipeline import RowCounts
from engine.data.views import View, load_counted_data


def account_data(config: DataConfig, tokenizer: Any) -> tuple[View, View, list[DataAccount]]:
    """Load the data as load_data does; return (train, eval, the accounts of both)."""
    train, evaluation, (train_counts, eval_counts) = load_counted_data(config, tokenizer)
    leaked = 0 if config.eval in (None, ON_TRAINING_SAMPLES) else num_common_rows(train, evaluation)
    training = make_account(TRAINING, train, train_counts, 0)
    return train, evaluation, [training, make_account(EVALUATION, evaluation, eval_counts, leaked)]


def make_account(part: str, view: View, counts: RowCounts, num_leaked: int) -> DataAccount:
    """Return the account of one view on a source with these counts."""
    return DataAccount(
        part=part,
        max_seq_length=view.max_seq_length,
        num_read=counts.num_read,
        num_bad=counts.num_bad,
        num_equal=view.num_equal_rows,
        num_chosen=len(view.rows),
        num_used=view.num_rows,
        num_samples=len(view),
        num_cut=view.num_cut,
        num_dropped=view.num_dropped,
        num_lost_tokens=view.num_given_tokens - view.num_used_tokens,
        num_tokens=int(view.lengths.sum()),
        num_targets=view.num_targets(),
        num_leaked=num_leaked,
        num_bos=counts.num_bos,
        num_eos=counts.num_eos,
        bad_rows=counts.reasons,
        notes=counts.notes,
    )


def num_common_rows(train: View, evaluation: View) -> int:
    """Return how many rows of `evaluation` have the tokens of a row of `train`."""
    return int(np.isin(evaluation.row_hashes, train.row_hashes).sum())
