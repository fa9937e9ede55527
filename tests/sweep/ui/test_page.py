"""The page in a browser: it opens, grows with the sweep, keeps text as text, and hands on commands."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import psutil
import pytest

from sweep.ui.__main__ import PORT, bound_socket, main
from sweep.ui.live_sweep import LiveSweep
from tests.support.browser import needs_browser
from tests.support.reports import make_report
from tests.support.served_page import opened, served
from tests.support.swept import TAG, swept

ROWS = "document.querySelectorAll('#trials tbody tr').length"
POINTS = "document.querySelector('#curves')?.data?.reduce((sum, line) => sum + line.y.filter((y) => y !== null).length, 0)"

@needs_browser
def test_the_page_opens_and_its_curves_grow_with_the_reports(tmp_path):
    folder = swept(tmp_path / "sweep")
    with served(folder) as address, opened(tmp_path, address) as tab:
        assert tab.wait_for(ROWS) == 7
        assert tab.ask("document.querySelector('#name').textContent") == "sweep"
        assert tab.ask("document.querySelector('tr.first td:nth-child(2)').textContent") == "5"
        points = tab.wait_for(POINTS)
        assert points == sum(len(folder.reports(number)) for number in range(7))
        with open(folder.trial(6) / "reports.jsonl", "a") as file:
            file.write(json.dumps(make_report(3, 1.25, tokens_seen=300, num_trainable=8).to_dict()) + "\n")
        titles = tab.ask("[...document.querySelectorAll('.modebar-btn')].map((button) => button.dataset.title)")
        assert titles and not any("Share" in title or "Cloud" in title for title in titles)  # nothing leaves the machine
        assert tab.wait_for(f"({POINTS}) > {points}") and tab.ask(POINTS) == points + 1
        assert tab.ask("[...document.querySelectorAll('#trials tr')].some((row) => row.textContent.includes('1.2500'))")


@needs_browser
@pytest.mark.parametrize("size", [{"is_dark": True}, {"width": 390, "height": 844}], ids=["dark", "phone"])
def test_every_figure_is_drawn_and_fits_and_no_text_becomes_markup(tmp_path, size):
    folder = swept(tmp_path / "sweep")
    answers = {"prompt": TAG, "expected": "e", "base": TAG, "adapter": f"<img src=x onerror={TAG}>"}
    folder.write_examples({"trial": 5, "examples": [answers]})
    folder.log.write_text(f"{TAG}\n")
    with served(folder) as address, opened(tmp_path, address, **size) as tab:
        tab.wait_for(ROWS)
        for number in range(7):
            tab.ask(f"document.querySelectorAll('#figures > section')[{number}].scrollIntoView()")
            tab.wait_for(f"document.querySelectorAll('#figures > section')[{number}].querySelector('.main-svg')")
        assert tab.ask("document.querySelectorAll('script:not([src]), img, iframe, [onerror], body b > *').length") == 0
        text = tab.ask("document.body.textContent")
        for place in (f"no {TAG}", f"onerror={TAG}", TAG):
            assert place in text
        assert tab.ask("document.documentElement.scrollWidth <= innerWidth")


@needs_browser
def test_curves_show_what_decides_and_the_loss_on_demand(tmp_path):
    title = "(document.querySelector('#curves')?.layout?.yaxis.title.text ?? '')"
    with served(swept(tmp_path / "sweep", metric="exact_match")) as address, opened(tmp_path, address) as tab:
        tab.wait_for(f"{title} === 'exact_match'")
        assert tab.ask("document.querySelector('#measure').value") == "exact_match"
        highest = "Math.max(...document.querySelector('#curves').data.flatMap((line) => line.y))"
        assert 0.4 < tab.ask(highest) < 0.5
        tab.ask("document.querySelector('#measure').value = 'eval_loss'; document.querySelector('#measure').onchange()")
        tab.wait_for(f"{title}.startsWith('eval loss')")
        assert tab.ask(highest) > 2.0
        parallel = "document.querySelectorAll('#figures > section')[0]"
        tab.ask(f"{parallel}.scrollIntoView()")
        tab.wait_for(f"{parallel}.querySelector('.main-svg')")
        shown = tab.ask(f"{parallel}.textContent")
        assert "exact_match" in shown and "0.4500" in shown and "minus" not in shown and "-0." not in shown
    with served(swept(tmp_path / "by loss")) as address, opened(tmp_path, address) as tab:
        tab.wait_for(f"{title}.startsWith('eval loss')")
        assert tab.ask("document.querySelector('#measures').hidden")


@needs_browser
def test_a_click_sorts_and_picks_and_words_filter(tmp_path):
    with served(swept(tmp_path / "sweep")) as address, opened(tmp_path, address) as tab:
        tab.wait_for(ROWS)
        numbers = "[...document.querySelectorAll('#trials tbody tr')].map((row) => +row.cells[1].textContent)"
        press = "[...document.querySelectorAll('#trials th button')].find((b) => b.textContent.startsWith('trial')).click()"
        tab.ask(press)
        assert tab.ask(numbers) == [*range(7)]
        tab.ask(press)
        assert tab.ask(numbers) == [*reversed(range(7))]
        tab.ask("document.querySelector('#filter').value = 'complete'")
        tab.ask("document.querySelector('#filter').dispatchEvent(new Event('input'))")
        assert tab.ask(numbers) == [5, 3, 1]
        tab.ask("document.querySelector('#trials tbody tr').click()")
        assert tab.ask("document.querySelector('#picked-title').textContent") == "Trial 5, COMPLETE"


@needs_browser
def test_rows_are_made_as_they_come_into_view(tmp_path, monkeypatch):
    live = LiveSweep(swept(tmp_path / "sweep"))
    answer = live.changes(None)
    numbers = [*range(250)]
    trials = [{**answer["trials"][0], "number": number, "params": {"lora.rank": number}} for number in numbers]
    monkeypatch.setattr(LiveSweep, "changes", lambda self, cursor: {**answer, "trials": trials, "ranks": numbers})
    with served(live.folder) as address, opened(tmp_path, address) as tab:
        assert tab.wait_for(ROWS) == 100
        for made in (200, 250):
            tab.ask("document.querySelector('.tall').scrollTop = 1e6")
            tab.wait_for(f"{ROWS} === {made}")
        tab.ask("document.querySelector('#filter').value = 'rank=249'")
        tab.ask("document.querySelector('#filter').dispatchEvent(new Event('input'))")
        assert tab.ask(ROWS) == 1


@needs_browser
def test_buttons_and_lines_go_to_control_and_are_disabled_without_it(tmp_path):
    folder, taken = swept(tmp_path / "sweep"), []

    def control(words):
        taken.append(words[1:])
        print(f"{words[1]} {TAG}")
        return 0

    with served(folder, control=control) as address, opened(tmp_path, address) as tab:
        tab.wait_for(ROWS)
        tab.ask("[...document.querySelectorAll('#trials tbody tr')].find((row) => row.cells[1].textContent === '6').click()")
        tab.ask("[...document.querySelectorAll('#buttons button')].find((button) => button.textContent === 'stop 6').click()")
        tab.wait_for(f"document.querySelector('#reply').textContent === {json.dumps(f'stop {TAG}')}")
        # a clone needs another value: its button only begins the line
        tab.ask("[...document.querySelectorAll('#buttons button')].find((one) => one.textContent.startsWith('clone 6')).click()")
        assert tab.ask("document.querySelector('#line').value").startswith("clone 6 lora.rank=")
        assert tab.ask("+getSelection().toString() > 0")
        tab.ask("document.querySelector('#line').value = 'add 8'; document.querySelector('#command').requestSubmit()")
        tab.wait_for(f"document.querySelector('#reply').textContent === {json.dumps(f'add {TAG}')}")
        assert taken == [["stop", "6"], ["add", "8"]]
        buttons = "[...document.querySelectorAll('#buttons button%s')]"
        titles = f"Object.fromEntries({buttons % ''}.map((one) => [one.textContent, one.title]))"
        disabled = f"{buttons % ':disabled'}.map((one) => one.textContent)"
        assert tab.ask(disabled) == ["go-on 6", "warm clone of 6 with …"]
        assert tab.ask(titles)["go-on 6"] == "trial 6 is not paused: RUNNING"
        tab.ask("[...document.querySelectorAll('#trials tbody tr')].find((row) => row.cells[1].textContent === '1').click()")
        assert tab.ask(disabled) == ["stop 1", "pause 1", "go-on 1", "warm clone of 1 with …", "keep 1"]
        assert tab.ask(titles)["stop 1"] == "trial 1 is over: COMPLETE" and tab.ask(titles)["clone 1 with …"] == ""
    with served(folder) as address, opened(tmp_path, address) as tab:
        tab.wait_for(ROWS)
        assert tab.ask("document.querySelectorAll('#buttons button:enabled, #command :enabled').length") == 0


@needs_browser
def test_two_sweeps_are_compared_with_a_word_on_whether_their_losses_compare(tmp_path):
    folders = [swept(tmp_path / "one"), swept(tmp_path / "other")]
    for number, folder in enumerate(folders):
        folder.write_data({"evaluation": f"set {number}"})
    with served(*folders) as address, opened(tmp_path, address) as tab:
        tab.wait_for("document.querySelector('#best-so-far .main-svg')")
        assert tab.ask("document.querySelectorAll('#compared tbody tr').length") == 2
        assert "do NOT compare" in tab.ask("document.querySelector('#comparable').textContent")
        tab.ask("document.querySelectorAll('#tabs button')[1].click()")
        assert tab.ask("document.querySelector('#name').textContent") == "other" and tab.ask(ROWS) == 7


def test_the_command_serves_on_this_machine_alone_until_ctrl_c(tmp_path):
    folder = swept(tmp_path / "sweep")
    process = subprocess.Popen([sys.executable, "-m", "sweep.ui", str(folder.path)], stdout=subprocess.PIPE, text=True)
    address = process.stdout.readline().split()[1]
    with urllib.request.urlopen(address, timeout=60) as page:
        assert b"static/page.js" in page.read()
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{address.rsplit('/', 2)[0]}/", timeout=60)
    listening = {c.laddr.ip for c in psutil.Process(process.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    assert address.split("/")[3] not in " ".join(psutil.Process(process.pid).cmdline())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


def test_what_cannot_be_shown_is_one_line(tmp_path, capsys):
    folder = swept(tmp_path / "sweep")
    with bound_socket(None) as taken:
        port = taken.getsockname()[1]
        assert main([str(folder.path), "--port", str(port)]) == 2
        with bound_socket(None) as other:
            assert PORT <= port < other.getsockname()[1]
    assert f"port {port} is taken" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2 and "must be a sweep folder" in capsys.readouterr().err
    assert main([str(folder.path), f"{folder.path}/../sweep"]) == 2 and "must be named once" in capsys.readouterr().err
    assert main(["--mlflow", str(folder.path), str(folder.path)]) == 2 and "must be left out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(folder.path), "--tracking-uri", "http://h"])
