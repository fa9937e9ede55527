"""Build trials that have ended, for the leaderboard and the choice of the best."""

from pathlib import Path

from engine.sample_losses import SampleLosses, write_sample_losses
from sweep.results.reevaluation import Reevaluation
from sweep.results.verdict import SweepVerdict, judge
from sweep.trials.record import Outcome, TrialRecord
from sweep.trials.selection import Rule
from tests.support.reports import make_report

REEVALUATION = Reevaluation(
    base_eval_loss=2.5, eval_loss=1.2, num_eval_target_tokens=12345, trial_eval_loss=1.2001, agrees=True, relative_tolerance=1e-3
)


def trial(number, *losses, outcome=Outcome.COMPLETE, num_trainable=100, folder="", reported=None, **changes):
    """Build a trial. reported: values of all its reports."""
    reports = [
        make_report(rung, loss, num_trainable=num_trainable, tokens_per_second=50.0 * rung, **reported or {})
        for rung, loss in enumerate(losses, start=1)
    ]
    config = {"model": {"path": "org/base"}, "data": {"train": "train.jsonl"}, "train": {"max_tokens": 1000}}
    params = {"lora.rank": 8, "optim.learning_rate": 0.00012345}
    return TrialRecord(number, params, config, outcome, str(folder), reports, **changes)


def sampled(number: int, losses: SampleLosses, folder: Path, **changes) -> TrialRecord:
    """Build a trial with these losses by sample, and write them into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_sample_losses(folder, 1, losses)
    return trial(number, losses.mean, folder=folder, **changes)


def judged(*records, reevaluation=REEVALUATION) -> SweepVerdict:
    """Return the verdict on these records. reevaluation: None before the end."""
    return judge(list(records), Rule(), reevaluation)
