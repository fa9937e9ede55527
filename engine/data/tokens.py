"""Hold encoded samples as arrays of tokens and targets on disk, and write them piece by piece."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.dialogue.conversation import Encoded

VERSION = 5  # of the token cache's content
BUFFER = 1 << 16  # values that a column holds in memory before it writes them


@dataclass(frozen=True)
class TokenSet:
    """Hold all samples of one source, joined into long arrays.

    Sample i is offsets[i]:offsets[i + 1] of input_ids (int32) and is_target (bool). first_target[i]
    is the position of its first target token, and hashes[i] has 64 bits of its tokens' hash.
    masks[i] is 0, or a hash of its targets if the data themselves leave answers without loss.
    Row r of the source gave the samples row_offsets[r]:row_offsets[r + 1], at least one.
    row_hashes[r] is the hash of its only sample, or of all its samples' tokens, or of its content.
    """

    input_ids: np.ndarray
    is_target: np.ndarray
    offsets: np.ndarray
    first_target: np.ndarray
    hashes: np.ndarray
    masks: np.ndarray
    row_offsets: np.ndarray
    row_hashes: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> TokenSet:
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls.__dataclass_fields__})

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_rows(self) -> int:
        return len(self.row_hashes)

    def samples_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the indices of the rows' samples, in the order of `rows`."""
        first, count = self.row_offsets[rows], self.row_offsets[rows + 1] - self.row_offsets[rows]
        before = np.repeat(np.cumsum(count) - count, count)
        return np.repeat(first, count) + np.arange(count.sum()) - before

    def count_targets(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return the number of targets in each range start:end of positions."""
        # np.add.reduceat would first copy the whole array, at 8 bytes a token.
        is_target = np.asarray(self.is_target)
        return np.array([np.count_nonzero(is_target[a:b]) for a, b in zip(starts.tolist(), ends.tolist())], dtype=np.int64)


class _Column:
    """Write a one-dimensional .npy file of a length that only the end knows."""

    def __init__(self, folder: Path, name: str, dtype: type) -> None:
        self._file, self._dtype, self._length = (folder / f"{name}.npy").open("wb"), np.dtype(dtype), 0
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0
        self._header()

    def extend(self, values: object) -> None:
        part = np.asarray(values, dtype=self._dtype)
        self._waiting.append(part)
        self._num_waiting += len(part)
        if self._num_waiting >= BUFFER:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._file.seek(0)
        self._header()
        self._file.close()

    def _flush(self) -> None:
        if self._waiting:
            self._file.write(np.concatenate(self._waiting).tobytes())
        self._length, self._num_waiting, self._waiting = self._length + self._num_waiting, 0, []

    def _header(self) -> None:
        """Write the header; numpy leaves room in it for any length of the first axis."""
        described = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, described)


DTYPES = {
    "input_ids": np.int32, "is_target": np.bool_, "offsets": np.int64, "first_target": np.int64, "hashes": np.uint64,
    "masks": np.uint64, "row_offsets": np.int64, "row_hashes": np.uint64,
}  # fmt: skip


def tokenise(rows: Iterable[tuple[list[Encoded], bool, bytes | None]], folder: Path) -> None:
    """Write the arrays of a TokenSet into `folder`, row by row, and hold none of them.

    rows: the samples of each row, each with a target token behind its first; whether the data leave
    some of its answers without loss; and a digest to know the row by instead of by its tokens.
    """
    with ExitStack() as stack:
        columns = {name: _Column(folder, name, dtype) for name, dtype in DTYPES.items()}
        for column in columns.values():
            stack.callback(column.close)
        num_tokens = num_samples = 0
        columns["offsets"].extend([0])
        columns["row_offsets"].extend([0])
        for samples, is_masked, identity in rows:
            row = hashlib.sha256()
            for sample in samples:
                ids, is_target = np.asarray(sample.input_ids, np.int32), np.asarray(sample.is_target, np.bool_)
                num_tokens += len(ids)
                columns["input_ids"].extend(ids)
                columns["is_target"].extend(is_target)
                columns["offsets"].extend([num_tokens])
                columns["first_target"].extend([int(np.argmax(is_target[1:])) + 1])
                hashed = hashlib.sha256(ids.tobytes()).digest()
                columns["hashes"].extend([_number(hashed)])
                columns["masks"].extend([_number(hashlib.sha256(is_target.tobytes()).digest()) if is_masked else 0])
                row.update(hashed)
            num_samples += len(samples)
            columns["row_offsets"].extend([num_samples])
            columns["row_hashes"].extend([_number(identity or (hashed if len(samples) == 1 else row.digest()))])


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")
