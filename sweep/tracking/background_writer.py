"""Write the newest state of each thing in one daemon thread.

A slow, dead or hanging store therefore costs the caller nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

FIRST_RETRY_S, LONGEST_RETRY_S = 0.5, 30.0
LAST_TRIES = 3  # failures in a row after close(), then the thread gives up
Key = tuple[str | int, ...]
Job = Callable[[], object]


class BackgroundWriter:
    """Runs jobs one after another; a failed job stays pending and is retried with growing pauses.

    Each job has a key. Of several pending jobs with the same key only the last runs, so the number
    of keys bounds the queue.
    """

    def __init__(self, name: str, is_permanent: Callable[[Exception], bool]) -> None:
        """Start the thread, called `name`.

        is_permanent: tells that a retry after this error cannot help.
        """
        self._is_permanent = is_permanent
        self._pending: dict[Key, Job] = {}
        self._refused: dict[str, list[Key]] = {}  # cause -> keys
        self._changed = threading.Condition()
        self._closing = self._given_up = False
        self._failures = self._num_done = 0
        self._last_error: str | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, key: Key, job: Job) -> None:
        """Have `job` run soon, in place of a pending job with the same key.

        Takes microseconds. Ignored after close().
        """
        with self._changed:
            if not self._closing:
                self._pending[key] = job  # the new job keeps the older one's place in line
                self._changed.notify_all()

    def close(self, timeout_s: float) -> dict[str, list[Key]]:
        """Write what is pending; return what was not written, by cause.

        Gives up after timeout_s in which no job was done. A job that hangs stays behind in its
        daemon thread, which ends with the process.
        """
        with self._changed:
            self._closing, self._failures = True, 0
            self._changed.notify_all()
        done = -1
        # wait for a slow store, not for a hanging one
        while self._thread.is_alive() and done != self._num_done:
            done = self._num_done
            self._thread.join(timeout_s)
        with self._changed:
            self._given_up = True
            self._changed.notify_all()
            unwritten = {cause: list(keys) for cause, keys in self._refused.items()}
            if self._pending:
                unwritten.setdefault(self._last_error or f"no answer within {timeout_s:g} s", []).extend(self._pending)
            return unwritten

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if self._given_up or not self._pending:
                    return
                key, job = next(iter(self._pending.items()))
            error = _attempt(job)
            with self._changed:
                if error is None or self._is_permanent(error):
                    self._done(key, job, error)
                elif not self._wait_after_failure(key, error):
                    return

    def _done(self, key: Key, job: Job, error: Exception | None) -> None:
        self._failures, self._last_error = 0, None
        self._num_done += 1
        if self._pending.get(key) is job:  # else a newer state has arrived
            del self._pending[key]
        if error is not None:
            self._refused.setdefault(f"refused: {_one_line(error)}", []).append(key)

    def _wait_after_failure(self, key: Key, error: Exception) -> bool:
        """Pause before the next try; return False to give up. The caller holds the lock.

        close() cuts the pause short.
        """
        self._failures += 1
        self._last_error = _one_line(error)
        # to the end of the line: one bad job must not hold up the others
        self._pending[key] = self._pending.pop(key)
        if self._closing and self._failures >= LAST_TRIES:
            return False
        closing = self._closing
        pause_s = FIRST_RETRY_S if closing else min(FIRST_RETRY_S * 2 ** min(self._failures - 1, 10), LONGEST_RETRY_S)
        self._changed.wait_for(lambda: self._given_up or self._closing != closing, pause_s)
        return not self._given_up


def _attempt(job: Job) -> Exception | None:
    try:
        job()
    except Exception as error:  # the caller must not notice any error of a store's client
        return error
    return None


def _one_line(error: Exception, limit: int = 300) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
