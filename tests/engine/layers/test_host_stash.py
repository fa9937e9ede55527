"""Test the stack of layer inputs in host memory."""

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from engine.layers import host_stash as offload
from engine.layers.host_stash import HostStash, PinnedMemory
from engine.model.device import host_share_gib


def test_what_is_put_away_comes_back_in_reverse_and_host_memory_is_used_again():
    stash = HostStash(chunk_bytes=1024)
    tensors = [torch.randn(n, 31) for n in (4, 70, 2)]  # the second takes ten chunks
    numbers = [stash.push(x.clone()) for x in tensors]
    stash.flush()
    chunks = [stash.memory.chunk(i).data_ptr() for i in range(stash.memory.num_bytes // 1024)]
    for number, x in reversed(list(zip(numbers, tensors))):
        assert torch.equal(stash.pop(number), x)
    again = [x.half() + 1 for x in reversed(tensors)]
    numbers = [stash.push(x) for x in again]
    stash.flush()
    assert [stash.memory.chunk(i).data_ptr() for i in range(stash.memory.num_bytes // 1024)] == chunks
    for number, x in reversed(list(zip(numbers, again))):
        assert torch.equal(stash.pop(number), x)


def test_memory_of_an_autograd_graph_is_away_until_its_gradient_is_wanted():
    stash, x = HostStash(chunk_bytes=4096), torch.randn(40, 8)
    leaf = torch.randn(40, 16, requires_grad=True)
    part, places = leaf[:, 4:12], torch.arange(40)
    y = (part * part).exp()
    truth = torch.autograd.grad(y.sum(), leaf, retain_graph=True)[0]
    number = stash.push(x, [leaf, part, y, places])
    assert leaf.untyped_storage().nbytes() > 0  # the copy out may still run
    stash.flush()
    assert [t.untyped_storage().nbytes() for t in (leaf, part, y, places)] == [0, 0, 0, 320]
    assert torch.equal(stash.pop(number), x)
    assert torch.equal(torch.autograd.grad(y.sum(), leaf)[0], truth)


def test_device_memory_is_let_go_some_layers_later_and_sooner_where_it_is_much(monkeypatch):
    def lives(num_bytes):
        stash, kept, seen = HostStash(), [], []
        for _ in range(6):
            stash.advance()
            kept.append(torch.zeros(num_bytes // 4))
            stash.push(torch.zeros(1), kept[-1:])
            seen.append(sum(t.untyped_storage().nbytes() > 0 for t in kept))
        return seen

    assert lives(64) == [1, 2, 3, 3, 3, 3]
    monkeypatch.setattr(offload, "HOST_IN_FLIGHT", 100)
    assert lives(64) == [1, 2, 2, 2, 2, 2]
    assert lives(640) == [1, 1, 1, 1, 1, 1]


def test_memory_is_made_for_the_next_layers_and_for_no_more_than_there_are():
    stash, seen = HostStash(chunk_bytes=1024), []
    stash.num_layers = 5
    for _ in range(5):
        stash.push(torch.zeros(100), [torch.zeros(100)])
        seen.append(stash.memory.num_bytes // 1024)
    assert seen == [3, 4, 5, 5, 5]


def test_memory_that_the_machine_does_not_have_is_an_error_of_the_step(monkeypatch):
    def fails(*_):
        raise MemoryError("no memory")

    monkeypatch.setattr(offload, "_new_chunk", fails)
    with pytest.raises(MemoryError):
        HostStash().push(torch.zeros(1))


class Driver:
    """Stand for the CUDA runtime: note what is pinned."""

    def __init__(self, answer):
        self.answer, self.pinned = answer, {}

    def cudaHostRegister(self, address, size, flags):
        if self.answer == 0:
            self.pinned[address] = size
        return self.answer

    def cudaHostUnregister(self, address):
        del self.pinned[address]


@pytest.fixture
def driver(monkeypatch):
    made = Driver(0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return made


def test_chunks_are_whole_huge_pages_and_pinned_until_their_owner_goes(driver):
    memory = PinnedMemory(2**21)
    memory.expect(3 * 2**21, torch.device("cuda"))
    chunks = [memory.chunk(i).fill_(i) for i in range(3)]
    assert [int(chunk.sum()) for chunk in chunks] == [0, 2**21, 2**22]
    assert driver.pinned == {chunk.data_ptr(): 2**21 for chunk in chunks} and not any(a % 2**21 for a in driver.pinned)
    del memory
    gc.collect()
    assert not driver.pinned


def test_torch_pins_what_the_driver_does_not(driver, monkeypatch):
    driver.answer, asked, empty = 1, [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, pin_memory=False, **more: asked.append(pin_memory) or empty(size, **more))
    memory = PinnedMemory(2**21)
    memory.expect(1, torch.device("cuda"))
    assert memory.chunk(0).numel() == 2**21 and asked == [True]


def test_out_of_order_is_an_error_and_a_cleared_stack_starts_anew():
    stash = HostStash()
    stash.push(torch.zeros(1))
    stash.push(torch.zeros(1))
    with pytest.raises(RuntimeError, match="0 was asked for, 1 is on top"):
        stash.pop(0)
    stash.clear()
    assert stash.push(torch.ones(2)) == 0 and torch.equal(stash.pop(0), torch.ones(2))


def test_a_stack_with_nothing_left_waits_for_no_copies(monkeypatch):
    """A recording that waits for the copies of earlier passes fails, and so do all after it."""
    waits = []
    current = SimpleNamespace(wait_stream=waits.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    stash = HostStash()
    number = stash.push(torch.ones(3))
    copies = stash._stream = SimpleNamespace(device="cuda")
    stash.clear()
    assert waits == [copies]
    with pytest.raises(RuntimeError, match="on top of the stack"):
        stash.pop(number)
    stash.clear()
    assert waits == [copies]


def test_host_memory_is_shared_by_the_gpus_of_a_machine(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 200000000 kB\nMemAvailable: 104857600 kB\n")
    assert host_share_gib(0.0, tmp_path / "meminfo", tmp_path) == pytest.approx(70.0)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert host_share_gib(0.0, tmp_path / "meminfo", tmp_path) == pytest.approx(35.0)
    assert host_share_gib(0.0, tmp_path / "none", tmp_path) == float("inf")


@pytest.mark.gpu
def test_copies_beside_computation_are_right():
    stash, reference = HostStash(), []
    x = torch.randn(2048, 2048, device="cuda")
    numbers, kept = [], []
    for _ in range(12):
        stash.advance()
        reference.append(x.clone())
        kept.append(x * 3)
        numbers.append(stash.push(x, kept[-1:]))
        # The old x is freed, and its memory reused, while its copy may still run.
        x = (x @ x).clamp(-2, 2)
    stash.flush()
    assert all(t.untyped_storage().nbytes() == 0 for t in kept)
    for number, truth, more in reversed(list(zip(numbers, reference, kept))):
        assert torch.equal(stash.pop(number), truth) and torch.equal(more, truth * 3)
        x = (x @ x).clamp(-2, 2)


@pytest.mark.gpu
def test_memory_is_pinned_until_the_stash_goes():
    stash = HostStash(chunk_bytes=4 * 2**20)
    stash.push(torch.zeros(3 * 2**20, device="cuda"))
    chunks = [stash.memory.chunk(i) for i in range(3)]
    assert all(chunk.is_pinned() for chunk in chunks) and len(stash.memory._registered) == 3
    del stash
    assert not any(chunk.is_pinned() for chunk in chunks)
