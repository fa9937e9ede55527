"""Call a library's own token mixer on a packed row, so that no sample sees another.

A mixer is what stands in attention's place: linear attention with a state, or a short convolution.
The library's modules have three ways to keep samples apart, and `LibraryMixer` takes the first that
gives the numbers of one call a sample:

- OFFSETS: the module gets the offsets and the number of each token's sample. Its kernels read them
  (flash-linear-attention and causal-conv1d).
- GAPS: the same offsets, but zeros between the samples keep the convolution apart. It needs
  flash-linear-attention alone.
- ALONE: one call a sample, on any machine. The library's torch operations know no offsets: one
  version refuses them, another runs on across samples.

Samples of one length need none of them: they are a plain batch.

No version is asked and no package looked for: two samples of the first row that has several are
computed each way. So a kernel that ignores what it is told is never used.

A row that a CUDA graph replays has its boundaries on the device alone (`Documents.are_bounds`).
OFFSETS and GAPS compute it if the kernels also take the chunks of all samples from us: they would
count them on the host. `try_offsets` finds that out. Such a mixer never waits for the device.

Shape letters: T tokens, D hidden.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from engine.layers.attention import Documents
from engine.layers.library.library_module import LibraryModule, seeded
from engine.shape.mixer_shape import CHUNK

PROBED_TOKENS = {"cuda": 2048}
"""Tokens of each of the two samples that a way is tried on, by the kind of device. Kernels are tuned on them."""
FEW_TOKENS = 512
ALLOWED = {torch.float32: 1e-3}  # relative difference of outputs; in 16 bits OTHER_ALLOWED
OTHER_ALLOWED = 0.05


class Way(StrEnum):
    """How a mixer keeps the samples of a row apart."""

    OFFSETS = "offsets"
    GAPS = "gaps"
    ALONE = "alone"


@dataclass
class LibraryMixer(LibraryModule):
    """Hold a mixer and its way, which is None until a row with several samples has shown it.

    reads_offsets: whether rows with boundaries on the device alone can be computed; None until tried.
    """

    way: Way | None = None
    reads_offsets: bool | None = None

    def try_offsets(self, x_TD: Tensor) -> bool:
        """Find out whether rows with boundaries on the device alone can be computed. Return it, and remember it.

        x_TD: hidden states, of which two samples of different lengths are computed.
        """
        num_tokens = x_TD.shape[0]
        border, known = (num_tokens * 3) // 5, self.way
        offsets = torch.tensor([0, border, num_tokens], dtype=torch.int32, device=x_TD.device)
        two, self.reads_offsets = Documents((border, num_tokens - border), offsets), True
        self.way = self._choose(x_TD, two)
        if self.way is Way.ALONE or _waits(self._ways()[self.way], x_TD, two):
            self.way, self.reads_offsets = known, False
        return self.reads_offsets

    def mix(self, x_TD: Tensor, documents: Documents, seed: int | None = None) -> Tensor:
        """Return the mixer's output [T, D]. Differentiable in x and the adapters.

        The same seed gives the same dropout masks. Raises ValueError if the row's boundaries are on the
        device alone and `try_offsets` has not shown that they are read.
        """
        if documents.are_bounds and not self.reads_offsets:
            raise ValueError("this mixer needs the lengths of a row's samples on the host")
        with seeded(seed, x_TD.device):
            if documents.are_bounds:
                return self._ways()[self.way](x_TD, documents)
            lengths = [length for length in documents.lengths if length]
            if len(set(lengths)) == 1:  # one sample, or a plain batch
                return self.module(x_TD.view(len(lengths), lengths[0], -1)).flatten(0, 1)
            if self.way is None:
                self.way = self._choose(x_TD, documents)
            return self._ways()[self.way](x_TD, documents)

    def _ways(self) -> dict[Way, Callable[[Tensor, Documents], Tensor]]:
        return {Way.OFFSETS: self._with_offsets, Way.GAPS: self._with_gaps, Way.ALONE: self._alone}

    @torch.no_grad()
    def _choose(self, x_TD: Tensor, documents: Documents) -> Way:
        """Return the first way that computes two samples of the row as if each were alone."""
        filled = [part for part in x_TD.split(documents.lengths) if part.shape[0]]
        most = _probed_tokens(x_TD.device)
        pair = [filled[0][-most:], filled[1][:most]]
        lengths = tuple(part.shape[0] for part in pair)
        offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=documents.offsets.dtype, device=x_TD.device)
        probe, two = torch.cat(pair), Documents(lengths, offsets)
        training = self.module.training
        self.module.eval()  # no dropout, whose masks differ from way to way
        try:
            right = self._alone(probe, two)
            return next((way for way, method in self._ways().items() if _keeps_apart(method, probe, two, right)), Way.ALONE)
        finally:
            self.module.train(training)

    def _alone(self, x_TD: Tensor, documents: Documents) -> Tensor:
        return torch.cat([self._call(part) for part in x_TD.split(documents.lengths) if part.shape[0]])

    def _with_offsets(self, x_TD: Tensor, documents: Documents) -> Tensor:
        samples_T, offsets = _samples(x_TD.shape[0], documents.offsets), documents.offsets
        offsets = offsets.view_as(offsets)  # a library may keep what it has computed for a tensor, by its identity
        return self._call(x_TD, cu_seq_lens_q=offsets, seq_idx=samples_T[None], **self._chunks(x_TD, offsets))

    def _with_gaps(self, x_TD: Tensor, documents: Documents) -> Tensor:
        """Put as many zeros behind each sample as the convolution looks back, and drop their outputs."""
        gap, offsets = self.module.conv_kernel_size - 1, documents.offsets
        moved = offsets + gap * torch.arange(offsets.numel(), dtype=offsets.dtype, device=offsets.device)
        rows_T = torch.arange(x_TD.shape[0], device=x_TD.device) + gap * _samples(x_TD.shape[0], offsets)
        wide = x_TD.new_zeros(x_TD.shape[0] + gap * (offsets.numel() - 1), x_TD.shape[1])
        wide = wide.index_copy(0, rows_T, x_TD)
        return self._call(wide, cu_seq_lens_q=moved, **self._chunks(wide, moved)).index_select(0, rows_T)

    def _chunks(self, x_TD: Tensor, offsets: Tensor) -> dict[str, Tensor]:
        return {"chunk_indices": chunk_indices(offsets, x_TD.shape[0])} if self.reads_offsets else {}

    def _call(self, x_TD: Tensor, **keywords: Any) -> Tensor:
        return self.module(x_TD[None], **keywords).squeeze(0)


def read_offsets(mixers: list[LibraryMixer], width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if all mixers compute rows with boundaries on the device alone. One of each class is tried, once.

    width: features of their input. Leaves the random generators as they are.
    """
    firsts: dict[type, LibraryMixer] = {}
    for mixer in mixers:
        first = firsts.setdefault(type(mixer.module), mixer)
        if first.reads_offsets is None:
            generator = torch.Generator(device).manual_seed(0)
            first.try_offsets(torch.randn(_probed_tokens(device), width, generator=generator, device=device).to(dtype))
        if first.reads_offsets:
            mixer.way = first.way
        mixer.reads_offsets = first.reads_offsets
    return all(mixer.reads_offsets for mixer in mixers)


def _probed_tokens(device: torch.device) -> int:
    return PROBED_TOKENS.get(device.type, FEW_TOKENS)


def chunk_indices(offsets: Tensor, num_tokens: int) -> Tensor:
    """Return the sample of each chunk and its number in that sample, [chunks, 2], in the order of the samples.

    The device counts them, so there are as many rows as samples of these lengths and numbers may
    have. Those that are too many lie behind the end of the last sample, where kernels write nothing.
    flash-linear-attention's own are [sum(ceil(length / CHUNK)), 2], a number that the host waits for.
    """
    counts = (offsets.diff() + (CHUNK - 1)) // CHUNK
    ends, number = counts.cumsum(0), counts.numel()
    places = torch.arange((num_tokens + (CHUNK - 1) * number) // CHUNK, device=offsets.device)
    samples = torch.bucketize(places, ends, right=True).clamp_(max=number - 1)
    return torch.stack([samples, places - (ends - counts)[samples]], dim=1).to(offsets.dtype)


def _samples(num_tokens: int, offsets: Tensor) -> Tensor:
    """Return the number of each token's sample, int32 [T]; the host does not wait for the device."""
    numbers = torch.arange(offsets.numel() - 1, dtype=torch.int32, device=offsets.device)
    return numbers.repeat_interleave(offsets.diff(), output_size=num_tokens)


def _keeps_apart(method: Callable[[Tensor, Documents], Tensor], x: Tensor, two: Documents, right: Tensor) -> bool:
    """Return True if a way gives the right outputs, and nothing of the second sample reaches the first.

    The outputs alone would not tell: a state that decays fast runs on unseen, until one token keeps
    it. The second sample's gradient in the first is exactly 0 or it is not.
    """
    leaf, border = x.detach().requires_grad_(), two.lengths[0]
    try:
        with torch.enable_grad():
            found = method(leaf, two)
            (gradient,) = torch.autograd.grad(found[border:], leaf, right[border:].roll(1, dims=1))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the library refuses offsets in its own words, and a module may lack what GAPS reads
        return False
    close = (found.detach().float() - right.float()).norm() <= ALLOWED.get(x.dtype, OTHER_ALLOWED) * right.float().norm()
    return bool(close) and not bool(gradient[:border].any())


def _waits(method: Callable[[Tensor, Documents], Tensor], x: Tensor, two: Documents) -> bool:
    """Return True if the host waits for the device in a pass forward and backward; never on the CPU."""
    if not x.is_cuda:
        return False
    leaf, before = x.detach().requires_grad_(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode does not see all waits: then recording fails
        torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.enable_grad():
            torch.autograd.grad(method(leaf, two), leaf, x)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False
