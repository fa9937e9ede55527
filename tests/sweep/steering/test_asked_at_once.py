"""Who asks whether a driver works in a folder is not taken for one, nor is in the way of one that starts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from sweep import control
from sweep.folder.sweep_folder import SweepFolder
from sweep.steering.inbox import unread
from tests.support.swept import swept

NUM_PROCESSES = 6


def at_once(work: Callable[[int], None], folder: Path) -> list[int]:
    """Begin the work in several processes in one moment. Returns their ids."""
    gate = folder / "gate"
    ids = []
    for number in range(NUM_PROCESSES):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                while not gate.exists():
                    time.sleep(0.001)
                work(number)
                code = 0
            finally:
                os._exit(code)
        ids.append(pid)
    gate.touch()
    return ids


def await_all(ids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ids]


def commander(folder: SweepFolder, out: Path) -> Callable[[int], None]:
    """Return what gives one command and keeps what it was told in a file."""

    def work(number: int) -> None:
        with open(out / f"said-{number}", "w") as said, redirect_stdout(said):
            assert control.main([str(folder.path), "add", str(number + 1)]) == 0

    return work


def test_commands_sent_at_once_all_wait_and_none_takes_another_for_a_driver(tmp_path):
    folder = swept(tmp_path / "sweep")
    folder.lock_file.touch()
    assert await_all(at_once(commander(folder, tmp_path), tmp_path)) == [0] * NUM_PROCESSES
    said = [(tmp_path / f"said-{number}").read_text() for number in range(NUM_PROCESSES)]
    assert all(f"recorded: add {number + 1}; no driver works" in text for number, text in enumerate(said)), said
    waiting = [command.text for _, command in unread(folder)]
    assert sorted(waiting) == [f"add {number + 1}" for number in range(NUM_PROCESSES)]


def test_a_driver_that_starts_while_others_ask_gets_the_folder_and_is_seen_by_all(tmp_path):
    folder = swept(tmp_path / "sweep")
    folder.lock_file.touch()
    seen = tmp_path / "seen"
    seen.mkdir()

    def ask(number: int) -> None:
        deadline_s = time.monotonic() + 60.0
        while not (tmp_path / "held").exists():
            folder.is_driven()
            assert time.monotonic() < deadline_s
        assert folder.is_driven()
        (seen / str(number)).touch()

    ids = at_once(ask, tmp_path)
    for _ in range(20):  # twin: a lock that tries once fails here, as test_file_lock shows
        with folder.lock():
            pass
    with folder.lock():
        (tmp_path / "held").touch()
        assert await_all(ids) == [0] * NUM_PROCESSES
    assert len(list(seen.iterdir())) == NUM_PROCESSES and not folder.is_driven()


def test_a_command_does_not_wait_for_a_driver_that_has_gone_meanwhile(tmp_path, monkeypatch, capsys):
    folder, answers = swept(tmp_path / "sweep"), [True, True, False]
    monkeypatch.setattr(SweepFolder, "is_driven", lambda self: answers.pop(0))
    began_s = time.monotonic()
    assert control.main([str(folder.path), "stop", "6"]) == 0
    assert "no driver works in this folder now" in capsys.readouterr().out
    assert time.monotonic() - began_s < control.PATIENCE_S / 2
