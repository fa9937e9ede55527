"""Find the reference model's log probabilities of answers, computed once on a machine and kept on the disk.

The reference is the base model, or that with the adapter of `lora.start_from`. Starts from the base's
weights (LoftQ, PiSSA) are no part of it. What it says of a sample depends on base model,
template, sample and length alone. So all trials of a machine share it, whatever their rank or rate.

It is kept in parts, so that a killed pass goes on where it was. A part is known by what it was
computed from: the model's content and precision, the device, and the tokens of its samples. The parts
used last are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.adapter.lora import detach
from engine.adapter.start import attach_started
from engine.config.preference_section import IN_A_PAIR
from engine.config.trial import TrainConfig
from engine.data.packing import collate, plan_once, rows_of
from engine.data.view import AnyView, make_cursor
from engine.model.base import Base
from engine.sources.identity import identify_model, identify_start
from engine.system.shared_cache import build_once, forget_old

VERSION = 1
PART_TOKENS = {"cpu": 2**13, "cuda": 2**19}  # tokens of a part: what a killed pass loses takes seconds
FILE, KIND = "logp.npy", "reference"
MOST = 4096  # parts kept, of a few KB: 2 billion tokens on CUDA


def reference_logps(
    config: TrainConfig,
    base: Base,
    view: AnyView,
    wanted: np.ndarray | None = None,
    before_each: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Return log p of each sample's target tokens together [N], in nats and fp64; NaN for samples that are not wanted.

    The adapter must be attached as `lora.start_from` has it, and add nothing or be detached without. wanted:
    indices of samples; all by default. before_each: called before each row that is computed; an
    exception from it ends the pass, and what was computed is kept.
    """
    found = np.full(len(view), np.nan)
    device = "cuda" if base.device.type == "cuda" else "cpu"
    model = json.dumps(_identity(config, base), sort_keys=True)
    longest = view.max_seq_length
    for part in _parts(view, np.arange(len(view)) if wanted is None else wanted, PART_TOKENS[device]):
        digest = hashlib.sha256(model.encode())
        for i in part:
            sample = view[i]
            digest.update(np.int64(len(sample.input_ids)).tobytes())
            digest.update(np.asarray(sample.input_ids, np.int64).tobytes() + np.asarray(sample.is_target, np.bool_).tobytes())

        def build(folder: Path, part: list[int] = part) -> None:
            np.save(folder / FILE, _computed(base, view, part, longest, before_each))

        folder = build_once(f"{KIND}-{digest.hexdigest()[:24]}", build)
        with contextlib.suppress(OSError):  # another user's cache
            os.utime(folder)
        found[part] = np.load(folder / FILE)
    forget_old(KIND, MOST)
    return found


def wanted_samples(config: TrainConfig, view: AnyView) -> np.ndarray:
    """Return the indices of all training samples that a trial can see, both of each pair.

    In the order in which it sees them, or that of the data if it sees all. So trials with other seeds
    share what they can.
    """
    cursor, seen, tokens = make_cursor(view, config), {}, 0
    num_pairs, most = len(view) // IN_A_PAIR, config.train.max_tokens + config.longest_step * len(config.train.report_grid())
    while tokens <= most and len(seen) < num_pairs:
        for pair in (pair for one_bin in cursor.take(config.bins_per_step) for pair in one_bin):
            seen[pair] = None
            tokens += int(view.lengths[IN_A_PAIR * pair : IN_A_PAIR * (pair + 1)].sum())
    pairs = np.arange(num_pairs) if len(seen) == num_pairs else np.array(list(seen))
    return np.stack([IN_A_PAIR * pairs, IN_A_PAIR * pairs + 1], axis=1).reshape(-1)


def started_reference(config: TrainConfig, base: Base, view: AnyView) -> np.ndarray:
    """Return `reference_logps` of all samples, for a base that has no adapter now."""
    if config.lora.start_from is None:
        return reference_logps(config, base, view)
    layers = attach_started(base.model, base.linear_names, config)
    try:
        return reference_logps(config, base, view)
    finally:
        detach(base.model, layers)


def _identity(config: TrainConfig, base: Base) -> list[Any]:
    model = config.model.model_dump(mode="json", exclude={"embeddings"})
    content = identify_model(config.model)
    if content:
        del model["path"], model["revision"]
    card = torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else "cpu"
    return [VERSION, model, content, identify_start(config.lora), str(base.dtype), card, torch.__version__]


def _parts(view: AnyView, samples: np.ndarray, most: int) -> Iterator[list[int]]:
    """Yield the samples in parts of up to so many tokens."""
    part, tokens = [], 0
    for i in samples.tolist():
        if part and tokens + int(view.lengths[i]) > most:
            yield part
            part, tokens = [], 0
        part.append(i)
        tokens += int(view.lengths[i])
    if part:
        yield part


@torch.no_grad()
def _computed(base: Base, view: AnyView, part: list[int], longest: int, before_each: Callable[[], None]) -> np.ndarray:
    """Return log p of each sample's targets, by rows as those of an evaluation."""
    was_training, found = base.model.training, []
    capacity = base.evaluation_row_tokens(longest)
    base.model.eval()
    try:
        for row in rows_of(plan_once(view.lengths[part], capacity), 1, base.shares_rows(longest)):
            before_each()
            batch = collate([view[part[k]] for k in row])
            losses_M = base.target_losses(batch.to(base.device)).double().cpu().numpy()
            place_M = np.searchsorted(batch.document_offsets.numpy(), batch.target_rows.numpy(), side="right") - 1
            found.append(-np.bincount(place_M, weights=losses_M, minlength=len(row)))
    finally:
        base.model.train(was_training)
    return np.concatenate(found)
