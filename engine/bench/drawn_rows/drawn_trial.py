"""Run the first steps of a drawn trial as a trial does, and take its memory and speed."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.adapter.lora import AnyLora, detach
from engine.adapter.running_average import RunningAverage
from engine.adapter.start import attach_started
from engine.bench.drawn_rows.drawn_samples import DrawnView
from engine.bench.drawn_rows.drawn_settings import MAX_TOKENS, known_shape, train_config
from engine.bench.shapes import family_kind, random_base
from engine.data.packing import Cursor, rows_of
from engine.errors import EngineError, first_line
from engine.evaluation.eval_loss import evaluation_batches
from engine.memory.prediction import CONTEXT_GIB, MemoryPrediction
from engine.model.base import Base
from engine.model.device import free, host_share_gib, limit_memory, pick_dtype
from engine.planning.cards import Card, found_card
from engine.planning.compute_plan import ComputePlan
from engine.planning.known_cards import with_known_rates
from engine.planning.planner import make_compute_plan
from engine.shape.families import FAMILIES
from engine.shape.policies import Policy
from engine.training.optim import make_optimizer, place_states
from engine.training.passes import FORESEEN_BINS, Passes
from engine.training.recordings import Recordings
from engine.units import GIB

STEPS = 3
TRAIN_TOKENS, STEPS_OF_SAMPLES, EVALUATED_TOKENS = 120_000, 6, 16_384
"""Tokens of all samples, at least, and as many as so many steps take; tokens evaluated."""


def has_card() -> bool:
    """Return True if there is a CUDA device."""
    return torch.cuda.is_available()


def card_here() -> Card:
    """Return this machine's CUDA card with the best rates that are known."""
    total_gib = torch.cuda.get_device_properties(0).total_memory / GIB
    return with_known_rates(found_card(torch.cuda.get_device_name(), total_gib), here=True)


def plan_of(values: dict[str, Any], card: Card) -> ComputePlan:
    """Return the plan that a trial of this setting gets on a card. Raises EngineError if there is none."""
    return make_compute_plan(train_config(values), known_shape(values), card, host_share_gib())


def predictions(plan: ComputePlan) -> dict[str, Any]:
    """Return the plan's predictions as plain data, in GiB and tokens per second."""
    memory, speed = plan.memory, plan.speed
    return {
        "plan": plan.describe(), "settings": plan.settings(), "predicted_gib": memory.peak_gib,
        "predicted_reserved_gib": memory.reserved_gib, "predicted_phase": memory.phase, **_parts(memory),
        "predicted_tokens_per_second": round(speed.tokens_per_second), "host_gib": round(memory.host_gib, 3),
    }  # fmt: skip


def _parts(memory: MemoryPrediction) -> dict[str, dict[str, float]]:
    """Return phases and components, to see what a wrong prediction left out."""
    parts = {"phases_gib": memory.phases, "components_gib": memory.components}
    return {name: {key: round(size / GIB, 3) for key, size in sizes.items() if size} for name, sizes in parts.items()}


class Trials:
    """Measure settings one by one on a CUDA device; settings of one shape share the loaded model."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._card, self._base, self._load_s = device, card_here(), None, 0.0
        self._shape: dict[str, Any] | None = None

    def measure(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return prediction and measurement of a setting. Without `fits` nothing ran, and `refused` says why."""
        try:
            plan = plan_of(values, self._card)
        except EngineError as error:
            return {"fits": False, "refused": first_line(error)}
        base = self._loaded(values)
        others_gib = self._others_gib()
        free(self._device)
        limit_memory(values["config"]["train"]["memory_budget_gib"] - CONTEXT_GIB, self._device)
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()
        run, error = Run(base, values, plan), {}
        try:
            run.take()
        except torch.OutOfMemoryError as full:
            error = {"error": first_line(full)}
        stats = torch.cuda.memory_stats()
        _undo(base)
        limit_memory(math.inf, self._device)
        free(self._device)
        found = {f"peak_{name}_gib": stats[f"{name}_bytes.all.peak"] / GIB for name in ("allocated", "reserved")}
        found |= {"num_out_of_memory": stats["num_ooms"], "num_retries": stats["num_alloc_retries"]}
        found |= {"load_s": self._load_s, "others_gib": others_gib, **run.marks, **error}
        return {"fits": True, **predictions(plan), **found}

    def forget(self) -> None:
        """Drop the loaded model."""
        self._base = self._shape = None
        free(self._device)

    def _loaded(self, values: dict[str, Any]) -> Base:
        if self._shape != values["shape"]:
            self.forget()
            known_shape(values)
            began_s, name = time.perf_counter(), values["name"]
            self._base = random_base(name, self._device, pick_dtype("auto", self._device), family_kind(name) in FAMILIES)
            torch.cuda.synchronize()
            self._shape, self._load_s = values["shape"], round(time.perf_counter() - began_s, 2)
        return self._base

    def _others_gib(self) -> float:
        """Return the GiB of the card that other processes hold, about."""
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        return round((total_bytes - free_bytes - torch.cuda.memory_reserved(self._device)) / GIB - CONTEXT_GIB, 1)


class Run:
    """A trial's first steps and an evaluation after the first of them, the ladder left out.

    marks: the tokens per second of each step, and the highest memory so far after each part. Layers
    whose products INT8 leaves too far from exact are not looked for: weights are random.
    """

    def __init__(self, base: Base, values: dict[str, Any], plan: ComputePlan) -> None:
        self.base, self.values, self.plan, self.config = base, values, plan, train_config(values)
        self.marks: dict[str, Any] = {"peaks_gib": {}}
        self.layers: dict[str, AnyLora] = {}

    def take(self) -> None:
        """Attach the adapter, take the steps, and detach it. Raises OutOfMemoryError."""
        try:
            self._train()
        finally:
            detach(self.base.model, self.layers)
            self.base.add_noise(None)
            self.layers.clear()

    def _train(self) -> None:
        config, base, data = self.config, self.base, self.config.data
        torch.manual_seed(config.train.seed)
        self.layers.update(attach_started(base.model, base.linear_names, config))
        view, evaluated = self._view(data.max_seq_length), self._view(data.eval_max_seq_length).up_to(EVALUATED_TOKENS)
        samples = evaluation_batches(base, evaluated, data.eval_max_seq_length)
        cursor = Cursor(view.lengths, data.max_seq_length, data.packing, config.train.seed)
        passes = Passes(config, base, self.layers, view, samples, cursor)
        adapter = passes.adapter
        optimizer = make_optimizer(adapter.parameter, config.optim, adapter.num_a, adapter.shapes)
        place_states(optimizer, self.plan.offload_optimizer)
        average = RunningAverage(adapter, config.optim.ema_horizon)
        adapter.refresh()
        passes.follow(self.plan, config.train.memory_budget_gib)
        base.model.train()
        self.marks["largest_row"] = self._largest_row(view, cursor)
        self._mark("attached")
        passes.record()
        self._mark("recorded")
        speeds, seen = [], 0
        for step in range(STEPS):
            began_s = time.perf_counter()
            taken = passes.gradients(cursor.take(config.bins_per_step), step)
            nn.utils.clip_grad_norm_(adapter.parameter, 1.0)
            optimizer.step()
            adapter.refresh()
            adapter.zero_grad()
            seen += taken.num_tokens
            average.update(taken.num_tokens, seen)
            self._mark(f"step {step + 1}")
            speeds.append(round(taken.num_tokens / (time.perf_counter() - began_s)))
            if step == 0:
                passes.evaluate(lambda: None)
                self._mark("evaluated")
        self.marks |= {"step_tokens_per_second": speeds, "tokens_per_second": max(speeds[1:])}
        self.marks["num_recorded"] = len(Recordings.of(base))

    def _view(self, longest: int) -> DrawnView:
        vocab_size, wanted = self.values["shape"]["vocab_size"], max(TRAIN_TOKENS, STEPS_OF_SAMPLES * self.config.longest_step)
        return DrawnView(self.values["lengths"], longest, wanted, vocab_size, self.values["number"])

    def _largest_row(self, view: DrawnView, cursor: Cursor) -> dict[str, int]:
        """Return the most tokens, targets and samples of a row that is recorded or taken, and the tokens that it may have."""
        size, shares = self.plan.micro_batch_size, self.base.shares_rows(self.config.data.max_seq_length)
        foreseen = min(FORESEEN_BINS, MAX_TOKENS // self.config.bin_tokens) if self.plan.cuda_graphs else 0
        bins = cursor.from_start().take(max(STEPS * self.config.bins_per_step, foreseen // size * size))
        rows = [np.array(row) for row in rows_of(bins, size, shares)]
        most = {"tokens": [view.lengths[row].sum() for row in rows], "targets": [view.targets_of(row).sum() for row in rows],
                "samples": [len(row) for row in rows]}  # fmt: skip
        return {**{name: int(max(numbers)) for name, numbers in most.items()}, "capacity": size * self.config.bin_tokens}

    def _mark(self, part: str) -> None:
        """Wait for the device, and note the highest memory so far."""
        if self.base.device.type == "cuda":
            torch.cuda.synchronize()
            stats = torch.cuda.memory_stats()
            peaks = (stats[f"{name}_bytes.all.peak"] for name in ("allocated", "reserved"))
            self.marks["peaks_gib"][part] = [round(size / GIB, 3) for size in peaks]


def _undo(base: Base) -> None:
    """Take back what a trial set in the model."""
    Recordings.of(base).clear()
    base.checkpoint_activations(Policy.KEEP)
    base.cache_weights(0.0)
    base.model.eval()
