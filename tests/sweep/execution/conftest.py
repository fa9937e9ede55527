"""Workers listen for signals and freeze what they hold: after a test, both are as before."""

from __future__ import annotations

import gc
import signal

import pytest


@pytest.fixture(autouse=True)
def _thaw():
    yield
    gc.unfreeze()
    gc.freeze()  # as tests/conftest.py left it, without a search through all libraries


@pytest.fixture(autouse=True)
def _keep_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
