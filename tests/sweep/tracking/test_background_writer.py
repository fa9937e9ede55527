"""The background writer retries failed jobs and writes only the newest state of each thing."""

import threading

import pytest

from sweep.tracking import background_writer as background
from sweep.tracking.background_writer import BackgroundWriter


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(background, "FIRST_RETRY_S", 0.001)


def test_a_job_that_fails_is_tried_again_and_others_go_on_meanwhile(impatient):
    done, both = [], threading.Event()

    def flaky():
        done.append("try")
        if done.count("try") < 4:
            raise OSError("away")
        both.set()

    writer = BackgroundWriter("test", lambda error: False)
    writer.put(("flaky",), flaky)
    writer.put(("other",), lambda: done.append("other"))
    assert both.wait(5)
    assert writer.close(5) == {}
    assert done[:3].count("other") == 1
    assert done.count("try") == 4


def test_of_several_states_of_one_key_only_the_last_is_written():
    seen, gate = [], threading.Event()
    writer = BackgroundWriter("test", lambda error: False)
    writer.put(("gate",), gate.wait)
    for state in range(10):
        writer.put(("trial", 0), lambda state=state: seen.append(state))
    gate.set()
    assert writer.close(5) == {}
    assert seen == [9]


def test_a_state_that_comes_while_an_older_one_is_written_is_written_too():
    seen, started, gate = [], threading.Event(), threading.Event()

    def slow():
        started.set()
        gate.wait()
        seen.append("old")

    writer = BackgroundWriter("test", lambda error: False)
    writer.put(("trial", 0), slow)
    started.wait()
    writer.put(("trial", 0), lambda: seen.append("new"))
    gate.set()
    assert writer.close(5) == {}
    assert seen == ["old", "new"]


def test_after_close_a_failing_job_gets_three_tries(impatient):
    tries = []

    def failing():
        tries.append(1)
        raise OSError("away")

    writer = BackgroundWriter("test", lambda error: False)
    writer._closing = True  # as if close() had come first
    writer._pending[("trial", 0)] = failing
    assert writer.close(5) == {"OSError: away": [("trial", 0)]}
    assert 3 <= len(tries) <= 6
