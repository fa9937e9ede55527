"""Where a slot's time went: the parts add up to it, whatever happens to trials, workers and drivers."""

from __future__ import annotations

import json
import random

import pytest

from engine.trial_report import EVALUATION, MODEL, RECORDING, SAVING, TRAIN, WAITING, PartClock
from sweep.folder.slot_times import LOADING, PARTS, UNREPORTED, shares_text, slot_times, steady_share, totals
from sweep.folder.timeline import Timeline

MEASURED = (TRAIN, RECORDING, EVALUATION, SAVING, MODEL, WAITING)


class Machine:
    """Slots whose workers measure, with a clock that is set back between two sessions."""

    def __init__(self, file, seed: int, by_card: bool) -> None:
        self.file, self.random, self.by_card = file, random.Random(seed), by_card
        self.now_s, self.wall_s, self.held_s, self.num_processes, self.next_trial = 1e9, 0.0, 0.0, 0, 0

    def session(self, num_slots: int, num_events: int, is_killed: bool) -> None:
        timeline = Timeline(self.file)
        self.now_s -= self.random.choice([0.0, 500.0])
        began_s = self.now_s
        timeline.start_session(self.now_s, num_slots)
        self.names = [self._name(slot) for slot in range(num_slots)]
        held: dict[int, tuple[int, float]] = {}  # slot -> trial, when it was assigned
        for _ in range(num_events):
            self.now_s += self.random.choice([0.0, 0.001, self.random.uniform(0.0, 60.0)])
            slot = self.random.randrange(num_slots)
            if slot in held:
                self._go_on(timeline, slot, held)
            else:
                timeline.on_assigned(self.next_trial, self.now_s)
                held[slot] = (self.next_trial, self.now_s)
                self.next_trial += self.random.choice([0, 1, 1]) or (self.next_trial not in [t for t, _ in held.values()])
                self.next_trial += self.next_trial in [trial for trial, _ in held.values()]
        while held and not is_killed:
            self._go_on(timeline, next(iter(held)), held)
        self.wall_s += num_slots * (self.now_s - began_s)
        self.held_s += sum(self.now_s - assigned_s for _, assigned_s in held.values())
        if is_killed:  # in the middle of a line
            with open(self.file, "a") as file:
                file.write('{"event": "repo')

    def _name(self, slot: int) -> str:
        self.num_processes += 1
        return f"box gpu{slot}" if self.by_card else f"box process {self.num_processes}"

    def _go_on(self, timeline: Timeline, slot: int, held: dict) -> None:
        (trial, assigned_s), kind = held[slot], self.random.randrange(5)
        timing = {"slot": self.names[slot], "began_s": self.now_s - self.random.uniform(-1.0, 70.0)}
        if self.random.random() < 0.8:  # the others are of a version that measured no parts
            # a worker's clock may run faster, and a damaged one backwards
            timing["parts"] = {part: self.random.uniform(-1.0, 30.0) for part in self.random.sample(MEASURED, 3)}
        if kind < 3:
            timeline.on_reported(trial, self.now_s, timing)
        if kind in (2, 3, 4):  # pruned at this report, killed without a word, ended with its last result
            if kind == 4:
                timeline.on_reported(trial, self.now_s, timing)
            if kind == 3:
                self.names[slot] = self._name(slot)
            timeline.on_ended(trial, self.now_s, {})
            del held[slot]
            self.held_s += self.now_s - assigned_s


@pytest.mark.parametrize("by_card", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_the_parts_of_all_slots_add_up_to_their_time_whatever_happens(tmp_path, seed, by_card):
    machine = Machine(tmp_path / "timeline.jsonl", seed, by_card)
    for _ in range(machine.random.randrange(1, 4)):
        machine.session(machine.random.randrange(1, 4), machine.random.randrange(1, 60), machine.random.random() < 0.5)
    timeline = Timeline(machine.file, mend=False)
    times = slot_times(timeline)
    assert len(times) == max(session.num_slots for session in timeline.sessions)
    assert sum(time.seconds for time in times) == pytest.approx(machine.wall_s, abs=1e-3)
    assert all(seconds >= 0.0 for time in times for seconds in time.parts.values())
    for span in timeline.spans:
        assert sum(span.parts.values()) == pytest.approx(span.ended_s - span.assigned_s, abs=1e-4)
    assert sum(timeline.usage.parts.values()) == pytest.approx(machine.held_s, abs=1e-3)
    assert sum(timeline.usage.parts.values()) == pytest.approx(timeline.usage.occupied_s, abs=1e-3)
    if by_card:  # a card is one slot through all sessions
        names = [name for time in times for name in time.names]
        assert len(names) == len(set(names))


def test_a_slot_trains_waits_and_loses_what_a_killed_worker_did(tmp_path):
    timeline = Timeline(tmp_path / "timeline.jsonl")
    timeline.start_session(0.0, 2)
    timeline.on_assigned(0, 10.0)
    timeline.on_reported(0, 110.0, {"slot": "gpu0", "began_s": 20.0, "parts": {MODEL: 5.0, TRAIN: 60.0, EVALUATION: 20.0}})
    timeline.on_reported(0, 150.0, {"slot": "gpu0", "began_s": 20.0, "parts": {WAITING: 1.0, SAVING: 2.0, TRAIN: 36.0}})
    timeline.on_ended(0, 180.0, {})  # its process was killed
    timeline.on_assigned(1, 190.0)
    timeline.on_ended(1, 200.0, {})
    busy, empty = slot_times(Timeline(tmp_path / "timeline.jsonl", mend=False))
    assert busy.names == ("gpu0",) and empty.names == ()
    # idle: 10 s before, 5 + 2 s on the way to the driver, 20 s after; no one knows which slot trial 1 held
    assert {part: round(seconds, 6) for part, seconds in busy.parts.items() if seconds} == {
        TRAIN: 96.0, EVALUATION: 20.0, SAVING: 2.0, LOADING: 15.0, WAITING: 37.0, UNREPORTED: 30.0}  # fmt: skip
    assert {part: seconds for part, seconds in empty.parts.items() if seconds} == {WAITING: 190.0, UNREPORTED: 10.0}
    assert totals([busy, empty])[TRAIN] == 96.0 and steady_share(totals([busy, empty])) == pytest.approx(96.0 / 400.0)
    assert shares_text(totals([busy, empty])).startswith("24.0 % steady training, 5.0 % evaluation, 0.5 % saving")


def test_a_timeline_of_an_older_version_is_not_reported_rather_than_steady(tmp_path):
    events = [
        {"event": "session", "at_s": 0.0}, {"event": "assigned", "at_s": 0.0, "trial": 0},
        {"event": "reported", "at_s": 60.0, "trial": 0, "slot": "gpu0", "began_s": 10.0, "dead_time_s": 1.0},
        {"event": "ended", "at_s": 90.0, "trial": 0},
    ]  # fmt: skip
    file = tmp_path / "timeline.jsonl"
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    (time,) = slot_times(Timeline(file, mend=False))
    assert {part: seconds for part, seconds in time.parts.items() if seconds} == {LOADING: 10.0, UNREPORTED: 80.0}
    assert slot_times(Timeline(tmp_path / "none.jsonl", mend=False)) == [] and set(PARTS) == set(time.parts)


def test_a_clock_of_parts_adds_up_and_hands_out_each_second_once():
    now = [0.0]
    clock = PartClock(clock=lambda: now[0])
    now[0] = 1.0
    with clock.part(TRAIN):
        now[0] = 4.0
        with clock.part(SAVING):
            now[0] = 4.5
        clock.move(TRAIN, RECORDING, 1.0)
    assert clock.take() == {"start": 1.0, TRAIN: 2.0, SAVING: 0.5, RECORDING: 1.0} and clock.take() == {}
    now[0] = 6.0
    assert clock.take() == {"start": 1.5} and clock.seconds("start", TRAIN, SAVING, RECORDING) == 6.0
