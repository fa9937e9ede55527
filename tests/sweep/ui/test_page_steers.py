"""The page's buttons steer a sweep that runs: its driver does what they say, and the page shows it."""

from __future__ import annotations

import time

import pytest

from sweep.folder.sweep_folder import SweepFolder
from sweep.ui.page_commands import find_control
from tests.support.browser import needs_browser
from tests.support.fake_sweeps import results, start, sweep_folder
from tests.support.served_page import opened, served

SLOW, FAST = 60.0, 0.02  # seconds a rung
SPACE = {"lora.rank": {"choices": [2, 4, 8]}, "optim.eps": {"choices": [FAST, SLOW]}}
ROW = "[...document.querySelectorAll('#trials tbody tr')].find((row) => row.cells[1].textContent === '%s')"
BUTTON = "[...document.querySelectorAll('#buttons button')].find((button) => button.textContent.startsWith('%s')).click()"
ENDS = {0: "PAUSED", 1: "PRUNED", 2: "COMPLETE", 3: "COMPLETE"}
REPLY = "document.querySelector('#reply').textContent"


def send(tab, words: str) -> str:
    """Press the button that begins with these words. Returns what the sweep answered."""
    tab.ask(BUTTON % words)
    return replied(tab)


def replied(tab) -> str:
    return tab.wait_for(f"{REPLY}.endsWith('…') ? '' : {REPLY}")


@needs_browser
@pytest.mark.faults
@pytest.mark.timeout(400)
def test_pause_clone_stop_and_go_on_by_the_buttons_of_the_page(tmp_path):
    """Two trials would take minutes. The page's buttons take their slots for another."""
    slow = [{"lora.rank": rank, "optim.eps": SLOW} for rank in (2, 4)]
    process = start(
        tmp_path, space=SPACE, sweep={"num_trials": 2, "first_trials": slow, "prior": False}, pruner={"name": "none"}
    )
    deadline = time.monotonic() + 200
    while len(list((tmp_path / "sweeps").glob("*/trials/*/.training"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    folder = sweep_folder(tmp_path)
    with served(SweepFolder(folder), control=find_control()) as address, opened(tmp_path, address) as tab:
        shows(tab, 0, "RUNNING")
        tab.ask(f"({ROW % 0}).click()")
        assert send(tab, "pause 0").startswith("done: pause 0")
        shows(tab, 0, "PAUSED")
        tab.ask(BUTTON % "clone 0 with")
        assert tab.ask("document.querySelector('#line').value") == "clone 0 lora.rank=2"
        tab.ask(f"document.querySelector('#line').value = 'clone 0 optim.eps={FAST}'")
        tab.ask("document.querySelector('#command').requestSubmit()")
        assert "trial 2 with rank=2 eps=0.02" in replied(tab)
        shows(tab, 2, "COMPLETE")
        tab.ask(f"({ROW % 2}).click()")
        tab.ask(BUTTON % "warm clone of 2 with")
        assert tab.ask("document.querySelector('#line').value") == "clone 2 --warm lora.rank=2"
        tab.ask("document.querySelector('#command').requestSubmit()")
        assert "trial 3 with rank=2 eps=0.02, warm from trial 2" in replied(tab)
        shows(tab, 3, "COMPLETE")
        assert tab.ask(f"({ROW % 3}).textContent").endswith("warm from trial 2 at 400 tokens")
        tab.ask(f"({ROW % 1}).click()")
        assert send(tab, "stop 1").startswith("done: stop 1")
        shows(tab, 1, "PRUNED")
        titles = tab.ask("[...document.querySelectorAll('#buttons button:disabled')].map((one) => one.title)")
        assert len(titles) == 5 and sum("is over" in title for title in titles) == 4
        assert "trial 1 has no adapter yet" in " ".join(titles)
        tab.ask("document.querySelector('#line').value = 'pause 1'; document.querySelector('#command').requestSubmit()")
        assert "is over" in replied(tab) and tab.ask("document.querySelector('#reply').className") == "fault"
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err + out
        tab.wait_for("document.querySelector('#state').textContent === 'no driver here'")
    assert {number: result["outcome"] for number, result in results(folder).items()} == ENDS


def shows(tab, number: int, outcome: str) -> None:
    tab.wait_for(f"({ROW % number})?.cells[2].textContent === '{outcome}'", 120)
