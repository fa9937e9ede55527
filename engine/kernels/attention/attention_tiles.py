"""Choose the tiles of the attention kernels by head and card. What they took is written beside them."""

from __future__ import annotations

from dataclasses import dataclass

import triton

LARGE_BYTES = 227 * 1024
Tile = tuple[int, int, int, int]  # M, N, warps, stages


@dataclass(frozen=True)
class AttentionTiles:
    """The tile of each kernel: `both` makes dk and dv at once, or each has a kernel.

    Shared memory holds rows of P 16-bit values, with S stages of what passes by: M + 2 S N rows
    forward, 2 M + 2 S N for dq and scores, 2 N + 2 S M for dk or both, N + 2 S M for dv. At P = 256 a row is
    512 bytes. Forward, 128 + 2 x 2 x 64 rows are 192 KiB, of 227 that a block may have on an H100;
    64 + 2 x 2 x 32 are 96 KiB, of 99 on a 3090, 4090, A10 or L4.

    `scores` and `products` replace all others of the backward pass where scores are stored
    (stored_scores.py). A stage of `products` is M rows of N + 256 values.

    Registers hold the sums in fp32: 128 x 256 over 8 warps are 128 of a thread's 255. So both dk
    and dv of 128 keys fit only up to P = 128.
    """

    forward: Tile
    dq: Tile
    both: Tile | None = None
    dk: Tile | None = None
    dv: Tile | None = None
    scores: Tile | None = None
    products: Tile | None = None


# P -> tiles for cards with as much shared memory as an H100, and for those with 99 KiB. Microseconds
# on an H100 (torch 2.11, triton 3.6; 8 + 4 heads, P = 256, softcap; 4 x 1,024 and 1 x 4,096 tokens):
# forward 105 and 229, dq 149 and 315, dk and dv at once 308 and 813. Without a softcap torch's flash
# attention takes 103 and 336 forward, 482 and 936 backward. A forward tile of 128 x 64 takes 113 and
# 241; 64 x 32 in 4 warps 116 and 268. The small tiles are compiled for sm_86 and not measured.
LARGE = {
    64: AttentionTiles((128, 64, 8, 3), (64, 64, 4, 2), both=(64, 64, 4, 2)),
    128: AttentionTiles((64, 64, 4, 3), (64, 64, 4, 2), both=(32, 64, 4, 2)),
    256: AttentionTiles((128, 32, 8, 3), (128, 32, 8, 2), both=(32, 64, 8, 2), scores=(128, 32, 8, 2), products=(64, 128, 8, 3)),
    512: AttentionTiles((64, 32, 8, 2), (64, 16, 8, 2), dk=(32, 64, 8, 1), dv=(32, 64, 8, 2),
                        scores=(64, 16, 8, 2), products=(64, 128, 8, 3)),
}  # fmt: skip
SMALL = {
    64: AttentionTiles((128, 64, 8, 2), (64, 64, 4, 2), both=(64, 64, 4, 2)),
    128: AttentionTiles((128, 32, 8, 2), (64, 32, 8, 2), both=(32, 64, 8, 1)),
    256: AttentionTiles((64, 32, 8, 2), (64, 32, 8, 1), both=(32, 32, 8, 2), scores=(64, 32, 8, 1), products=(32, 128, 8, 2)),
    512: AttentionTiles((32, 16, 4, 1), (32, 16, 8, 1), dk=(16, 32, 8, 1), dv=(16, 32, 8, 1),
                        scores=(32, 16, 8, 1), products=(32, 128, 8, 2)),
}  # fmt: skip
TINY = AttentionTiles((32, 16, 4, 1), (32, 16, 4, 1), dk=(16, 32, 4, 1), dv=(16, 32, 4, 1),
                      scores=(32, 16, 4, 1), products=(16, 32, 4, 1))  # fmt: skip
"""Tiles for tests: fp32 has no matrix instruction that keeps its digits, and an interpreter no shared memory."""


def choose_tiles(head_dim: int, shared_bytes: int) -> AttentionTiles:
    """Return the tiles for 16-bit heads on a card whose blocks may have `shared_bytes` of shared memory."""
    fitting = LARGE if shared_bytes >= LARGE_BYTES else SMALL
    return fitting[max(64, triton.next_power_of_2(head_dim))]
