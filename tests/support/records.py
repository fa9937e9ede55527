"""Build trials that have ended, for the leaderboard and the choice of the best."""

from sweep.trials.record import Outcome, TrialRecord

REEVALUATION = {
    "base_eval_loss": 2.5,
    "eval_loss": 1.2,
    "num_eval_target_tokens": 12345,
    "agrees": True,
    "trial_eval_loss": 1.2001,
}


def report(rung=1, eval_loss=1.0, num_trainable=100, **changes):
    values = {"rung": rung, "tokens_seen": 1000 * rung, "eval_loss": eval_loss, "num_trainable": num_trainable}
    return {**values, "tokens_per_second": 50.0 * rung, "peak_allocated_gib": 1.5, **changes}


def trial(number, *losses, outcome=Outcome.COMPLETE, num_trainable=100, folder="", **changes):
    reports = [report(rung, loss, num_trainable) for rung, loss in enumerate(losses, start=1)]
    config = {"model": {"path": "org/base"}, "data": {"train": "train.jsonl"}, "train": {"max_tokens": 1000}}
    params = {"lora.rank": 8, "optim.learning_rate": 0.00012345}
    return TrialRecord(number, params, config, outcome, str(folder), reports, **changes)
