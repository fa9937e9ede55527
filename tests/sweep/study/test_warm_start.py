"""A warm start takes over suitable trials of an earlier sweep and refuses others in one line."""

from __future__ import annotations

import json

import pytest

from engine.errors import InputError
from sweep.config.sweep import parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.results.leaderboard import write_leaderboard
from sweep.space.parse import parse_space
from sweep.study.earlier_sweeps import EarlierSweeps, read_earlier
from sweep.study.warm_start import NUM_FIRST_POINTS, changed_part
from sweep.trials.record import Outcome
from sweep.trials.selection import Rule
from tests.support.fake_sweeps import BASE, start, sweep_folder
from tests.support.records import judged, trial
from tests.support.studies import WIDE, config_for, ledger_in, report, study_in, write_reports

RANKS = {"lora.rank": {"choices": [2, 4, 8]}}


def finished_sweep(path, config, outcomes=(Outcome.COMPLETE,) * 4) -> SweepFolder:
    """Make a sweep whose trials ended so. A higher rank has a higher loss."""
    path.mkdir()
    folder, study = SweepFolder(path), study_in(path, config)
    folder.write_config(config)
    for outcome in outcomes:
        proposal = study.ask()
        rank = proposal.config.lora.rank
        spent = {"peak_allocated_gib": rank / 16, "elapsed_s": 1.0, "tokens_per_second": 1.0}
        reports = [report(rung, 1.0 + rank / 10 + 1 / rung, **spent) for rung in (1, 2, 3, 4)]
        for one in reports if outcome is Outcome.COMPLETE else reports[:2]:
            study.report(proposal.number, one.rung, one.eval_loss)
            study.should_prune(proposal.number)
        write_reports(path, proposal.number, reports if outcome is Outcome.COMPLETE else reports[:2])
        if outcome is Outcome.PAUSED:
            study.stop(proposal.number, outcome)
        else:
            study.tell(proposal.number, outcome)
    return folder


def warm_config(earlier: SweepFolder, space=WIDE, **options):
    return config_for(space, warm_start=[str(earlier.path)], **options)


def read(config, data=None):
    return read_earlier(config, parse_space(config.space), data or {}).trials


def warm_study(path, config, data=None):
    path.mkdir(exist_ok=True)
    study = study_in(path, config)
    found = read_earlier(config, parse_space(config.space), data or {})
    study.beginning.keep(found.first_points, None)
    study.take_over(found)
    return study


def test_what_is_known_for_good_enters_with_its_outcome_its_curve_and_its_source(tmp_path):
    known, unknown = [Outcome.COMPLETE, Outcome.PRUNED, Outcome.DIVERGED, Outcome.PAUSED], [Outcome.FAILED, Outcome.LOST]
    outcomes = [*known, Outcome.OUT_OF_MEMORY, *unknown]
    old = finished_sweep(tmp_path / "old", config_for(WIDE, pruner="none"), outcomes)
    before = old.journal.read_bytes()
    study = warm_study(tmp_path / "new", warm_config(old))
    assert old.journal.read_bytes() == before
    records = study.records()
    assert [record.outcome for record in records] == known
    assert [record.source for record in records] == [f"{old.path} trial {number}" for number in range(4)]
    there = study_in(old.path, config_for(WIDE, pruner="none")).records()[:4]
    assert [(r.config, r.reports, r.params) for r in records] == [(r.config, r.reports, r.params) for r in there]
    assert study._trials()[0].value == there[0].score


def test_a_trial_of_an_earlier_sweep_is_never_trained_again(tmp_path):
    old = finished_sweep(tmp_path / "old", config_for(RANKS, "grid"), [Outcome.COMPLETE] * 2)
    known = {record.params["lora.rank"] for record in study_in(old.path, config_for(RANKS, "grid")).records()}
    study = warm_study(tmp_path / "new", warm_config(old, RANKS, sampler="grid"))
    proposals = []
    while (proposal := study.ask()) is not None:
        proposals.append(proposal)
    assert [proposal.params["lora.rank"] for proposal in proposals] == sorted({2, 4, 8} - known)


def test_the_sampler_starts_from_what_the_earlier_sweep_learned(tmp_path):
    """With ten known trials TPE samples near low losses and not at random."""
    steep = {"optim.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}, "lora.rank": {"choices": [2, 64]}}
    old = finished_sweep(tmp_path / "old", config_for(steep, "random"), [Outcome.COMPLETE] * 20)
    config = warm_config(old, steep, sampler="tpe")
    warm, cold = warm_study(tmp_path / "new", config), study_in(_made(tmp_path / "cold"), config_for(steep, "tpe"))
    ranks = {name: [study.ask().config.lora.rank for _ in range(16)] for name, study in (("warm", warm), ("cold", cold))}
    assert ranks["warm"].count(2) >= 12
    assert ranks["cold"].count(2) < 12


def test_the_pruner_judges_new_trials_against_the_earlier_ones_only_where_it_is_the_same(tmp_path):
    old = finished_sweep(tmp_path / "old", config_for(WIDE, "random"))
    for pruner, stops in (("successive_halving", True), ("hyperband", False)):
        study = warm_study(tmp_path / pruner, warm_config(old, pruner=pruner))
        number = study.ask().number
        study.report(number, 1, 9.0)
        assert study.should_prune(number) is stops


def test_earlier_trials_take_no_place_tell_no_listener_and_reach_no_target(tmp_path):
    old = finished_sweep(tmp_path / "old", config_for(WIDE))
    config = warm_config(old, num_trials=2, pruner="none", budget={"target_loss": 5.0})
    warm_study(tmp_path / "new", config)
    heard = []
    listener = type("Listener", (), {"on_trial_updated": lambda self, record: heard.append(record.number)})()
    ledger = ledger_in(tmp_path / "new", config, listeners=(listener,))
    assert ledger.recover() == [] and heard == []
    assert [ledger.next_trial().number, ledger.next_trial().number] == [4, 5]
    assert not ledger.reported(4, report(1, 9.0))
    assert set(heard) == {4, 5}


def test_an_earlier_trial_cannot_win_and_has_no_rank(tmp_path):
    earlier, ours = trial(0, 0.5, source="old trial 7"), trial(1, 1.0)
    assert Rule().best([earlier, ours]) is ours
    assert Rule().best([earlier]) is None
    write_leaderboard(tmp_path, [earlier, ours], "demo", judged(earlier, ours, reevaluation=None))
    board = json.loads((tmp_path / "leaderboard.json").read_text())
    assert [(row["number"], row["rank"], row["source"]) for row in board["trials"]] == [(1, 1, None), (0, None, "old trial 7")]
    assert board["outcomes"] == {"COMPLETE": 1}
    assert "from old trial 7" in (tmp_path / "leaderboard.md").read_text()


def test_taking_over_again_after_a_kill_doubles_nothing(tmp_path):
    old = finished_sweep(tmp_path / "old", config_for(WIDE))
    config = warm_config(old)
    study = study_in(_made(tmp_path / "new"), config)
    study.take_over(EarlierSweeps(read(config)[:2]))
    again = study_in(tmp_path / "new", config)
    again.take_over(EarlierSweeps(read(config)))
    assert [record.source for record in again.records()] == [f"{old.path} trial {number}" for number in range(4)]
    assert study_in(tmp_path / "new", config).has_earlier_trials


def test_a_narrower_space_takes_the_trials_that_lie_in_it(tmp_path):
    old = finished_sweep(tmp_path / "old", config_for(WIDE), [Outcome.COMPLETE] * 8)
    rates = sorted(record.config["optim"]["learning_rate"] for record in study_in(old.path, config_for(WIDE)).records())
    narrow = {**WIDE, "optim.learning_rate": {"low": rates[2], "high": rates[5], "log": True}}
    assert sorted(earlier.params["optim.learning_rate"] for earlier in read(warm_config(old, narrow))) == rates[2:6]


def test_choices_are_found_by_value_whatever_their_names(tmp_path):
    named = {"lora.target_modules": {"choices": {"attention": ["q_proj", "k_proj"], "all": "all-linear"}}}
    renamed = {"lora.target_modules": {"choices": {"everything": "all-linear", "qk": ["q_proj", "k_proj"]}}}
    old = finished_sweep(tmp_path / "old", config_for(named, "grid"), [Outcome.COMPLETE] * 2)
    assert {earlier.params["lora.target_modules"] for earlier in read(warm_config(old, renamed))} == {"everything", "qk"}


def test_two_sweeps_that_share_a_trial_give_it_once(tmp_path):
    olds = [finished_sweep(tmp_path / name, config_for(RANKS, "grid"), [Outcome.COMPLETE] * 3) for name in "ab"]
    config = config_for(RANKS, warm_start=[str(old.path) for old in olds])
    assert [earlier.source for earlier in read(config)] == [f"{olds[0].path} trial {number}" for number in range(3)]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"data": {"train": "other"}}, "data.train is 't' there and 'other' here, and trials would learn from different data"),
        ({"data": {"train": "t", "eval_max_samples": 7}}, "data.eval_max_samples is 256 there and 7 here"),
        ({"model": {"path": "n"}}, "model.path is 'm' there and 'n' here"),
        ({"train": {"max_tokens": 800, "num_reports": 4}}, "train.max_tokens is 400 there and 800 here"),
        ({"train": {"max_tokens": 400, "num_reports": 2}}, "train.report_at_tokens"),
        (
            {"optim": {"lr_schedule": "linear"}},
            "none of its 4 ended trials is a point of this space: optim.lr_schedule is 'cosine'",
        ),
        (
            {"train": {"max_tokens": 400, "num_reports": 4, "weight_cache_gib": 1.0, "matmul": "int8"}},
            "none of its 4 ended trials is a point of this space: train.matmul is 'bf16' in trial 0, and 'int8' here",
        ),
        ({"space": {"lora.rank": {"choices": [64]}}}, "none of its 4 ended trials is a point of this space: lora.rank is"),
    ],
)
def test_what_does_not_compare_is_one_line_that_says_why(tmp_path, change, part):
    from sweep.config.sweep import parse_sweep_config

    old = finished_sweep(tmp_path / "old", config_for(WIDE))
    config = parse_sweep_config({**warm_config(old).model_dump(mode="json"), **change})
    with pytest.raises(InputError) as error:
        read(config)
    assert part in str(error.value) and str(error.value).startswith("sweep.warm_start = ") and "\n" not in str(error.value)


def test_auto_products_take_the_trials_of_a_sweep_with_those_that_auto_means(tmp_path):
    from sweep.config.sweep import parse_sweep_config

    old = finished_sweep(tmp_path / "old", config_for(WIDE))
    train = {"max_tokens": 400, "num_reports": 4, "matmul": "auto"}
    assert len(read(parse_sweep_config({**warm_config(old).model_dump(mode="json"), "train": train}))) == 4


@pytest.mark.parametrize("journal", [b"[]\n", b"{}\n", b'{"op_code": 99}\n', b"\xff\xfe\n", b'{"op_code":\n{}\n', None])
def test_a_damaged_journal_is_one_line(tmp_path, journal):
    old = finished_sweep(tmp_path / "old", config_for(WIDE), [Outcome.COMPLETE])
    whole = old.journal.read_bytes()
    old.journal.write_bytes(whole.replace(b"COMPLETE", b"COMPLETED") if journal is None else journal)
    with pytest.raises(InputError, match=r"^folder = '.*/old': has a damaged journal") as error:
        read(warm_config(old))
    assert "\n" not in str(error.value)


def test_a_folder_that_is_none_and_a_sweep_without_results_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"sweep\.warm_start = '.*nowhere'.*must be a sweep folder"):
        read(config_for(WIDE, warm_start=[str(tmp_path / "nowhere")]))
    empty = finished_sweep(tmp_path / "empty", config_for(WIDE), [])
    with pytest.raises(InputError, match="must be a sweep with a trial that has ended"):
        read(warm_config(empty))


@pytest.mark.parametrize("sampler", ["random", "grid"])
def test_of_a_sweep_over_other_samples_the_best_points_come_first_and_no_loss_enters(tmp_path, sampler):
    old = finished_sweep(tmp_path / "old", config_for(RANKS, "grid", pruner="none"), [Outcome.COMPLETE] * 3)
    old.write_data({"training": "a", "evaluation": "b"})
    config = config_for(RANKS, sampler, warm_start=[str(old.path)])
    assert len(read(config, {"training": "a", "evaluation": "b"})) == 3
    found = read_earlier(config, parse_space(config.space), {"training": "a", "evaluation": "c"})
    assert found.trials == [] and found.first_points == [{"lora.rank": rank} for rank in (2, 4, 8)]  # by their losses
    assert "its evaluation samples differ from today's" in found.notes[0] and NUM_FIRST_POINTS >= 3
    study = warm_study(tmp_path / "new", config, {"evaluation": "c"})
    assert study.has_earlier_trials and study.records() == []
    assert study.ask().params == {"lora.rank": 2}
    again = study_in(tmp_path / "new", config)  # a resume goes on with the next
    assert [again.ask().params["lora.rank"] for _ in range(2)] == [4, 8] and again.ask() is None


def test_first_points_that_an_earlier_sweep_trained_are_told_and_not_tried(tmp_path):
    old = finished_sweep(tmp_path / "old", config_for(RANKS, "grid", pruner="none"), [Outcome.PAUSED])
    (known,) = [record.params for record in study_in(old.path, config_for(RANKS, "grid")).records()]
    (tmp_path / "new").mkdir()
    study = study_in(tmp_path / "new", warm_config(old, RANKS))
    others = [{"lora.rank": rank} for rank in (2, 4, 8) if {"lora.rank": rank} != known]
    study.beginning.keep([known, *others], None)
    assert study.beginning.known_line(study.is_new) is None
    study.take_over(read_earlier(warm_config(old, RANKS), parse_space(RANKS), {}))
    line = "first trials: 1 of 3 is known from an earlier sweep, and not trained again"
    assert study.beginning.known_line(study.is_new) == line and study.ask().params == others[0]


def test_paused_trials_are_among_the_best_points_and_a_sweep_without_any_is_refused(tmp_path):
    outcomes = [Outcome.COMPLETE, Outcome.PAUSED, Outcome.PRUNED]
    old = finished_sweep(tmp_path / "old", config_for(RANKS, "grid", pruner="none"), outcomes)
    scores = {r.params["lora.rank"]: (r.score, r.outcome) for r in study_in(old.path, config_for(RANKS, "grid")).records()}
    able = sorted((score, rank) for rank, (score, outcome) in scores.items() if outcome is not Outcome.PRUNED)
    hopeless = finished_sweep(tmp_path / "hopeless", config_for(RANKS, "grid", pruner="none"), [Outcome.PRUNED] * 2)
    for folder in (old, hopeless):
        folder.write_data({"evaluation": "b"})
    space = parse_space(RANKS)
    found = read_earlier(warm_config(old, RANKS), space, {"evaluation": "c"})
    assert found.first_points == [{"lora.rank": rank} for _, rank in able]
    assert found.notes[0].endswith("its best 2 points come first")
    with pytest.raises(InputError, match="gives nothing to begin with: its evaluation samples differ"):
        read_earlier(warm_config(hopeless, RANKS), space, {"evaluation": "c"})


def test_what_is_not_known_of_either_sweep_has_not_changed():
    assert changed_part({"training": "a"}, None) is changed_part({}, {"training": "a"}) is None
    assert changed_part({"model": "a"}, {"model": "b", "training": "c"}) == "model"


@pytest.mark.faults
def test_a_whole_sweep_learns_from_an_earlier_one_and_shows_the_front_of_its_own_trials(tmp_path):
    space = {"lora.rank": {"choices": [2, 4, 8, 16]}}
    values = config_for(space, "grid", "none").model_dump(mode="json") | {"data": BASE["data"]}
    old = finished_sweep(tmp_path / "old", parse_sweep_config(values), [Outcome.COMPLETE] * 2)
    known = {record.params["lora.rank"] for record in study_in(old.path, config_for(space, "grid")).records()}
    sweep = {"num_trials": 4, "warm_start": [str(old.path)], "objectives": ["eval_loss", "peak_allocated_gib"]}
    sweep["first_trials"] = [{"lora.rank": min(known)}]
    refused = start(tmp_path, space=space, sweep=sweep, optim={"eps": 0.05})
    _, err = refused.communicate(timeout=100)
    assert refused.returncode == 2 and err.count("\n") == 1 and "optim.eps is 1e-08 in trial 0, and 0.05 here" in err
    assert not (tmp_path / "sweeps").exists()
    process = start(tmp_path, space=space, sweep=sweep)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert f"warm start 2 trials from {old.path}" in out
    assert "first trials: 1 of 1 is known from an earlier sweep, and not trained again" in out
    folder = sweep_folder(tmp_path)
    trained = {number for number in range(8) if (folder / "trials" / f"{number:04d}" / "starts.txt").exists()}
    assert trained == {2, 3}
    board = json.loads((folder / "leaderboard.json").read_text())
    assert {row["params"]["lora.rank"] for row in board["trials"] if row["number"] in trained} == {2, 4, 8, 16} - known
    front = {row["number"] for row in board["pareto_front"]}
    assert front == trained  # a larger rank is better, but needs more memory
    assert all((folder / "trials" / f"{number:04d}" / "adapter" / "adapter_model.safetensors").exists() for number in front)
    assert board["best_trial"] in trained and "pareto front of eval_loss, peak_allocated_gib: trials" in out
    assert "the space is used up: 2 of 4 trials were possible" in out


def _made(path):
    path.mkdir()
    return path
