"""Units that both halves count in."""

from __future__ import annotations

GIB = 2**30
