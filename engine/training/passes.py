"""Compute a trial's rows under its plan: the gradients of a step, and the loss of an evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import AnyLora
from engine.adapter.token_rows import TokenRows
from engine.config.preference_section import IN_A_PAIR
from engine.config.trial import TrainConfig
from engine.data.packing import Batch, Cursor, collate, rows_of
from engine.data.row_sizes import FewSizes, Size
from engine.data.view import AnyView
from engine.errors import Interrupted, OutOfMemory
from engine.evaluation.eval_limits import needs_base
from engine.evaluation.eval_loss import EvaluationSet, evaluate
from engine.model.base import Base
from engine.model.device import free, peak_gib
from engine.planning.compute_plan import ComputePlan
from engine.planning.speed import EVALUATION_WAITS
from engine.preference.pair_losses import row_loss
from engine.preference.trial_pairs import TrialPairs
from engine.sample_losses import SampleLosses
from engine.training.cuda_graphs import Graphs, RowLoss, make_graphs
from engine.training.recordings import Recordings
from engine.units import GIB

# Bins whose rows tell which sizes to record before the first step.
FORESEEN_BINS = 4096
BASE_LOSSES = "base_eval_losses"  # in base.lasting: digest of the samples -> losses by set


@dataclass(frozen=True)
class StepResult:
    """Hold what a step's rows gave: their summed loss, on the device, and what to divide it by; and their tokens."""

    loss: Tensor
    divisor: int
    num_tokens: int
    num_targets: int


class Passes:
    """Compute rows with and without recordings. `view` and `samples` are the trial's data; `cursor` is somewhere in it.

    pads_unrecorded: rows that are not recorded get filler too. exempt: linear layers that multiply in
    the working dtype, whatever `train.matmul` says. pairs: what `find_pairs` found, which comes before the first pass.
    """

    def __init__(
        self, config: TrainConfig, base: Base, layers: dict[str, AnyLora], view: AnyView, samples: EvaluationSet, cursor: Cursor
    ) -> None:
        self._config, self._base, self._view, self._samples, self._cursor = config, base, view, samples, cursor
        self.pairs: TrialPairs | None = None
        self.exempt: tuple[str, ...] = ()
        self._recordings = Recordings.of(base)
        self._has_earlier = len(self._recordings) > 0
        self._layers = layers
        self.adapter = FlatAdapter(layers, base.dtype, self._recordings.adapter_memory(layers, base.dtype))
        alpha, memory = config.train.neftune_noise_alpha, self.adapter.memory
        memory.embedding_noise.fill_(alpha)
        base.add_noise(memory.embedding_noise if alpha else None, memory.noise)
        self._began_s = self._recordings.recording_s
        self._training: Graphs | None = None
        self._evaluation: Graphs | None = None
        self._may_record_evaluation = config.train.cuda_graphs is not False
        self.pads_unrecorded = base.device.type == "cuda" and base.pads_rows(config.data.max_seq_length)

    def find_pairs(self, evaluation: AnyView, interrupted: Callable[[], bool]) -> None:
        """Find what the reference model says of the samples, if they are pairs; see TrialPairs.of.

        The adapter must be as it starts; a start from the base's weights is no part of the reference. If
        memory runs out, try again without recordings and weight cache. Raises OutOfMemory.
        """
        given = self._config, self._base, self._view, evaluation, interrupted
        for is_last in (False, True):
            try:
                with self.adapter.silent() if self._config.lora.start != "default" else nullcontext():
                    self.pairs = TrialPairs.of(*given)
                return
            except torch.OutOfMemoryError:
                pass  # the traceback keeps the failed pass's tensors alive until this block ends
            if is_last:
                raise OutOfMemory("out of memory in the pass of the reference model", None, self.peak_gib())
            self.drop_all()
            self._base.cache_weights(0.0)
            free(self._base.device)

    @property
    def recording_s(self) -> float:
        """Return the seconds that this trial has spent on recording."""
        return self._recordings.recording_s - self._began_s

    def peak_gib(self) -> float:
        """Return the peak of memory in GiB, recorded passes included (see `model.device.peak_gib`)."""
        recorded = [graphs.peak_bytes for graphs in (self._training, self._evaluation) if graphs is not None]
        if not recorded or self._base.device.type != "cuda":
            return peak_gib(self._base.device)
        kept = self._recordings.idle_bytes(self.adapter.memory) / GIB
        return max(peak_gib(self._base.device), max(recorded) / GIB) - kept

    def follow(self, plan: ComputePlan, limit_gib: float) -> None:
        """Compute by this plan from now on. limit_gib: device memory that the trial may have."""
        base, data, memory = self._base, self._config.data, self.adapter.memory
        self._plan, self._limit_gib, self._training, self._evaluation = plan, limit_gib, None, None
        longest, longest_evaluated = data.max_seq_length, data.eval_max_seq_length
        kind = self._config.matmul, self.exempt, longest, self._config.train.neftune_noise_alpha > 0.0
        key = (*plan.settings().items(), *kind, self._baked(), self._pair_loss())
        need_gib = None if plan.memory is None else plan.memory.peak_gib + plan.memory.reserve_gib
        self._recordings.drop_if_short(key, memory, need_gib, limit_gib)
        base.checkpoint_activations(plan.policy, plan.keep_layers, plan.host_layers)
        base.set_matmul(self._config.matmul, self.exempt)
        base.cache_weights(plan.weight_cache_gib)
        if plan.cuda_graphs:
            loss = RowLoss(self._loss, self._config.learns_pairs and self._config.preference.needs_reference)
            self._training = make_graphs(base, memory, key, plan.micro_batch_size * self._config.bin_tokens, longest, loss=loss)
            if self._training is not None:
                self._training.few = self._foreseen()
        has_room = plan.cuda_graphs or (need_gib is not None and need_gib + plan.evaluation_gib <= limit_gib)
        if has_room and self._may_record_evaluation:
            capacity, key = base.evaluation_row_tokens(longest_evaluated), ("evaluation", longest_evaluated, self._baked())
            self._evaluation = make_graphs(base, memory, key, capacity, longest_evaluated, trains=False)

    def record(self) -> None:
        """Record the rows that the trial will have, as far as recordings are planned and missing.

        Raises OutOfMemoryError if there is no room for those of training.
        """
        if self._training is not None:
            self._training.record(self._training.few.sizes)
        if self._evaluation is None:
            return
        try:
            if self._plan.cuda_graphs or self._evaluation_waits():
                self._evaluation.record(Size.padded(batch) for batch in self._samples.batches)
            else:
                self._evaluation = None
        except torch.OutOfMemoryError:
            # rows are computed launch by launch, with the same numbers
            self._evaluation, self._may_record_evaluation = None, False

    def drop_earlier(self) -> bool:
        """Drop all recordings, once, if some are an earlier trial's. Return True if there is more room now."""
        if not self._has_earlier:
            return False
        self._has_earlier = False
        self._training = self._evaluation = None
        return self._recordings.clear()

    def drop_all(self) -> None:
        """Drop all recordings; those of a plan that ran out of memory leave a pool in pieces."""
        self._training = self._evaluation = None
        self._has_earlier = False
        self._recordings.clear()

    def gradients(self, bins: list[list[int]], step: int) -> StepResult:
        """Add the gradients of the step's bins, of their mean loss per target token or per pair."""
        rows = rows_of(bins, self._plan.micro_batch_size, self._base.shares_rows(self._config.data.max_seq_length))
        batches = [self._collated(row) for row in rows]
        num_targets = sum(b.num_targets for b in batches)
        divisor = num_targets if self.pairs is None else sum(map(len, rows))
        total = torch.zeros((), device=self._base.device)
        for number, batch in enumerate(batches):
            if self._config.draws_noise:
                self.adapter.draw_masks(self._config.train.seed, step, number)
            if self._training is not None:
                total += self._training.backward(batch, divisor)
                continue
            loss = self._loss(self._filled(batch).to(self._base.device))
            (loss / divisor).backward()
            total += loss.detach()
        self.adapter.freeze(decays=self._config.optim.weight_decay > 0.0)
        return StepResult(total, divisor, sum(b.num_tokens for b in batches), num_targets)

    def _filled(self, batch: Batch) -> Batch:
        """Return a row that is not recorded, with filler if `pads_unrecorded`."""
        longest = self._config.data.max_seq_length
        capacity = self._plan.micro_batch_size * self._config.bin_tokens
        return Size.fine(batch, capacity, longest).pad(batch, longest) if self.pads_unrecorded else batch

    def _loss(self, batch: Batch) -> Tensor:
        """Return a row's summed loss, in nats and fp32."""
        if self.pairs is None:
            return self._base.loss(batch)
        return row_loss(self._config.preference, self._base.trained_target_losses(batch), batch)

    def _members(self, row: list[int]) -> list[int]:
        """Return the samples of a row of the cursor's items: these, or both of each pair."""
        return row if not self._config.learns_pairs else [IN_A_PAIR * i + k for i in row for k in range(IN_A_PAIR)]

    def _collated(self, row: list[int]) -> Batch:
        members = self._members(row)
        reference = None if self.pairs is None else self.pairs.reference_of(members)
        return collate([self._view[i] for i in members], reference)

    def evaluate(self, before_each: Callable[[], None]) -> SampleLosses:
        """Return each sample's loss, or each pair's."""
        losses = self._evaluated(before_each)
        return losses if self.pairs is None else self.pairs.judge(losses)

    def _evaluated(self, before_each: Callable[[], None]) -> SampleLosses:
        """Return each sample's loss. If memory runs out, try again without recordings and weight cache."""
        try:
            return evaluate(self._base, self._samples, before_each, self._evaluation and self._evaluation.target_losses)
        except torch.OutOfMemoryError:
            if not self._plan.weight_cache_gib and self._evaluation is None:
                raise
        self._training = self._evaluation = None
        self._may_record_evaluation = False
        self._recordings.clear()
        self._base.cache_weights(0.0)
        free(self._base.device)
        losses = evaluate(self._base, self._samples, before_each)
        self.follow(self._plan, self._limit_gib)
        return losses

    def base_eval_losses(self, interrupted: Callable[[], bool]) -> dict[str, float]:
        """Return the base model's loss on each evaluation set, with the adapter's B at zero.

        They are measured once for each base and samples, and only if a limit follows them. Raises
        Interrupted.
        """
        if not needs_base(self._config.data):
            return {}

        def stop_if_asked() -> None:
            if interrupted():
                raise Interrupted("stopped on request before its first step")

        known = self._base.lasting.setdefault(BASE_LOSSES, {})
        key = self._samples.digest, self._config.preference.judged, self._config.lora.start_from
        if key not in known:
            with self.adapter.silent():
                known[key] = self.evaluate(stop_if_asked).means
        return known[key]

    def _foreseen(self) -> FewSizes:
        """Return the sizes of the trial's rows, from its first step on: the same ones in a process that goes on with it."""
        size, longest = self._plan.micro_batch_size, self._config.data.max_seq_length
        cursor, left, sizes = self._cursor.from_start(), self._config.train.max_tokens, []
        while left > 0 and len(sizes) * size < FORESEEN_BINS:
            rows = rows_of(cursor.take(self._config.bins_per_step), size, shares_rows=True)
            for row in rows[: FORESEEN_BINS // size + 1]:
                members = np.array(self._members(row))
                tokens, targets = int(self._view.lengths[members].sum()), int(self._view.targets_of(members).sum())
                sizes.append(Size.around(tokens, targets, len(members), size * self._config.bin_tokens, longest))
                left -= tokens
        return FewSizes.of(sizes)

    def _baked(self) -> Hashable:
        """Return what a recording holds as numbers: nothing, unless adapted layers run unfused."""
        adapted = [one for one in self._layers.values() if not isinstance(one, TokenRows)]
        if not self._base.runs_outside_layers(adapted):
            return ()
        return self._config.lora.lora_dropout, *(one.scaling for one in adapted)

    def _pair_loss(self) -> Hashable:
        """Return what a recording holds of the loss of pairs: all of it, and None without pairs."""
        section = self._config.preference
        return (section.loss, section.beta, section.label_smoothing) if self._config.learns_pairs else None

    def _evaluation_waits(self) -> bool:
        """Return True if the device waits for the host in an evaluation; measured once for each base."""
        if self._base.device.type != "cuda":
            return False
        if self._recordings.evaluation_waits is None:
            was_training = self._base.model.training
            self._base.model.eval()  # dropout outside fused layers would take from the trial's random numbers
            try:
                self._recordings.evaluation_waits = self._times_launches()
            finally:
                self._base.model.train(was_training)
        return self._recordings.evaluation_waits

    @torch.no_grad()
    def _times_launches(self) -> bool:
        known = False
        for _ in range(2):  # the first compiles
            torch.cuda.synchronize()
            began_s = time.perf_counter()
            self._base.loss(self._samples.batches[0].to(self._base.device))
            launched_s = time.perf_counter() - began_s
            torch.cuda.synchronize()
            known = launched_s > EVALUATION_WAITS * (time.perf_counter() - began_s)
        return known
