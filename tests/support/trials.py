"""Build and run trials of the engine.

It makes configs with changes, runs one trial from start to end, and finds the numbers that two
share.
"""

import copy

import torch

from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.data.packing import collate
from engine.sample_losses import SampleLosses
from engine.training.loop import train
from tests.support.reports import PART_SECONDS

CPU = torch.device("cpu")


def build(values, **sections):
    merged = copy.deepcopy(values)
    for section, changes in sections.items():
        merged[section].update(changes)
    return parse(TrainConfig, {**merged, "train": {**merged["train"], "device": "cpu"}})


def run(config, folder, base=None):
    folder.mkdir(parents=True, exist_ok=True)
    return list(train(config, folder, base=base))


def memory_ends_at(monkeypatch, num_tokens):
    """Imitate a small card: with gradients, rows of more than `num_tokens` tokens do not fit."""
    from engine.model.base import Base

    whole = Base.loss

    def loss(self, batch):
        if torch.is_grad_enabled() and batch.num_tokens > num_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, batch)

    monkeypatch.setattr(Base, "loss", loss)


def run_stopped(config, folder, base=None, between=lambda: None):
    """Run a trial that is stopped after its first report, then to its end. between: called at the stop."""
    folder.mkdir(parents=True, exist_ok=True)
    first = train(config, folder, base=base)
    reports = [next(first)]
    first.close()
    between()
    return [*reports, *train(config, folder, base=base)]


def take_step(base, adapter, optimizer, row):
    """Train on one row, and return its mean loss before the step."""
    loss = base.loss(row) / row.num_targets
    loss.backward()
    optimizer.step()
    adapter.refresh()
    adapter.zero_grad()
    return loss.item()


def mean_loss(view, loss_of_row):
    """Return the loss in nats per target. loss_of_row: row of one sample -> its mean loss."""
    rows = [collate([view[i]]) for i in range(len(view))]
    return sum(loss_of_row(row) * row.num_targets for row in rows) / sum(row.num_targets for row in rows)


def one_loss(value):
    """Return what an evaluation of one target finds."""
    return SampleLosses("0" * 16, (value,), (1,))


def same_numbers(one, two):
    drop = {"tokens_per_second", "step_time_ms", "elapsed_s", "peak_allocated_gib", "peak_reserved_gib", "setup_s", *PART_SECONDS}
    return [{k: v for k, v in r.to_dict().items() if k not in drop} for r in one] == [
        {k: v for k, v in r.to_dict().items() if k not in drop} for r in two
    ]
