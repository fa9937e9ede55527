"""Relative paths in a config start at the folder in which the sweep was started."""

from __future__ import annotations

from pathlib import Path

from sweep.config.absolute_paths import with_absolute_paths
from tests.support.studies import WIDE, config_for


def test_paths_that_exist_become_absolute_and_names_stay_names(tmp_path):
    (tmp_path / "mine.jsonl").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "chatml").touch()
    config = config_for(WIDE)
    config = config.model_copy(update={
        "model": config.model.model_copy(update={"path": "model"}),
        "data": config.data.model_copy(update={"train": "mine.jsonl", "eval": "org/name", "chat_template": "chatml"}),
        "lora": config.lora.model_copy(update={"start_from": "model"}),
        "tracking": config.tracking.model_copy(update={"uri": "sqlite:///runs.db"}),
    })  # fmt: skip
    found = with_absolute_paths(config, tmp_path)
    assert found.lora.start_from == str(tmp_path / "model")
    assert (found.model.path, found.data.train) == (str(tmp_path / "model"), str(tmp_path / "mine.jsonl"))
    assert (found.data.eval, found.data.chat_template) == ("org/name", "chatml")
    assert found.tracking.uri == f"sqlite:///{tmp_path / 'runs.db'}"
    assert with_absolute_paths(found, Path("/")) == found


def test_lists_and_patterns_of_files_become_absolute(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    config = config_for(WIDE)
    data = config.data.model_copy(update={"train": ("a.jsonl", "*.jsonl", "none*.jsonl", "org/set"), "eval": "?.jsonl"})
    found = with_absolute_paths(config.model_copy(update={"data": data}), tmp_path).data
    assert found.train == (f"{tmp_path}/a.jsonl", f"{tmp_path}/*.jsonl", "none*.jsonl", "org/set")
    assert found.eval == f"{tmp_path}/?.jsonl"
