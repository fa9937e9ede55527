"""A trial's hours hold its evaluations, and a sweep that mostly evaluates is told so, with a way out that is right."""

from __future__ import annotations

import itertools
import json
import random
import re
import types

import pytest

from engine.bench.shapes import SHAPES
from engine.command_answers import VisibleCard
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.data.account import account_data
from engine.planning.cards import CARDS
from engine.shape.model_shape import ModelShape
from sweep import preflight
from sweep.__main__ import main
from sweep.config.compose import compose
from sweep.config.sweep import parse_sweep_config
from sweep.plan.feasibility import Feasibility
from sweep.plan.forecast import describe_forecast
from sweep.plan.reference_forecast import reference_line
from sweep.plan.trial_hours import LEAST_S, MOST_SHARE, EvaluationWork, Point, evaluation_warning, least_reports, most_reports
from sweep.space.parse import parse_space
from sweep.text import duration_text
from tests.support.prepared import prepared
from tests.support.reports import make_account
from tests.support.tiny_models import byte_tokenizer

SHAPE = ModelShape.of({"model_type": "llama", **SHAPES["llama-3.2-1b"]}, "1B")
FEASIBILITY = Feasibility(SHAPE, CARDS["rtx4090"])
MANY = 1000  # whole trials, so that no sweep is too short for a warning


def values(**sections):
    data = {"train": "t", "max_seq_length": 1024, "eval_max_seq_length": 1024, **sections.get("data", {})}
    train = {"max_tokens": 1_000_000, "num_reports": 8, "tokens_per_step": 8192, **sections.get("train", {})}
    return {"model": {"path": "m"}, "data": data, "train": train, "optim": sections.get("optim", {})}


def evaluated(num_tokens=200_000, part="evaluation", **changes):
    return make_account(part, **{"max_seq_length": 1024, "num_tokens": num_tokens, "num_chosen": 256, **changes})


def facts(*accounts, **changes):
    return prepared(accounts=[make_account(num_tokens=10**8, max_seq_length=1024), *accounts], **changes)


def point(found, **sections):
    config = parse(TrainConfig, values(**sections))
    return Point({}, config, FEASIBILITY.check_fit(config), EvaluationWork.of(config, found))


def share(one):
    return one.evaluation_hours / one.hours


def test_the_work_counts_every_set_once_at_the_length_of_the_evaluation_and_a_running_average_again():
    own = [evaluated(300, "evaluation/a"), evaluated(500, "evaluation/b"), evaluated(400, "evaluation/b")]
    others = [evaluated(900, "evaluation/b", max_seq_length=512), evaluated(7000, "training", max_seq_length=1024)]
    config = parse(TrainConfig, values())
    work = EvaluationWork.of(config, facts(*own, *others))
    assert (work.num_tokens, work.times) == (800, 8)
    averaged = parse(TrainConfig, values(optim={"ema_horizon": 0.5}, train={"report_at_tokens": [250_000, 500_000]}))
    assert EvaluationWork.of(averaged, facts(*own)).times == 6  # the last report is at max_tokens
    assert EvaluationWork.of(config, facts(others[0])) is None and EvaluationWork.of(config, None) is None


def test_hours_are_those_of_steps_and_evaluations():
    one, without = point(facts(evaluated())), point(None)
    speed = one.fit.evaluation.tokens_per_second
    assert one.evaluation_hours == pytest.approx(8 * 200_000 / speed / 3600)
    assert one.hours == pytest.approx(without.hours + one.evaluation_hours) and without.evaluation_hours == 0.0
    assert without.hours == pytest.approx(1_000_000 / one.tokens_per_second / 3600)


@pytest.mark.parametrize("grid", [(1, 2, 4, 8), (2, 4, 6, 8), (3, 4, 8)])
def test_no_sweep_makes_more_reports_than_said(grid):
    most = most_reports(grid, 3, 1.5)
    ends = itertools.product(range(len(grid) + 1), repeat=3)
    possible = max(sum(one) for one in ends if sum((0, *grid)[rung] for rung in one) <= 1.5 * grid[-1])
    assert possible <= most <= possible + 1


@pytest.mark.parametrize(
    ("found", "sections", "num_trials"),
    [
        (facts(evaluated(20_000)), {}, MANY),  # few tokens
        (None, {}, MANY),  # samples that nobody has counted
        (facts(evaluated()), {}, LEAST_S / 3600 / point(facts(evaluated())).evaluation_hours * 0.99),  # seconds in all
        (facts(evaluated(num_chosen=32)), {"train": {"num_reports": 2}}, MANY),  # neither can be fewer
    ],
)
def test_there_is_no_warning_where_nothing_is_wrong_known_or_to_be_done(found, sections, num_trials):
    assert evaluation_warning([point(found, **sections)], num_trials) is None


@pytest.mark.parametrize(("num_tokens", "warns"), [(70_000, False), (110_000, True)])
def test_the_bound_is_a_quarter_of_the_time(num_tokens, warns):
    one = point(facts(evaluated(num_tokens)))
    assert (share(one) > MOST_SHARE) is warns is (evaluation_warning([one], MANY) is not None)


def test_there_is_no_warning_without_a_predicted_speed():
    config = parse(TrainConfig, values(train={"device": "cpu"}))
    one = Point({}, config, FEASIBILITY.check_fit(config), EvaluationWork.of(config, facts(evaluated())))
    assert one.hours is None and evaluation_warning([one], MANY) is None


def proposals(line):
    """Return the overrides that a warning proposes, each with the share that it promises."""
    found = re.findall(r"((?:data|train)\.\w+)=(\d+) makes it about (\d+)%", line)
    return [(path.split("."), int(number), int(percent) / 100) for path, number, percent in found]


def test_what_the_warning_proposes_does_what_it_says(tmp_path):
    """Both ways out are taken, on real data that are prepared again."""
    rng, file = random.Random(0), tmp_path / "t.jsonl"
    texts = ("".join(rng.choices("abcdefgh ", k=int(rng.lognormvariate(5.6, 0.8)) + 5)) for _ in range(3000))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = byte_tokenizer()
    tokenizer.name_or_path = "bytes"

    def taken(**sections):
        given = {"data": {"train": str(file), "format": "text", **sections.get("data", {})},
                 "train": {"max_tokens": 500_000, **sections.get("train", {})}}  # fmt: skip
        config = parse(TrainConfig, values(**given))
        return point(prepared(accounts=account_data(config.data, tokenizer)[2]), **given)

    before = taken()
    line = evaluation_warning([before], MANY)
    each = f"8 evaluations of {before.work.num_tokens:,} tokens"
    assert line.startswith(f"evaluation takes about {share(before):.0%} of a trial's time ({each}): data.eval_max_samples=")
    found = proposals(line)
    assert [path for path, _, _ in found] == [["data", "eval_max_samples"], ["train", "num_reports"]]
    for (section, key), number, promised in found:
        assert share(taken(**{section: {key: number}})) == pytest.approx(promised, abs=0.02) and promised <= MOST_SHARE


def test_rungs_at_given_tokens_are_named_instead_of_their_number_and_few_samples_stay():
    rungs = {"report_at_tokens": [2**k for k in range(10, 18)]}
    line = evaluation_warning([point(facts(evaluated(num_chosen=32)), train=rungs)], MANY)
    assert "rungs (train.report_at_tokens) make it about" in line and "eval_max_samples" not in line


SWEEP = ["model=local", "model.path=m", "data=local", "data.train=t.jsonl", "data.max_seq_length=1024",
         "data.eval_max_seq_length=1024", "train.max_tokens=1000000", "train.tokens_per_step=8192", "space=none",
         "space.lora.rank.choices=[8,64]", "sampler=grid", "pruner=none", "tracking=none"]  # fmt: skip


@pytest.mark.parametrize(("changes", "least"), [
    ([], 2), (["pruner=successive_halving_late"], 3), (["pruner=hyperband", "pruner.min_rung=4"], 5),
    (["pruner=median", "pruner.num_warmup_rungs=3"], 4), (["pruner=patient"], 4), (["pruner=none"], 2),
    (["pruner=none", "metrics.exact_match=true", "metrics.at=[2,5]"], 5), (["pruner=hyperband", "sampler=freeze_thaw"], 2),
])  # fmt: skip
def test_no_rung_is_given_up_that_pruner_or_metrics_need(changes, least):
    given = [] if "sampler=freeze_thaw" in changes else ["sampler=tpe"]
    config = parse_sweep_config(compose(["model=local", "model.path=m", "data.train=t", "train.num_reports=8", *given, *changes]))
    assert least_reports(config) == least
    one = point(facts(evaluated(100_000)))
    text = evaluation_warning([one], MANY, least)
    assert f"train.num_reports={max(least, 3)} makes" in text


@pytest.fixture
def answered(monkeypatch, tmp_path):
    found = facts(evaluated(), shape=SHAPE, card=VisibleCard("NVIDIA GeForce RTX 4090", 24.0))
    monkeypatch.setattr(preflight, "inspect", lambda config, module: found)
    monkeypatch.setattr(preflight, "prepare", lambda configs, module: found)
    monkeypatch.chdir(tmp_path)
    return found


def test_a_dry_run_says_how_much_of_the_hours_is_evaluation_and_warns(answered, monkeypatch, capsys):
    monkeypatch.setattr("sweep.cluster.slots.count_gpus", lambda: 0)
    assert main([*SWEEP, "cluster.card=rtx4090", "dry_run=true", "train.num_reports=8"]) == 0
    shown = capsys.readouterr()
    cost = next(line for line in shown.out.splitlines() if line.startswith("cost "))
    percent = int(re.search(r" GPU hours, (\d+)% of them evaluation, if no trial is pruned: ", cost)[1])
    warning = next(line for line in shown.err.splitlines() if "evaluation takes" in line)
    assert f"WARNING: evaluation takes about {percent}% of a trial's time (8 evaluations of 200,000 tokens): " in warning
    assert main([*SWEEP, "cluster.card=rtx4090", "dry_run=true", "train.num_reports=1"]) == 0
    assert "evaluation takes" not in capsys.readouterr().err


def test_a_start_warns_too_and_a_resume_does_not(answered, monkeypatch, capsys):
    config, part = composed(), types.SimpleNamespace  # only what the check reads
    space, base = parse_space(config.space), config.base().model_dump(mode="json")
    made = part(config=config, space=space, slots=part(device="cuda"), kinds={}, base=lambda: base)
    monkeypatch.setattr(preflight, "_checked", lambda plan, *_: (plan, answered))
    monkeypatch.setattr(preflight, "_check_disk", lambda *_: None)
    monkeypatch.setattr(preflight, "with_chosen_matmul", lambda plan, *_: (plan, []))
    for folder, warns in ((None, True), ("sweeps/one", False)):
        preflight.check_sweep(made, part(command=()), {}, folder)
        assert ("evaluation takes about" in capsys.readouterr().err) is warns


def composed():
    return parse_sweep_config(compose([*SWEEP, "cluster.calibrate=false", "train.num_reports=8"]))


def test_the_reference_model_reads_at_the_speed_of_an_evaluation():
    config = parse(TrainConfig, values(data={"format": "preference"}))
    found = facts(evaluated(1_000_000))
    speed = point(found).fit.evaluation.tokens_per_second
    line = reference_line(config, found, speed)
    assert f"reads up to 2,000,000 tokens, about {duration_text(2_000_000 / speed)}, once on each machine" in line
    assert "tokens, once on each machine" in reference_line(config, found, None)


def test_a_budget_of_tokens_counts_the_reports_of_short_trials():
    config = composed()
    base = config.base().model_dump(mode="json")
    base["train"]["report_at_tokens"] = [62_500, 125_000, 250_000, 500_000, 1_000_000]
    text, _ = describe_forecast(parse_space(config.space), base, FEASIBILITY, 8, 1.0, facts(evaluated()))
    cost = text.splitlines()[-1]
    assert re.search(r"at most [\d.]+ GPU hours, \d+% of them evaluation: the tokens of 1 full trial of ", cost)
    assert cost.endswith(f", and at most {int(most_reports(base['train']['report_at_tokens'], 2, 1.0))} reports")
