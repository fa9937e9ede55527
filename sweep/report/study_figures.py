"""Draw what the COMPLETE trials say of the parameters: importance, parallel coordinates, slices.

The figures are drawn from the sweep's own records, so that no version of Optuna changes what they
show. Optuna only computes the importances. Names and values are escaped, so a tag in them stays
text.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from engine.errors import first_line
from sweep.report.chart_data import IMPORTANCE, PARALLEL, SLICES, usual_range
from sweep.report.figures import Drawn, hover
from sweep.space.space import Choice, Dimension, Space
from sweep.text import short_name
from sweep.trials.objectives import EVAL_LOSS
from sweep.trials.record import Outcome, TrialRecord

MIN_COMPLETE = 2
NUM_COLUMNS = 5  # slices side by side
MANY = 8  # from so many axes on, their names are written aslant
NUM_COLOURS = 64  # one trace for each, so that thousands of trials stay fast
NOT_SET = "not set"
Scale = list[list[float | str]]
# low is dark, and the other end is cut off before it gets too pale to see on white
ON_WHITE: Scale = [[i / 20, sample_colorscale("Plasma", [0.72 * i / 20])[0]] for i in range(21)]
# on a dark page low is bright, and the other end is cut off before it gets too dark to see
ON_BLACK: Scale = [[i / 20, sample_colorscale("Plasma", [1.0 - 0.72 * i / 20])[0]] for i in range(21)]


@dataclass(frozen=True)
class Axis:
    """Place the values of one parameter between 0 and 1. ticks: places and their escaped texts."""

    name: str
    places: dict[int, float]
    ticks: list[tuple[float, str]]


def study_figures(
    trials: Sequence[FrozenTrial], records: Sequence[TrialRecord], space: Space, scale: Scale = ON_WHITE
) -> dict[str, Callable[[], Drawn]]:
    """Return what draws each figure, by title; a str in place of a figure says why there is none.

    scale: the colours of losses, low to high.
    """
    complete = [r for r in records if r.outcome is Outcome.COMPLETE and r.score is not None and math.isfinite(r.score)]
    complete = [r for r in complete if r.warm is None]  # its loss is its parent's as much as its parameters'
    varied = [d for d in space.dimensions if len({str(record.params.get(d.path)) for record in complete}) > 1]
    makers = {
        IMPORTANCE: (2, lambda: _importance(trials, complete, varied)),
        PARALLEL: (1, lambda: _parallel(complete, varied, scale)),
        SLICES: (1, lambda: _slices(complete, varied, scale)),
    }
    return {title: partial(_drawn, complete, varied, *makers[title]) for title in makers}


def _drawn(complete: list[TrialRecord], varied: list[Dimension], least: int, make: Callable[[], Drawn]) -> Drawn:
    return _lacking(complete, varied, least) or make()


def _lacking(complete: list[TrialRecord], varied: list[Dimension], least: int) -> str | None:
    if len(complete) < MIN_COMPLETE:
        return f"needs {MIN_COMPLETE} COMPLETE trials, there {'is' if len(complete) == 1 else 'are'} {len(complete)}"
    if len(varied) < least:
        many = "1 parameter differs" if len(varied) == 1 else f"{len(varied)} parameters differ"
        return f"needs {least} parameters that differ between COMPLETE trials; {many}"
    return None


def _importance(trials: Sequence[FrozenTrial], complete: list[TrialRecord], varied: list[Dimension]) -> Drawn:
    """Draw each parameter's share of the differences in loss, as Optuna estimates it."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    scores = {record.number: record.score for record in complete}
    study = optuna.create_study()
    for trial in trials:
        if trial.number in scores:
            study.add_trial(
                optuna.trial.create_trial(
                    state=TrialState.COMPLETE, value=scores[trial.number], params=trial.params, distributions=trial.distributions
                )
            )
    always = [d.path for d in varied if all(d.path in record.params for record in complete)]
    if len(always) < 2:
        return "needs 2 parameters that every COMPLETE trial has"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna warns about experimental features
            found = optuna.importance.get_param_importances(study, params=always)
    except Exception as error:  # a missing figure must not cost the whole report
        return f"Optuna could not compute it ({first_line(error)})"
    names = _names(varied)
    shares = sorted(((share, names[path]) for path, share in found.items()), reverse=True)
    figure = go.Figure(
        go.Bar(
            x=[share for share, _ in shares], y=[name for _, name in shares], orientation="h", marker={"color": "#2166ac"},
            text=[f"{share:.2f}" for share, _ in shares], hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(xaxis_title=f"share of the differences in {_label(complete)}", xaxis_rangemode="tozero")
    return figure.update_yaxes(autorange="reversed", type="category", automargin=True)


def _parallel(complete: list[TrialRecord], varied: list[Dimension], scale: Scale) -> go.Figure:
    """Draw one line per trial through all axes, the loss first, in the colour of its loss."""
    axes = [_loss_axis(complete), *(_axis(dimension, name, complete) for dimension, name in _named(varied))]
    low, high = _limits(complete)
    groups: dict[int, list[TrialRecord]] = {}
    for record in sorted(complete, key=lambda record: record.score, reverse=True):  # the best on top
        groups.setdefault(round(NUM_COLOURS * _share(record.score, low, high)), []).append(record)
    figure = go.Figure()
    for step, ours in groups.items():
        colour = sample_colorscale(scale, [step / NUM_COLOURS])[0]
        x, y, texts = [], [], []
        for record in ours:
            x += [*range(len(axes)), None]
            y += [*(axis.places[record.number] for axis in axes), None]
            texts += [f"{hover(record)}<br>{_label(complete)} {_shown(record):.4f}"] * (len(axes) + 1)
        figure.add_trace(
            go.Scatter(
                x=x, y=y, text=texts, mode="lines+markers", line={"color": colour, "width": 2}, marker={"size": 6},
                showlegend=False, hovertemplate="%{text}<extra></extra>", meta=[record.score for record in ours],
            )
        )  # fmt: skip
    figure.add_trace(_colour_bar(low, high, scale, complete))
    _draw_axes(figure, axes)
    return figure


def _label(complete: Sequence[TrialRecord]) -> str:
    """Return what the trials are compared by: the eval loss, or a metric."""
    return "eval loss (nats)" if complete[0].chosen_by == EVAL_LOSS else complete[0].chosen_by


def _shown(record: TrialRecord) -> float:
    """Return the loss or metric itself. A score is its negative where larger is better."""
    return record.sign * record.score


def _colour_bar(low: float, high: float, scale: Scale, complete: Sequence[TrialRecord]) -> go.Scatter:
    """Return an empty trace that carries the colour bar of the lines. low, high: of the scores."""
    if complete[0].sign < 0:
        low, high, scale = -high, -low, [[1.0 - at, colour] for at, colour in reversed(scale)]
    bar = {"colorscale": scale, "showscale": True, "colorbar": {"title": _label(complete)}}
    marker = {"color": [low], "cmin": low, "cmax": high, **bar}
    return go.Scatter(x=[None], y=[None], mode="markers", marker=marker, showlegend=False, hoverinfo="skip")


def _draw_axes(figure: go.Figure, axes: list[Axis]) -> None:
    for place, axis in enumerate(axes):
        figure.add_shape(type="line", x0=place, x1=place, y0=0, y1=1, line={"color": "#999999", "width": 1}, layer="below")
        for at, text in axis.ticks:
            figure.add_annotation(
                x=place, y=at, text=text, showarrow=False, xanchor="right", xshift=-6, font={"size": 11},
                bgcolor="rgba(255,255,255,0.75)",
            )  # fmt: skip
    ticks = {"tickvals": list(range(len(axes))), "ticktext": [axis.name for axis in axes]}
    ticks |= {"tickangle": -20} if len(axes) >= MANY else {}
    figure.update_xaxes(**ticks, range=[-0.35, len(axes) - 0.8], side="top", showgrid=False, zeroline=False, fixedrange=True)
    figure.update_yaxes(visible=False, range=[-0.06, 1.06], fixedrange=True)
    figure.update_layout(hovermode="closest")


def _slices(complete: list[TrialRecord], varied: list[Dimension], scale: Scale) -> go.Figure:
    """Draw the loss against each parameter alone. The later the trial, the paler."""
    rows, columns = math.ceil(len(varied) / NUM_COLUMNS), min(NUM_COLUMNS, len(varied))
    figure = make_subplots(rows, columns, shared_yaxes=True, horizontal_spacing=0.15 / columns, vertical_spacing=0.25 / rows)
    numbers = [record.number for record in complete]
    for i, (dimension, name) in enumerate(_named(varied)):
        row, column = i // NUM_COLUMNS + 1, i % NUM_COLUMNS + 1
        axis = _axis(dimension, name, complete)
        marker = {"color": numbers, "cmin": min(numbers), "cmax": max(numbers), "colorscale": scale, "size": 9}
        marker |= {"line": {"color": "white", "width": 1}, "showscale": i == 0, "colorbar": {"title": "trial"}}
        figure.add_trace(
            go.Scatter(
                x=[axis.places[record.number] for record in complete], y=[_shown(record) for record in complete], mode="markers",
                text=[hover(record) for record in complete], marker=marker, showlegend=False,
                hovertemplate=f"%{{text}}<br>{_label(complete)} %{{y:.4f}}<extra></extra>",
            ), row, column,
        )  # fmt: skip
        ticks = {"tickvals": [at for at, _ in axis.ticks], "ticktext": [text for _, text in axis.ticks]}
        figure.update_xaxes(title=name, **ticks, range=[-0.1, 1.1], row=row, col=column)
    figure.update_yaxes(title=_label(complete), col=1).update_layout(height=150 + 350 * rows)
    ends = usual_range([record.score for record in complete])
    return figure.update_yaxes(range=ends and sorted(complete[0].sign * end for end in ends))


def _named(varied: list[Dimension]) -> list[tuple[Dimension, str]]:
    names = _names(varied)
    return [(dimension, names[dimension.path]) for dimension in varied]


def _names(varied: list[Dimension]) -> dict[str, str]:
    """Return an escaped name for each path: the end that the terminal shows if unique, else the whole path."""
    ends = {dimension.path: short_name(dimension.path) for dimension in varied}
    count = Counter(ends.values())
    return {path: escape(end if count[end] == 1 else path) for path, end in ends.items()}


def _loss_axis(complete: list[TrialRecord]) -> Axis:
    """Return the axis of what decides, low values at the bottom: the best is there for a loss, at the top for a metric."""
    low, high = _limits(complete)
    sign = complete[0].sign
    beyond = f" and {'above' if sign > 0 else 'below'}" if any(record.score > high for record in complete) else ""

    def place(share: float) -> float:
        return share if sign > 0 else 1.0 - share

    places = {record.number: place(_share(record.score, low, high)) for record in complete}
    values = {share: sign * (low + share * (high - low)) + 0.0 for share in (0.0, 0.25, 0.5, 0.75, 1.0)}  # no -0.0000
    ticks = [(place(share), f"{value:.4f}{beyond if share == 1.0 else ''}") for share, value in values.items()]
    return Axis(_label(complete), places, ticks if high > low else [(place(0.0), f"{sign * low + 0.0:.4f}")])


def _axis(dimension: Dimension, name: str, complete: list[TrialRecord]) -> Axis:
    """Return the axis of a parameter. A trial that does not have it lies at a tick of its own."""
    values = {record.number: record.params.get(dimension.path, _LACKS) for record in complete}
    lacks = any(value is _LACKS for value in values.values())
    known = [value for value in values.values() if value is not _LACKS]
    bottom = 0.12 if lacks else 0.0
    if isinstance(dimension, Choice):
        order = [value for value in dimension.values if value in known]
        share = {value: i / max(1, len(order) - 1) for i, value in enumerate(order)}
        ticks = [(share[value], _text(value)) for value in order]
        places = {number: share.get(value, 0.0) for number, value in values.items()}
    else:
        scale = math.log if dimension.log else float
        low, high = scale(min(known)), scale(max(known))
        places = {n: 0.0 if value is _LACKS else _share(scale(value), low, high) for n, value in values.items()}
        ticks = [(i / 4, low + i / 4 * (high - low)) for i in range(5)] if high > low else [(0.0, low)]
        ticks = [(at, f"{math.exp(value) if dimension.log else value:.3g}") for at, value in ticks]
    placed = {n: 0.0 if values[n] is _LACKS else bottom + (1.0 - bottom) * place for n, place in places.items()}
    moved = [(bottom + (1.0 - bottom) * at, text) for at, text in ticks]
    return Axis(name, placed, [*([(0.0, NOT_SET)] if lacks else []), *moved])


_LACKS = object()


def _limits(complete: Iterable[TrialRecord]) -> tuple[float, float]:
    """Return the losses at both ends of the colours. A few trials far above share one end."""
    losses = [record.score for record in complete]
    usual = usual_range(losses, margin=0.0)
    return (min(losses), max(losses)) if usual is None else (usual[0], usual[1])


def _share(value: float, low: float, high: float) -> float:
    return min(1.0, (value - low) / (high - low)) if high > low else 0.0


def _text(value: Any, limit: int = 24) -> str:
    """Return a choice as an escaped label: an axis has little room for a long name."""
    text = str(value)
    return escape(text if len(text) <= limit else f"{text[: limit - 1]}…")
