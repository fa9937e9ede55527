"""Build trials as a tracker is told of them."""

from sweep.trials.record import TrialRecord
from tests.support.reports import make_report

CONFIG = {"experiment": "demo"}


def report(rung, eval_loss):
    return make_report(
        rung, eval_loss, train_loss=eval_loss + 0.1, elapsed_s=1.5 * rung, tokens_per_second=700.0, peak_allocated_gib=1.25,
        num_trainable=4096,
    )  # fmt: skip


def trial(number, outcome, *losses, **changes):
    reports = [report(rung, loss) for rung, loss in enumerate(losses, start=1)]
    values = {"params": {"lora.rank": 8}, "config": {"seed": number}, "started_s": 1e9, "ended_s": 1e9 + 60, **changes}
    return TrialRecord(number, outcome=outcome, reports=reports, **{"folder": "trial", **values})
