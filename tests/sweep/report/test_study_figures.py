"""The figures of the parameters show every COMPLETE trial, in colours that follow the loss."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import plotly.graph_objects as go
import pytest
from plotly.colors import sample_colorscale

from sweep.report.page import Section, render
from sweep.report.study_figures import NOT_SET, ON_WHITE, study_figures
from sweep.space.parse import parse_space
from sweep.trials.record import Outcome, TrialRecord
from tests.support.browser import ask, needs_browser
from tests.support.records import trial

LONG = "a-choice-with-a-name-longer-than-any-axis-has-room-for"
SPACE = parse_space({
    "lora.rank": {"choices": [4, 8, 16]},
    "lora.target_modules": {"choices": {"<b>x</b>": ["q_proj"], LONG: ["v_proj"], "all-linear": "all-linear"}},
    "lora.use_rslora": {"choices": [True, False]},
    "optim.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "data.max_seq_length": {"low": 128, "high": 512, "step": 64},
    "lora.lora_dropout": {"low": 0.0, "high": 0.5, "when": {"lora.use_rslora": [True]}},
})  # fmt: skip


def drawn(losses: list[float], seed: int = 0) -> list[TrialRecord]:
    """Make COMPLETE trials with these losses in SPACE, and others that must not be shown."""
    rng, records = random.Random(seed), []
    for number, loss in enumerate(losses):
        params = {d.path: rng.choice(list(d.points() or (d.low, d.high, (d.low + d.high) / 2))) for d in SPACE.dimensions}
        if not params["lora.use_rslora"]:
            del params["lora.lora_dropout"]
        records.append(replace(trial(number, loss), params=params))
    pruned, nan = trial(90, 0.5, outcome=Outcome.PRUNED), replace(trial(91, float("nan")), params=records[0].params)
    return [*records, pruned, nan]


def lines(figure: go.Figure) -> dict[float, str]:
    """Return the colour of each trial's line, by its loss."""
    return {loss: trace.line.color for trace in figure.data for loss in trace.meta or ()}


def rgb(colour: str) -> tuple[float, ...]:
    return tuple(float(part) / 255 for part in re.findall(r"[\d.]+", colour))


def luminance(colour: str) -> float:
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb(colour)]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


LOSSES = {
    "usual": [2.9, 2.5, 2.7, 2.6, 2.55, 3.1],
    "two": [2.5, 2.6],
    "equal": [2.5, 2.5, 2.5],
    "one far off": [2.5, 2.6, 2.55, 2.7, 2.65, 80.0],
    "many": [2.0 + 0.001 * (i * 37 % 500) for i in range(500)],
}


@pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES)
def test_every_complete_trial_has_a_line_that_can_be_seen_and_the_colours_follow_the_loss(losses):
    figure = study_figures([], drawn(losses), SPACE)["Parallel coordinates"]()
    colours = lines(figure)
    assert sorted(colours) == sorted(set(losses))
    seen = [luminance(colours[loss]) for loss in sorted(colours)]
    assert seen == sorted(seen)
    assert all((1.0 + 0.05) / (value + 0.05) >= 2.0 for value in seen)  # contrast with white
    assert sum(trace.x.count(None) for trace in figure.data[:-1]) == len(losses)  # a gap ends each line
    bar = figure.data[-1].marker
    assert bar.showscale and bar.cmin == min(losses)
    for loss, colour in colours.items():
        share = min(1.0, (loss - bar.cmin) / (bar.cmax - bar.cmin)) if bar.cmax > bar.cmin else 0.0
        expected = rgb(sample_colorscale([list(stop) for stop in bar.colorscale], [share])[0])
        assert max(abs(a - b) for a, b in zip(rgb(colour), expected, strict=True)) < 0.03


def test_a_metric_of_which_more_is_better_is_shown_itself_with_larger_values_above_and_the_best_in_the_same_colour(monkeypatch):
    losses = LOSSES["usual"]
    by_loss = study_figures([], drawn(losses), SPACE)
    of_loss = {name: by_loss[name]() for name in ("Parallel coordinates", "Slices")}
    monkeypatch.setattr(TrialRecord, "chosen_by", property(lambda record: "exact_match"))
    monkeypatch.setattr(TrialRecord, "sign", property(lambda record: -1.0))
    monkeypatch.setattr(TrialRecord, "score", property(lambda record: record.kept.eval_loss))  # so a metric of minus it
    figures = study_figures([], drawn(losses), SPACE)
    parallel, slices = figures["Parallel coordinates"](), figures["Slices"]()
    assert parallel.layout.xaxis.ticktext[0] == "exact_match"
    size = len(parallel.layout.xaxis.ticktext) + 1  # a gap ends each line
    for one, other in zip(parallel.data[:-1], of_loss["Parallel coordinates"].data[:-1], strict=True):
        assert [1.0 - y for y in one.y[::size]] == pytest.approx(other.y[::size]) and one.y[1:size] == other.y[1:size]
    assert lines(parallel) == lines(of_loss["Parallel coordinates"])
    bars = parallel.data[-1].marker, of_loss["Parallel coordinates"].data[-1].marker
    assert (bars[0].cmin, bars[0].cmax) == (-bars[1].cmax, -bars[1].cmin)
    assert [stop[1] for stop in bars[0].colorscale] == [stop[1] for stop in reversed(bars[1].colorscale)]
    texts = [note.text for note in parallel.layout.annotations if note.x == 0]
    assert texts == [f"-{text}".replace("above", "below") for text in
                     (note.text for note in of_loss["Parallel coordinates"].layout.annotations if note.x == 0)]  # fmt: skip
    places = [(note.y, float(note.text.partition(" ")[0])) for note in parallel.layout.annotations if note.x == 0]
    assert sorted(places) == sorted(places, key=lambda place: place[1])  # larger values are above
    assert all(list(trace.y) == [-loss for loss in losses] for trace in slices.data)
    assert list(slices.layout.yaxis.range) == [-end for end in reversed(of_loss["Slices"].layout.yaxis.range)]


def test_the_scale_that_was_used_before_is_told_apart():  # the twin
    assert not all((1.05) / (luminance(c) + 0.05) >= 2.0 for c in sample_colorscale("Blues", [0.0, 0.5, 1.0]))
    assert luminance(ON_WHITE[-1][1]) > luminance(ON_WHITE[0][1])


def test_each_point_of_a_line_lies_at_the_tick_of_its_value():
    records = drawn(LOSSES["usual"])
    figure = study_figures([], records, SPACE)["Parallel coordinates"]()
    axes = list(figure.layout.xaxis.ticktext)
    assert axes == ["eval loss (nats)", "rank", "target_modules", "use_rslora", "learning_rate", "max_seq_length", "lora_dropout"]
    ticks = {(note.x, note.text): note.y for note in figure.layout.annotations}
    by_loss = {record.score: record.params for record in records[:6]}
    for trace in figure.data[:-1]:
        for start, loss in zip(range(0, len(trace.x), len(axes) + 1), trace.meta, strict=True):
            params, places = by_loss[loss], trace.y[start : start + len(axes)]
            assert places[1] == ticks[1, str(params["lora.rank"])]
            assert places[3] == ticks[3, str(params["lora.use_rslora"])]
            assert (places[6] == 0.0 == ticks[6, NOT_SET]) is ("lora.lora_dropout" not in params)


def test_slices_show_each_complete_trial_at_its_loss_over_every_parameter():
    figure = study_figures([], drawn(LOSSES["usual"]), SPACE)["Slices"]()
    assert len(figure.data) == 6  # two rows
    assert all(list(trace.y) == LOSSES["usual"] and list(trace.marker.color) == [*range(6)] for trace in figure.data)


def test_names_and_choices_are_text():
    figures = study_figures([], drawn(LOSSES["usual"]), SPACE)
    for title in ("Parallel coordinates", "Slices"):
        text = figures[title]().to_json()
        assert "<b>" not in text and "&lt;b&gt;x" in text


STROKES = """
const box = document.querySelector('.plotly-graph-div').getBoundingClientRect();
return [...document.querySelectorAll('.scatterlayer .js-line')].map(line => {
  const at = line.getBoundingClientRect(), style = getComputedStyle(line);
  return {stroke: style.stroke, width: parseFloat(style.strokeWidth), opacity: parseFloat(style.opacity), wide: at.width,
          inside: at.left >= box.left && at.right <= box.right && at.top >= box.top && at.bottom <= box.bottom};
})"""


@needs_browser
def test_a_browser_draws_every_line_visibly_inside_its_figure_in_the_order_of_the_losses(tmp_path):
    figure = study_figures([], drawn(LOSSES["usual"]), SPACE)["Parallel coordinates"]()
    strokes = ask(render("t", [], [Section("Parallel coordinates", figure)], "{}"), STROKES, tmp_path)
    assert len(strokes) == 6
    assert all(s["width"] >= 1.5 and s["opacity"] > 0.8 and s["wide"] > 500 and s["inside"] for s in strokes)
    seen = [luminance(stroke["stroke"]) for stroke in strokes]  # the worst is drawn first
    assert seen == sorted(seen, reverse=True) and len(set(seen)) == 6
    assert all(1.05 / (value + 0.05) >= 2.0 for value in seen)


@needs_browser
def test_no_button_of_a_figure_sends_it_anywhere(tmp_path):
    figure = study_figures([], drawn(LOSSES["usual"]), SPACE)["Parallel coordinates"]()
    titles = "return [...document.querySelectorAll('.modebar-btn')].map((button) => button.dataset.title)"
    shown = ask(render("t", [], [Section("Parallel coordinates", figure)], "{}"), titles, tmp_path)
    assert "Download plot as a PNG" in shown and not any("Share" in title or "Cloud" in title for title in shown)
