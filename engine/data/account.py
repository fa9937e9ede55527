"""Count what became of a data set: read, left out, cut, used."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.command_answers import EVALUATION, TRAINING, DataAccount
from engine.config.data_section import DataConfig
from engine.config.preference_section import IN_A_PAIR, PREFERENCE
from engine.data.row_pipeline import RowCounts, merged
from engine.data.source_files import NamedSource
from engine.data.view import AnyView, JoinedView
from engine.data.views import evaluation_sources, load_counted_data


def account_data(config: DataConfig, tokenizer: Any) -> tuple[AnyView, AnyView, list[DataAccount]]:
    """Load the data as load_data does; return (train, eval, the accounts of both).

    A mixture has an account, and one for each source. Several evaluation sets have one each.
    """
    train, evaluation, counts = load_counted_data(config, tokenizer)
    sources = {name: found for (part, name), found in counts.items() if part == TRAINING}
    in_pairs = config.format == PREFERENCE
    accounts = [make_account(TRAINING, train, merged(sources.values()), 0, in_pairs)]
    if isinstance(train, JoinedView):
        accounts += [make_account(f"{TRAINING}/{name}", one, sources[name], 0, in_pairs) for name, one in train.parts.items()]
    own = {name for name, source in evaluation_sources(config).items() if isinstance(source, NamedSource)}
    brought = config.eval is None  # with a builtin
    for name, one in evaluation.parts.items() if config.eval_sets else (("", evaluation),):
        leaked = num_common_rows(train, one) if name in own and not brought else 0
        part = f"{EVALUATION}/{name}" if name else EVALUATION
        accounts.append(make_account(part, one, counts[EVALUATION, name], leaked, in_pairs))
    return train, evaluation, accounts


def make_account(part: str, view: AnyView, counts: RowCounts, num_leaked: int, in_pairs: bool = False) -> DataAccount:
    """Return the account of one view on a source with these counts. in_pairs: its samples are pairs."""
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
        num_dropped=view.num_dropped // (IN_A_PAIR if in_pairs else 1),
        num_lost_tokens=view.num_given_tokens - view.num_used_tokens,
        num_tokens=int(view.lengths.sum()),
        num_targets=view.num_targets(),
        num_leaked=num_leaked,
        num_pairs=len(view) // IN_A_PAIR if in_pairs else 0,
        num_bos=counts.num_bos,
        num_eos=counts.num_eos,
        bad_rows=counts.reasons,
        notes=counts.notes,
    )


def num_common_rows(train: AnyView, evaluation: AnyView) -> int:
    """Return how many rows of `evaluation` have the tokens of a row of `train`."""
    return int(np.isin(evaluation.row_hashes, train.row_hashes).sum())
