"""No engine command runs a model's own code because a file says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.__main__ import main

MODELING = """
from pathlib import Path
from transformers import PretrainedConfig
Path(__file__).with_name("ran").touch()
Path({ran!r}).touch()
class OwnConfig(PretrainedConfig):
    model_type = "own"
"""
COMMANDS = {"train": [], "prepare": [], "inspect": [], "plan": ["--card", "rtx4090"], "evaluate": ["--adapter", "none"]}


@pytest.fixture
def ran(tmp_path, monkeypatch) -> Path:
    """Make a model folder with code of its own, which touches this file, and the configs that permit it."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, ran = tmp_path / "model", tmp_path / "ran"
    model.mkdir()
    auto = {"AutoConfig": "own.OwnConfig"}
    (model / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n')
    (model / "own.py").write_text(MODELING.format(ran=str(ran)))
    values = {"model": {"path": str(model), "trust_remote_code": True}, "data": {"train": str(tmp_path / "data.jsonl")}}
    values["train"] = {"max_tokens": 9}
    (tmp_path / "train_config.json").write_text(json.dumps(values))
    (tmp_path / "configs.json").write_text(json.dumps([values]))
    return ran


@pytest.mark.parametrize("command", COMMANDS)
def test_a_config_file_permits_nothing_and_the_command_line_does(ran, command, capsys):
    file = ran.with_name("configs.json" if command == "prepare" else "train_config.json")
    given = [command, str(file), *COMMANDS[command]]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert "model.trust_remote_code = True: a file cannot permit" in error and "add --trust-remote-code" in error
    assert error.count("\n") == 1 and not ran.exists()
    assert main([*given, "--trust-remote-code"]) == (0 if command == "inspect" else 2)  # twin: it runs, and is no model
    error = capsys.readouterr().err
    assert "cannot permit" not in error
    if command not in ("train", "evaluate"):  # these look for the weights first, and there are none
        assert ran.exists(), error
