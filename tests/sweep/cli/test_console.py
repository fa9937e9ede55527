"""Text from a config reaches the terminal as text: no markup, no control characters."""

from __future__ import annotations

import io

import pytest

from sweep.cli.console import LineConsole, TableConsole
from sweep.trials.record import Outcome
from tests.support.tracked import trial

NAMES = [
    "[/attn]", "[all]", "[bold red]", "[link=https://x]y[/link]", "a\x1b[2Jb", "new\nline", "\x07", "re\u202edrow", "плюс [x]",
]  # fmt: skip


def shown(name: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in name)


@pytest.mark.parametrize("outcome", [Outcome.RUNNING, Outcome.PRUNED, Outcome.INFEASIBLE])
@pytest.mark.parametrize("name", NAMES)
def test_a_choice_is_shown_as_it_is_called_in_the_table(name, outcome):
    stream = io.StringIO()
    console = TableConsole(stream, 4, 8)
    console._console.width = 200
    console.on_trial_updated(trial(0, outcome, 2.0, params={"lora.target_modules": name}))
    console._console.print(console._table())
    assert f"target_modules={shown(name)}" in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue() and "\x07" not in stream.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_is_shown_as_it_is_called_in_a_line(name):
    stream = io.StringIO()
    console = LineConsole(stream, 4)
    console.on_trial_updated(trial(0, Outcome.RUNNING, params={"lora.target_modules": name}))
    assert stream.getvalue() == f"trial   0  started   target_modules={shown(name)}\n"


def test_the_time_left_is_over_the_table_and_in_each_line_of_a_report_or_an_end():
    table, stream = TableConsole(io.StringIO(), 4, 8), io.StringIO()
    assert "0 of 8 trials ended" in table._table().title
    table.expect(lambda: "3 of 8 trials ended, time left: about 2.1 h")
    assert table._table().title.endswith("3 of 8 trials ended, time left: about 2.1 h")
    console = LineConsole(stream, 4)
    console.on_trial_updated(trial(0, Outcome.RUNNING, 2.0))  # of an earlier session
    console.expect(lambda: "0 of 8 trials ended, time left: -")
    console.on_trial_updated(trial(1, Outcome.RUNNING))
    console.on_trial_updated(trial(1, Outcome.PRUNED, 2.0))
    said = [line.endswith("  | 0 of 8 trials ended, time left: -") for line in stream.getvalue().splitlines()]
    assert said == [False, False, True, True]


def test_a_line_says_that_a_trial_pauses_and_another_that_it_goes_on():
    stream = io.StringIO()
    console = LineConsole(stream, 4)
    console.on_trial_updated(trial(3, Outcome.RUNNING))
    for outcome in (Outcome.RUNNING, Outcome.PAUSED, Outcome.RUNNING):
        console.on_trial_updated(trial(3, outcome, 2.0))
    *_, paused, goes_on = stream.getvalue().splitlines()
    assert paused.startswith("trial   3  PAUSED         eval loss 2.0000") and goes_on == "trial   3  goes on after rung 1/4"


def test_the_table_says_that_a_trial_still_loads_the_model():
    console = TableConsole(io.StringIO(), 4, 8, is_training=lambda record: record.number == 1)
    for number, losses in ((0, ()), (1, ()), (2, (2.0,))):
        console.on_trial_updated(trial(number, Outcome.RUNNING, *losses))
    console.on_trial_updated(trial(3, Outcome.FAILED))
    assert [str(cell) for cell in console._table().columns[2]._cells] == ["loading", "0/4", "1/4", "0/4"]


def test_the_table_marks_the_trial_that_the_rule_chooses():
    console = TableConsole(io.StringIO(), 4, 8)
    for number, loss, outcome in ((0, 2.5, Outcome.COMPLETE), (1, 2.4, Outcome.STOPPED), (2, 2.3, Outcome.PRUNED)):
        console.on_trial_updated(trial(number, outcome, loss))
    losses = console._table().columns[4]._cells
    assert [bool(cell.style) for cell in losses] == [False, True, False]


@pytest.mark.parametrize("make", [lambda stream: LineConsole(stream, 4), lambda stream: TableConsole(stream, 4, 8)])
def test_a_note_keeps_its_own_lines_and_nothing_that_steers_a_terminal(make):
    stream = io.StringIO()
    make(stream).note("two\nlines of [bold]text\x1b[2J")
    assert stream.getvalue() == "two\nlines of [bold]text\\x1b[2J\n"
