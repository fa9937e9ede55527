"""Keep an optimizer's 8-bit states in pinned host memory, and step the parameter piece by piece.

States of 8 bits belong to blocks of 256 values, so pieces of whole blocks take the same step as the
whole: bit for bit. A piece's states come to the device while the piece before is stepped, and go
back while the next one is. The scales of the blocks, a 64th of the states, stay on the device.

ZeRO-Offload (Ren et al., arXiv:2101.06840) steps on the host instead, whose numbers are not the device's.
bitsandbytes' paged states are moved by the driver, which no plan can count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engine.shape.compute_limits import STATE_PIECE, STATE_PIECES

STATES = ("state1", "state2")
BLOCK = 256  # values that share a scale


class StatesOnHost:
    """Stands before an optimizer of bitsandbytes among the bases of a class."""

    is_on_host = False
    _copies: Copies | None = None

    def place_states(self, on_host: bool) -> None:
        """Move the 8-bit states, those of today and those made later, to the host or back to their parameters' devices."""
        if on_host == self.is_on_host:
            return
        self.is_on_host = on_host
        if self._copies is not None:
            self._copies.wait()
            self._copies = None
        for parameter, state in self.state.items():
            self._place(parameter, state)

    def _place(self, parameter: Tensor, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if isinstance(value, Tensor):
                stays = self.is_on_host and _is_host_state(name, value)
                state[name] = _pinned(value, parameter.device) if stays else value.to(parameter.device)

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return zeros for a state of `p`. The library calls it."""
        if not self.is_on_host or dtype != torch.uint8:
            return super().get_state_buffer(p, dtype)
        return torch.zeros(p.shape, dtype=dtype, pin_memory=p.is_cuda)

    def to_gpu(self) -> None:
        """Leave the states where they are. The library calls it before the first step."""

    def state_dict(self) -> dict[str, Any]:
        """Return the library's, with the states as the last step left them."""
        if self._copies is not None:
            self._copies.wait()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load states, wherever they were when they were saved."""
        super().load_state_dict(state_dict, move_to_device=False)
        for parameter, state in self.state.items():
            self._place(parameter, state)

    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Step one parameter, as the library does, in pieces if its states are on the host."""
        state = self.state[p]
        names = [name for name in STATES if name in state and _is_host_state(name, state[name])]
        if not self.is_on_host or not names:
            super().update_step(group, p, gindex, pindex)
            return
        if self._copies is None:
            largest = max(one.numel() for each in self.param_groups for one in each["params"])
            self._copies = Copies(p.device, min(STATE_PIECE, largest))
        values, gradient = p.detach().view(-1), p.grad.view(-1)
        pieces = [slice(start, min(start + STATE_PIECE, len(values))) for start in range(0, len(values), STATE_PIECE)]
        whole = {name: state[name].view(-1) for name in names}
        for number, piece in enumerate(pieces):
            if number == 0:
                self._copies.fetch(0, {name: whole[name][piece] for name in names})
            if number + 1 < len(pieces):
                self._copies.fetch(number + 1, {name: whole[name][pieces[number + 1]] for name in names})
            part, blocks = nn.Parameter(values[piece]), slice(piece.start // BLOCK, -(-piece.stop // BLOCK))
            part.grad = gradient[piece]
            scales = {name: value[blocks] for name, value in state.items() if name.startswith("absmax")}
            self.state[part] = {**state, **scales, **self._copies.fetched(number)}
            super().update_step(group, part, gindex, pindex)
            del self.state[part]
            self._copies.put_back(number, {name: whole[name][piece] for name in names})
        state["step"] += 1


class Copies:
    """Copy pieces of states to the device and back, beside the computation. It holds room for a few pieces."""

    def __init__(self, device: torch.device, size: int) -> None:
        """Size: the most values of a piece."""
        self._device, self._size, self._is_cuda = device, size, device.type == "cuda"
        self._room: list[dict[str, Tensor]] = [{} for _ in range(STATE_PIECES)]
        self._sizes = [0] * STATE_PIECES
        if self._is_cuda:
            self._to, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._arrived, self._stepped, self._left = ([torch.cuda.Event() for _ in range(STATE_PIECES)] for _ in range(3))

    def fetch(self, number: int, states: dict[str, Tensor]) -> None:
        """Begin to copy a piece's states to the device."""
        place = number % STATE_PIECES
        room = self._room[place]
        for name, state in states.items():
            if name not in room:
                room[name] = torch.empty(self._size, dtype=state.dtype, device=self._device)
        self._sizes[place] = len(next(iter(states.values())))
        if not self._is_cuda:
            self._copy({name: room[name][: len(state)] for name, state in states.items()}, states)
            return
        if number == 0:  # the step before may still put back what is read now
            self._to.wait_stream(self._back)
            self._to.wait_stream(torch.cuda.current_stream(self._device))  # and the room may be new
        self._to.wait_event(self._left[place])
        with torch.cuda.stream(self._to):
            self._copy({name: room[name][: len(state)] for name, state in states.items()}, states)
            self._arrived[place].record()

    def fetched(self, number: int) -> dict[str, Tensor]:
        """Return a piece's states on the device, for what is computed from here on."""
        place = number % STATE_PIECES
        if self._is_cuda:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[place])
        return {name: room[: self._sizes[place]] for name, room in self._room[place].items()}

    def put_back(self, number: int, states: dict[str, Tensor]) -> None:
        """Begin to copy a piece's states to the host, behind what has been computed so far."""
        place = number % STATE_PIECES
        found = {name: self._room[place][name][: len(state)] for name, state in states.items()}
        if not self._is_cuda:
            self._copy(states, found)
            return
        self._stepped[place].record()
        self._back.wait_event(self._stepped[place])
        with torch.cuda.stream(self._back):
            self._copy(states, found)
            self._left[place].record()

    def wait(self) -> None:
        """Wait until the host has all that was put back."""
        if self._is_cuda:
            self._back.synchronize()

    @staticmethod
    def _copy(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
        for name, target in targets.items():
            target.copy_(sources[name], non_blocking=True)


def _is_host_state(name: str, value: Tensor) -> bool:
    return name in STATES and value.dtype == torch.uint8


def _pinned(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor in host memory, pinned if `device` is CUDA."""
    if device.type != "cuda" or value.is_pinned():
        return value.to("cpu")
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value)
