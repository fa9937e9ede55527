"""What all trials of a sweep share is known by its content, and another one is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from engine.config.trial import ModelConfig
from engine.errors import InputError, InputsChanged
from engine.sources import identity
from engine.sources.identity import PARTS, identify_model, is_input_fault, refuse_changed
from tests.support.trials import build

RECORDED = {part: f"{part}-then" for part in PARTS}


@pytest.fixture
def model(tiny_model_dir, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def found(folder: Path) -> dict[str, str]:
    return identify_model(ModelConfig(path=str(folder)))


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def test_a_copy_is_the_same_model_and_new_times_make_no_other(model, tmp_path):
    before = found(model)
    assert set(before) == {"config", "weights", "tokenizer"}
    assert found(Path(shutil.copytree(model, tmp_path / "copy"))) == before
    (model / "model.safetensors").touch()
    (model / "README.md").write_text("read me")
    assert found(model) == before


@pytest.mark.parametrize(
    ("name", "part"),
    [("model.safetensors", "weights"), ("config.json", "config"), ("tokenizer.json", "tokenizer"),
     ("tokenizer_config.json", "tokenizer")],
)  # fmt: skip
def test_a_file_of_which_one_bit_differs_makes_another_model(model, name, part):
    before = found(model)
    flip(model / name)
    after = found(model)
    assert {key for key in before if before[key] != after[key]} == {part}


@pytest.mark.parametrize(("name", "part"), [("modeling_new.py", "config"), ("chat_template.jinja", "tokenizer")])
def test_a_file_that_changes_what_runs_makes_another_model(model, name, part):
    before = found(model)
    (model / name).write_text("new")
    assert {key for key, value in found(model).items() if before[key] != value} == {part}


def test_a_single_file_next_to_shards_counts_because_transformers_reads_it(model):
    shutil.copy(model / "model.safetensors", model / "part.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "part.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    both = found(model)["weights"]
    flip(model / "model.safetensors")
    changed = found(model)["weights"]
    flip(model / "part.safetensors")
    assert len({both, changed, found(model)["weights"]}) == 3


def test_weights_are_read_once_for_each_state_of_the_files(model, monkeypatch):
    before = found(model)
    monkeypatch.setattr(identity, "content_digests", lambda *_: 1 / 0)
    assert found(model) == before
    (model / "model.safetensors").touch()  # twin: a new time alone makes it look again
    with pytest.raises(ZeroDivisionError):
        found(model)


def test_weights_that_change_while_they_are_read_have_no_digest(model, monkeypatch):
    original = identity.content_digests

    def slow(folder, names):
        digests = original(folder, names)
        flip(folder / "model.safetensors")
        return digests

    monkeypatch.setattr(identity, "content_digests", slow)
    with pytest.raises(InputError, match="changed while they were read"):
        found(model)


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert found(Path("org/model")) == {}
    repository = tmp_path / "models--org--model"
    for commit in ("a" * 40, "b" * 40):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        assert found(Path("org/model")) == {"commit": commit}


@pytest.mark.parametrize("part", PARTS)
def test_another_input_is_one_line_with_both_digests_and_the_way_out(tiny_config, part):
    config = build(tiny_config)
    refuse_changed(config, RECORDED, RECORDED)
    refuse_changed(config, {}, RECORDED)  # a sweep of an older version
    for now, shown in (({**RECORDED, part: "other"}, "other"), ({k: v for k, v in RECORDED.items() if k != part}, "none")):
        with pytest.raises(InputsChanged) as error:
            refuse_changed(config, RECORDED, now)
        line = str(error.value)
        assert line.startswith(PARTS[part][0] if part != "evaluation" else "data.train")  # held out from the training data
        assert f"digest then {part}-then, now {shown})" in line and "\n" not in line
        assert "put the former back and resume, or start a new sweep" in line


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (InputsChanged("x"), True), (InputError("data.train line 61", "{", "must be JSON"), True),
        (InputError("data.chat_template", "x.jinja", "allowed"), True), (InputError("model.path", "/m", "no such folder"), True),
        (InputError("data.max_seq_length", 8, "raise it"), False), (InputError("lora.target_modules", "x", "no layer"), False),
        (ValueError("data.train"), False),
    ],
)  # fmt: skip
def test_an_input_that_cannot_be_read_any_more_has_changed_too(error, is_one):
    assert is_input_fault(error, RECORDED) is is_one
    if not isinstance(error, InputsChanged):
        assert not is_input_fault(error, {})  # twin: nothing was recorded


def test_a_hub_that_does_not_answer_is_no_change():
    assert not is_input_fault(InputError("model.path", "org/model", "its error: no connection"), {"commit": "a"})


def test_a_start_that_one_trial_has_for_itself_is_that_trial_s_fault_alone():
    lost = InputError("lora.start_from", "trials/0003/start", "holds no adapter any more")
    assert is_input_fault(lost, RECORDED) and not is_input_fault(lost, {"commit": "a"})
