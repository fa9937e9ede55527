"""A trial trains only on what its sweep began with: samples, template and base model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from engine.data.readers import read_rows
from engine.data.source_files import NamedSource, find_source
from engine.data.views import identify, load_data, load_recorded
from engine.errors import InputError, InputsChanged
from engine.model.inspect import load_tokenizer
from tests.support.tiny_models import TEMPLATE
from tests.support.trials import build, run

ROW = {"messages": [{"role": "user", "content": "What is new?"}, {"role": "assistant", "content": "This line."}]}


@pytest.fixture
def own(tiny_config, tmp_path) -> dict:
    """Return the config with copies of model, data and template that a test may change."""
    data, template = tmp_path / "data.jsonl", tmp_path / "chat.jinja"
    shutil.copy(tiny_config["data"]["train"], data)
    template.write_text(TEMPLATE)
    model = shutil.copytree(tiny_config["model"]["path"], tmp_path / "model")
    paths = {"train": str(data), "chat_template": str(template)}
    return {**tiny_config, "model": {"path": str(model)}, "data": {**tiny_config["data"], **paths}}


def recorded(config) -> dict[str, str]:
    tokenizer = load_tokenizer(config.model)
    return identify(config, tokenizer, load_data(config.data, tokenizer))


def append(own: dict, text: str) -> None:
    with open(own["data"]["train"], "a") as file:
        file.write(text)


CHANGES = {
    "a line more": (lambda own: append(own, json.dumps(ROW) + "\n"), "data.train", "training samples changed"),
    "half a line": (lambda own: append(own, '{"messages": ['), "data.train", "valid when the sweep began"),
    "no file": (lambda own: Path(own["data"]["train"]).unlink(), "data.train", "valid when the sweep began"),
    "template": (
        lambda own: Path(own["data"]["chat_template"]).write_text(TEMPLATE.replace("<|end|>", " <|end|>")),
        "data.chat_template", "chat template changed",
    ),
    "no template": (lambda own: Path(own["data"]["chat_template"]).unlink(), "data.chat_template", "valid when"),
    "weights": (
        lambda own: Path(own["model"]["path"], "model.safetensors").write_bytes(
            Path(own["model"]["path"], "model.safetensors").read_bytes()[:-1] + b"\x7f"
        ),
        "model.path", "its weights changed",
    ),
    "no model": (lambda own: shutil.rmtree(own["model"]["path"]), "model.path", "valid when the sweep began"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_sweep_did_not_begin_with_is_refused(own, change):
    config = build(own)
    wanted, tokenizer = recorded(config), load_tokenizer(config.model)
    assert set(wanted) == {"config", "weights", "tokenizer", "template", "training", "evaluation"}
    assert load_recorded(config, tokenizer, wanted)[0].digest() == wanted["training"]
    make, field, said = CHANGES[change]
    make(own)
    with pytest.raises(InputsChanged, match=said) as error:
        load_recorded(config, tokenizer, wanted)
    assert str(error.value).startswith(field) and "\n" not in str(error.value)


def test_lengths_that_a_space_varies_and_a_blank_line_change_nothing(own):
    config = build(own)
    wanted, tokenizer = recorded(config), load_tokenizer(config.model)
    append(own, "\n")
    for length in (64, 100):
        load_recorded(build(own, data={"max_seq_length": length}), tokenizer, wanted)
    with pytest.raises(InputError, match="raise it") as error:  # the trial's own fault, not the data's
        load_recorded(build(own, data={"max_seq_length": 8}), tokenizer, wanted)
    assert not isinstance(error.value, InputsChanged)


def test_a_trial_compares_before_its_first_step(own, tmp_path, base):
    from engine.training.loop import train

    config = build(own)
    wanted = recorded(config)
    (tmp_path / "trial").mkdir()
    append(own, json.dumps(ROW) + "\n")
    with pytest.raises(InputsChanged, match="training samples changed"):
        list(train(config, tmp_path / "trial", inputs=wanted))
    assert not list((tmp_path / "trial").iterdir())
    run(config, tmp_path / "alone")  # twin: outside a sweep there is nothing to compare with


def test_the_evaluation_of_the_winner_compares_too(own, tmp_path):
    from engine.__main__ import main

    config = build(own)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "inputs.json").write_text(json.dumps(recorded(config)))
    run(config, tmp_path / "trial")
    given = ["evaluate", str(tmp_path / "config.json"), "--adapter", str(tmp_path / "trial" / "adapter")]
    assert main([*given, "--inputs", str(tmp_path / "inputs.json")]) == 0
    append(own, json.dumps(ROW) + "\n")
    assert main([*given, "--inputs", str(tmp_path / "inputs.json")]) == 2


def test_a_file_that_changes_while_it_is_read_is_refused(own):
    source = NamedSource("data.train", (own["data"]["train"],))
    rows = read_rows(source, find_source(source))
    next(rows)
    append(own, json.dumps(ROW) + "\n")
    with pytest.raises(InputError, match="changed while it was read"):
        list(rows)


STYLED = "{% if style is defined %}<|system|>{{ style }}<|end|>{% endif %}" + TEMPLATE


def styled(own, **data):
    """Return configs as a space over the template's variables gives them, with many rows held out."""
    Path(own["data"]["chat_template"]).write_text(STYLED + "{# {{ thinking }} #}")
    return build(own, data={"eval": None, "eval_fraction": 0.5, **data})


def test_trials_with_other_variables_of_the_template_hold_out_the_same_rows_and_pass_the_check(own):
    from engine.prepare import prepare

    configs = [styled(own, template_kwargs=given) for given in ({}, {"style": "short"}, {"style": "a long one"})]
    facts = prepare(configs)
    tokenizer, learnt = load_tokenizer(configs[0].model), set()
    for config in configs:
        train, evaluation = load_recorded(config, tokenizer, facts.data)
        learnt.add((train.targets_digest(), evaluation.targets_digest()))
        assert load_recorded(config.model_copy(), tokenizer, facts.data)[0].digest() == train.digest()
    assert len(facts.data) == 6 + 2 * 2 and len(learnt) == 1
    append(own, json.dumps(ROW) + "\n")
    for config in configs:
        with pytest.raises(InputsChanged, match="samples changed"):
            load_recorded(config, tokenizer, facts.data)


def test_variables_that_change_what_is_scored_are_refused(own):
    from engine.prepare import prepare

    Path(own["data"]["chat_template"]).write_text(TEMPLATE.replace("<|end|>", "{{ tail }}<|end|>"))
    configs = [build(own, data={"template_kwargs": given}) for given in ({}, {"tail": "!"})]
    with pytest.raises(InputError, match="scored on other target tokens") as error:
        prepare(configs)
    assert error.value.field == "data.template_kwargs"
    with pytest.raises(InputError, match="{} instead of null"):
        prepare([styled(own), styled(own, template_kwargs={"style": "short"})])
