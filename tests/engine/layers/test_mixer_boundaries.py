"""A mixer in a recording reads where samples begin from the device: the present row's boundaries, never those before."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_5 import modeling_qwen3_5 as library

from engine.adapter.lora import LoraLinear
from engine.config.trial import LoraConfig
from engine.layers.attention import Documents
from engine.layers.library.library_mixer import LibraryMixer, Way, chunk_indices, read_offsets
from engine.shape.mixer_shape import CHUNK, MixerShape
from tests.support.mixers import ORIGINAL_RULE, KeepsByIdentity, chunk_rule, deaf, mixer_on, told_conv

SHAPE, WIDTH, PLACES = MixerShape(2, 4, 16, 8, 4), 48, 5
PACKINGS = [(90, 30, 80), (200,), (1, 64, 65, 70), (100, 100), (3, 1, 1, 1, 194)]


def mixer() -> LibraryMixer:
    made = mixer_on("cpu", WIDTH, SHAPE, LoraConfig(rank=2))
    made.module.float()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.module.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    nn.init.constant_(made.module.A_log, -3.0)  # a state that lasts
    for part in made.module.modules():
        part.__dict__.pop("forward", None)  # so that the tests' kernels are called
    return made


def offsets_of(lengths: tuple[int, ...]) -> Tensor:
    ends = list(itertools.accumulate(lengths))
    return torch.tensor([0, *ends, *[ends[-1]] * (PLACES - len(lengths))], dtype=torch.int32)


def outputs(of: LibraryMixer, x: Tensor, documents: Documents) -> Tensor:
    """Return output and gradient of x."""
    leaf = x.detach().requires_grad_()
    y = of.mix(leaf, documents)
    return torch.stack([y.detach(), *torch.autograd.grad(y, leaf, x.flip(0))])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(library, "torch_chunk_gated_delta_rule", chunk_rule)


@pytest.mark.parametrize("lengths", PACKINGS)
def test_chunks_are_the_library_s_and_the_rest_lies_behind_the_end(lengths):
    offsets = offsets_of(lengths)
    found = chunk_indices(offsets, 200).tolist()
    right = [[i, n] for i, length in enumerate(lengths) for n in range(-(-length // CHUNK))]
    assert found[: len(right)] == right and len(found) == (200 + (CHUNK - 1) * PLACES) // CHUNK
    assert all(CHUNK * number >= offsets[sample + 1] - offsets[sample] for sample, number in found[len(right) :])


@pytest.mark.parametrize("conv", [None, told_conv], ids=["gaps", "offsets"])
def test_a_row_with_bounds_is_computed_by_the_boundaries_that_its_tensor_holds_now(conv, x, monkeypatch):
    if conv is not None:
        monkeypatch.setattr(library, "causal_conv1d_fn", conv)
    ours, row = mixer(), Documents((200, 0), offsets_of(PACKINGS[0]))
    assert row.are_bounds and ours.try_offsets(x) and ours.way is (Way.GAPS if conv is None else Way.OFFSETS)
    found = []
    for lengths in PACKINGS:
        row.offsets.copy_(offsets_of(lengths))  # in place, as before a replay
        found.append(outputs(ours, x, row))
        alone = mixer()
        alone.way = Way.ALONE
        monkeypatch.setattr(library, "torch_chunk_gated_delta_rule", ORIGINAL_RULE)
        torch.testing.assert_close(found[-1], outputs(alone, x, Documents(lengths, offsets_of(lengths))), rtol=1e-3, atol=1e-4)
        monkeypatch.setattr(library, "torch_chunk_gated_delta_rule", chunk_rule)
    assert all((a - b).norm() > 0.01 * a.norm() for a, b in itertools.combinations(found, 2))


def test_nothing_that_a_library_keeps_for_a_tensor_reaches_another_row(x, monkeypatch):
    monkeypatch.setattr(library, "torch_chunk_gated_delta_rule", KeepsByIdentity())
    monkeypatch.setattr(library, "causal_conv1d_fn", told_conv)
    ours, row = mixer(), Documents((200, 0), offsets_of(PACKINGS[0]))
    assert ours.try_offsets(x) and ours.way is Way.OFFSETS
    one = outputs(ours, x, row)
    row.offsets.copy_(offsets_of(PACKINGS[2]))
    two = outputs(ours, x, row)
    assert (one - two).norm() > 0.01 * one.norm()
    monkeypatch.setattr(library, "torch_chunk_gated_delta_rule", chunk_rule)
    torch.testing.assert_close(two, outputs(ours, x, row))


@pytest.mark.parametrize("rule", [ORIGINAL_RULE, deaf(ORIGINAL_RULE)], ids=["no chunks", "a state that runs on"])
def test_a_mixer_that_does_not_read_them_refuses_such_a_row_and_computes_others_as_before(rule, x, monkeypatch):
    monkeypatch.setattr(library, "torch_chunk_gated_delta_rule", rule)
    ours = mixer()
    assert not ours.try_offsets(x) and ours.way is None
    with pytest.raises(ValueError, match="needs the lengths of a row's samples on the host"):
        ours.mix(x, Documents((200, 0), offsets_of(PACKINGS[0])))
    ours.mix(x, Documents(PACKINGS[0], offsets_of(PACKINGS[0])[:4]))
    assert ours.way is Way.ALONE


def test_one_mixer_of_a_class_is_tried_and_all_follow(x, monkeypatch):
    several, tried = [mixer() for _ in range(3)], []
    whole = LibraryMixer.try_offsets
    monkeypatch.setattr(LibraryMixer, "try_offsets", lambda self, x: tried.append(self) or whole(self, x))
    before = torch.get_rng_state()
    for _ in range(2):
        assert read_offsets(several, WIDTH, torch.float32, torch.device("cpu"))
    assert tried == several[:1] and {one.way for one in several} == {Way.GAPS} and torch.equal(before, torch.get_rng_state())
    assert read_offsets([], WIDTH, torch.float32, torch.device("cpu"))


def test_dropout_follows_the_noise_of_the_pass_and_takes_no_random_number(x):
    ours, noise = mixer(), torch.tensor([5, 2**30])
    layers = [layer for layer in ours.module.modules() if isinstance(layer, LoraLinear)]
    for number, layer in enumerate(layers):
        layer.dropout, layer.number = 0.25, number
    assert isinstance(ours.new_seed(), int)  # without the adapter's flat memory, masks come from torch's generator
    for layer in layers:
        layer.noise = noise
    assert ours.new_seed() is None and ours.try_offsets(x)
    row, before = Documents((200, 0), offsets_of(PACKINGS[0])), torch.get_rng_state()
    one = outputs(ours, x, row)
    assert torch.equal(one, outputs(ours, x, row)) and torch.equal(before, torch.get_rng_state())
    noise[0] = 6  # as before a replay
    assert not torch.equal(one, outputs(ours, x, row))
    assert layers[0].drop(torch.ones(1, 400, 8)).mean() == pytest.approx(1.0, abs=0.1)
