"""Select samples from tokenised sources, and join what several sources give."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from engine.config.preference_section import IN_A_PAIR
from engine.config.trial import TrainConfig
from engine.data.packing import Cursor, Mixture, Sample
from engine.data.tokens import TokenSet
from engine.errors import InputError
from engine.units import counted

SCANNED = 2**24  # tokens at once


class View:
    """Select rows of a TokenSet and fit their samples into a length.

    overlong: what happens to longer samples: `cut`, `drop`, `split` into pieces, or `error`. Samples
    without a target within the length are left out; `num_dropped` counts them. Pieces overlap by
    one token, which the second does not predict, so that each target is learnt once. part: training
    or evaluation, for messages. in_pairs: each row is a pair of samples, chosen and rejected, which
    are used both or not at all; if their tokens are equal within the length, there is nothing to prefer.
    """

    def __init__(
        self, tokens: TokenSet, rows: np.ndarray, max_seq_length: int, overlong: str = "cut", part: str = "training",
        in_pairs: bool = False,
    ) -> None:  # fmt: skip
        self._tokens, self.rows, self.max_seq_length = tokens, rows, max_seq_length
        self._given = tokens.samples_of(rows)
        full = tokens.offsets[self._given + 1] - tokens.offsets[self._given]
        self.num_given_tokens = int(full.sum())
        if overlong == "error" and (full > max_seq_length).any():
            count = int((full > max_seq_length).sum())
            longer = f"{count:,} of {counted(len(full), f'{part} sample')} {'is' if count == 1 else 'are'} longer"
            longer += f" than {counted(max_seq_length, 'token')}"
            others = "cut, drop" if in_pairs else "cut, drop, split"
            raise InputError("data.overlong", overlong, f"{longer}, the longest has {full.max():,}; or {others}")
        if overlong == "drop":
            kept = full <= max_seq_length
        else:
            kept = tokens.first_target[self._given] < max_seq_length
        if in_pairs:
            kept &= ~_are_equal(tokens, self._given, np.minimum(full, max_seq_length))
            kept = np.repeat(kept.reshape(-1, IN_A_PAIR).all(axis=1), IN_A_PAIR)
        if overlong == "split":
            self._chosen, self._starts, self.lengths = _pieces(tokens, self._given, full, max_seq_length)
        else:
            self._chosen = self._given[kept]
            self._starts, self.lengths = tokens.offsets[self._chosen], np.minimum(full[kept], max_seq_length)
        self.num_dropped = len(full) - len(np.unique(self._chosen))
        self.num_cut = int((tokens.offsets[self._chosen + 1] - self._starts > self.lengths).sum()) if overlong == "cut" else 0

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def row_hashes(self) -> np.ndarray:
        """Return the content hash of each row that was selected."""
        return self._tokens.row_hashes[self.rows]

    @property
    def num_equal_rows(self) -> int:
        """Return the number of rows that repeat an earlier one."""
        return len(self.rows) - len(np.unique(self.row_hashes))

    @property
    def num_rows(self) -> int:
        """Return the number of rows with at least one sample that is used."""
        return len(np.unique(np.searchsorted(self._tokens.row_offsets, self._chosen, side="right")))

    @property
    def num_used_tokens(self) -> int:
        """Return the tokens of the data that are read at least once in a pass."""
        repeated = len(self._chosen) - len(np.unique(self._chosen))
        return int(self.lengths.sum()) - repeated

    def num_targets(self) -> int:
        """Return the number of tokens that carry loss in one pass."""
        return int(self.targets_of(np.arange(len(self))).sum())

    def targets_of(self, samples: np.ndarray) -> np.ndarray:
        """Return the number of tokens that carry loss in each of these samples."""
        starts = self._starts[samples]
        return self._tokens.count_targets(starts + 1, starts + self.lengths[samples])

    def digest(self) -> str:
        """Return 16 hex digits of the samples, at full length and in order.

        They are equal for the same tokens with the same first targets. The data's own loss masks
        count where there are any.
        """
        parts = [self._tokens.hashes[self._given], self._tokens.first_target[self._given].astype(np.uint64)]
        masks = self._tokens.masks[self._given]
        content = np.stack([*parts, masks] if masks.any() else parts)
        return hashlib.sha256(content.tobytes()).hexdigest()[:16]

    def targets_digest(self) -> str:
        """Return a digest of the tokens that carry loss within the length, in order."""
        found = hashlib.sha256()
        for i in range(len(self)):
            sample = self[i]
            found.update(sample.input_ids[1:][sample.is_target[1:]].tobytes())
        return found.hexdigest()[:16]

    def largest_id(self) -> int:
        """Return the largest token id in the arrays that these samples come from."""
        return int(np.max(self._tokens.input_ids)) if len(self._tokens.input_ids) else 0

    def ids_among(self, ids: list[int]) -> set[int]:
        """Return which of these token ids are in the arrays that these samples come from."""
        array, found = self._tokens.input_ids, set()
        for start in range(0, len(array), SCANNED):
            part = array[start : start + SCANNED]
            found |= set(part[np.isin(part, ids)].tolist())
        return found

    def row_of(self, i: int) -> int:
        """Return the place of the sample's row among the rows of its source that could be read, from 0."""
        return int(np.searchsorted(self._tokens.row_offsets, self._chosen[i], side="right")) - 1

    def is_whole(self, i: int) -> bool:
        """Return True if nothing of the sample lies beyond the length."""
        offsets, sample = self._tokens.offsets, self._chosen[i]
        return bool(self._starts[i] == offsets[sample] and self.lengths[i] == offsets[sample + 1] - offsets[sample])

    def __getitem__(self, i: int) -> Sample:
        part = slice(self._starts[i], self._starts[i] + self.lengths[i])
        return Sample(np.asarray(self._tokens.input_ids[part]), np.asarray(self._tokens.is_target[part]))


class JoinedView:
    """Join the samples of several sources, or of several evaluation sets, one after the other.

    It has what a View has; a row has no place of its own in it. parts: name -> view, each with
    samples. weights: of evaluation sets in the eval loss, or of a mixture's sources in its tokens;
    empty for what is held out of a mixture.
    """

    def __init__(self, parts: Mapping[str, View | JoinedView], weights: Mapping[str, float] | None = None) -> None:
        self.parts, self.weights = dict(parts), dict(weights or {})
        views = list(self.parts.values())
        self.max_seq_length = views[0].max_seq_length
        self.lengths = np.concatenate([view.lengths for view in views])
        self.rows = np.concatenate([view.rows for view in views])
        self._starts = np.cumsum([0, *map(len, views)])
        self.num_given_tokens, self.num_dropped = self._sum("num_given_tokens"), self._sum("num_dropped")
        self.num_cut = self._sum("num_cut")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def row_hashes(self) -> np.ndarray:
        """Return the content hash of each row that was selected."""
        return np.concatenate([view.row_hashes for view in self.parts.values()])

    @property
    def num_equal_rows(self) -> int:
        """Return the number of rows that repeat an earlier one, of another part too."""
        return len(self.rows) - len(np.unique(self.row_hashes))

    @property
    def num_rows(self) -> int:
        """Return the number of rows with at least one sample that is used."""
        return self._sum("num_rows")

    @property
    def num_used_tokens(self) -> int:
        """Return the tokens of the data that are read at least once in a pass."""
        return self._sum("num_used_tokens")

    def num_targets(self) -> int:
        """Return the number of tokens that carry loss in one pass."""
        return sum(view.num_targets() for view in self.parts.values())

    def targets_of(self, samples: np.ndarray) -> np.ndarray:
        """Return the number of tokens that carry loss in each of these samples."""
        found = np.zeros(len(samples), dtype=np.int64)
        for start, end, view in zip(self._starts, self._starts[1:], self.parts.values(), strict=False):
            here = (samples >= start) & (samples < end)
            found[here] = view.targets_of(samples[here] - start)
        return found

    def digest(self) -> str:
        """Return 16 hex digits of the samples of all parts, in order."""
        return self._digest(lambda view: view.digest())

    def targets_digest(self) -> str:
        """Return a digest of the tokens that carry loss within the length, in order."""
        return self._digest(lambda view: view.targets_digest())

    def largest_id(self) -> int:
        """Return the largest token id in the arrays that these samples come from."""
        return max(view.largest_id() for view in self.parts.values())

    def ids_among(self, ids: list[int]) -> set[int]:
        """Return which of these token ids are in the arrays that these samples come from."""
        return set().union(*(view.ids_among(ids) for view in self.parts.values()))

    def is_whole(self, i: int) -> bool:
        """Return True if nothing of the sample lies beyond the length."""
        view, place = self._at(i)
        return view.is_whole(place)

    def __getitem__(self, i: int) -> Sample:
        view, place = self._at(i)
        return view[place]

    def _at(self, i: int) -> tuple[View | JoinedView, int]:
        part = int(np.searchsorted(self._starts, i, side="right")) - 1
        return list(self.parts.values())[part], int(i - self._starts[part])

    def _sum(self, name: str) -> int:
        return sum(getattr(view, name) for view in self.parts.values())

    def _digest(self, of: Callable[[Any], str]) -> str:
        text = "\n".join(f"{name} {of(view)}" for name, view in self.parts.items())
        return hashlib.sha256(text.encode()).hexdigest()[:16]


AnyView = View | JoinedView


def make_cursor(view: AnyView, config: TrainConfig) -> Cursor:
    """Return the cursor at the start of the training samples, mixed by their weights if they have several sources.

    It walks through pairs if the samples are pairs: pair i has the samples 2 i and 2 i + 1.
    """
    mixture, size = None, IN_A_PAIR if config.learns_pairs else 1
    if isinstance(view, JoinedView):
        lengths = [_joined(one.lengths, size) for one in view.parts.values()]
        mixture = Mixture.of(lengths, [view.weights[name] for name in view.parts])
    return Cursor(_joined(view.lengths, size), config.bin_tokens, config.data.packing, config.train.seed, mixture)


def _joined(lengths: np.ndarray, size: int) -> np.ndarray:
    """Return the lengths of `size` neighbours together."""
    return lengths.reshape(-1, size).sum(axis=1) if size > 1 else lengths


def _are_equal(tokens: TokenSet, samples: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return whether each sample has the tokens of the other one of its pair, within these lengths."""
    equal = np.repeat(lengths[0::2] == lengths[1::2], IN_A_PAIR)
    for i in np.flatnonzero(equal[0::2]) * IN_A_PAIR:
        one, other = (tokens.input_ids[start : start + lengths[i]] for start in tokens.offsets[samples[i : i + IN_A_PAIR]])
        equal[i : i + IN_A_PAIR] = np.array_equal(one, other)
    return equal


def _pieces(tokens: TokenSet, given: np.ndarray, full: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (sample, start, length) of the pieces that have a target."""
    counts = np.maximum(1, -(-(full - 1) // (length - 1)))
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    samples, before = np.repeat(given, counts), number * (length - 1)
    starts, lengths = tokens.offsets[samples] + before, np.minimum(length, np.repeat(full, counts) - before)
    kept = tokens.count_targets(starts + 1, starts + lengths) > 0
    return samples[kept], starts[kept], lengths[kept]
