"""The journal's file for its one writer. Optuna's own takes a lock, opens the file and waits for the disk on every record, and
opens it again on every look; here the driver holds the folder's lock, so nobody else writes. The format is Optuna's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from sweep.folder.flush import flush_soon


class JournalFile(BaseJournalBackend):
    """Appends records, and gives back those that were not read yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (lives as long as the study)
        self._file.seek(0)
        self._unread = self._file.readlines()
        self._num_read = 0

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Records from that number on; Optuna asks for each once, in order."""
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
