"""The estimate of a library's mixer is no less than what its torch operations save and allocate, and little more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from engine.config.trial import LoraConfig
from engine.layers.attention import Documents
from engine.memory.mixer_bytes import MixerBytes
from engine.model.library_layers import Storages
from engine.shape.compute_limits import documents_of
from engine.shape.mixer_shape import MixerShape
from tests.support.mixers import mixer_on

SHAPES = {
    "qwen3.5-4b": (2560, MixerShape(16, 32, 128, 128, 4)),
    "qwen3.5-0.8b": (1024, MixerShape(16, 16, 128, 128, 4)),
    "wide values": (512, MixerShape(8, 8, 64, 256, 3)),
    "wide keys": (512, MixerShape(4, 8, 128, 64, 4)),
}
LORA = LoraConfig(rank=4)
ADAPTER = 2**20  # casts, gradients and hidden of the adapters, which the walk counts


def row(device: str, hidden_size: int, length: int, samples: int) -> tuple[Tensor, Documents]:
    x = torch.ones(samples * length, hidden_size, dtype=torch.bfloat16, device=device, requires_grad=True)
    return x, Documents((length,) * samples, torch.empty(1))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("length", "samples"), [(1024, 1), (512, 3)])
def test_passes_allocate_no_more_than_estimated_and_not_much_less(name: str, length: int, samples: int) -> None:
    hidden_size, shape = SHAPES[name]
    mixer, (x, documents) = mixer_on("meta", hidden_size, shape, LORA), row("meta", hidden_size, length, samples)
    dy = torch.empty_like(x)
    estimate = MixerBytes.of(shape, hidden_size, length * samples, length, 2)
    with Storages() as storages:
        storages.ignore(x, dy, *mixer.module.parameters())
        y = mixer.mix(x, documents)
        kept, forward = storages.alive, storages.highest
        storages.highest = storages.alive
        gradients = torch.autograd.grad(y, [x, *mixer.adapters], dy, materialize_grads=True)
        backward = storages.highest
        del y, gradients
        storages.highest = before = storages.alive
        with torch.no_grad():
            mixer.mix(x, documents)
        alone = storages.highest - before
    assert kept - ADAPTER <= estimate.graph <= 1.02 * kept
    assert max(forward, backward) - ADAPTER <= estimate.graph + estimate.extra <= 1.15 * max(forward, backward)
    assert alone - ADAPTER <= estimate.alone <= 1.15 * alone


def test_what_the_graph_saves_is_what_is_estimated() -> None:
    """On the CPU, by the tensors that autograd saves; what it saves of the parameters and the input does not count."""
    hidden_size, shape = 256, MixerShape(2, 4, 32, 32, 4)
    mixer, (x, documents) = mixer_on("cpu", hidden_size, shape, LORA), row("cpu", hidden_size, 200, 1)
    nn.init.normal_(x, generator=torch.Generator().manual_seed(0))
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        y = mixer.mix(x, documents)
    note(y)
    for tensor in (x, *mixer.module.parameters()):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    estimate = MixerBytes.of(shape, hidden_size, 200, 200, 2)
    assert 0.9 * estimate.graph < sum(saved.values()) < 1.03 * estimate.graph
    assert MixerBytes.of(shape, hidden_size, 192, 192, 2).graph < estimate.graph  # 200 tokens are padded to 256


def test_kernels_keep_less() -> None:
    hidden_size, shape = SHAPES["qwen3.5-4b"]
    by_torch = MixerBytes.of(shape, hidden_size, 4096, 2048, 2)
    by_kernels = MixerBytes.of(MixerShape(16, 32, 128, 128, 4, has_kernels=True), hidden_size, 4096, 2048, 2)
    assert by_kernels.graph < by_torch.graph / 2 and by_kernels.alone < by_torch.alone


def test_a_row_with_boundaries_on_the_device_takes_more_for_its_gaps_and_the_chunks_it_may_have() -> None:
    hidden_size, shape = SHAPES["qwen3.5-4b"]
    shape = replace(shape, has_kernels=True)
    plain, padded = (MixerBytes.of(shape, hidden_size, 4096, 2048, 2, documents) for documents in (0, documents_of(4096)))
    states = 2 * shape.repeated_keys * shape.value_dim
    for one, two, copies in ((plain.graph, padded.graph, 1), (plain.extra, padded.extra, 1), (plain.alone, padded.alone, 2)):
        assert one + 2 * 4096 * hidden_size * copies < two < 1.1 * one + 2 * 4192 * hidden_size * copies + 2 * 34 * states


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3.5-4b", "qwen3.5-0.8b"])
def test_on_a_card_passes_allocate_no_more_than_estimated(name: str) -> None:
    """The allocator counts what the library's operations allocate inside, which the meta device does not see."""
    hidden_size, shape = SHAPES[name]
    mixer, (x, documents) = mixer_on("cuda", hidden_size, shape, LORA), row("cuda", hidden_size, 1024, 1)
    estimate, dy = MixerBytes.of(shape, hidden_size, 1024, 1024, 2), torch.empty_like(x)
    mixer.mix(x, documents).backward(dy)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = mixer.mix(x, documents)
    kept = torch.cuda.memory_allocated() - before
    torch.autograd.grad(y, x, dy)
    peak = torch.cuda.max_memory_allocated() - before
    assert 0.9 * estimate.graph < kept - ADAPTER <= estimate.graph
    assert peak - ADAPTER <= estimate.graph + estimate.extra
