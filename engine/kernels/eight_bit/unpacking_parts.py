"""Hold what several eight-bit kernels do with values in registers: rounding to codes, and the Hadamard matrix."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def code_bits(x, inverse):
    """Return x * inverse, at most 127 in size, rounded once to nearest even, in the low byte of an int32.

    Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the float.
    """
    return tl.fma(x, inverse, 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def hadamard_tile(dtype: tl.constexpr):
    """Return H [64, 64]: element i, j is 1/8, negative if i & j has an odd number of ones."""
    both = tl.arange(0, 64)[:, None] & tl.arange(0, 64)[None, :]
    both = both ^ (both >> 4)
    both = both ^ (both >> 2)
    both = both ^ (both >> 1)
    return (0.125 - 0.25 * (both & 1).to(tl.float32)).to(dtype)


@triton.jit
def nibbles_of(words, COUNT: tl.constexpr):
    """Return the 8 elements of each word, COUNT in all, in the order of the words, as places in NF4's table.

    A word is little-endian with its high nibble first: elements start at bits 4, 0, 12, 8, 20, 16, 28,
    24. They are joined one by one, which leaves all eight in the thread that loaded the word.
    """
    even = tl.join(tl.join(words >> 4, words >> 20), tl.join(words >> 12, words >> 28))
    odd = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
    return tl.join(even, odd).reshape(COUNT) & 15
