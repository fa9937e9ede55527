"""The sampler's copy of the study, the journal's file and its flushes in the background."""

from __future__ import annotations

import json
import random
import threading

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from sweep.folder import flush as disk
from sweep.folder.sweep_folder import SweepFolder
from sweep.study import proposals as drafts
from sweep.study.journal_file import JournalFile
from sweep.trials.record import Outcome
from tests.support.studies import SMALL, WIDE, config_for, finish_one, study_in


def run_trials(study, count: int, seed: int = 0) -> list[dict]:
    """Run this many trials, two at a time, and return the proposals.

    Some of the trials are pruned, some fail.
    """
    rng, running, params = random.Random(seed), [], []
    for _ in range(count):
        proposal = study.ask()
        params.append(proposal.params)
        running.append(proposal.number)
        if len(running) == 2:
            number = running.pop(0)
            study.report(number, 1, rng.random())
            study.tell(number, rng.choice([Outcome.COMPLETE, Outcome.COMPLETE, Outcome.PRUNED, Outcome.FAILED]))
    return params


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "cmaes"])
@pytest.mark.parametrize("pruner", ["successive_halving", "hyperband"])
def test_a_copy_that_follows_the_journal_proposes_what_one_made_anew_does(tmp_path, sampler, pruner, monkeypatch):
    proposed = {}
    for name in ("following", "anew"):
        (tmp_path / name).mkdir()
        study = study_in(tmp_path / name, config_for(WIDE, sampler, pruner))
        if name == "anew":
            propose = study._proposer.propose

            def anew(number, trials, is_new, drafts=study._proposer, propose=propose):
                drafts._copy = None
                return propose(number, trials, is_new)

            monkeypatch.setattr(study._proposer, "propose", anew)
        proposed[name] = run_trials(study, 25)
    assert proposed["following"] == proposed["anew"]
    assert len({json.dumps(params) for params in proposed["anew"]}) == 25


def test_in_a_space_that_is_nearly_used_up_rejected_drafts_leave_no_trace(tmp_path):
    study = study_in(tmp_path, config_for(SMALL, "tpe"))
    run_trials(study, 6)
    assert study.ask() is None
    copy = study._proposer._copy.get_trials(deepcopy=False)
    running = [trial for trial in copy if not trial.state.is_finished()]
    # the running trial, and no known one
    assert len(running) == 1 == len(study.running())


def test_tpe_sees_the_best_the_running_and_a_share_of_many_trials(tmp_path, monkeypatch):
    for name, value in (("MOST_SEEN", 60), ("FEWEST_SEEN", 40), ("BEST_SEEN", 16), ("LEAST_SHARE", 8)):
        monkeypatch.setattr(drafts, name, value)
    study = study_in(tmp_path, config_for(WIDE, "tpe"))
    run_trials(study, 200)
    sizes = []
    for _ in range(30):
        study.tell(finish_one(study), Outcome.COMPLETE)
        sizes.append(len(study._proposer._copy.get_trials(deepcopy=False)))
    assert max(sizes) <= 61 and min(sizes) < 60
    seen = {trial.value for trial in drafts.thin_out(study._trials(), 0)}
    complete = sorted(trial.value for trial in study._trials() if trial.state.name == "COMPLETE")
    assert set(complete[: drafts.BEST_SEEN]) <= seen and len(seen) < len(complete)


def test_the_journals_file_is_optunas_own_and_the_other_way_round(tmp_path):
    study = study_in(tmp_path, config_for(WIDE, "tpe"))
    run_trials(study, 8)
    path = SweepFolder(tmp_path).journal
    theirs = optuna.load_study(study_name="sweep", storage=JournalStorage(JournalFileBackend(str(path))))
    assert theirs.get_trials() == study._trials()
    theirs.enqueue_trial({"lora.rank": 2})
    ours = optuna.load_study(study_name="sweep", storage=JournalStorage(JournalFile(path)))
    assert ours.get_trials() == theirs.get_trials() and len(ours.get_trials()) == 9


def test_a_record_out_of_turn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="record 5 was asked for, 0 is next"):
        list(JournalFile(tmp_path / "journal").read_logs(5))


def test_a_decision_does_not_wait_for_the_disk_and_everything_is_flushed_in_the_end(tmp_path, monkeypatch):
    flushed, slow = [], threading.Event()
    monkeypatch.setattr(disk.os, "fsync", lambda handle: (slow.wait(10.0), flushed.append(handle)))
    study = study_in(tmp_path, config_for(WIDE, "random"))
    number = study.ask().number
    study.report(number, 1, 1.0)
    study.tell(number, Outcome.COMPLETE)
    assert flushed == [] and len(study_in(tmp_path, config_for(WIDE, "random")).records()) == 1
    slow.set()
    disk.wait_until_flushed()
    assert len(flushed) >= 2  # the journal after its last record, and the trial's config
    assert not disk._waiting


def test_a_sweep_of_many_trials_that_is_resumed_proposes_what_it_would_have_proposed(tmp_path, monkeypatch):
    """With one slot, what TPE sees of many trials depends on the trial's number alone.

    It must not depend on when the copy was made.
    """
    for name, value in (("MOST_SEEN", 30), ("FEWEST_SEEN", 20), ("BEST_SEEN", 8), ("LEAST_SHARE", 4)):
        monkeypatch.setattr(drafts, name, value)
    proposed = {}
    for name in ("left open", "resumed"):
        (tmp_path / name).mkdir()
        study, config, rng = study_in(tmp_path / name, config_for(WIDE, "tpe")), config_for(WIDE, "tpe"), random.Random(0)
        proposed[name] = []
        for number in range(55):
            if name == "resumed" and number in (33, 47, 50):
                study = study_in(tmp_path / name, config)
            proposal = study.ask()
            study.report(proposal.number, 1, rng.random())
            study.tell(proposal.number, Outcome.COMPLETE)
            proposed[name].append(proposal.params)
    assert proposed["left open"] == proposed["resumed"]
