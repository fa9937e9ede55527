"""Record passes over a micro-batch as CUDA graphs, one for each row size, and replay them.

A graph replays in one launch. A fused layer takes about 60 launches forward and backward (counted:
1,859 for 30 layers, without copies). With short rows and small models the host needs longer for the
launches than the device for the work. On one host, SmolLM2-135M at 512 tokens spent 160 ms on
launches for 9 ms of work.

Rows are padded so that few sizes occur (engine/data/row_sizes.py). A trial's sizes are recorded
before its first step, the largest first, so that the smaller ones find room in the same memory.
Recordings outlive the trial (recordings.py). Graphs read what changes between rows from fixed
tensors: inputs, offsets, the number of targets, the adapter and the dropout's seed. They add to the
adapter's gradient in place.

A plan with copies to host memory uses none. The fp32 loss of a padded row equals that of the row up
to rounding.

A library's token mixer, or router of experts, is code that we do not know: it may have kept what it
found in the row that was recorded. So the first recording of such a model is replayed for two rows that differ in nothing
but their boundaries, and compared with the passes that are not recorded.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.adapter.flat import AdapterMemory
from engine.data.packing import Batch, Sample, collate
from engine.data.row_sizes import FewSizes, Size
from engine.errors import first_line
from engine.model.base import Base
from engine.training import recordings as recorder
from engine.training.recordings import MAX_OF_A_KIND, RecordedKind, RecordedRow, Recordings

# The two rows that a recording is tried on: most tokens of a sample, and the share of their difference
# that replayed and unrecorded pass may be apart. They have differed by rounding, if at all.
TRIED_TOKENS, TRIED_APART = 192, 0.1
# Gradients that are compared, evenly spread: four copies of an adapter on experts have no place (2.4 GiB each).
TRIED_GRADIENTS = 2**22
MEASURES = torch.cuda.memory_allocated, torch.cuda.max_memory_allocated


@dataclass(frozen=True)
class RowLoss:
    """Hold what gives a row's summed loss, and whether it reads the row's `reference`."""

    of_row: Callable[[Batch], Tensor]
    has_reference: bool = False


class Graphs:
    """Compute rows of one kind of pass by recordings, which are made on first use.

    With `trains`, a pass is forward and backward, in the mode in which the model is. Otherwise it is
    the forward pass of an evaluation, in evaluation mode. A replay does not change the mode: that
    takes 10 ms for 400 modules.
    """

    def __init__(
        self, base: Base, memory: AdapterMemory, key: Hashable, capacity: int, longest: int, trains: bool, loss: RowLoss | None
    ) -> None:
        """Take the recordings of `base` for this kind of pass.

        key: what decides the pass besides the adapter's memory and the row, such as the plan, and the
        numbers of the loss. capacity, longest: most tokens in a row and in a sample. loss: that of a row
        in training; the base's by default. `few` may be set: the sizes that rows in training get.
        """
        self.few = FewSizes()
        self._loss = loss or RowLoss(base.loss)
        self._has_reference = trains and self._loss.has_reference
        self._base, self._memory, self._capacity, self._longest, self._trains = base, memory, capacity, longest, trains
        self._recordings = Recordings.of(base)
        self._began_s = self._recordings.recording_s
        self._kind: RecordedKind = self._recordings.kind(key, memory, base.read_addresses())

    @property
    def recording_s(self) -> float:
        """Return the seconds that the base's passes have been recorded for since this object was made."""
        return self._recordings.recording_s - self._began_s

    @property
    def peak_bytes(self) -> int:
        """Return the bytes that torch would have allocated at the peak of this pass now, if it were not recorded."""
        return 0 if self._base.device.type != "cuda" else torch.cuda.memory_allocated() + self._kind.activation_bytes

    def record(self, sizes: Iterable[Size]) -> None:
        """Record these sizes if they are not yet, the largest first. Changes no gradient."""
        wanted, rows = set(sizes), self._kind.rows
        missing = sorted(wanted - rows.keys(), reverse=True)[:MAX_OF_A_KIND]
        for size in list(rows.keys() - wanted)[: max(0, len(rows) + len(missing) - MAX_OF_A_KIND)]:
            self._drop(size)  # an earlier trial's, whose data differed
        for size in missing[: MAX_OF_A_KIND - len(rows)]:
            if self._recordings.can_record:
                self._record(size)

    def backward(self, batch: Batch, num_targets: int) -> Tensor:
        """Add the gradient of loss / num_targets to the adapter's gradient, and return the loss.

        `batch` must be on the host. The loss is an fp32 scalar in nats, valid until the next call.
        """
        size = Size.of(batch, self._capacity, self._longest)
        return self._run(self.few.size_of(batch, size, self._longest), batch, num_targets)

    def target_losses(self, batch: Batch) -> Tensor:
        """Return the losses of a padded row's `target_rows` [M], on any device; valid until the next call."""
        return self._run(Size.padded(batch), batch, 1)

    def _run(self, size: Size, batch: Batch, num_targets: int) -> Tensor:
        if not self._kind.rows:  # after an error too, when all were dropped: as before the first step
            self.record(self.few.sizes)
        known = self._kind.rows.get(size)
        if known is None and self._recordings.can_record:
            self._make_place()
            known = self._record(size)
        row = self._for_any_row(size, size.pad(batch, self._longest)) if self._trains else batch
        if known is None:
            return self._compute(self._fixed(row, num_targets))
        known.fill(row, num_targets)
        known.replay()
        return known.loss

    def _make_place(self) -> None:
        """Drop the recording made last if there is no place for one more: that of a rare size.

        A row that is not recorded would need its activations beside those of the pool. Recording it
        takes the host about as long as launching it.
        """
        while len(self._kind.rows) >= MAX_OF_A_KIND:
            self._drop(next(reversed(self._kind.rows)))

    def _drop(self, size: Size) -> None:
        if self._base.device.type == "cuda":
            torch.cuda.synchronize(self._base.device)  # it may still run
        del self._kind.rows[size]

    def _fixed(self, row: Batch, num_targets: int) -> RecordedRow:
        device = self._base.device
        return RecordedRow(row.to(device), torch.full((), num_targets, dtype=torch.float32, device=device))

    def _compute(self, row: RecordedRow) -> Tensor:
        if self._trains:
            loss = self._loss.of_row(row.batch)
            (loss / row.divisor).backward()
            return loss.detach()
        was_training = self._base.model.training
        self._base.model.eval()
        try:
            return self._base.target_losses(row.batch)
        finally:  # after an error too: the trial goes on, and its next steps are recorded in this mode
            self._base.model.train(was_training)

    def _record(self, size: Size) -> RecordedRow | None:
        """Record a row size. If it is the first of its kind, a small row is computed before."""
        began_s = time.perf_counter()
        try:
            if not self._follows_boundaries():
                raise RuntimeError("a recorded pass does not read where the samples of its row begin")
            row, used = self._captured(size)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # model code waits for the device: no graphs, same numbers
            warnings.warn(f"no CUDA graphs for this model: {first_line(error)}", stacklevel=2)
            self._recordings.start_over()
            self._recordings.can_record = False
            return None
        finally:
            self._recordings.recording_s += time.perf_counter() - began_s
        self._kind.activation_bytes = max(self._kind.activation_bytes, used)
        self._kind.rows[size] = row
        self._recordings.trim(self._memory)
        return row

    def _follows_boundaries(self) -> bool:
        """Return True if a replay computes its own row, not the one recorded; tried once for each base with mixers or experts."""
        if self._recordings.follows_boundaries is None:
            self._recordings.follows_boundaries = not self._base.calls_library or self._try_two_rows()
        return self._recordings.follows_boundaries

    def _try_two_rows(self) -> bool:
        """Record a small row, and replay it for two rows of its size with the same tokens and other boundaries."""
        longer = max(2, min(TRIED_TOKENS, 2 * self._longest // 3))
        ids = np.random.default_rng(0).integers(0, self._base.model.config.get_text_config().vocab_size, longer + longer // 3 + 1)
        samples = [np.split(ids, [border]) for border in (longer, len(ids) - longer)]
        reference = np.zeros(len(samples)) if self._has_reference else None
        rows = [collate([Sample(part, np.ones(len(part), bool)) for part in two], reference) for two in samples]
        size = Size.of(rows[0], self._capacity, self._longest)
        rows = [self._for_any_row(size, size.pad(row, self._longest)) for row in rows]
        known, _ = self._captured(size)

        def replayed(row: Batch) -> Tensor:
            known.fill(row, 1)
            known.replay()
            return known.loss

        right = [self._outcome(lambda row=row: self._compute(self._fixed(row, 1))) for row in rows]
        allowed = TRIED_APART * (right[0] - right[1]).norm()
        found = [self._outcome(lambda row=row: replayed(row)) for row in rows]
        return all(bool((a - b).norm() < allowed) for a, b in zip(found, right, strict=True))

    def _outcome(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return a pass's losses and a sample of the adapter's gradient as one vector; the gradient itself stays as it was."""
        gradient = self._memory.gradient
        before = gradient.to("cpu", copy=True) if gradient.any() else None
        gradient.zero_()
        step = gradient.numel() // TRIED_GRADIENTS | 1  # odd, so that it hits all features and ranks
        try:
            return torch.cat([compute().reshape(-1).float(), gradient[::step].float()])
        finally:
            gradient.zero_() if before is None else gradient.copy_(before)

    def _captured(self, size: Size) -> tuple[RecordedRow, int]:
        """Return the recorded row, and what its pass allocated beyond what was there before, if that is a new peak."""
        row = self._fixed(self._empty(size), 1)
        if not self._kind.is_warm:
            self._warm_up(Size.around(1, 1, 1, self._capacity, self._longest))
        now, peak = (measure() if self._base.device.type == "cuda" else 0 for measure in MEASURES)
        try:
            row.loss, row.replay = recorder.capture(lambda: self._compute(row), self._recordings.pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a library may have to load what it needs for this size
            self._recordings.start_over()
            self._warm_up(size)
            row.loss, row.replay = recorder.capture(lambda: self._compute(row), self._recordings.pool)
        highest = MEASURES[1]() if self._base.device.type == "cuda" else 0
        return row, highest - now if highest > peak else 0

    def _empty(self, size: Size) -> Batch:
        row = self._for_any_row(size, size.empty_row(self._longest))
        return replace(row, reference=torch.zeros(size.num_documents, dtype=torch.float64)) if self._has_reference else row

    def _for_any_row(self, size: Size, row: Batch) -> Batch:
        """Return a padded row whose lengths on the host hold for every row of its size.

        Attention on CUDA asks whether the row is a plain batch, and else only for the longest sample,
        so an upper bound serves all rows. A mixer would take whole samples' lengths from the host. The
        CPU needs the lengths themselves.
        """
        if self._base.device.type == "cpu":
            return row
        is_plain = size.whole and not self._base.has_mixers
        return replace(row, document_lengths=size.lengths if is_plain else (self._longest, 0))

    def _warm_up(self, size: Size) -> None:
        """Compute an empty row, so that kernels are compiled and libraries loaded. It adds zeros to the gradient."""
        if self._base.device.type != "cuda":
            return
        device = self._base.device
        side, random = _side_stream(device), torch.cuda.get_rng_state(device)
        row = self._fixed(self._empty(size), 1)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._compute(row)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.set_rng_state(random, device)
        self._kind.is_warm = True


def make_graphs(
    base: Base,
    memory: AdapterMemory,
    key: Hashable,
    capacity: int,
    longest: int,
    trains: bool = True,
    loss: RowLoss | None = None,
) -> Graphs | None:
    """Return graphs for `base`, or None if its attention, mixers, rows or an unfused layer rule them out."""
    return Graphs(base, memory, key, capacity, longest, trains, loss) if base.pads_rows(longest) else None


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream on which all first rows are computed.

    cuBLAS takes 2 x 32 MiB (Hopper) for every stream it is used on and never releases them. With
    one stream for each recording, 50 trials left 2 GiB behind.
    """
    return torch.cuda.Stream(device)
