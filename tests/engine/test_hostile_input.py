"""Malicious models, checkpoints, templates and data are refused, and none of their code runs."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch

from engine.__main__ import main
from engine.config.parsing import parse
from engine.config.trial import TrainConfig
from engine.dialogue.templates import SampleError
from engine.errors import CheckpointError
from engine.training.loop import train


class Bomb:
    """Create a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def model(tmp_path, tiny_model_dir) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.fixture
def refused(tmp_path, tiny_config, capsys):
    """Return a function that runs a command on a bad config and returns its error line."""

    def run(command="prepare", *flags, **sections):
        config = {name: {**tiny_config.get(name, {}), **values} for name, values in {**tiny_config, **sections}.items()}
        file = tmp_path / "config.json"
        file.write_text(json.dumps([config] if command == "prepare" else config))
        code = main([command, str(file), *flags])
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1, err
        return lines[0]

    return run


def edit(folder: Path, name: str, **values) -> None:
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))


def test_the_bomb_of_these_tests_does_go_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("indexed", [False, True])
def test_a_pickle_in_a_model_folder_is_never_opened(model, refused, tmp_path, indexed):
    (model / "model.safetensors").unlink()
    torch.save({"x": Bomb(tmp_path / "mark")}, model / "pytorch_model.bin")
    if indexed:
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "pytorch_model.bin"}}))
    for command in ("prepare", "train"):
        assert "safetensors" in refused(command, model={"path": str(model)})
    assert not (tmp_path / "mark").exists()


def test_code_in_a_model_folder_runs_only_where_it_is_asked_for(model, refused, tmp_path):
    edit(model, "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n")
    assert "custom code" in refused(model={"path": str(model)})
    assert not (tmp_path / "mark").exists()
    asks = {"path": str(model), "trust_remote_code": True}
    assert "add --trust-remote-code" in refused(model=asks)  # a file cannot permit it
    assert not (tmp_path / "mark").exists()
    refused("prepare", "--trust-remote-code", model=asks)  # twin: allowed, the code runs
    assert (tmp_path / "mark").exists()


def header(values: dict) -> bytes:
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [b"", struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 90_000_000) + b" " * 100, header({}),
     header({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}}) + bytes(16)],
    ids=["empty", "huge header", "cut header", "no tensor", "huge shape"],
)  # fmt: skip
def test_damaged_weights_are_refused_before_any_trial(model, refused, content):
    (model / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refused(model={"path": str(model)})


def test_weights_that_lack_tensors_are_refused_and_not_made_up(model, refused):
    (model / "model.safetensors").write_bytes(
        header({"model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}) + bytes(256)
    )
    assert "lacks" in refused("train", model={"path": str(model)})


def test_an_index_cannot_name_files_outside_its_folder(model, refused):
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../outside.safetensors"}}))
    assert "'../outside.safetensors'" in refused(model={"path": str(model)})


@pytest.mark.parametrize(
    "values", [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"model_type": [1]}, {"hidden_act": "os.system"},
               {"num_hidden_layers": -1}], ids=str,
)  # fmt: skip
def test_a_config_json_of_wrong_types_is_one_line(model, refused, values):
    edit(model, "config.json", **values)
    assert refused(model={"path": str(model)}).startswith("error: model.path = ")


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}", "{% include '/etc/passwd' %}",
     "{{ lipsum.__globals__['os'].mkdir('MARK') }}", "{{ '{0.__class__.__mro__}'.format(messages) }}", "{{ messages.clear() }}"],
)  # fmt: skip
def test_a_chat_template_stays_in_its_sandbox(refused, tmp_path, template):
    file = tmp_path / "t.jinja"
    file.write_text(template.replace("MARK", str(tmp_path / "mark")))
    assert "the chat template refused it" in refused(data={"chat_template": str(file)})
    assert not (tmp_path / "mark").exists()


BOMBS = {
    "{{ 'a' * 10 ** 11 }}": "GiB of memory",
    "{{ ('a' * 10 ** 7 * 50)[:5] }}{{ 'a' * 10 ** 8 * 4 }}": "GiB of memory|characters",
    "{% set x = namespace(v='a') %}{% for i in range(60) %}{% set x.v = x.v ~ x.v %}{% endfor %}{{ x.v }}": "GiB of memory",
    "{{ 'a' * (10 ** 7 + 1) }}": "makes 10,000,001 characters",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "takes",
    "{{ 9 ** (9 ** 9) }}": "takes",
}


@pytest.mark.parametrize("template", BOMBS, ids=range(len(BOMBS)))
def test_a_chat_template_that_would_take_all_time_or_memory_is_stopped(refused, tmp_path, template, monkeypatch):
    from engine.system import limited_child as bounded

    monkeypatch.setattr(bounded.Bounded.__init__, "__defaults__", (1.0 if BOMBS[template] == "takes" else 20.0, 0.5))
    (tmp_path / "t.jinja").write_text(template)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert re.search(BOMBS[template], refused(data={"chat_template": str(tmp_path / "t.jinja")}))
    # KiB; the child has its own limit
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024
    assert multiprocessing.active_children() == []


def test_an_ordinary_template_is_rendered_in_a_child_as_it_would_be_here(tiny_model_dir):
    from engine.config.data_section import DataConfig
    from engine.config.trial import ModelConfig
    from engine.dialogue.conversation import Conversation
    from engine.dialogue.encoding import Encoder
    from engine.model.inspect import load_tokenizer
    from engine.system.limited_child import Bounded

    encoder = Encoder(load_tokenizer(ModelConfig(path=str(tiny_model_dir))), DataConfig(train="x"))
    messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    sample = Conversation(messages, (False, True))
    with Bounded(encoder.render) as render:
        assert [render(sample), render(sample)] == [encoder.render(sample)] * 2
        with pytest.raises(SampleError, match="no answer"):
            render(Conversation(messages[1:], (True,)))
        assert render(sample) == encoder.render(sample)


@pytest.mark.parametrize("path", ["/etc/passwd", "nope.jinja", "../.ssh/id_rsa", "a\0b"])
def test_a_chat_template_is_a_jinja_file_and_no_other(refused, path):
    assert refused(data={"chat_template": path}).startswith("error: ")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b"\xff\xfe\n"), ("a.jsonl", b"[" * 200_000), ("a.jsonl", b"\0\n"), ("a.json", b"5"), ("a.parquet", b"PAR1" * 9)],
)
def test_data_that_is_not_what_its_name_says_is_one_line(refused, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert refused(data={"train": str(tmp_path / name)}).startswith("error: data.train")


@pytest.mark.parametrize("path", ["../../etc/passwd", "a/../b", "http://127.0.0.1/x", "builtin:../x", "/etc"])
def test_paths_and_addresses_are_no_hub_ids(refused, path):
    assert "data.train" in refused(data={"train": path})
    assert "model.path" in refused("inspect", model={"path": path})


@pytest.fixture
def checkpoint(tmp_path, tiny_config) -> Path:
    reports = train(parse(TrainConfig, tiny_config), tmp_path / "trial")
    next(reports)
    reports.close()
    return tmp_path / "trial" / "checkpoint"


@pytest.mark.faults  # ten trials
def test_checkpoints_made_to_harm_are_refused_one_by_one(checkpoint, tiny_config, tmp_path):
    """Each changed checkpoint gets correct checksums, as an attacker would write them."""
    good = Path(shutil.copytree(checkpoint, tmp_path / "good"))
    config = parse(TrainConfig, tiny_config)
    state = json.loads((good / "state.json").read_text())
    optimizer = torch.load(good / "optimizer.pt", weights_only=True)
    wrong_shape = {**optimizer, "optimizer": {**optimizer["optimizer"], "state": {
        0: {**optimizer["optimizer"]["state"][0], "exp_avg": torch.zeros(3)}}}}  # fmt: skip
    cases = {
        "more than tensors": lambda: torch.save({"optimizer": Bomb(tmp_path / "mark")}, checkpoint / "optimizer.pt"),
        "has shape": lambda: torch.save(wrong_shape, checkpoint / "optimizer.pt"),
        "header too large": lambda: (checkpoint / "adapter.safetensors").write_bytes(struct.pack("<Q", 2**60)),
        "step": lambda: state.update(step="x"),
        "position": lambda: state.update(position=-1),
        "reports do not match": lambda: state.update(tokens_seen=7),
        "report.step = None: required": lambda: state["reports"][0].pop("step"),
        "belongs to config": lambda: state.update(fingerprint="another trial"),
        "evil": lambda: state.update(evil=1),
    }
    for said, change in cases.items():
        shutil.rmtree(checkpoint)
        shutil.copytree(good, checkpoint)
        state = json.loads((good / "state.json").read_text())
        change()
        names = ("adapter.safetensors", "optimizer.pt")
        state["sha256"] = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names}
        (checkpoint / "state.json").write_text(json.dumps(state))
        with pytest.raises(CheckpointError, match=said):
            list(train(config, checkpoint.parent))
    shutil.rmtree(checkpoint)
    checkpoint.symlink_to(good)
    with pytest.raises(CheckpointError, match="is a link"):
        list(train(config, checkpoint.parent))
    checkpoint.unlink()
    shutil.copytree(good, checkpoint)
    assert len(list(train(config, checkpoint.parent))) == 2  # twin: the unchanged one continues
    assert not (tmp_path / "mark").exists()
