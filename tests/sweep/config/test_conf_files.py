"""A fault in a file of conf/ is one line that names file, line and column."""

from __future__ import annotations

import shutil

import pytest

from engine.errors import InputError
from sweep.__main__ import compose
from sweep.config import conf_files

HEAD = b"# @package _global_\n"
FAULTS = {  # text after the head -> place, and what the line says
    b"lora:\n\trank: 8\n": ("line 3, column 1", "with spaces, not tabs"),
    b"lora:\n  rank: 8\n   lora_alpha: 3\n": ("line 4, column 14", "mapping values are not allowed here"),
    b"lora:\n  rank: 8\n  rank: 9\n": ("line 4, column 3", "duplicate key rank"),
    b"lora: {rank: 8\n": ("line 3, column 1", "expected ',' or '}'"),
    b"lora: {rank: 8} # \xff\n": ("line 2, column 19", "invalid start byte"),
    b"a: \x01\n": ("line 2, column 4", "special characters"),
    "lora: {rank: 8}\n".encode("utf-16"): ("line 2, column 1", "start byte"),
    b"lora: *x\n": ("line 2, column 7", "undefined alias 'x'"),
    b"a: &a 1\nb: *a\nlora: [\n": ("line 5, column 1", "expected"),
    b"lora: rank: 8\n": ("line 2, column 11", "mapping values are not allowed"),
    b"a: 1\n---\nb: 2\n": ("line 3, column 1", "another document"),
    b"lora: {rank: !foo 1}\n": ("line 2, column 14", "!foo"),
    b"lora:rank:8\n": ("line 2, column 1", "must hold keys with values"),
    b"- lora\n": ("line 2, column 1", "must hold keys with values"),
    b"a: " + b"[" * 1200: ("mine.yaml", "must be plain YAML"),
    b"train: {seed: " + b"1" * 5000 + b"}\n": ("", "4300 digits"),
    b"sweep: {name: '${'}\n": ("", "${"),
    b"null: 1\n": ("", ""),
    b"defaults: 5\n": ("", "defaults must be a list"),
}


@pytest.fixture
def conf(tmp_path, monkeypatch):
    folder = shutil.copytree(conf_files.conf_folder(), tmp_path / "conf")
    monkeypatch.setattr(conf_files, "conf_folder", lambda: folder)
    return folder


@pytest.mark.parametrize("text", FAULTS, ids=range(len(FAULTS)))
def test_a_fault_names_its_place(conf, text):
    file, (place, what) = conf / "experiment" / "mine.yaml", FAULTS[text]
    file.write_bytes(HEAD + text)
    with pytest.raises(InputError) as error:
        compose(["experiment=mine", "data.train=t.jsonl"])
    line = str(error.value)
    assert what in line and place in line and "\n" not in line, line
    if place:
        assert line.startswith("config = ") and str(file) in error.value.value


def test_a_fault_in_a_file_that_another_file_names_is_found_too(conf):
    (conf / "space" / "bad.yaml").write_bytes(b"lora:\n\trank: 1\n")
    (conf / "experiment" / "mine.yaml").write_bytes(HEAD + b"defaults:\n  - override /space: bad\n")
    with pytest.raises(InputError, match=r"space/bad\.yaml, line 2, column 1"):
        compose(["experiment=mine", "data.train=t.jsonl"])


@pytest.mark.parametrize("text", [b"", b"# nothing\n", b"\xef\xbb\xbflora: {rank: 8}\n", b"lora: {rank: 8}\r\n"])
def test_files_without_a_fault_are_taken(conf, text):
    (conf / "experiment" / "mine.yaml").write_bytes(text if text.startswith(b"\xef") else HEAD + text)
    compose(["experiment=mine", "data.train=t.jsonl", "model=smollm2-135m"])
