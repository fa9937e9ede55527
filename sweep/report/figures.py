"""Draw the report's figures of the sweep's measurements.

Each function takes plain records and returns a plotly figure, or a str that says why there is none.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sweep.folder.timeline import Span
from sweep.report.chart_data import COLOURS, metric_curve, usual_range
from sweep.trials.objectives import EVAL_LOSS, objective_values, pareto_front
from sweep.trials.record import Outcome, TrialRecord

FADED = (Outcome.PRUNED, Outcome.INFEASIBLE)
BEST = "#e6a700"
DEAD = "#222222"
FRONT = ("eval_loss", "peak_allocated_gib", "elapsed_s")
UNITS = ((300.0, 1.0, "seconds"), (18_000.0, 60.0, "minutes"), (math.inf, 3600.0, "hours"))
Drawn = go.Figure | str


def hover(record: TrialRecord) -> str:
    """Return the text that appears under the mouse for a trial.

    Names and values are escaped, so a tag in them stays text.
    """
    params = (f"{escape(path)} = {escape(str(value))}" for path, value in record.params.items())
    return "<br>".join([f"trial {record.number} {record.outcome}{record.warm_text}", *params])


def learning_curves(records: list[TrialRecord], best: TrialRecord | None, measure: str = EVAL_LOSS) -> Drawn:
    """Draw one line per trial and one trace per outcome. measure: eval_loss or a metric.

    A trace for each trial would make thousands of trials slow. Gaps separate the lines of a trace.
    """
    if not any(record.reports for record in records):
        return "no trial has reported yet"
    figure, is_loss = go.Figure(), measure == EVAL_LOSS
    label = "eval loss" if is_loss else escape(measure)
    for outcome, ours in _by_outcome([record for record in records if record.reports]):
        style = {"line": {"color": COLOURS[outcome], "width": 1.6}, "opacity": 0.5 if outcome in FADED else 0.9}
        figure.add_trace(_curves([r for r in ours if r is not best], outcome, measure, label, style))
    if best is not None:
        figure.add_trace(_curves([best], f"best: trial {best.number}", measure, label, {"line": {"color": BEST, "width": 3.5}}))
    figure.update_layout(xaxis_title="tokens seen", yaxis_title=f"{label} ({records[0].loss_unit})" if is_loss else label)
    losses = [report.eval_loss for record in records for report in record.reports]
    figure.update_xaxes(rangemode="tozero", tickformat=",d")
    figure.update_yaxes(range=usual_range(losses) if is_loss else None)
    return figure


def _curves(records: list[TrialRecord], name: str, measure: str, label: str, style: dict[str, Any]) -> go.Scatter:
    tokens: list[int | None] = []
    values: list[float | None] = []
    texts: list[str] = []
    for record in records:
        points = metric_curve(record, measure)
        tokens += [at for at, _ in points] + [None]
        values += [value for _, value in points] + [None]
        texts += [hover(record)] * (len(points) + 1)
    return go.Scatter(
        x=tokens, y=values, text=texts, name=name, mode="lines+markers", marker={"size": 5}, **style,
        hovertemplate=f"%{{text}}<br>%{{x:,}} tokens, {label} %{{y:.4f}}<extra></extra>",
    )  # fmt: skip


def pareto(records: list[TrialRecord]) -> Drawn:
    """Plot loss against memory and against time.

    Stars mark the COMPLETE trials that no other trial beats in all three.
    """
    measured = [record for record in records if objective_values(record, FRONT) is not None and record.source is None]
    if not measured:
        return "no trial has measured loss, memory and time yet"
    front = pareto_front(measured, FRONT)
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.04)
    groups = [(outcome.value, ours, COLOURS[outcome], "circle", 9) for outcome, ours in _by_outcome(measured)]
    for name, ours, colour, symbol, size in [*groups, ("Pareto front", front, BEST, "star", 15)]:
        losses, memory, seconds = zip(*(objective_values(record, FRONT) for record in ours)) if ours else ((), (), ())
        opacity = 0.4 if name in FADED else 0.95
        for column, values in ((1, memory), (2, seconds)):
            figure.add_trace(
                go.Scatter(
                    x=values, y=losses, text=[hover(r) for r in ours], name=name, legendgroup=name, mode="markers",
                    showlegend=column == 1, opacity=opacity, marker={"color": colour, "symbol": symbol, "size": size},
                    hovertemplate="%{text}<br>%{x:,.4g}, eval loss %{y:.4f}<extra></extra>",
                ), 1, column,
            )  # fmt: skip
    figure.update_xaxes(title="peak allocated GiB", row=1, col=1)
    figure.update_xaxes(title="seconds in optimizer steps", row=1, col=2)
    figure.update_yaxes(title="eval loss (nats)", row=1, col=1)
    figure.update_yaxes(range=usual_range([record.eval_loss or 0.0 for record in measured]))
    return figure


def memory(records: list[TrialRecord]) -> Drawn:
    """Plot the predicted against the measured peak.

    A prediction on the line is exact; one below it is on the safe side.
    """
    known = [record for record in records if None not in (record.predicted_peak_gib, record.peak_allocated_gib)]
    if not known:
        return "no trial has both a predicted and a measured peak (on a CPU, none is predicted)"
    figure = go.Figure()
    for outcome, ours in _by_outcome(known):
        figure.add_trace(
            go.Scatter(
                x=[r.predicted_peak_gib for r in ours], y=[r.peak_allocated_gib for r in ours], text=[hover(r) for r in ours],
                name=outcome, mode="markers", marker={"color": COLOURS[outcome], "size": 9},
                hovertemplate="%{text}<br>predicted %{x:.2f} GiB, measured %{y:.2f} GiB<extra></extra>",
            )
        )  # fmt: skip
    top = max(max(record.predicted_peak_gib, record.peak_allocated_gib) for record in known)
    exact = {"color": "#999999", "dash": "dash"}
    figure.add_trace(go.Scatter(x=[0, top], y=[0, top], name="predicted = measured", mode="lines", line=exact))
    figure.update_layout(xaxis_title="predicted peak GiB", yaxis_title="measured peak GiB")
    return figure


def slots(records: list[TrialRecord], spans: list[Span]) -> Drawn:
    """Draw which trial ran in which slot, and the dead time between two trials of a slot."""
    if not spans:
        return "no trial has held a slot yet"
    start_s = min(span.assigned_s for span in spans)
    length_s = max(span.ended_s or span.assigned_s for span in spans) - start_s
    scale, unit = next((scale, unit) for limit, scale, unit in UNITS if length_s < limit)
    by_number = {record.number: record for record in records}
    shown = [(span, by_number[span.trial]) for span in spans if span.trial in by_number]
    figure = go.Figure()
    for outcome in Outcome:
        ours = [(span, record) for span, record in shown if record.outcome is outcome]
        bars = [(span, _begin(span), (span.ended_s or span.assigned_s) - _begin(span), hover(record)) for span, record in ours]
        if bars:
            figure.add_trace(_bars(bars, outcome, COLOURS[outcome], start_s, scale, unit))
    dead = [
        (span, _begin(span), span.dead_time_s, f"dead time before the first step of trial {span.trial}")
        for span, _ in shown
        if span.dead_time_s is not None
    ]
    if dead:
        figure.add_trace(_bars(dead, "dead time", DEAD, start_s, scale, unit))
    figure.update_layout(barmode="overlay", xaxis_title=f"{unit} since the first trial", bargap=0.25)
    figure.update_yaxes(autorange="reversed", type="category")
    return figure


def dead_time_line(spans: list[Span]) -> str:
    """Sum up the dead time, which the figure of the slots shows only as slivers."""
    dead = [span.dead_time_s for span in spans if span.dead_time_s is not None]
    held = sum(span.ended_s - span.assigned_s for span in spans if span.ended_s is not None)
    if not dead or not held:
        return ""
    share = 100.0 * sum(dead) / held
    return (
        f"Dead time between two trials of a slot: median {statistics.median(dead):.2f} s, at most {max(dead):.2f} s, in all "
        f"{sum(dead):.1f} s, {share:.1f} % of the {held:,.0f} s for which slots were held."
    )


def _begin(span: Span) -> float:
    return span.assigned_s if span.began_s is None else span.began_s


def _bars(bars: list[tuple[Span, float, float, str]], name: str, colour: str, start_s: float, scale: float, unit: str) -> go.Bar:
    """Draw bars. bars: span, begin and length in seconds, hover text."""
    return go.Bar(
        y=[escape(span.slot or "slot not reported") for span, *_ in bars],
        x=[length / scale for _, _, length, _ in bars],
        base=[(begin - start_s) / scale for _, begin, _, _ in bars],
        text=[str(span.trial) if name != "dead time" else "" for span, *_ in bars],
        textposition="inside", insidetextanchor="middle", name=name, orientation="h",
        marker={"color": colour, "line": {"color": "white", "width": 0 if name == "dead time" else 1}},
        customdata=[[text] for *_, text in bars],
        hovertemplate="%{customdata[0]}<br>%{x:.3g} " + unit + " from %{base:.3g}<extra></extra>",
    )  # fmt: skip


def _by_outcome(records: Sequence[TrialRecord]) -> list[tuple[Outcome, list[TrialRecord]]]:
    """Group records by outcome, worst outcome first, so that good trials are drawn on top."""
    groups = [(outcome, [r for r in records if r.outcome is outcome]) for outcome in reversed(Outcome)]
    return [(outcome, ours) for outcome, ours in groups if ours]
