"""Define limits that layers and evaluation obey, and that predictions count with. No torch."""

from __future__ import annotations

from engine.units import GIB

MLP_TILE_TOKENS = 8192
"""The MLP of a longer row is computed in tiles if the policy keeps none of its tensors.

Gate and up of one tile are 0.44 GiB at F = 14,336.
"""

LOSS_CHUNK_BYTES = 256 * 2**20
"""Bytes of logits, in the working dtype, that the loss computes at once.

They are 1,046 rows of bf16 at V = 128,256. More memory gains little speed (H100, head matmuls,
forward / backward): 576 / 650 TFLOP/s at 256 rows, 673 / 693 at 1,024, 681 / 762 at 2,048.
"""

HOST_EMBEDDING_MIN_BYTES = 256 * 2**20
"""A smaller input embedding stays on the device, because the transfers cost more than it saves.

They are 32 MiB, 0.6 to 1.4 ms, for 4,096 tokens of 4,096 features.
"""

EVALUATION_ROW_TOKENS = 4096
"""Samples of an evaluation share rows of at least this many tokens, because launches dominate short
rows: a row of 256 tokens took 140 ms of launches for 3 ms of work (H100)."""

HOST_LAG, HOST_IN_FLIGHT = 3, GIB
"""The device memory of a layer that is stored on the host is released HOST_LAG layers later, which
leaves time for the copy out. While more than HOST_IN_FLIGHT bytes wait, the oldest are released
sooner, but at least one layer later. Layers of long rows are large, and slow enough for their
copies."""

FLASH_HEAD = 256
"""Flash attention takes heads of up to this many features; wider ones go to our own kernels."""

SCORE_BLOCK, SCORE_BYTES, SCORE_HEAD = 128, 288 * 2**20, 129
"""Our attention's backward pass stores scores of heads of at least SCORE_HEAD features, as many heads
at once as SCORE_BYTES hold. Blocks of SCORE_BLOCK queries make a triangle. Narrower heads make their
scores again, which is less work there than memory."""


def score_cells(tokens: int, block: int = SCORE_BLOCK) -> int:
    """Return the cells of one head's triangle over a row: its block i holds block x (i + 1) block."""
    blocks = -(-tokens // block)
    return blocks * (blocks + 1) // 2 * block * block


def heads_with_stored_scores(tokens: int, heads: int, groups: int, head_dim: int, element: int) -> int:
    """Return the query heads whose p and ds are stored at once; 0: a row is too long, or heads are narrow.

    They are whole key/value heads, in parts as equal as can be. element: bytes of a value.
    """
    fitting = SCORE_BYTES // max(1, 2 * element * score_cells(tokens) * (heads // groups))
    wide = head_dim >= SCORE_HEAD and (head_dim <= 256 or head_dim % 256 == 0)
    if element != 2 or not wide or not fitting:
        return 0
    parts = -(-groups // fitting)
    return heads // groups * -(-groups // parts)
