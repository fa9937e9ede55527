"""Store the journal for its one writer, in Optuna's own format.

On every record, Optuna's own backend takes a lock, opens the file and waits for the disk. On every
read it opens the file again. Here the driver holds the folder's lock, so no one else writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from sweep.folder.flush import flush_soon


class JournalFile(BaseJournalBackend):
    """Append records, and return those that were not read yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (lives as long as the study)
        self._file.seek(0)
        self._unread = self._file.readlines()
        self._num_read = 0

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield the records from that number on.

        Optuna asks for each record once, in order. Raises ValueError for any other number.
        """
        if log_number_from != self._num_read:
            raise ValueError(f"{self._path}: record {log_number_from} was asked for, {self._num_read} is next")
        while self._unread:
            lines, self._unread = self._unread, []
            self._num_read += len(lines)
            yield from map(json.loads, lines)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = [json.dumps(log, separators=(",", ":")) + "\n" for log in logs]
        self._file.write("".join(lines))
        self._file.flush()
        self._unread += lines
        flush_soon(self._path)
