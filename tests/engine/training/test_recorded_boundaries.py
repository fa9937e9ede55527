"""A replay computes the row it is given: two packings of one row size, for Qwen3.5 with its mixers and for Gemma 4."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5 as library

from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import attach
from engine.bench import shapes
from engine.config.trial import LoraConfig
from engine.data.packing import Sample, collate
from engine.data.row_sizes import Size
from engine.layers.library.library_kernels import FLASH_LINEAR_ATTENTION, calls_kernels
from engine.layers.library.library_mixer import LibraryMixer
from engine.layers.swap import mixers
from engine.shape.policies import Policy
from engine.training import cuda_graphs, recordings
from engine.training.cuda_graphs import make_graphs
from engine.training.recordings import Recordings
from tests.support.fake_recorder import FakeRecorder
from tests.support.mixers import chunk_rule, tune_nothing

CPU, LONGEST, CAPACITY, VOCABULARY = torch.device("cpu"), 100, 200, 512
SMALL = {"vocab_size": VOCABULARY, "num_hidden_layers": 4}
MODELS = {
    "qwen3.5": {**shapes.SHAPES["qwen3.5-0.8b"], **SMALL, "intermediate_size": 512, "linear_num_value_heads": 32},
    "gemma-4": {**shapes.SHAPES["gemma-4-e2b"], **SMALL, "hidden_size": 512, "intermediate_size": 512, "num_kv_shared_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 100,
                "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 64},
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "sliding_window": 40, "global_head_dim": 32, "hidden_size_per_layer_input": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}  # fmt: skip
PACKINGS = [(95, 20, 70), (20, 70, 95), (70, 95, 20), (61, 62, 62)]


class Trial:
    """A random base with an adapter that changes it, and its recordings of one kind of pass."""

    def __init__(self, name, device, monkeypatch, dropout=0.0, policy=Policy.RECOMPUTE, trains=True):
        on_cpu = device.type == "cpu"
        values = {**MODELS[name], **{key: value for key, value in TINY.items() if on_cpu and key in MODELS[name]}}
        if on_cpu and name == "qwen3.5":
            values |= {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
        monkeypatch.setitem(shapes.SHAPES, "small", values)
        self.base = shapes.random_base("small", device, torch.float32 if on_cpu else torch.bfloat16, fused=True)
        for mixer in mixers(self.base.model):
            mixer.module.A_log.fill_(-4.0)  # a state that lasts for hundreds of tokens
        for path, parameter in self.base.model.named_parameters() if name == "gemma-4" else ():
            if path.endswith("q_norm.weight"):  # its scores are not scaled, and sharp attention amplifies rounding
                parameter.data.fill_(0.06)
        layers = attach(self.base.model, self.base.linear_names, LoraConfig(rank=4, lora_dropout=dropout), 0)
        self.adapter = FlatAdapter(layers, self.base.dtype)
        noise = torch.randn(self.adapter.parameter.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            self.adapter.parameter += 0.02 * noise.to(device)
        self.adapter.refresh()
        self.base.model.train()
        self.base.checkpoint_activations(policy, 1)
        self.graphs = make_graphs(self.base, self.adapter.memory, "kind", CAPACITY, LONGEST, trains)

    def gradient(self, compute):
        """Return the loss of a pass and its gradient."""
        self.adapter.zero_grad()
        loss = compute()
        return loss.detach().sum().item(), self.adapter.parameter.grad.clone()

    def alone(self, row):
        def compute():
            loss = self.base.loss(row.to(self.base.device))
            (loss / row.num_targets).backward()
            return loss

        return self.gradient(compute)

    def recorded(self, row):
        return self.gradient(lambda: self.graphs.backward(row, row.num_targets))


def rows():
    ids = np.random.default_rng(0).integers(1, VOCABULARY, sum(PACKINGS[0]))
    return [collate([Sample(part, np.ones(len(part), bool)) for part in np.split(ids, np.cumsum(lengths)[:-1])])
            for lengths in PACKINGS]  # fmt: skip


def apart(one, two):
    return float((one - two).norm() / two.norm())


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(library, "torch_chunk_gated_delta_rule", chunk_rule)


@pytest.mark.parametrize("name", MODELS)
def test_padded_rows_have_the_loss_and_gradient_of_the_rows(name, monkeypatch, kernels):
    trial = Trial(name, CPU, monkeypatch)
    assert len({Size.of(row, CAPACITY, LONGEST) for row in rows()}) == 1
    for row in rows()[:2]:
        (loss, gradient), (truth, right) = trial.recorded(row), trial.alone(row)
        assert loss == pytest.approx(truth, rel=1e-5) and apart(gradient, right) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_a_recording_that_follows_the_boundaries_is_tried_once_and_used(name, monkeypatch, kernels):
    monkeypatch.setattr(cuda_graphs, "TRIED_GRADIENTS", 64)
    trial = Trial(name, CPU, monkeypatch)
    recorder = FakeRecorder(trial.base, monkeypatch)
    before = trial.adapter.memory.gradient.fill_(3.0).clone()
    trial.graphs.record([Size.of(rows()[0], CAPACITY, LONGEST)])
    assert torch.equal(trial.adapter.memory.gradient, before)  # the trial leaves no gradient behind
    assert recorder.num_recorded == (2 if name == "qwen3.5" else 1)
    for row in rows():
        assert trial.recorded(row)[0] == pytest.approx(trial.alone(row)[0], rel=1e-5)
    assert recorder.num_recorded == (2 if name == "qwen3.5" else 1)


@pytest.mark.parametrize("compared", [2**22, 64])
def test_a_recording_that_keeps_the_boundaries_it_was_made_with_is_found_out(compared, monkeypatch, kernels):
    """Attention reads the present ones; the mixers do not, as if a library had counted chunks on the host."""
    monkeypatch.setattr(cuda_graphs, "TRIED_GRADIENTS", compared)
    trial = Trial("qwen3.5", CPU, monkeypatch)
    FakeRecorder(trial.base, monkeypatch)
    honest, whole, first = recordings.capture, LibraryMixer.mix, {}

    def mix(self, x, documents, seed=None):
        kept = first.setdefault(x.shape[0], replace(documents, offsets=documents.offsets.clone()))
        return whole(self, x, kept, seed)

    def capture(compute, pool):
        result, replay = honest(compute, pool)

        def baked():
            with monkeypatch.context() as patch:
                patch.setattr(LibraryMixer, "mix", mix)
                replay()

        return result, baked

    monkeypatch.setattr(recordings, "capture", capture)
    row = rows()[0]
    with pytest.warns(UserWarning, match="no CUDA graphs for this model: a recorded pass does not read where the samples"):
        trial.recorded(row)
    kept = Recordings.of(trial.base)
    assert not kept.can_record and not len(kept) and kept.follows_boundaries is False
    assert trial.recorded(row)[0] == pytest.approx(trial.alone(row)[0], rel=1e-5)


@pytest.fixture
def card(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no card")
    with suppress(ImportError):
        import_module(f"{FLASH_LINEAR_ATTENTION}.ops.gated_delta_rule")
        tune_nothing(monkeypatch, FLASH_LINEAR_ATTENTION)
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "policy", "dropout"), [
    ("qwen3.5", Policy.KEEP, 0.0), ("qwen3.5", Policy.RECOMPUTE, 0.2), ("gemma-4", Policy.KEEP, 0.0),
    ("gemma-4", Policy.RECOMPUTE, 0.0),  # masks of its projection outside the layers are torch's, new in each pass
])  # fmt: skip
def test_a_replay_has_the_loss_and_gradients_of_its_own_packing(name, policy, dropout, card, monkeypatch):
    trial = Trial(name, card, monkeypatch, dropout, policy)
    if name == "qwen3.5" and not calls_kernels(trial.base.model, FLASH_LINEAR_ATTENTION):
        pytest.skip("flash-linear-attention is not installed, or refuses this card")
    assert trial.graphs is not None and all(mixer.reads_offsets for mixer in mixers(trial.base.model))
    trial.adapter.draw_masks(0, 0, 0)
    found = [trial.recorded(row) for row in rows()]
    kept = Recordings.of(trial.base)
    assert len(kept) == 1 and kept.can_record
    again = [trial.recorded(row) for row in rows()]
    kept.can_record = False
    kept.clear()
    right = [trial.recorded(row) for row in rows()]  # the same padded rows, launch by launch
    assert not len(kept)
    for (loss, gradient), (other, same), (truth, wanted) in zip(found, again, right, strict=True):
        assert loss == pytest.approx(truth, rel=1e-4) == pytest.approx(other, rel=1e-4)
        assert apart(gradient, wanted) < 0.01 and apart(same, wanted) < 0.01
    differences = [apart(right[0][1], other[1]) for other in right[1:]]
    assert min(differences) > 0.1, differences  # the boundaries matter
    if not dropout:
        for row, (truth, wanted) in zip(rows(), right, strict=True):
            loss, gradient = trial.alone(row)
            assert loss == pytest.approx(truth, rel=2e-3) and apart(gradient, wanted) < 0.5 * min(differences)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_recorded_evaluation_has_the_losses_of_its_own_packing_to_the_bit(name, card, monkeypatch):
    trial = Trial(name, card, monkeypatch, trains=False)
    if name == "qwen3.5" and not calls_kernels(trial.base.model, FLASH_LINEAR_ATTENTION):
        pytest.skip("flash-linear-attention is not installed, or refuses this card")
    padded = [Size.of(row, CAPACITY, LONGEST).pad(row, LONGEST) for row in rows()]
    padded = [type(row)(**{**vars(row), "document_lengths": (LONGEST, 0)}) for row in padded]
    found = [trial.graphs.target_losses(row).clone() for row in padded]
    assert len(Recordings.of(trial.base)) == 1
    trial.base.model.eval()
    right = [trial.base.target_losses(row.to(card)) for row in padded]
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert not torch.equal(right[0], right[1])
