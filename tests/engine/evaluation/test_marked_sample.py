"""A sample is shown as the model sees it: whole, its targets marked, and only as text."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.__main__ import main
from engine.data.packing import Sample
from engine.evaluation.marked_sample import COLOUR, PLAIN, carries_loss, marked, marks_for, runs
from tests.support.paths import ROOT

TEXT = "<|user|> what?\n<|end|>café 漢 \x1b[2J ⟦x⟧ done<|end|>"


@pytest.fixture(scope="module")
def by_bytes() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a byte, so that a token may end inside a character."""
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def by_words() -> PreTrainedTokenizerFast:
    """Return a tokenizer that drops the space of a text's first token, as SentencePiece does."""
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "▁c": 2}, unk_token="▁a"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sample_of(tokenizer, text: str, *targets: slice) -> Sample:
    ids = np.array(tokenizer(text)["input_ids"])
    is_target = np.zeros(len(ids), dtype=bool)
    for part in targets:
        is_target[part] = True
    return Sample(ids, is_target)


@pytest.mark.parametrize("targets", [(), (slice(0, None),), (slice(20, None),), (slice(3, 9), slice(12, 13), slice(25, 27))])
def test_the_runs_are_the_whole_text_in_order(by_bytes, targets):
    sample = sample_of(by_bytes, "the quick brown fox jumps over", *targets)
    found = runs(sample.input_ids.tolist(), sample.is_target.tolist(), by_bytes)
    assert "".join(text for text, _ in found) == "the quick brown fox jumps over"
    assert [kind for _, kind in found] == [i % 2 == int(bool(sample.is_target[0]) is False) for i in range(len(found))]


def test_a_run_that_begins_inside_a_character_loses_nothing_after_it(by_bytes):
    sample = sample_of(by_bytes, "aé漢b", slice(2, 5))  # from the middle of é to the middle of 漢
    found = runs(sample.input_ids.tolist(), sample.is_target.tolist(), by_bytes)
    assert len(found) == 3 and found[0][0].startswith("a") and found[2][0].endswith("b")


def test_spaces_between_words_stay_where_a_run_begins(by_words):
    assert runs([0, 1, 2], [False, True, True], by_words) == [("a", False), (" b c", True)]
    assert by_words.decode([1, 2]) == "b c"  # the twin: a run decoded alone


def test_text_of_the_data_is_text_and_the_marks_are_ours_alone(by_bytes):
    sample = sample_of(by_bytes, TEXT, slice(20, None))
    shown = marked(sample, by_bytes, PLAIN)
    assert shown.count("⟦") == shown.count("⟧") == 1 and "\\u27e6x\\u27e7" in shown
    assert "\x1b" not in shown and "\\x1b[2J" in shown and "\n" in shown and "café 漢" in shown
    assert marked(sample, by_bytes, COLOUR).replace(COLOUR[0], "").replace(COLOUR[1], "").count("\x1b") == 0


def test_the_first_token_carries_no_loss_whatever_the_data_say(by_bytes):
    """No token stands before it. The account's targets leave it out, too."""
    sample = sample_of(by_bytes, "plain text", slice(0, None))
    assert marked(sample, by_bytes, PLAIN) == "p⟦lain text⟧" and sum(carries_loss(sample)) == 9
    assert carries_loss(sample_of(by_bytes, "ab", slice(1, 2))) == [False, True] and carries_loss(sample_of(by_bytes, "")) == []


def test_colours_are_for_terminals(monkeypatch):
    terminal = io.StringIO()
    assert marks_for(terminal) == PLAIN
    terminal.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert marks_for(terminal) == COLOUR
    monkeypatch.setenv("NO_COLOR", "1")
    assert marks_for(terminal) == PLAIN


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model_dir):
    folder = tmp_path_factory.mktemp("show")
    lines = [json.dumps({"prompt": f"Question {i}? ", "completion": f"Answer {i}."}) for i in range(40)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    values = {"model": {"path": str(tiny_model_dir)}, "data": {"train": str(folder / "data.jsonl")},
              "train": {"max_tokens": 100}}  # fmt: skip
    (folder / "train_config.json").write_text(json.dumps(values))
    return folder


def test_the_command_shows_the_sample_asked_for_from_a_file_or_a_folder(config, capsys):
    assert main(["show-sample", str(config)]) == 0
    first = capsys.readouterr().out
    assert first.startswith("sample 1 of 38 for training: ") and "? ⟦Answer " in first
    assert main(["show-sample", str(config / "train_config.json"), "--sample", "2"]) == 0
    assert capsys.readouterr().out.split("\n", 1)[1] != first.split("\n", 1)[1]
    assert main(["show-sample", str(config), "--eval"]) == 0
    assert "sample 1 of 2 for evaluation" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "said"), [(["--sample", "39"], "--sample = 39: must be from 1 to 38"),
                                             (["--sample", "0"], "--sample = 0: must be from 1 to 38")])  # fmt: skip
def test_a_sample_that_is_not_there_is_one_line(config, capsys, words, said):
    assert main(["show-sample", str(config), *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_a_folder_without_a_config_and_a_file_that_permits_code_are_refused(config, tmp_path, capsys):
    assert main(["show-sample", str(ROOT / "docs")]) == 2
    assert "must be a train_config.json or hold one, as best/" in capsys.readouterr().err
    values = json.loads((config / "train_config.json").read_text())
    values["model"]["trust_remote_code"] = True
    (tmp_path / "train_config.json").write_text(json.dumps(values))
    assert main(["show-sample", str(tmp_path)]) == 2
    assert "add --trust-remote-code" in capsys.readouterr().err
