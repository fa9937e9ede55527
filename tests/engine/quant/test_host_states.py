"""An optimizer with its states on the host takes the same steps, bit for bit, and its checkpoint is the same."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from engine.quant import bnb, host_states

SIZE = 5 * 1024 + 300  # the last piece is short, and its last block too


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(host_states, "STATE_PIECE", 1024)


def optimizer_of(name, weight):
    return bnb.lion([weight], eight_bit=True, lr=1e-2) if name == "lion" else bnb.adamw_8bit([weight], lr=1e-2, weight_decay=0.1)


def run(name, places, device="cpu", again=False, size=SIZE):
    """Take steps; places: of the states in each. again: through a checkpoint before each step."""
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(size, generator=generator).to(device))
    optimizer = optimizer_of(name, weight)
    for on_host in places:
        weight.grad = torch.randn(size, generator=generator).to(device)
        if again:
            torch.save(optimizer.state_dict(), file := io.BytesIO())
            optimizer = optimizer_of(name, weight)
            optimizer.place_states(on_host)
            optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        optimizer.place_states(on_host)
        optimizer.step()
    state = optimizer.state[weight]
    optimizer.state_dict()  # waits for the copies
    assert len(optimizer.state) == 1 and state["step"] == len(places)
    return weight.detach().cpu(), {k: v.cpu() for k, v in state.items() if isinstance(v, torch.Tensor)}, state


def same(one, other):
    return torch.equal(one[0], other[0]) and all(torch.equal(value, other[1][name]) for name, value in one[1].items())


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_steps_in_pieces_are_those_of_the_whole_to_the_bit(name):
    plain = run(name, [False] * 4)
    assert same(run(name, [True] * 4), plain)
    assert same(run(name, [False, True, True, False]), plain)
    assert same(run(name, [True, False, True, True], again=True), plain)
    assert not same(run(name, [True] * 3), plain)


def test_small_parameters_have_states_in_fp32_that_stay():
    assert same(run("adamw", [True] * 3, size=1000), run("adamw", [False] * 3, size=1000))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_steps_with_states_in_pinned_memory_are_the_same_on_a_card(name):
    if not torch.cuda.is_available():
        pytest.skip("no card")
    plain = run(name, [False] * 4, "cuda")
    hosted = run(name, [True] * 4, "cuda")
    assert same(hosted, plain) and hosted[2]["state1"].is_pinned() and hosted[2]["absmax1"].is_cuda
    assert same(run(name, [True, False, True, True], "cuda", again=True), plain)
