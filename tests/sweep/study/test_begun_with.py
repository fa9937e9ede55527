"""The journal keeps what a sweep began with; a config file that was edited since is refused."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest

from engine.command_answers import PreparedFacts
from engine.errors import InputError, InputsChanged
from sweep import driver, preflight
from sweep.config.resume_changes import AMENDABLE, BUDGETS, NUM_TRIALS, refuse_edits
from sweep.config.sweep import BudgetConfig, SweepConfig, parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.steering.command import parse_words
from sweep.steering.history import TakenCommand
from sweep.study.begun_with import read_begun_with, read_unedited_config
from tests.support.studies import WIDE, config_for, finish_one, study_in

INPUTS = {"weights": "then", "training": "t", "evaluation": "e"}
OTHER = {
    "model.quantization": "none", "model.dtype": "float32", "model.layers": "original", "model.embeddings": "host",
    "data.format": "text", "optim.name": "adamw", "optim.lr_schedule": "linear", "train.device": "cpu",
    "tracking.uri": "sqlite:////elsewhere.db", "tracking.metrics_host": "0.0.0.0", "cluster.card": "rtx4090",
    "lora.target_modules": ["q_proj"], "sweep.objectives": ["eval_loss", "elapsed_s"], "sweep.warm_start": ["other"],
    "data.chat_template": "chatml", "data.eval": "train", "train.report_at_tokens": [100, 200], "cluster.address": "head:6379",
    "optim.max_grad_norm": 2.0, "tracking.name": "mlflow", "sampler.name": "tpe", "pruner.name": "median",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> SweepFolder:
    """Return a sweep folder with one trial, whose journal keeps config and inputs."""
    config = parse_sweep_config({**config_for(WIDE).model_dump(mode="json"), "tracking": {"name": "none"}})
    folder = SweepFolder(tmp_path / "sweep")
    folder.path.mkdir()
    folder.write_config(config)
    study = study_in(folder.path, config)
    assert study.keep_begun_with(config, INPUTS)
    finish_one(study)
    return folder


def leaves(values: dict[str, Any], above: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        path = f"{above}.{name}" if above else name
        found += leaves(value, path) if isinstance(value, dict) and value and path != "space" else [path]
    return found


def edited(folder: SweepFolder, path: str, value: Any) -> dict[str, Any]:
    values = json.loads(folder.config_file.read_text())
    *sections, name = path.split(".")
    place = values
    for section in sections:
        place = place[section]
    place[name] = value
    folder.config_file.write_text(json.dumps(values))
    return values


def another(path: str, value: Any) -> Any:
    if path in OTHER:
        return OTHER[path]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value / 2 or 0.25
    return "other" if isinstance(value, str) else 1


def test_every_field_that_no_resume_may_change_is_refused_when_it_was_edited(folder):
    config = folder.read_config()
    text, refused = folder.config_file.read_text(), 0
    for path in leaves(config.model_dump(mode="json")):
        if path in AMENDABLE or path == "space":
            continue
        value: Any = config.model_dump(mode="json")
        for part in path.split("."):
            value = value[part]
        edited(folder, path, another(path, value))
        try:
            folder.read_config()
        except InputError:
            pass  # not even valid: refused as before
        else:
            assert folder.read_config() != config, path
            with pytest.raises(InputError, match="edited in sweep_config.json: the sweep began with") as error:
                read_unedited_config(folder)
            field = error.value.field
            assert path == field or path.startswith(field + "."), (path, field)
            refused += 1
        folder.config_file.write_text(text)
    assert refused > 45 and read_unedited_config(folder) == config


def test_what_a_resume_may_change_may_be_edited_and_only_upwards(folder):
    edited(folder, NUM_TRIALS, 20)
    edited(folder, "cluster.num_gpus", 3)
    assert read_unedited_config(folder).sweep.num_trials == 20
    edited(folder, NUM_TRIALS, 1)
    with pytest.raises(InputError, match=r"sweep\.num_trials = 1: must be at least 8 on resume"):
        read_unedited_config(folder)
    assert set(BUDGETS) < set(AMENDABLE)


def test_the_order_of_the_space_counts_and_so_does_each_bound(folder):
    text = folder.config_file.read_text()
    edited(folder, "space", dict(reversed(WIDE.items())))
    with pytest.raises(InputError, match="^space = "):
        read_unedited_config(folder)
    folder.config_file.write_text(text)
    space = copy.deepcopy(WIDE)
    space["optim.learning_rate"]["high"] = 1e-1
    edited(folder, "space", space)
    with pytest.raises(InputError, match=r"space\.optim\.learning_rate\.high = 0\.1: edited in sweep_config\.json"):
        read_unedited_config(folder)


@pytest.mark.parametrize(("before", "now"), [(4, 4.0), (1, True), (0.0, False)])
def test_a_number_of_another_kind_is_another_space(before, now):
    config = config_for(WIDE)
    spaces = [{"lora.rank": {"low": value, "high": 64}} for value in (before, now)]
    with pytest.raises(InputError, match="edited in sweep_config.json"):
        refuse_edits(config.model_copy(update={"space": spaces[1]}), config.model_copy(update={"space": spaces[0]}))


def test_an_amended_config_is_kept_and_the_inputs_of_the_start_stay(folder):
    config = parse_sweep_config({**folder.read_config().model_dump(mode="json"), "sweep": {"num_trials": 20}})
    study = study_in(folder.path, folder.read_config())
    size = folder.journal.stat().st_size
    assert study.keep_begun_with(folder.read_config(), INPUTS) and folder.journal.stat().st_size == size  # nothing is new
    assert study.keep_begun_with(config, INPUTS)
    begun = read_begun_with(folder)
    assert begun.config == config and begun.inputs == INPUTS


def test_a_folder_of_an_older_version_is_recorded_from_now_on(tmp_path):
    config = config_for(WIDE)
    folder = SweepFolder(tmp_path)
    folder.write_config(config)
    assert read_begun_with(folder) == read_begun_with(SweepFolder(tmp_path / "none"))  # no journal yet
    finish_one(study_in(tmp_path, config))
    assert read_begun_with(folder).config is None and read_unedited_config(folder) == config
    study = study_in(tmp_path, config)
    assert not study.keep_begun_with(config, INPUTS)  # the session says so
    assert study.keep_begun_with(config, INPUTS) and read_begun_with(folder).inputs == INPUTS


def resumed(folder: SweepFolder, data: dict[str, str], monkeypatch, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Resume up to the first trial, with these digests of today's inputs; return what the session is given."""
    given: dict[str, Any] = {}
    facts = PreparedFacts(
        model_path="m", layers="-", num_train_samples=1, num_eval_samples=1, num_dropped_samples=0, num_trainable=[1], data=data
    )
    monkeypatch.setattr(preflight, "prepare", lambda *_: facts)
    monkeypatch.setattr(driver, "_run", lambda plan, *rest: given.update(config=plan.config, inputs=rest[-1]) or 0)
    assert driver.resume(str(folder.path), overrides or {}) == 0
    return given


@pytest.mark.parametrize("part", INPUTS)
def test_a_resume_with_other_inputs_is_refused_before_anything_is_written(folder, monkeypatch, part):
    journal = folder.journal.read_bytes()
    with pytest.raises(InputsChanged, match=f"digest then {INPUTS[part]}, now other"):
        resumed(folder, {**INPUTS, part: "other"}, monkeypatch)
    assert folder.journal.read_bytes() == journal
    assert resumed(folder, INPUTS, monkeypatch)["inputs"] == INPUTS  # twin


def test_an_older_folder_compares_the_samples_that_it_knows_and_records_the_rest(tmp_path, monkeypatch):
    config = parse_sweep_config({**config_for(WIDE).model_dump(mode="json"), "tracking": {"name": "none"}})
    folder = SweepFolder(tmp_path)
    folder.write_config(config)
    folder.write_data({"training": "t", "evaluation": "e"})
    finish_one(study_in(tmp_path, config))
    with pytest.raises(InputsChanged, match="digest then t, now other"):
        resumed(folder, {**INPUTS, "training": "other"}, monkeypatch)
    assert resumed(folder, INPUTS, monkeypatch)["inputs"] == INPUTS


def test_a_resume_takes_the_edited_budget_and_refuses_an_edited_trial(folder, monkeypatch):
    edited(folder, NUM_TRIALS, 9)
    config: SweepConfig = resumed(folder, INPUTS, monkeypatch, {"sweep.budget.gpu_hours": 2.0})["config"]
    assert (config.sweep.num_trials, config.sweep.budget.gpu_hours) == (9, 2.0)
    edited(folder, "optim.weight_decay", 0.5)
    with pytest.raises(InputError, match=r"optim\.weight_decay = 0\.5: edited in sweep_config\.json: the sweep began with 0\.0"):
        resumed(folder, INPUTS, monkeypatch)


def test_other_commands_that_read_the_folder_refuse_an_edited_config_too(folder):
    from sweep.report.build import write_report
    from sweep.study.earlier_sweeps import read_earlier

    edited(folder, "optim.weight_decay", 0.5)
    with pytest.raises(InputError, match="edited in sweep_config.json"):
        write_report(folder)
    here = config_for(WIDE, warm_start=[str(folder.path)])
    with pytest.raises(InputError, match=r"sweep\.warm_start.*edited in sweep_config\.json"):
        read_earlier(here, None, {})


def take(folder: SweepFolder, config: SweepConfig, settings: dict[str, Any]) -> None:
    """Enter a command in the journal that gives the sweep these settings."""
    study = study_in(folder.path, config)
    command = parse_words(["add", "1"], "ann@box", 0.0, str(len(study.commands.taken)))
    study.commands.add(TakenCommand(command, 1.0, None, settings))


def test_commands_change_the_config_of_the_next_resume_once(folder):
    began = folder.read_config()
    for num_trials in (9, 12):
        take(folder, began, {NUM_TRIALS: num_trials})
    take(folder, began, {"sweep.budget.gpu_hours": 8.0})
    config = read_unedited_config(folder)
    assert (config.sweep.num_trials, config.sweep.budget.gpu_hours) == (12, 8.0)
    folder.write_config(config)  # as the driver did before it was killed
    assert read_unedited_config(folder) == config

    larger = config.model_copy(update={"sweep": config.sweep.model_copy(update={"num_trials": 20, "budget": BudgetConfig()})})
    folder.write_config(larger)  # a resume has lifted the limit and asked for more
    assert study_in(folder.path, larger).keep_begun_with(larger, INPUTS)
    assert read_begun_with(folder).num_commands == 3
    assert read_unedited_config(folder) == larger
    take(folder, larger, {NUM_TRIALS: 21})
    assert read_unedited_config(folder).sweep.num_trials == 21


def test_a_damaged_command_in_the_journal_is_one_line(folder):
    config = folder.read_config()
    study_in(folder.path, config).commands._study.set_user_attr("command 000000", {"command": 3})
    with pytest.raises(InputError, match="holds a damaged command"):
        read_unedited_config(folder)


def test_a_sweep_that_an_older_version_began_goes_on_without_a_price_of_set_ups(tmp_path):
    config = parse_sweep_config({**config_for(WIDE).model_dump(mode="json"), "sampler": {"name": "freeze_thaw"}})
    folder = SweepFolder(tmp_path / "sweep")
    folder.path.mkdir()
    folder.write_config(config)
    assert study_in(folder.path, config).keep_begun_with(config, INPUTS)
    assert read_unedited_config(folder).sampler.setup_tokens == "auto"
    for file in (folder.config_file, folder.journal):
        file.write_text(re.sub(r',?\s*\\?"setup_tokens\\?": \\?"auto\\?"', "", file.read_text()))
    assert read_unedited_config(folder).sampler.setup_tokens == 0 and "setup_tokens" not in folder.config_file.read_text()
