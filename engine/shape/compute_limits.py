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

LENGTH_STEP = 256
"""cuDNN plans each new shape of a batch for more than a second, so it gets only samples of multiples of this."""

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
