"""The stack of layer inputs in host memory."""

import pytest
import torch

from engine.offload import HostStash, host_share_gib


def test_what_is_put_away_comes_back_in_reverse_and_buffers_are_used_again():
    stash = HostStash()
    tensors = [torch.randn(n, 3) for n in (4, 7, 2)]
    numbers = [stash.push(x.clone()) for x in tensors]
    buffers = [b.data_ptr() for b in stash._buffers]
    for number, x in reversed(list(zip(numbers, tensors))):
        assert torch.equal(stash.pop(number), x)
    again = [x.half() + 1 for x in tensors]
    numbers = [stash.push(x) for x in again]
    assert [b.data_ptr() for b in stash._buffers] == buffers
    assert torch.equal(stash.pop(numbers[-1]), again[-1])


def test_out_of_order_is_an_error_and_a_cleared_stack_starts_anew():
    stash = HostStash()
    stash.push(torch.zeros(1))
    stash.push(torch.zeros(1))
    with pytest.raises(RuntimeError, match="0 asked for, 1 is on top"):
        stash.pop(0)
    stash.clear()
    assert stash.push(torch.ones(2)) == 0 and torch.equal(stash.pop(0), torch.ones(2))


def test_host_memory_is_shared_by_the_gpus_of_a_machine(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 200000000 kB\nMemAvailable: 104857600 kB\n")
    assert host_share_gib(tmp_path / "meminfo", tmp_path) == pytest.approx(70.0)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert host_share_gib(tmp_path / "meminfo", tmp_path) == pytest.approx(35.0)
    assert host_share_gib(tmp_path / "none", tmp_path) == float("inf")


@pytest.mark.gpu
def test_copies_beside_computation_are_right():
    stash, reference = HostStash(), []
    x = torch.randn(2048, 2048, device="cuda")
    numbers = []
    for _ in range(12):
        reference.append(x.clone())
        numbers.append(stash.push(x))
        x = (x @ x).clamp(-2, 2)  # the old x is freed, and its memory asked for again, while its copy may still run
    for number, truth in reversed(list(zip(numbers, reference))):
        assert torch.equal(stash.pop(number), truth)
        x = (x @ x).clamp(-2, 2)
