"""Workers listen for signals, which after a test are as before, and freeze what they hold."""

from __future__ import annotations

import gc
import signal

import pytest


@pytest.fixture(autouse=True)
def _stay_frozen(monkeypatch, request):
    """Let workers freeze objects and not thaw them.

    A worker thaws before it loads a model, to search for what it can drop. In this process that search
    goes through the libraries of all tests, twice a trial. Tests of growth need it.
    """
    if "faults" not in request.keywords:
        monkeypatch.setattr(gc, "unfreeze", lambda: None)


@pytest.fixture(autouse=True)
def _keep_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
