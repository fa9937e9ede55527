"""End Tune's loop between two of its steps.

After a signal or a change of the inputs that happens once the running trials have saved; at a full
disk it happens at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.tune.stopper import Stopper

from engine.errors import InputsChanged, StorageError
from engine.system.signals import handled
from sweep.execution.interruption import taken_signals

# managers leave 20 s or more between SIGTERM and SIGKILL, and Ray takes 2 to 3 s to end
GRACE_S = 15.0


class SafeStop(Stopper):
    """Turn a signal or a full disk into an exception between two steps of Tune's loop.

    So the exception never tears a journal write. After a signal, or once the inputs have changed, it
    comes when the running trials have ended or the grace period is over. Inside it is
    KeyboardInterrupt, because on an Exception Tune's loop would wait for all trials to end.
    """

    def __init__(
        self,
        fault: Callable[[], str | None],
        wind_down: Callable[[], None],
        num_training: Callable[[], int],
        grace_s: float = GRACE_S,
        monotonic: Callable[[], float] = time.monotonic,
        *,
        changed_inputs: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Take the callbacks to the ledger.

        fault: returns why to stop at once, or None. wind_down: asks the running trials to end.
        num_training: returns how many of them may still have something to save. changed_inputs:
        returns why no more trials may start, or None.
        """
        self._fault, self._wind_down, self._num_training = fault, wind_down, num_training
        self._changed_inputs, self._grace_s, self._monotonic = changed_inputs, grace_s, monotonic
        self._signalled, self._deadline_s = False, None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles this object into its snapshots, which no one reads

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self._fault():
            raise KeyboardInterrupt
        is_ending = self._signalled or self._changed_inputs() is not None
        if is_ending and self._deadline_s is None:
            self._deadline_s = self._monotonic() + self._grace_s
            self._wind_down()
        if is_ending and (not self._num_training() or self._monotonic() >= self._deadline_s):
            raise KeyboardInterrupt
        return False

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Hold the first signal until the next safe point. A second signal acts at once."""

        def catch(number: int, frame: Any) -> None:
            self._signalled = True
            give_back()

        with handled(taken_signals(), catch) as give_back:
            try:
                yield
            except KeyboardInterrupt:
                if self._signalled:
                    raise
                if self._fault():
                    raise StorageError(self._fault()) from None
                if self._changed_inputs():
                    raise InputsChanged(self._changed_inputs()) from None
                raise
