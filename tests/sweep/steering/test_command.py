"""Words become a command, or one line that says what is wrong with them."""

from __future__ import annotations

import pytest

from engine.errors import InputError
from sweep.steering.command import Command, Kind, parse_words
from sweep.steering.history import History, TakenCommand

TAKEN = [
    ("add 8", Kind.ADD, 8, {}),
    ("stop 3", Kind.STOP, 3, {}),
    ("go-on 0", Kind.GO_ON, 0, {}),
    ("clone 3 optim.learning_rate=1e-4 lora.rank=8", Kind.CLONE, 3, {"optim.learning_rate": 1e-4, "lora.rank": 8}),
    ("try lora.target_modules=all-linear", Kind.TRY, None, {"lora.target_modules": "all-linear"}),
    ("budget gpu_hours=8 target_loss=null", Kind.BUDGET, None, {"gpu_hours": 8, "target_loss": None}),
    ("finish", Kind.FINISH, None, {}),
]
REFUSED = {
    "": "must be status, add, stop",
    "stopp 3": "did you mean 'stop'",
    "stop": "must name a trial's number, as in stop 3",
    "stop -1": "must name a trial's number",
    "stop three": "must name a trial's number",
    "stop 3 4": "takes no further words, and '4' follows",
    "stop ²": "must name a trial's number",
    "add 0": "must name how many trials, as in add 8",
    "add 99999999999999999999": "must name how many trials",
    "clone 3": "must name a value, as in clone 3 optim.learning_rate=1e-4",
    "stop 3 --warm": "has no --warm",
    "try": "must name a value",
    "budget hours=8": "hours is no limit; there are gpu_hours, wall_clock_hours, target_loss",
    "finish 3": "takes no further words",
}


@pytest.mark.parametrize(("text", "kind", "number", "values"), TAKEN)
def test_words_become_a_command_that_travels_as_text(text, kind, number, values):
    command = parse_words(text.split(), "ann@box", 12.5, "000-1")
    assert (command.kind, command.number, command.values, command.text) == (kind, number, values, text)
    assert Command.from_dict(command.to_dict()) == command


def test_a_warm_clone_needs_no_value_and_an_older_file_is_a_cold_one():
    one, other = parse_words(["clone", "3", "--warm"]), parse_words(["clone", "3", "lora.rank=8", "--warm"])
    assert (one.warm, one.values, other.warm, other.values) == (True, {}, True, {"lora.rank": 8})
    assert Command.from_dict(other.to_dict()) == other
    older = {name: value for name, value in other.to_dict().items() if name != "warm"}
    assert not Command.from_dict(older).warm
    with pytest.raises(ValueError, match="its start"):
        Command.from_dict({**parse_words(["stop", "3"]).to_dict(), "warm": True})


@pytest.mark.parametrize(("text", "line"), REFUSED.items())
def test_words_that_name_no_command_are_one_line(text, line):
    with pytest.raises(InputError) as caught:
        parse_words(text.split())
    assert caught.value.field == "command" and line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "format"}, {"number": None}, {"number": "x"}, {"values": 3}, {"who": "\x1b[2J"}, {"text": "x" * 3000},
        {"sent_s": []},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_file_that_holds_no_command_is_refused(change):
    with pytest.raises(ValueError, match="holds"):
        Command.from_dict({**parse_words(["stop", "3"]).to_dict(), **change})
    for other in (None, [], {}, "stop 3"):
        with pytest.raises(ValueError, match="holds no command"):
            Command.from_dict(other)


def test_the_history_follows_from_the_commands_that_were_not_refused():
    history, refusals = History(), {"stop 2": "why"}
    for words in ("stop 1", "stop 2", "pause 3", "pause 4", "go-on 3", "keep 5", "finish"):
        history.take(TakenCommand(parse_words(words.split(), name=words), 1.0, refusals.get(words)))
    assert (list(history.stopped), list(history.held), history.kept) == ([1], [4], {5})
    assert history.finished_by is not None and len(history.ids) == 7
    history.take(TakenCommand(parse_words(["add", "2"]), 2.0))
    assert history.finished_by is None
    again = History(TakenCommand.from_dict(one.to_dict()) for one in history.taken)
    assert again.taken == history.taken and again.held.keys() == history.held.keys()
