"""Say why a sweep halts now although it has trials left: a full disk, changed inputs, or a stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import StorageError, first_line
from engine.system.files import storage_fault


class Halt:
    """Hold the reasons, one line each.

    storage_fault: why the sweep must stop at once. changed_inputs: why no more trials may start.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self.is_winding_down = folder, False
        self.storage_fault, self.changed_inputs = None, None

    @contextmanager
    def on_disk(self) -> Iterator[None]:
        """Wrap every event: if the disk is full, suspend. The journal is valid to its last line."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, StorageError) and storage_fault(error) is None:
                raise
            self.suspend(f"{self._path} cannot be written ({first_line(error)})")

    def suspend(self, reason: str) -> None:
        """Start and end no trial now that the disk is full. A resume continues running trials."""
        self.storage_fault = self.storage_fault or reason

    def wind_down(self, changed_inputs: str | None = None) -> None:
        """Start no trial from now on: the driver will end. A resume continues running trials.

        changed_inputs: in one line, what a trial found that the sweep did not begin with.
        """
        self.is_winding_down, self.changed_inputs = True, self.changed_inputs or changed_inputs
