"""An adapter folder from someone else grants no permission, and leads nowhere that its reader did not name."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.adapter.origin import read_origin
from engine.adapter.portable import Adapter, read_adapter
from engine.chat import main as chat
from engine.config.parsing import parse, to_json
from engine.config.trial import TrainConfig
from engine.errors import InputError
from engine.export.__main__ import main as export
from tests.support.export_models import save_adapter, save_model


def adapter(base: str) -> Adapter:
    return Adapter({"q": (torch.zeros(1, 1), torch.zeros(1, 1))}, 1, 1.0, base, None, {})


def folder_with(place: Path, **model) -> Path:
    place.mkdir(exist_ok=True)
    config = parse(TrainConfig, {"model": model, "data": {"train": "t"}, "train": {"max_tokens": 400}})
    (place / "train_config.json").write_text(to_json(config))
    return place


@pytest.mark.parametrize("command", [["chat"], ["export", "--to", "peft"], ["export", "--to", "merged"]])
def test_a_folder_that_permits_its_own_code_runs_none(tmp_path, command, capsys):
    base = save_model(tmp_path / "base")
    folder = save_adapter(tmp_path / "adapter", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}))
    (base / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n")
    folder_with(folder, path=str(base), trust_remote_code=True)
    name, *options = command
    written = ["--no-losses", "--out", str(tmp_path / "out")]
    run, more = (chat, ["--prompt", "hi"]) if name == "chat" else (export, [*options, *written])
    capsys.readouterr()  # what saving the model printed
    assert run([str(folder), *more]) == 2
    error = capsys.readouterr().err
    assert "model.trust_remote_code = True: a file cannot permit" in error and "--trust-remote-code" in error
    assert error.count("\n") == 1 and not (tmp_path / "mark").exists() and not (tmp_path / "out").exists()
    if options == ["--to", "peft"]:
        return  # reads no model
    run([str(folder), *more, "--trust-remote-code"])  # twin: the command line permits it
    assert (tmp_path / "mark").exists()


def test_the_two_files_of_a_folder_must_name_one_base_model(tmp_path):
    folder = folder_with(tmp_path / "adapter", path="/models/a")
    model, config = read_origin(folder, adapter("/models/a"))
    assert model.path == "/models/a" == config.model.path
    with pytest.raises(InputError, match=r"model.path = '/models/a': must be the base model of adapter_config.json, '/models/b'"):
        read_origin(folder, adapter("/models/b"))
    named = config.model_copy(update={"model": config.model.model_copy(update={"path": "/moved/a"})})
    assert read_origin(folder, adapter("/models/a"), config=named)[0].path == "/moved/a"  # the caller knows where it lies now


def test_a_builtin_is_the_model_it_was_published_as(tmp_path):
    folder = folder_with(tmp_path / "adapter", path="builtin:smollm2-135m-instruct")
    model, _ = read_origin(folder, adapter("HuggingFaceTB/SmolLM2-135M-Instruct"))
    assert model.path == "builtin:smollm2-135m-instruct"


@pytest.mark.parametrize("path", ["base", "./base", "../base", "adapter/base", "org/base", ".", "a/b/c"])
def test_a_relative_path_in_a_file_of_the_folder_is_not_followed(tmp_path, monkeypatch, path):
    (tmp_path / "here" / "org" / "base").mkdir(parents=True)
    (tmp_path / "here" / "base").mkdir()
    (tmp_path / "here" / "adapter" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for folder in (folder_with(tmp_path / "with", path=path), tmp_path / "without"):
        with pytest.raises(InputError, match="must name an absolute path or a hub id that is no folder here"):
            read_origin(folder, adapter(path))
    assert read_origin(tmp_path / "without", adapter("org/elsewhere"))[0].path == "org/elsewhere"  # a hub id


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["/etc", "..", "builtin:x"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """Make a valid adapter folder; return it with the content of its two files."""
    place = tmp_path_factory.mktemp("foreign")
    base = save_model(place / "base")
    folder = folder_with(save_adapter(place / "adapter", base), path=str(base))
    return folder, {name: json.loads((folder / name).read_text()) for name in ("adapter_config.json", "train_config.json")}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_folder_with_any_value_anywhere_is_one_line_or_the_adapter_that_it_names(foreign, data):
    folder, files = foreign
    name = data.draw(st.sampled_from(sorted(files)))
    values = copy.deepcopy(files[name])
    place = values
    while isinstance(place[key := data.draw(st.sampled_from(sorted(place)))], dict) and place[key]:
        place = place[key]
    place[key] = data.draw(JSON)
    (folder / name).write_text(json.dumps(values))
    try:
        found = read_adapter(folder)
        model, _ = read_origin(folder, found)
        assert not model.trust_remote_code and Path(model.path).is_absolute() == Path(found.base).is_absolute()
    except InputError as error:
        assert "\n" not in str(error)
    finally:
        (folder / name).write_text(json.dumps(files[name]))
