"""Tokenise rendered samples into arrays of tokens and targets on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.templates import Renderer, SampleError, TargetText, detect_format
from engine.errors import InputError
from engine.system.limited_child import Bounded, TooCostly

VERSION = 1  # of the token cache's content
CHUNK = 512  # texts per call of the tokenizer


@dataclass(frozen=True)
class TokenSet:
    """Hold all samples of one source, joined into long arrays.

    Sample i is offsets[i]:offsets[i + 1] of input_ids (int32) and is_target (bool). first_target[i]
    is the position of its first target token, and hashes[i] has 64 bits of its content's hash.
    """

    input_ids: np.ndarray
    is_target: np.ndarray
    offsets: np.ndarray
    first_target: np.ndarray
    hashes: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> TokenSet:
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls.__dataclass_fields__})

    def __len__(self) -> int:
        return len(self.offsets) - 1


def tokenise(texts: list[tuple[str, TargetText]], tokenizer: Any, folder: Path) -> None:
    """Write the arrays of a TokenSet into `folder`.

    texts: pairs of a sample's name for messages and its text. InputError for a sample without a
    target token.
    """
    ids, targets, lengths, first, hashes = [], [], [], [], []
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        encoded = tokenizer([t.text for _, t in chunk], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for (name, text), id_list, offsets in zip(chunk, encoded["input_ids"], encoded["offset_mapping"]):
            sample_ids = np.asarray(id_list, dtype=np.int32)
            is_target = _targets(np.asarray(offsets, dtype=np.int64).reshape(-1, 2), text.spans)
            where = np.flatnonzero(is_target[1:])  # no position predicts a sample's first token
            if len(where) == 0:
                raise InputError(name, text.text, "has no target token, so there is nothing to learn")
            ids.append(sample_ids)
            targets.append(is_target)
            lengths.append(len(sample_ids))
            first.append(int(where[0]) + 1)
            hashes.append(int.from_bytes(hashlib.sha256(sample_ids.tobytes()).digest()[:8], "little"))
    np.save(folder / "input_ids.npy", np.concatenate(ids))
    np.save(folder / "is_target.npy", np.concatenate(targets))
    np.save(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    np.save(folder / "first_target.npy", np.asarray(first, dtype=np.int64))
    np.save(folder / "hashes.npy", np.asarray(hashes, dtype=np.uint64))


def render_all(
    field: str, samples: Any, format_name: str, template: str | None, tokenizer: Any
) -> Iterator[tuple[str, TargetText]]:
    render = None
    with ExitStack() as child:
        for name, sample in samples:
            if not isinstance(sample, Mapping):
                raise InputError(name, sample, "must be an object with named columns")
            if render is None:
                render = Renderer(tokenizer, detect_format(sample, format_name, name), template).render
                if template is not None:
                    render = child.enter_context(Bounded(render))
            try:
                yield from ((name, text) for text in render(sample))
            except TooCostly as error:
                raise InputError("data.chat_template", template, f"{error} for {name}") from None
            except SampleError as error:
                raise InputError(name, dict(sample), str(error)) from error
            except KeyError as error:
                raise InputError(name, sorted(sample), f"column {error} is missing, but the first sample has it") from None


def _targets(offsets_L2: np.ndarray, spans: tuple[tuple[int, int], ...]) -> np.ndarray:
    start, end = offsets_L2[:, 0], offsets_L2[:, 1]
    hit = np.zeros(len(offsets_L2), dtype=bool)
    for low, high in spans:
        hit |= (end > low) & (start < high) & (end > start)
    return hit
