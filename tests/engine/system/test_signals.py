"""Signals are handled for the length of a block, whatever a library does to them."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from contextlib import suppress

import pytest

from engine.system.signals import handled, handler_kept


@pytest.mark.parametrize("fault", [False, True])
def test_a_librarys_handler_of_a_signal_does_not_stay(fault):
    """A handler that is installed below Python, in another thread, as Ray does."""
    taken = []
    library = ctypes.CDLL(None)
    with handled([signal.SIGTERM], lambda number, frame: taken.append(number)):

        def install() -> None:
            with suppress(RuntimeError), handler_kept(signal.SIGTERM):
                library.signal(signal.SIGTERM, ctypes.c_void_p(0))  # SIG_DFL, which ends the process
                if fault:
                    raise RuntimeError

        thread = threading.Thread(target=install)
        thread.start()
        thread.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    assert taken == [signal.SIGTERM]
