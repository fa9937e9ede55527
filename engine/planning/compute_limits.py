"""The limits that layers and evaluation keep to, and by which memory and speed are predicted. No torch."""

from __future__ import annotations

from engine.units import GIB

MLP_TILE_TOKENS = 8192
"""The MLP of a longer row is computed in tiles, where nothing of it is kept: gate and up of one tile
at F = 14,336 are 0.44 GiB."""

LOSS_CHUNK_BYTES = 256 * 2**20
"""Bytes of logits, in the working dtype, that the loss computes at once: 1,046 rows of bf16 at
V = 128,256. The head matmuls, forward / backward, reach 576 / 650 TFLOP/s at 256 rows, 673 / 693 at
1,024 and 681 / 762 at 2,048 (H100): beyond this, memory buys little."""

HOST_EMBEDDING_MIN_BYTES = 256 * 2**20
"""A smaller input embedding stays on the device, since it is not worth its transfers: 32 MiB, 0.6 to
1.4 ms, for 4,096 tokens of 4,096 features."""

EVALUATION_ROW_TOKENS = 4096
"""Samples of an evaluation share rows of at least this many tokens: on an H100 a row of 256 tokens
took 140 ms of launches for 3 ms of work."""

HOST_LAG, HOST_IN_FLIGHT = 3, GIB
"""The device memory of a layer that is stored on the host is released HOST_LAG layers later, which
leaves time for the copy out. It is released sooner, a layer later at the soonest, where more than
HOST_IN_FLIGHT bytes wait: layers of long rows are large, and slow enough for their copies."""
