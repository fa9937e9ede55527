"""The base model is quantised once per node; a second process reads the same bits or makes them."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.model.load
from engine.data.packing import collate
from engine.data.views import load_data
from engine.errors import InputError
from engine.model.load import load_base
from engine.quant.shared_base import PREFIX, QUOTA_VARIABLE, load_packed
from tests.support.trials import CPU, build


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def num_quantised(monkeypatch):
    """Return a list with one entry per quantised model."""
    counted, original = [], engine.model.load.nf4_load_config
    monkeypatch.setattr(engine.model.load, "nf4_load_config", lambda *given: (counted.append(1), original(*given))[1])
    return counted


def bits(base):
    """Return every parameter, with its quantisation state, and every buffer as bytes by name."""
    tensors = dict(base.model.named_buffers())
    for name, parameter in base.model.named_parameters():
        tensors[name] = parameter.data
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            inner = {"absmax": state.absmax, "code": state.code, "offset": state.offset, "absmax2": state.state2.absmax}
            tensors |= {f"{name}.{part}": value for part, value in inner.items()}
            assert (state.blocksize, state.quant_type, state.dtype, state.shape) == (64, "nf4", torch.float32, state.shape)
    flat = {name: tensor.reshape(-1).contiguous().view(torch.uint8) for name, tensor in tensors.items()}
    return {name: (str(tensor.dtype), tuple(tensor.shape), flat[name].numpy().tobytes()) for name, tensor in tensors.items()}


def packed(cache):
    return sorted(cache.glob(f"{PREFIX}*"))


def test_a_second_load_reads_the_packed_weights_and_has_the_same_bits_and_the_same_loss(tiny_config, cache, num_quantised):
    config = build(tiny_config)
    first, second = (load_base(config.model, CPU) for _ in range(2))
    assert len(num_quantised) == 1 == len(packed(cache))
    assert bits(first) == bits(second) and sum("absmax2" in name for name in bits(first)) == 14
    assert first.swaps == second.swaps and first.linear_names == second.linear_names
    batch = collate([load_data(config.data, first.tokenizer)[0][0]])
    with torch.no_grad():
        assert first.loss(batch) == second.loss(batch)


def test_other_settings_and_other_weights_are_another_base(tiny_config, cache, num_quantised, tmp_path):
    config = build(tiny_config)
    model = tmp_path / "model"
    shutil.copytree(config.model.path, model)
    for changes in ({}, {"double_quantization": False}, {"quantization": "none"}):
        load_base(config.model.model_copy(update={"path": str(model), **changes}), CPU)
    assert len(num_quantised) == 2 == len(packed(cache))
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)  # same name and size
    load_base(config.model.model_copy(update={"path": str(model)}), CPU)
    assert len(num_quantised) == 3 == len(packed(cache))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("full disk", "has 0.0 GiB free"),
        ("quota 0", f"{QUOTA_VARIABLE} allows 0"),
        ("quota no number", f"{QUOTA_VARIABLE} = 'x': must be a number of GiB"),
        ("no folder", "QLORA_SWEEP_CACHE"),
    ],
)
def test_where_it_cannot_be_kept_the_model_is_quantised_all_the_same_and_one_line_says_so(
    tiny_config, cache, num_quantised, monkeypatch, capsys, fault, said
):
    if fault == "full disk":
        monkeypatch.setattr("engine.quant.shared_base.shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    elif fault == "no folder":
        cache.write_text("a file where the folder should be")
    else:
        monkeypatch.setenv(QUOTA_VARIABLE, "0" if fault == "quota 0" else "x")
    for _ in range(2):
        load_base(build(tiny_config).model, CPU)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING")]
    assert len(num_quantised) == 2 == len(warnings) and all(said in line for line in warnings)
    assert packed(cache) == [] and not list(cache.glob(".nf4*building*"))


@pytest.mark.parametrize("can_write", [True, False])
def test_packed_weights_keep_the_model_s_own_names(cache, tmp_path, capsys, can_write):
    """Some families store weights merged or turned, into which transformers would bring packed ones too."""

    class Merged(torch.nn.Linear):
        def save_pretrained(self, folder, save_original_format=True):
            if save_original_format or not can_write:
                raise ValueError("these cannot be merged")
            save_file(self.state_dict(), folder / "model.safetensors")

    (tmp_path / "config.json").write_text("{}")
    made = []

    def quantise():
        made.append(Merged(2, 2))
        return made[-1], {}

    def read(folder):
        found = torch.nn.Linear(2, 2)
        found.load_state_dict(load_file(folder / "model.safetensors"))
        return found, {}

    def broken(folder):
        found, _ = read(folder)
        found.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
        return found, {}

    for _ in range(2):
        found, _ = load_packed(tmp_path, {}, quantise, read)
    if can_write:
        assert len(made) == 1 and torch.equal(found.weight, made[0].weight)
        assert load_packed(tmp_path, {}, quantise, broken)[0] is made[1]  # reading may rename too
    else:
        assert found is made[1] and "cannot be merged" in capsys.readouterr().err


def test_a_damaged_packed_base_is_made_anew(tiny_config, cache, num_quantised, capsys):
    config = build(tiny_config)
    whole = bits(load_base(config.model, CPU))
    file = packed(cache)[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert bits(load_base(config.model, CPU)) == whole and len(num_quantised) == 2
    assert "has changed since it was written" in capsys.readouterr().err
    assert bits(load_base(config.model, CPU)) == whole and len(num_quantised) == 2


def test_beyond_the_quota_the_base_used_longest_ago_is_removed(tiny_config, cache, tmp_path, monkeypatch):
    config, models = build(tiny_config), [tmp_path / f"model-{number}" for number in range(3)]
    for model in models:
        shutil.copytree(config.model.path, model)
    load = [lambda model=model: load_base(config.model.model_copy(update={"path": str(model)}), CPU) for model in models]
    load[0]()
    (first,) = packed(cache)
    size = sum(file.stat().st_size for file in first.iterdir())
    monkeypatch.setenv(QUOTA_VARIABLE, str(2.5 * size / 2**30))
    load[1]()
    load[0]()  # now the second is the least recently used
    load[2]()
    assert len(packed(cache)) == 2 and first in packed(cache)


class Bits(str):
    """Stand for a model without layers."""

    def named_modules(self):
        return iter(())


def test_workers_of_a_node_that_begin_at_once_quantise_once(tmp_path, cache, monkeypatch):
    """One worker quantises; the others wait and read its result."""
    folder, quantised, read = tmp_path / "model", [], []
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr("engine.quant.shared_base._save", lambda model, target: (target / "weights").write_text(model))

    def quantise():
        quantised.append(1)
        time.sleep(0.3)  # the others arrive meanwhile
        return "bits", {}

    def load(_):
        return load_packed(folder, {}, quantise, lambda packed: (read.append(1), (Bits((packed / "weights").read_text()), {}))[1])

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(load, range(4))) == [("bits", {})] * 4
    assert (len(quantised), len(read)) == (1, 3)


def test_a_model_that_lacks_a_tensor_is_refused_every_time_and_never_saved(tiny_config, cache, tmp_path, num_quantised):
    folder = shutil.copytree(build(tiny_config).model.path, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = build(tiny_config, model={"path": str(folder)}).model
    for _ in range(2):  # the second trial of a worker must not find what the first was refused
        with pytest.raises(InputError, match=r"lacks 1 tensors, such as model\.layers\.1\.mlp\.up_proj\.weight"):
            load_base(config, CPU)
    assert packed(cache) == [] and num_quantised == []
