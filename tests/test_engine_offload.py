"""The stack of layer inputs in host memory."""

import pytest
import torch

from engine.offload import HostStash


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
