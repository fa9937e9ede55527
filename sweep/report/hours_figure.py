"""Draw where a sweep's hours went: one bar for each slot, split into what was done."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from engine.trial_report import EVALUATION, RECORDING, SAVING, TRAIN, WAITING
from engine.units import counted
from sweep.folder.slot_times import (
    LOADING,
    PARTS,
    UNREPORTED,
    SlotTime,
    both_shares,
    shares_text,
    steady_share,
    steady_share_with_eval,
    totals,
)
from sweep.report.figures import UNITS, Drawn
from sweep.text import duration_text

COLOURS = {
    TRAIN: "#1b9e77",
    RECORDING: "#e6ab02",
    EVALUATION: "#2166ac",
    SAVING: "#7b3294",
    LOADING: "#d95f02",
    WAITING: "#c9c9c9",
    UNREPORTED: "#b2182b",
}
LEAST_SHARE = 0.0005  # less is 0.0 %, and no bar shows it
FEWEST_PERCENT = 3.0  # less is too narrow for its number


def where_hours_went(times: Sequence[SlotTime]) -> Drawn:
    """Draw one stacked bar for each slot. Its parts add up to the time for which the slot was there."""
    longest_s = max((time.seconds for time in times), default=0.0)
    if not longest_s:
        return "no slot has been held yet"
    whole_s = sum(time.seconds for time in times)
    scale, unit = next((scale, unit) for limit, scale, unit in UNITS if longest_s < limit)
    names = [f"{_name(number, time)}<br>{_steady(time)}" for number, time in enumerate(times, 1)]
    figure = go.Figure()
    for part, words in PARTS.items():
        seconds = [time.parts[part] for time in times]
        if sum(seconds) > LEAST_SHARE * whole_s:
            figure.add_trace(
                go.Bar(
                    y=names, x=[each / scale for each in seconds], name=words, orientation="h",
                    text=[_number(each, time) for each, time in zip(seconds, times)], textposition="inside",
                    insidetextanchor="middle", textangle=0, marker={"color": COLOURS[part]},
                    hovertemplate=f"{words}: %{{x:.3g}} {unit}<extra>%{{y}}</extra>",
                )
            )  # fmt: skip
    figure.update_layout(barmode="stack", bargap=0.3, xaxis_title=f"{unit} of the slot", legend_traceorder="normal")
    figure.update_layout(uniformtext={"minsize": 10, "mode": "hide"})
    figure.update_yaxes(autorange="reversed", type="category", automargin=True, ticks="outside", ticklen=6, tickcolor="white")
    return figure


def hours_line(times: Sequence[SlotTime]) -> str:
    """Say the same of all slots together, in one line."""
    parts = totals(times)
    if not sum(parts.values()):
        return ""
    both = both_shares(parts)
    split = f" So {both}." if both else " No process told what it did: it was killed, or of an older version."
    return (
        f"{counted(len(times), 'slot')}, {duration_text(sum(parts.values()))} together: {shares_text(parts)}.{split} "
        "Not reported: what a process did that died before its next report. Preparation before the first trial and the "
        "evaluation after the last are not counted."
    )


def hours_height(times: Sequence[SlotTime]) -> int:
    return 170 + 54 * len(times)


def _name(number: int, time: SlotTime) -> str:
    """Name a slot by its card. Processes come and go, so several make a number."""
    if len(time.names) == 1:
        return escape(time.names[0])
    return f"slot {number}" + (f" ({len(time.names)} processes)" if time.names else "")


def _steady(time: SlotTime) -> str:
    share, both = steady_share(time.parts), steady_share_with_eval(time.parts)
    return "not split" if share is None else f"{100.0 * share:.0f} % steady, {100.0 * both:.0f} % with eval"


def _number(seconds: float, time: SlotTime) -> str:
    percent = 100.0 * seconds / time.seconds if time.seconds else 0.0
    return f"{percent:.0f} %" if percent >= FEWEST_PERCENT else ""
