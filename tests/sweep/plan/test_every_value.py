"""Every value that help and completion list goes through a whole dry run, with the memory and speed of a card."""

from __future__ import annotations

import copy
import itertools

import pytest

from engine.command_answers import Facts
from engine.errors import InputError
from sweep import driver, preflight
from sweep.__main__ import compose, groups
from sweep.cli.config_keys import keys, sections
from tests.support.fake_engine import SHAPE
from tests.support.prepared import prepared

BASE = ["model=local", "model.path=m", "data=local", "data.train=t.jsonl", "train.max_tokens=100000", "space=learning-rate",
        "train.tokens_per_step=1024", "data.max_seq_length=512", "cluster.card=rtx4090"]  # fmt: skip
KEYS = [key for section in sections() for key in keys(section) if key.values]
VALUES = {key.path: key.values for key in KEYS}
NEEDS = {  # what else a value or an option of the space takes
    "metrics.choice_accuracy=true": {"metrics.choices": ["a", "b"]},
    "space=preference": {"data.format": "preference"},
    "space=what-it-learns-from": {"data.train": [{"path": "t.jsonl"}, {"path": "u.jsonl"}]},
}
REFUSED = {  # alone, on a machine without a GPU, for a model without experts -> the beginning of the line
    "train.device=cuda": "train.device = 'cuda': needs a GPU",
    "sampler.name=grid": "sampler.name = 'grid': needs a space",
    "space=rank-experts": "lora.target_modules = 'experts': matches no linear layer",
    "preference.loss=orpo": "preference.loss = 'orpo': needs data.format = preference",
}
TOGETHER = {  # fields that concern one another -> pairs of values that are refused
    ("optim.name", "lora.start"): [],
    ("optim.name", "train.offload_optimizer"): [(name, "true") for name in ("adamw", "lion", "muon")],
    ("train.matmul", "model.quantization"): [("int8", "none"), ("int8_backward", "none")],
    ("train.activation_checkpointing", "train.cuda_graphs"): [("offload", "true")],
    ("lora.start", "model.quantization"): [("loftq", "none")],
}


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    monkeypatch.setattr("sweep.cluster.slots.count_gpus", lambda: 0)
    monkeypatch.setattr(preflight, "prepare", lambda probes, _: prepared(num_trainable=[1] * len(probes)))
    monkeypatch.setattr(preflight, "inspect", lambda *_: Facts(shape=SHAPE))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')


def dry_run(given, words=()):
    """Return the line with which the sweep was refused; empty if its plan was printed."""
    chosen = {word.split("=")[0] for word in words}
    raw = copy.deepcopy(compose([*(word for word in BASE if word.split("=")[0] not in chosen), *words]))
    for path, value in given.items():
        *parents, last = path.split(".")
        section = raw
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = {"true": True, "false": False, "null": None}.get(value, value) if isinstance(value, str) else value
    try:
        assert driver.start(raw, dry_run=True) == 0
    except InputError as refused:
        return str(refused)
    return ""


def is_as_told(name, line):
    return line.startswith(REFUSED[name]) and "\n" not in line if name in REFUSED else line == ""


@pytest.mark.parametrize("key", KEYS, ids=[f"{key.path} {key.owner}".strip() for key in KEYS])
def test_each_value_alone_is_planned(key):
    group = key.path.split(".")[0]
    for value in key.values:
        name = f"{key.path}={value}"
        if key.path in ("sampler.name", "pruner.name"):
            line = dry_run({}, [f"{group}={value}", *(["sampler=tpe"] if group == "pruner" else [])])
        else:
            words = [f"{group}={key.owner}"] if key.owner else []
            line = dry_run({key.path: value, **NEEDS.get(name, {})}, words)
        assert is_as_told(name, line), line


@pytest.mark.parametrize("option", groups()["space"])
def test_each_space_is_planned(option):
    name = f"space={option}"
    assert is_as_told(name, dry_run(NEEDS.get(name, {}), [name]))


@pytest.mark.parametrize("paths", TOGETHER, ids=" ".join)
def test_values_of_two_fields_together_are_planned_or_refused_in_one_line(paths):
    for values in itertools.product(*(VALUES[path] for path in paths)):
        line = dry_run(dict(zip(paths, values)))
        assert bool(line) == (values in TOGETHER[paths]) and "\n" not in line, (values, line)
