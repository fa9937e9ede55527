"""Make samples of random tokens whose lengths follow a drawn distribution."""

from __future__ import annotations

import copy
import math
import random
from typing import Any, Self

import numpy as np

from engine.data.packing import Sample

SHORTEST, BATCH, MOST_SAMPLES = 8, 256, 20_000
KINDS = ("lognormal", "bimodal", "tiny", "full", "uniform")


def draw_lengths(generator: random.Random) -> dict[str, Any]:
    """Return a distribution of lengths: its kind and numbers, and the share of a sample's tokens that carry loss."""
    kind = generator.choices(KINDS, weights=(10, 4, 3, 2, 3))[0]
    low, high = generator.uniform(15, 200), generator.uniform(0.6, 1.0)
    numbers: dict[str, dict[str, float]] = {
        "lognormal": {"mean": generator.uniform(3.5, 7.5), "deviation": generator.uniform(0.2, 1.3)},
        "bimodal": {"short": low, "long": high, "share": generator.uniform(0.05, 0.8)},
        "tiny": {"most": generator.uniform(12, 90)},
        "full": {},
        "uniform": {"least": generator.uniform(0.0, 0.7)},
    }
    given = {name: round(value, 3) for name, value in numbers[kind].items()}
    return {"kind": kind, **given, "targets": round(generator.uniform(0.05, 1.0), 3)}


class SampleView:
    """Stand in for a View: samples that are all there, and their lengths."""

    def __init__(self, lengths: np.ndarray, samples: list[Sample]) -> None:
        self.lengths, self._samples = lengths, samples

    def __getitem__(self, i: int) -> Sample:
        return self._samples[i]

    def targets_of(self, samples: np.ndarray) -> np.ndarray:
        return np.array([self._samples[i].is_target[1:].sum() for i in samples])

    def first(self, number: int) -> Self:
        """Return a view of the first samples."""
        view = copy.copy(self)
        view.lengths = self.lengths[:number]
        return view


class DrawnView(SampleView):
    """Samples of at most `longest` tokens, of at least `num_tokens` in all.

    lengths: what `draw_lengths` returns.
    """

    def __init__(self, lengths: dict[str, Any], longest: int, num_tokens: int, vocab_size: int, seed: int) -> None:
        random_ = np.random.default_rng([seed, longest])
        found = np.empty(0, np.int64)
        while found.sum() < num_tokens and len(found) < MOST_SAMPLES:
            drawn = _lengths(lengths, longest, random_)
            found = np.append(found, np.clip(np.rint(drawn), min(SHORTEST, longest), longest).astype(np.int64))
        enough = 1 + int(np.searchsorted(found.cumsum(), num_tokens))
        found = found[: max(2, enough)]
        super().__init__(found, [self._sample(length, lengths["targets"], vocab_size, random_) for length in found])

    @staticmethod
    def _sample(length: int, targets: float, vocab_size: int, random_: np.random.Generator) -> Sample:
        ids = random_.integers(0, vocab_size, length)
        return Sample(ids, np.arange(length) >= min(length - 2, math.floor(length * (1.0 - targets))))

    def up_to(self, num_tokens: int) -> DrawnView:
        """Return a view of the first samples, two or more, up to so many tokens."""
        return self.first(max(2, int(np.searchsorted(self.lengths.cumsum(), num_tokens, side="right"))))


def _lengths(given: dict[str, Any], longest: int, random_: np.random.Generator) -> np.ndarray:
    if given["kind"] == "lognormal":
        return np.exp(random_.normal(given["mean"], given["deviation"], BATCH))
    if given["kind"] == "bimodal":
        long = random_.normal(given["long"] * longest, 0.05 * longest, BATCH)
        return np.where(random_.random(BATCH) < given["share"], long, random_.exponential(given["short"], BATCH))
    if given["kind"] == "tiny":
        return random_.uniform(SHORTEST, given["most"], BATCH)
    if given["kind"] == "full":
        return np.full(BATCH, longest)
    return random_.uniform(given["least"] * longest, longest, BATCH)
