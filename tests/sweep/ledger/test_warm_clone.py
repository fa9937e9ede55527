"""A warm clone begins with its parent's adapter, everybody is told, and neither sampler nor pruner learns from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine.sample_losses import SampleLosses, write_sample_losses
from engine.sources.identity import ADAPTER_FILES, identify_start
from sweep.cluster.slots import Slots
from sweep.execution.worker_config import REAL_ENGINE, worker_config
from sweep.folder.flush import wait_until_flushed
from sweep.folder.sweep_folder import SweepFolder
from sweep.ledger.steered_ledger import SteeredLedger
from sweep.results.best_folder import best_card
from sweep.results.final_seeds import finalists
from sweep.results.leaderboard import board_rows, board_table
from sweep.steering.checks import refusals
from sweep.steering.history import History
from sweep.tidy import find_litter
from sweep.tracking.mlflow_names import trial_name
from sweep.trials.record import Outcome
from sweep.trials.selection import Rule
from sweep.trials.warm_from import WarmFrom
from tests.support.records import judged
from tests.support.steered import steered
from tests.support.studies import WIDE, config_for, report, write_reports

FEW = {"lora.rank": {"choices": [2, 4, 8]}, "lora.target_modules": {"choices": {"all": "all-linear", "q": ["q_proj"]}}}
TEXT = "warm from trial 0 at 200 tokens"


def write_adapter(path: Path, number: int, rung: int, losses: list[float]) -> None:
    """Leave what the engine leaves at a rung: losses by sample, the adapter, the reports."""
    folder = SweepFolder(path).trial(number)
    write_sample_losses(folder, rung, SampleLosses("d", (losses[rung - 1],), (1,)))
    (folder / "adapter").mkdir(exist_ok=True)
    for name in ADAPTER_FILES:
        (folder / "adapter" / name).unlink(missing_ok=True)
        (folder / "adapter" / name).write_text(f"{number} {rung} {name}")
    write_reports(path, number, [report(at, loss) for at, loss in enumerate(losses, 1)])


def begun(path: Path, config=None, rungs: int = 2, **options):
    """Return a ledger whose trial 0 has reported so often, and what sends it commands."""
    ledger, tell = steered(path, config or config_for(WIDE, pruner="none", num_trials=3), **options)
    ledger.next_trial()
    for rung in range(1, rungs + 1):
        losses = [3.0 - at / 10 for at in range(1, rung + 1)]
        write_adapter(path, 0, rung, losses)
        ledger.reported(0, report(rung, losses[-1]))
    return ledger, tell


def train(path: Path, ledger: SteeredLedger, number: int, *losses: float) -> list[bool]:
    """Train a trial until it is pruned or to its end. losses: of all its rungs. Returns what the ledger said of each."""
    verdicts = []
    for rung in range(len(ledger.records[number].reports) + 1, 4):
        write_adapter(path, number, rung, list(losses[:rung]))
        verdicts.append(ledger.reported(number, report(rung, losses[rung - 1])))
        if verdicts[-1]:
            return verdicts
    write_adapter(path, number, 4, list(losses))
    ledger.ended(number, Outcome.COMPLETE, report(4, losses[3]))
    return verdicts


def test_it_begins_with_a_copy_of_the_parent_s_adapter_which_stays_whatever_happens_to_the_parent(tmp_path):
    ledger, tell = begun(tmp_path / "a")
    assert tell("clone 0 --warm") is None  # its own values will do: it trains on
    start = SweepFolder(tmp_path / "a").start(1)
    write_adapter(tmp_path / "a", 0, 3, [2.9, 2.8, 2.5])
    shutil.rmtree(start.parent.parent / "0000" / "adapter")
    assert [(start / name).read_text() for name in ADAPTER_FILES] == [f"0 2 {name}" for name in ADAPTER_FILES]
    ledger.ended(0, Outcome.COMPLETE, report(4, 2.0))
    clone = ledger.next_trial()
    record = ledger.records[1]
    assert clone.number == 1 and clone.params == ledger.records[0].params and record.warm.text == TEXT
    assert clone.config.lora.start_from == str(start) and record.config["lora"]["start_from"] == str(start)
    assert clone.config.lora.start_digest == identify_start(clone.config.lora)["adapter"] == record.warm.digest
    ledger.reported(1, report(1, 1.9))

    shutil.move(tmp_path / "a", tmp_path / "b")  # a resume elsewhere is the same trial
    ledger, _ = steered(tmp_path / "b", config_for(WIDE, pruner="none", num_trials=3))
    assert ledger.recover() == [1]
    again = ledger.next_trial()
    assert again.config.lora.start_from == str(SweepFolder(tmp_path / "b").start(1))
    assert again.config.fingerprint() == clone.config.fingerprint()


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "gp"])
@pytest.mark.parametrize("pruner", ["successive_halving", "hyperband"])
def test_neither_sampler_nor_pruner_learns_from_it_before_and_after_a_resume(tmp_path, sampler, pruner):
    """The next proposals and verdicts are the same, whether the clone is far better or far worse than all."""
    found = {}
    for loss in (0.1, 90.0):
        path = tmp_path / str(loss)
        config = config_for(WIDE, sampler, pruner, num_trials=9)
        config = config.model_copy(update={"sampler": config.sampler.model_copy(update={"num_startup_trials": 2})})
        ledger, tell = begun(path, config, rungs=3)
        train(path, ledger, 0, 2.9, 2.8, 2.7, 2.6)
        assert tell("clone 0 --warm lora.rank=8") is None and ledger.next_trial().number == 1
        assert train(path, ledger, 1, loss, loss, loss, loss) == [False] * 3  # no pruner judges it
        for number in range(2, 6):
            if number == 4:
                ledger, _ = steered(path, config)
                ledger.recover()
            found.setdefault(loss, []).append(ledger.next_trial().params)
            found[loss].append(train(path, ledger, number, *(3.0 - number / 9,) * 4))
        assert (Rule().best(ledger.records).number == 1) == (loss < 1.0)  # it can win
    assert found[0.1] == found[90.0]


class Asked:
    """Stand before a policy, and keep what it was asked of."""

    def __init__(self, policy) -> None:
        self._policy, self.situations = policy, []

    def decide(self, situation):
        self.situations.append((sorted(situation.trials), situation.tokens_left))
        return self._policy.decide(situation)


def test_freeze_thaw_neither_pauses_it_nor_sees_it_but_keeps_its_tokens_off(tmp_path):
    config = config_for(WIDE, "freeze_thaw", "none", num_trials=6, budget={"full_trials": 4})
    ledger, tell = begun(tmp_path, config, rungs=1, num_slots=2)
    policy = ledger._freezer._policy = Asked(ledger._freezer._policy)
    assert tell("clone 0 --warm") is None and ledger.next_trial().number == 1
    ledger.next_trial()  # for the other slot
    assert [ledger.reported(1, report(rung, 9.0)) for rung in (1, 2, 3)] == [False] * 3
    ledger.ended(1, Outcome.COMPLETE, report(4, 9.0))
    ledger.next_trial()
    assert policy.situations and all(1 not in numbers for numbers, _ in policy.situations)
    assert {left for _, left in policy.situations} <= {1600 - 400 - need for need in (100, 200)}  # the whole clone from the start


OTHER_LAYERS = "trial 0 adapts all-linear, and this point [q_proj]: a warm clone adapts the same layers"
REFUSED = {
    "clone 1 --warm": "trial 1 has no adapter yet: its first report writes one; leave --warm out to start from zero",
    "clone 0 --warm lora.rank=2": "the adapter of trial 0 has a larger rank than lora.rank = 2: take lora.rank=4 or more",
    "clone 0 --warm lora.target_modules=q": OTHER_LAYERS,
}


@pytest.mark.parametrize(("words", "line"), REFUSED.items())
def test_what_does_not_fit_is_refused_in_one_line_and_leaves_nothing(tmp_path, words, line):
    _, tell = steered(tmp_path, config_for(FEW, pruner="none", num_trials=2))
    assert tell("try lora.rank=4 lora.target_modules=all") is None and tell("try lora.rank=4 lora.target_modules=q") is None
    write_adapter(tmp_path, 0, 1, [2.0])
    assert tell(words) == f"command = {words!r}: {line}"
    assert not list(tmp_path.glob("trials/*/start*")) and not list(tmp_path.glob("trials/*/.start*"))


@pytest.mark.parametrize(("section", "line"), [
    ({"lora": {"use_dora": True}}, "has a DoRA adapter, and a start has A and B alone"),
    ({"lora": {"start": "pissa", "rank": 2}}, "larger rank than lora.rank = 2: take lora.rank=4 or more"),
    ({"lora": {"start": "loftq"}}, "lora.start = 'loftq': must be default with lora.start_from"),
    ({"data": {"train": "t", "format": "preference"}}, "the losses of pairs have the start as their reference"),
])  # fmt: skip
def test_a_sweep_whose_adapters_are_no_start_says_so(tmp_path, section, line):
    config = config_for({"optim.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}, pruner="none", num_trials=3)
    config = type(config).model_validate(config.model_dump(mode="json") | section)
    _, tell = begun(tmp_path, config, rungs=1)
    assert line in tell("clone 0 --warm optim.learning_rate=0.001")
    assert tell("clone 0 optim.learning_rate=0.001") is None


def test_an_adapter_that_is_being_saved_or_was_removed_is_refused_and_the_page_knows_it(tmp_path):
    ledger, tell = begun(tmp_path)
    folder = SweepFolder(tmp_path).trial(0)
    write_sample_losses(folder, 3, SampleLosses("d", (1.0,), (1,)))
    assert "is saving a better adapter just now" in tell("clone 0 --warm")
    assert "clone --warm" not in refusals(ledger.records[0], History())
    shutil.rmtree(folder / "adapter")
    assert "the adapter of trial 0 has been removed" in tell("clone 0 --warm")
    assert "has been removed" in refusals(ledger.records[0], History())["clone --warm"]
    assert not SweepFolder(tmp_path).start(1).exists()


def test_the_same_start_and_point_are_one_trial_and_a_later_adapter_is_another(tmp_path):
    ledger, tell = begun(tmp_path)
    assert tell("clone 0 --warm") is None
    assert "another trial began with that adapter at that point already" in tell("clone 0 --warm")
    assert not SweepFolder(tmp_path).start(2).exists()
    write_adapter(tmp_path, 0, 3, [2.9, 2.8, 2.5])
    assert tell("clone 0 --warm") is None
    assert [record.warm and record.warm.tokens for record in ledger.records] == [None, 200, 300]


def test_its_start_goes_once_neither_it_nor_best_needs_it(tmp_path):
    ledger, tell = begun(tmp_path)
    folder = SweepFolder(tmp_path)
    folder.write_config(config_for(WIDE))
    folder.start(0).mkdir()  # a kill left it before the journal had the command
    for words in ("clone 0 --warm lora.rank=8", "clone 0 --warm"):
        assert tell(words) is None
    train(tmp_path, ledger, 0, 2.9, 2.8, 2.6, 2.5)
    ledger.next_trial()
    train(tmp_path, ledger, 1, 2.4, 2.2, 2.1, 2.0)
    assert tell("stop 2") is None
    wait_until_flushed()
    assert [folder.start(number).exists() for number in range(3)] == [False, True, False]
    folder.start(2).mkdir()
    assert [litter.folders for litter in find_litter(folder)] == [(folder.start(2),)]


def test_everybody_is_told_and_a_finalist_it_is_not(tmp_path):
    ledger, tell = begun(tmp_path)
    tell("clone 0 --warm lora.rank=8")
    train(tmp_path, ledger, 0, 2.9, 2.8, 2.6, 2.5)
    ledger.next_trial()
    train(tmp_path, ledger, 1, 2.4, 2.2, 2.1, 2.0)
    first, second = ledger.records[0], ledger.records[1]
    assert [record.number for record in finalists(Rule(), [first, second])] == [0]
    rows = board_rows([first, second])
    assert rows[0]["warm"] == second.warm.to_dict() and board_table(rows)[1][0][-1] == TEXT
    assert trial_name(second) == "0001 COMPLETE warm from 0" and second.result()["warm"]["tokens"] == 200
    verdict = judged(first, second)
    assert verdict.best_line.endswith(f"({TEXT}).")
    assert "the adapter of trial 0 of the same sweep, at 200 tokens" in best_card(verdict, "s", "org/base")


def test_its_worker_compares_its_own_start_and_not_the_sweep_s(tmp_path):
    ledger, tell = begun(tmp_path)
    tell("clone 0 --warm lora.rank=8")
    ledger.ended(0, Outcome.COMPLETE, report(4, 2.5))
    proposal, folder = ledger.next_trial(), SweepFolder(tmp_path)
    slots = Slots(num_slots=1, device="cpu", cpus_per_trial=1)
    sent = [worker_config(proposal, folder, slots, REAL_ENGINE, inputs={"adapter": d, "weights": "w"}) for d in
            ("other", proposal.config.lora.start_digest)]  # fmt: skip
    assert ["adapter" in one["inputs"] for one in sent] == [False, True]


def test_a_damaged_start_is_no_start():
    for data in ({}, {"trial": 1}, {"trial": "x", "tokens": 1, "digest": "d"}, None):
        with pytest.raises((LookupError, TypeError, ValueError)):
            WarmFrom.from_dict(data)
