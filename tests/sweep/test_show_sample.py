"""`python -m sweep show-sample` lets the engine print a sample of the sweep described."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from sweep.__main__ import main
from sweep.execution import engine_commands


@pytest.fixture
def asked(monkeypatch):
    """Collect what the engine is asked, in place of running it."""
    calls = []

    def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
        place = command.index("-m")
        calls.append((command[place + 1 : place + 3], json.loads(Path(command[place + 3]).read_text()), command[place + 4 :]))
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(engine_commands.subprocess, "run", run)
    return calls


def test_the_engine_gets_the_base_config_and_the_options(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.jsonl").write_text('{"text": "x"}\n')
    assert main(["show-sample", "+experiment=quickstart", "--sample", "3", "data.train=my.jsonl", "--eval"]) == 7
    (command, config, options), = asked  # fmt: skip
    assert command == ["engine", "show-sample"] and options == ["--sample", "3", "--eval"]
    assert config["data"]["train"] == str(tmp_path / "my.jsonl") and config["model"]["path"].startswith("builtin:")


def test_permission_for_the_models_code_comes_from_these_words_alone(asked):
    words = ["show-sample", "+experiment=quickstart"]
    main(words)
    main([*words, "model.trust_remote_code=true"])
    assert [options for _, _, options in asked] == [["--sample", "1"], ["--sample", "1", "--trust-remote-code"]]


def test_a_wrong_word_is_one_line(asked, capsys):
    assert main(["show-sample", "data.trian=x"]) == 2
    assert capsys.readouterr().err.startswith("error: ") and asked == []
