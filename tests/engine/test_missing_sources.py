"""A data file or template that is not there is refused before the hub is asked for a model."""

from __future__ import annotations

import json
import sys

import pytest

from engine.__main__ import main
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.errors import InputError
from engine.sources.hub_ids import refuse_missing_files


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"train": "nope.jsonl"}, "data.train"),
        ({"train": "t.jsonl", "eval": "a/b/c"}, "data.eval"),
        ({"train": "nope.csv.zst"}, "data.train"),
        ({"train": ["t.jsonl", "nope.jsonl"]}, "data.train"),
        ({"train": ["t.jsonl", "org/data"]}, "data.train"),
        ({"train": "t.jsonl", "eval": "nope/*.jsonl"}, "data.eval"),
        ({"train": "t.jsonl", "chat_template": "none.jinja"}, "data.chat_template"),
    ],
)
def test_missing_data_is_refused_before_the_hub_is_asked_for_a_model(data, field, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    values = {"model": {"path": "org/model"}, "data": data, "train": {"max_tokens": 400}}
    with pytest.raises(InputError, match="no such file") as error:
        refuse_missing_files(parse(TrainConfig, values).data)
    assert error.value.field == field
    (tmp_path / "configs.json").write_text(json.dumps([values]))
    monkeypatch.setitem(sys.modules, "engine.prepare", None)  # is not even loaded
    assert main(["prepare", "configs.json"]) == 2


@pytest.mark.parametrize("data", [{"train": "t.jsonl", "eval": "train"}, {"train": "org/data"}, {"train": ["t.jsonl", "*l"]},
                                  {"train": "*.jsonl"}, {"train": "."}, {"train": "builtin:stdlib-docs"},
                                  {"train": "name", "chat_template": "chatml"}])  # fmt: skip
def test_what_is_here_or_may_be_on_the_hub_is_left_to_prepare(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    refuse_missing_files(parse(TrainConfig, {"model": {"path": "m"}, "data": data, "train": {"max_tokens": 400}}).data)
