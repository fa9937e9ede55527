"""A signal ends the driver at a safe point, never in the middle of Tune's loop."""

from __future__ import annotations

import os
import signal

import pytest

from sweep.execution.interruption import Interruption, taken_signals
from sweep.execution.safe_stop import SafeStop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("all_have_saved", [True, False])
def test_after_a_signal_running_trials_have_their_time_to_save_and_no_more(number, all_have_saved):
    now, live, asked = [0.0], [2], []
    stop = SafeStop(lambda: None, lambda: asked.append(now[0]), lambda: live[0], 15.0, lambda: now[0])
    with pytest.raises(KeyboardInterrupt), stop.catching():
        assert not stop.stop_all()
        now[0] = 1.0
        os.kill(os.getpid(), number)  # kept for the next safe point
        assert not stop.stop_all()
        now[0] = 15.9
        assert not stop.stop_all() and asked == [1.0]
        live[0], now[0] = (0, 15.9) if all_have_saved else (2, 16.0)
        stop.stop_all()
        pytest.fail("it goes on")


def test_a_worker_looks_for_the_drivers_file_no_more_than_five_times_a_second(tmp_path):
    now, file = [0.0], tmp_path / ".stop"
    interruption = Interruption(lambda: None, lambda: now[0])
    interruption.follow(file)
    assert not interruption.is_asked()
    file.touch()
    now[0] = 0.19
    assert not interruption.is_asked()
    now[0] = 0.21
    assert interruption.is_asked()
    file.unlink()
    assert interruption.is_asked()  # said once, it holds for this trial


@pytest.mark.parametrize("is_immune", [False, True])
def test_a_closed_terminal_ends_a_driver_as_a_signal_does_but_not_under_nohup(is_immune):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_immune else signal.SIG_DFL)
    try:
        assert (signal.SIGHUP in taken_signals()) is not is_immune
        with SafeStop(lambda: None, lambda: None, lambda: 0).catching():
            assert (signal.getsignal(signal.SIGHUP) is signal.SIG_IGN) is is_immune
    finally:
        signal.signal(signal.SIGHUP, before)
