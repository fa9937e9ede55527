"""Experiments for 24 GB cards fit them and cost what they say; debug options do what they say."""

from __future__ import annotations

import json
import re

import pytest

from engine.command_answers import Facts
from engine.errors import InputError
from engine.planning.cards import CARDS
from engine.shape.model_shape import ModelShape
from sweep import preflight
from sweep.__main__ import compose, groups, main
from sweep.config.compose import given_keys
from sweep.config.conf_files import conf_folder
from sweep.config.sweep import parse_sweep_config
from sweep.plan.feasibility import Feasibility
from sweep.plan.forecast import describe_forecast
from sweep.plan.idle_settings import refuse_idle_overrides
from sweep.prior.beginning import has_prior
from sweep.space.parse import parse_space
from tests.support.prepared import prepared

LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
SHAPES = {  # from their config.json
    "llama-3.2-1b": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                     "head_dim": 64, "tie_word_embeddings": True},
    "llama-3.2-3b": {**LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
                     "head_dim": 128, "tie_word_embeddings": True},
    "llama-3.1-8b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                     "head_dim": 128, "tie_word_embeddings": False},
    "qwen2.5-7b": {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
                   "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
                   "sliding_window": 131072, "use_sliding_window": False},
}  # fmt: skip
EXPERIMENTS = [f"{model}-24gb" for model in SHAPES]
LARGEST = {"lora.rank": 128, "lora.target_modules": "all-linear", "data.max_seq_length": 4096, "optim.learning_rate": 1e-4}

LEAN = {"micro_batch_size": 1, "activation_checkpointing": True, "keep_layers": 1, "host_layers": 0, "weight_cache_gib": 0.0}


def shape(experiment):
    model = experiment.removesuffix("-24gb")
    return ModelShape.of(SHAPES[model], model)


def test_every_experiment_but_four_for_a_cpu_is_one_for_24_gb_cards_and_is_tested_here():
    assert groups()["experiment"] == sorted([*EXPERIMENTS, "extraction", "forgetting", "preferences", "quickstart"])


def test_the_experiment_without_a_gpu_chooses_by_right_answers_and_fits_its_data():
    from engine.sources import orders

    config = parse_sweep_config(compose(["+experiment=extraction"]))
    assert config.chosen_by == "exact_match" and config.base().metrics.choose_by == "exact_match"
    assert config.metrics.names == ("exact_match", "number_match", "json_valid") and config.metrics.is_due(1, 1)
    row = next(orders.rows("eval", 1))
    assert set(config.metrics.fields) <= set(row) and json.loads(row["messages"][-1]["content"])["quantity"] == row["quantity"]


def test_the_rule_of_an_experiment_with_limits_names_them_and_that_of_others_does_not():
    limited, free = (parse_sweep_config(compose([f"+experiment={name}"])).rule.text for name in ("forgetting", "quickstart"))
    assert "or PAUSED and keeps to data.eval_limits; " in limited and "or PAUSED; " in free


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_most_demanding_point_of_a_committed_sweep_fits_a_card_of_22_gib(experiment):
    config = parse_sweep_config(compose([f"+experiment={experiment}"]))
    space, base = parse_space(config.space), config.base().model_dump(mode="json")
    corner = {dimension.path: dimension.corners()[-1] for dimension in space.dimensions}
    assert {**corner, "optim.learning_rate": 1e-4} == LARGEST
    base["train"] |= LEAN  # one plan that fits is enough, and is found at once
    feasibility = Feasibility(shape(experiment), CARDS["a10g"])
    assert feasibility.check_fit(space.apply(base, LARGEST)).fits
    base["train"]["memory_budget_gib"] = 3.0  # twin: too little memory is reported
    assert not feasibility.check_fit(space.apply(base, LARGEST)).fits


@pytest.mark.parametrize("given", [[], *([f"+experiment={name}"] for name in EXPERIMENTS)])
def test_a_sweep_freezes_and_thaws_unless_one_key_says_otherwise(given):
    words = [*given, "data.train=my.jsonl"]
    config = parse_sweep_config(compose(words))
    assert config.pauses_trials and has_prior(config) and config.effective_pruner.name == "none"
    assert config.effective_budget.full_trials == (8 if given else 4)
    tpe = parse_sweep_config(compose([*words, "sampler=tpe"]))
    assert (tpe.sampler.name, tpe.effective_pruner.name, tpe.effective_budget.full_trials) == ("tpe", "successive_halving", None)
    assert not has_prior(tpe) and tpe.pruner == config.pruner
    assert not has_prior(parse_sweep_config(compose([*words, "sweep.prior=false"])))


def test_a_pruner_or_several_objectives_alone_are_refused_with_the_sampler_to_add():
    words = ["+experiment=llama-3.1-8b-24gb", "data.train=my.jsonl"]
    with pytest.raises(InputError, match=r"sampler.name = 'freeze_thaw': takes one objective; .* use sampler=tpe, gp, nsga2"):
        parse_sweep_config(compose([*words, "sweep.objectives=[eval_loss,elapsed_s]"]))
    for word in ("pruner=hyperband", "pruner.reduction_factor=3"):
        config = parse_sweep_config(compose([*words, word]))
        with pytest.raises(InputError, match="sampler=freeze_thaw pauses trials .*sampler=tpe"):
            refuse_idle_overrides(config, parse_space(config.space), given_keys([*words, word]))
        config = parse_sweep_config(compose([*words, word, "sampler=tpe"]))
        refuse_idle_overrides(config, parse_space(config.space), given_keys([*words, word, "sampler=tpe"]))


def test_a_saved_config_keeps_its_sampler_and_one_without_a_sampler_is_of_before_this_default():
    saved = parse_sweep_config(compose(["+experiment=llama-3.1-8b-24gb", "sampler=tpe"])).model_dump(mode="json")
    assert parse_sweep_config(saved).sampler.name == "tpe"
    assert parse_sweep_config({name: part for name, part in saved.items() if name != "sampler"}).sampler.name == "tpe"


def test_own_data_takes_one_override_and_its_evaluation_comes_from_it_too():
    data = parse_sweep_config(compose(["+experiment=llama-3.1-8b-24gb", "data.train=my.jsonl"])).data
    assert (data.train, data.eval, data.eval_max_seq_length) == ("my.jsonl", None, 4096)


def test_a_committed_sweep_is_forecast_from_a_folder_with_nothing_but_config_json(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama-3.2-1b"]))

    def inspect(config, module):
        assert config.model.path == str(tmp_path)
        return Facts(shape=ModelShape.of(json.loads((tmp_path / "config.json").read_text()), "m"))

    monkeypatch.setattr(preflight, "inspect", inspect)
    monkeypatch.setattr(preflight, "prepare", lambda configs, module: prepared(inspect(configs[0], module)))
    monkeypatch.setattr("sweep.cluster.slots.count_gpus", lambda: 0)
    arguments = ["+experiment=llama-3.2-1b-24gb", f"model.path={tmp_path}", "cluster.card=rtx4090", "dry_run=true"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "does not fit" not in text
    assert stated_hours("llama-3.2-1b-24gb")["rtx4090"] == pytest.approx(hours(text), rel=0.05)


def hours(forecast):
    return float(re.search(r"^cost +at most ([\d.]+) GPU hours: the tokens of 8 full trials", forecast, re.M)[1])


def stated_hours(experiment):
    """Return the hours that the experiment's comment states, by card."""
    text = (conf_folder() / "experiment" / f"{experiment}.yaml").read_text()
    found = re.search(r"([\d.]+) GPU hours on a 4090, ([\d.]+) on a 3090", text)
    return {"rtx4090": float(found[1]), "rtx3090": float(found[2])}


@pytest.mark.faults  # over a minute a card
@pytest.mark.parametrize("card", ["rtx4090", "rtx3090"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_committed_sweep_costs_what_its_comment_says_and_no_corner_is_infeasible(experiment, card):
    config = parse_sweep_config(compose([f"+experiment={experiment}"]))
    space, base = parse_space(config.space), config.base().model_dump(mode="json")
    text, _ = describe_forecast(space, base, Feasibility(shape(experiment), CARDS[card]), config.sweep.num_trials,
                             config.effective_budget.full_trials)  # fmt: skip
    assert "does not fit" not in text
    assert stated_hours(experiment)[card] == pytest.approx(hours(text), rel=0.05)


@pytest.mark.parametrize("debug", groups()["debug"])
def test_a_debug_option_makes_one_trial_of_any_experiment_wherever_it_stands(debug):
    for experiment in ("quickstart", "llama-3.1-8b-24gb"):
        given = [f"+experiment={experiment}", f"+debug={debug}"]
        config = parse_sweep_config(compose(given))
        assert config == parse_sweep_config(compose(given[::-1]))
        assert (config.sweep.num_trials, config.pruner.name, config.tracking.name) == (1, "none", "none")
        assert config.sweep.only_most_demanding == (debug == "one-trial") == (config.space != {})
        assert config.sweep.name == f"debug-{debug}"
        assert config.train.max_tokens < 30_000
    # the experiment's model and data stay
    assert config.model.path == "meta-llama/Llama-3.1-8B-Instruct"


def test_overfitting_one_batch_evaluates_on_the_samples_that_it_trains_on():
    config = parse_sweep_config(compose(["+experiment=quickstart", "+debug=overfit-one-batch"]))
    assert config.data.eval == "train" and config.data.train_max_samples == config.data.eval_max_samples
    assert config.train.tokens_per_step >= config.data.train_max_samples * config.data.max_seq_length
