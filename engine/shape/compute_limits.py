"""Define limits that layers and evaluation obey, and that predictions count with. No torch."""

from __future__ import annotations

from engine.config.matmul import Matmul
from engine.units import GIB

ROTATED, INT8_MULTIPLE, INT8_WIDEST = 64, 16, 65_536
"""Sizes of products in INT8: features that one rotation takes, a multiple that tensor cores read, and the
widest row that the kernels quantise."""


def takes_int8(mode: Matmul, features_in: int, features_out: int) -> bool:
    """Return True if a group of linear layers of these sizes has products in INT8 in this mode."""
    divides = features_in % (ROTATED if mode.is_int8_forward else INT8_MULTIPLE) == features_out % INT8_MULTIPLE == 0
    return mode.is_int8_backward and divides and max(features_in, features_out) <= INT8_WIDEST


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

STATE_PIECE, STATE_PIECES = 2**22, 3
"""Values of the adapter whose 8-bit states come from the host at once, and pieces on the device at a time.

Copies of 4 MiB are about as fast as larger ones (PCIe 4 and 5). One piece comes, one is stepped, one goes.
"""

LENGTH_STEP = 256
"""cuDNN plans each new shape of a batch for more than a second, so it gets only samples of multiples of this."""

EVALUATION_ROW_TOKENS = 4096
"""Samples of an evaluation share rows of at least this many tokens, because launches dominate short
rows: a row of 256 tokens took 140 ms of launches for 3 ms of work (H100)."""

FULL_ROW_WIDTH, MOST_WIDE_ROWS = 2048, 4
"""Narrower models have as many more tokens in such a row, up to four times: kernels of narrow layers do not fill
a card. 130,328 tokens of SmolLM2-135M ran at 650k tok/s in rows of 4,096, 833k of 8,192 and 910k of 16,384 (H200)."""


def evaluation_row_tokens(longest: int, width: int | None = None) -> int:
    """Return the most tokens in a row of an evaluation. width: hidden size of a model that runs fused on a card, else None."""
    more = 1 if width is None else min(MOST_WIDE_ROWS, max(1, FULL_ROW_WIDTH // width))
    return max(longest, more * EVALUATION_ROW_TOKENS)


MIN_DOCUMENTS, TOKENS_A_DOCUMENT = 8, 128
"""A padded row has places for so many samples: one for each of these tokens of its capacity, and more
if its samples are shorter. Attention leaves an empty sample at once."""


def documents_of(capacity: int, needed: int = 0) -> int:
    """Return the samples for which a padded row of up to `capacity` tokens has places, `needed` or more."""
    return 1 << (max(MIN_DOCUMENTS, capacity // TOKENS_A_DOCUMENT, needed) - 1).bit_length()


HOST_LAG, HOST_IN_FLIGHT = 3, GIB
"""The device memory of a layer that is stored on the host is released HOST_LAG layers later, which
leaves time for the copy out. While more than HOST_IN_FLIGHT bytes wait, the oldest are released
sooner, but at least one layer later. Layers of long rows are large, and slow enough for their
copies."""

FLASH_HEAD = 256
"""Flash attention takes heads of up to this many features; wider ones go to our own kernels."""

SAMPLE_ROWS = 128
"""Rows beyond a sample's own that flash attention's backward pass has for it (torch, mha_varlen_bwd)."""

MAGNITUDE_ROWS = 2048
"""Rows of a weight's own gradient that DoRA makes at once, of which only the magnitudes' gradients stay."""

SCORE_BLOCK, SCORE_BYTES, SCORE_HEAD = 128, 72 * 2**10, 129
"""Our attention's backward pass stores the scores of heads of at least SCORE_HEAD features, of as many
heads at once as SCORE_BYTES hold for each token of a row, or of MLP_TILE_TOKENS: the MLP needs as
much at another moment. Narrower heads make them again, which is less work than the memory they would
move."""


def score_blocks(longest: int) -> int:
    """Return the blocks of keys that a block of queries sees, its own included; a query sees `longest` keys."""
    return -(-(longest - 1) // SCORE_BLOCK) + 1


def score_cells(tokens: int, longest: int) -> int:
    """Return the cells of one head's scores: block i of queries holds the blocks of keys that it may see."""
    blocks, wide = -(-tokens // SCORE_BLOCK), score_blocks(longest)
    narrow = min(blocks, wide)
    return (narrow * (narrow + 1) // 2 + (blocks - narrow) * wide) * SCORE_BLOCK**2


def heads_with_stored_scores(tokens: int, longest: int, heads: int, groups: int, head_dim: int, element: int) -> int:
    """Return the query heads whose scores are stored at once, or 0 if none are.

    They are whole key/value heads, in parts as equal as can be. longest: the keys that a query sees
    at most. element: bytes of a value.
    """
    if element != 2 or head_dim < SCORE_HEAD or (head_dim > 256 and head_dim % 256) or not tokens:
        return 0
    fitting = min(tokens, MLP_TILE_TOKENS) * SCORE_BYTES // (2 * element * score_cells(tokens, longest) * (heads // groups))
    parts = -(-groups // fitting) if fitting else 0
    return heads // groups * -(-groups // parts) if parts else 0
