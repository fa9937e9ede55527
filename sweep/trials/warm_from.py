"""Define what a warm clone begins with: the adapter that another trial of the sweep had.

A copy of that adapter lies in the clone's own folder. Its losses count tokens that the clone did
not see. So sampler and pruner learn nothing from the clone; it may win all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class WarmFrom:
    """Name the adapter: the trial that trained it, the tokens it had seen there, and the files' digest.

    tokens: without those of a start that the trial had itself. digest: see
    `engine.sources.identity.identify_start`.
    """

    trial: int
    tokens: int
    digest: str

    @property
    def text(self) -> str:
        return f"warm from trial {self.trial} at {self.tokens:,} tokens"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> WarmFrom:
        """Read what to_dict() returned. Raises TypeError, LookupError or ValueError for anything else."""
        return cls(int(data["trial"]), int(data["tokens"]), str(data["digest"]))

    def put_into(self, config: Mapping[str, Any], start: Path) -> dict[str, Any]:
        """Return a trial's config, as plain data, with this start. start: the copy of the adapter."""
        lora = {**config.get("lora", {}), "start_from": str(start.absolute()), "start_digest": self.digest}
        return {**config, "lora": lora}
