"""Say what each slot's time went to, from the events in `timeline.jsonl`.

A slot's time is that of the sessions in which it was there. It is held by trials, whose workers say
what they did (see timeline.Span), or it is idle.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from engine.trial_report import ATTACH, DATA, EVALUATION, MODEL, RECORDING, SAVING, START, TRAIN, WAITING
from sweep.folder.timeline import UNREPORTED, Session, Span, Timeline

LOADING = "load"
SHOWN = {TRAIN: TRAIN, RECORDING: RECORDING, EVALUATION: EVALUATION, SAVING: SAVING, LOADING: LOADING, WAITING: WAITING,
         UNREPORTED: UNREPORTED, START: LOADING, MODEL: LOADING, DATA: LOADING, ATTACH: LOADING}  # fmt: skip
"""From each part that a worker measures to the one that it is shown as."""
PARTS = {
    TRAIN: "steady training",
    RECORDING: "recording and compiling",
    EVALUATION: "evaluation",
    SAVING: "saving",
    LOADING: "starting and loading",
    WAITING: "idle",
    UNREPORTED: "not reported",
}
"""The parts that a slot's time is split into, with the words for them, in the order of a bar."""


@dataclass(frozen=True)
class SlotTime:
    """Hold what one slot's time went to. names: what workers called it, the newest last.

    parts: seconds by part of PARTS. They add up to the slot's time.
    """

    names: tuple[str, ...]
    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass
class _Lane:
    """One slot while it is put together. In one session, its stays do not overlap."""

    names: list[str] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    ended_s: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def add(self, part: str, seconds: float) -> None:
        self.parts[SHOWN.get(part, UNREPORTED)] += seconds


def slot_times(timeline: Timeline) -> list[SlotTime]:
    """Return each slot's time up to the newest event, over all sessions.

    A slot is known by its card. On a CPU it is known by its process, whose name changes when it
    dies: then the new process takes a slot that is free.
    """
    lanes: list[_Lane] = []
    for number, session in enumerate(timeline.sessions):
        spans = sorted(
            (span for span in timeline.spans if span.session == number), key=lambda span: (span.assigned_s, span.ended_s)
        )
        for own, lane in _matched(_apart(spans, max(session.num_slots or 1, _most_at_once(spans))), lanes):
            _account(own, lane, session)
    times = [SlotTime(tuple(lane.names), {part: max(seconds, 0.0) for part, seconds in lane.parts.items()}) for lane in lanes]
    return sorted(times, key=lambda time: (not time.names, time.names[-1:]))


def shown_parts(measured: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds by part of PARTS from those that workers measured."""
    sums = dict.fromkeys(PARTS, 0.0)
    for part, seconds in measured.items():
        sums[SHOWN.get(part, UNREPORTED)] += seconds
    return sums


def totals(times: Iterable[SlotTime]) -> dict[str, float]:
    """Return the seconds by part of PARTS, over all slots."""
    sums = dict.fromkeys(PARTS, 0.0)
    for time in times:
        for part, seconds in time.parts.items():
            sums[part] += seconds
    return sums


def steady_share(parts: Mapping[str, float]) -> float | None:
    """Return the share of steady training, from 0 to 1, or None if no one told what was done: an older version, or one killed."""
    known = sum(seconds for part, seconds in parts.items() if part not in (WAITING, UNREPORTED))
    is_split = known > 0.0 or parts[WAITING] > 0.0 == parts[UNREPORTED]  # an idle slot trained for none of its time
    return parts[TRAIN] / sum(parts.values()) if is_split else None


def steady_share_with_eval(parts: Mapping[str, float]) -> float | None:
    """Return the share of steady training and evaluation together, recorded or not, or None as steady_share does."""
    share = steady_share(parts)
    return None if share is None else share + parts[EVALUATION] / sum(parts.values())


def both_shares(parts: Mapping[str, float]) -> str:
    """Return both shares in a few words. Empty where steady_share is None."""
    share, both = steady_share(parts), steady_share_with_eval(parts)
    return "" if share is None else f"{100.0 * share:.1f} % steady, {100.0 * both:.1f} % with evaluation"


def shares_text(parts: Mapping[str, float]) -> str:
    """Return the parts in words: 61.2 % steady training, 9.0 % evaluation. What rounds to 0 is left out."""
    whole = sum(parts.values())
    shares = {words: f"{100.0 * parts[part] / whole:.1f}" for part, words in PARTS.items()}
    return ", ".join(f"{share} % {words}" for words, share in shares.items() if float(share) > 0.0)


def _apart(spans: Sequence[Span], num_slots: int) -> list[_Lane]:
    """Put the stays of a session, in the order of their starts, on its lanes.

    Stays of one name belong together. A stay without a name, whose worker died before it reported,
    goes where it fits. If no such order is found, the stays go where they fit, whatever their names.
    """
    groups: dict[object, list[Span]] = {}
    for span in spans:
        groups.setdefault(span.slot or (span.slot, len(groups)), []).append(span)
    named = sorted(groups.values(), key=lambda group: (group[0].slot is None, group[0].assigned_s))
    for order in (named, [[span] for span in spans]):
        lanes = [_Lane() for _ in range(num_slots)]
        if all(_placed(group, lanes) for group in order):
            return lanes
    raise AssertionError("stays in the order of their starts fit as many lanes as overlap at once")


def _most_at_once(spans: Sequence[Span]) -> int:
    """Return how many stays overlap at most."""
    ends: list[float] = []
    most = 0
    for span in spans:
        while ends and ends[0] <= span.assigned_s:
            heapq.heappop(ends)
        heapq.heappush(ends, span.ended_s)
        most = max(most, len(ends))
    return most


def _placed(group: Sequence[Span], lanes: Sequence[_Lane]) -> bool:
    """Put stays on an empty lane, else on the first on which they overlap with no other."""
    for lane in sorted(lanes, key=lambda lane: bool(lane.spans)):
        is_after = group[0].assigned_s >= lane.ended_s
        if is_after or not any(_overlap(span, other) for span in group for other in lane.spans):
            lane.spans += group
            lane.ended_s = max(lane.ended_s, *(span.ended_s for span in group), 0.0)
            for span in group:
                _name(lane, span.slot)
            return True
    return False


def _overlap(one: Span, other: Span) -> bool:
    return one.assigned_s < other.ended_s and other.assigned_s < one.ended_s


def _matched(own: Sequence[_Lane], known: list[_Lane]) -> list[tuple[_Lane, _Lane]]:
    """Pair a session's lanes with those of the sessions before: by name, then in order, then new."""
    free, pairs = list(known), []
    for lane in own:
        same = next((other for other in free if set(other.names) & set(lane.names)), None)
        if same is not None:
            free.remove(same)
            pairs.append((lane, same))
    paired = {id(lane) for lane, _ in pairs}
    for lane in own:
        if id(lane) not in paired:
            if not free:
                known.append(_Lane())
                free = known[-1:]
            pairs.append((lane, free.pop(0)))
    return pairs


def _account(own: _Lane, lane: _Lane, session: Session) -> None:
    """Add a session's lane to a slot: what its stays did, and the time without a trial."""
    for name in own.names:
        _name(lane, name)
    held_s = 0.0
    for span in own.spans:
        held_s += span.ended_s - span.assigned_s
        for part, seconds in span.parts.items():
            lane.add(part, seconds)
    lane.add(WAITING, session.ended_s - session.began_s - held_s)


def _name(lane: _Lane, name: str | None) -> None:
    """Note a name of the lane, the newest last."""
    if name is not None:
        lane.names[:] = [*(known for known in lane.names if known != name), name]
