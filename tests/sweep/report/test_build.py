"""The report needs only the folder, in any state. Data stays text. A failure spares the sweep."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser

import pytest
from plotly.offline import get_plotlyjs

from engine.errors import InputError
from sweep.folder.slot_times import slot_times
from sweep.folder.sweep_folder import SweepFolder
from sweep.folder.timeline import Timeline
from sweep.report import build as report
from sweep.report import page as report_page
from sweep.report.__main__ import main
from sweep.report.figures import dead_time_line
from sweep.report.hours_figure import hours_line, where_hours_went
from sweep.trials.record import Outcome
from tests.support.reports import make_account
from tests.support.swept import SPACE, TAG, swept


class Elements(HTMLParser):
    """Collects a page's elements, and the attributes through which a page loads something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.loads: list[str] = []
        self.feed(page.replace(get_plotlyjs(), "plotly.js"))

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.loads += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "data", "action", "srcset")]


def page_of(folder: SweepFolder) -> str:
    return report.write_report(folder).read_text()


def test_a_sweep_is_one_page_with_every_figure_and_plotly_once_and_nothing_to_load(tmp_path):
    page = page_of(swept(tmp_path))
    assert page.count(get_plotlyjs()) == 1
    elements = Elements(page)
    assert elements.loads == [] and "default-src 'none'" in page
    shown = page.replace(get_plotlyjs(), "")
    # all figures: curves, three of the parameters, Pareto, memory, where the hours went, slots
    assert shown.count("Plotly.newPlot(") == 8
    assert shown.count("Not shown: ") == 1 and "Not shown: the end of a sweep generates them" in shown
    assert "7 trials of 16 asked for: 1 RUNNING, 3 COMPLETE, 1 PRUNED, 1 DIVERGED, 1 FAILED." in shown
    assert "median 0.50 s, at most 0.50 s, in all 3.0 s" in shown
    assert len(page) < 5_500_000


def test_where_a_metric_decides_the_curves_show_it_and_the_loss_beside_it(tmp_path):
    page = page_of(swept(tmp_path, metric="exact_match")).replace(get_plotlyjs(), "")
    assert page.count("Plotly.newPlot(") == 9 and page.index("<h2>Learning curves") < page.index(f"<h2>{report.LOSSES}")
    curves = page[page.index("<h2>Learning curves") : page.index(f"<h2>{report.LOSSES}")]
    assert '"text":"exact_match"' in curves and "eval loss" not in curves
    assert report.LOSSES not in page_of(swept(tmp_path / "by loss"))


def test_what_looks_like_a_tag_in_a_name_a_value_or_an_error_stays_text(tmp_path, monkeypatch):
    folder = swept(tmp_path)
    assert TAG in folder.config_file.read_text()
    plain = {"choices": {"plain": ["q_proj"], "all-linear": "all-linear"}}
    clean = Elements(page_of(swept(tmp_path / "clean", space={**SPACE, "lora.target_modules": plain})))
    assert sorted(Elements(page_of(folder)).names) == sorted(clean.names)
    assert TAG not in page_of(folder).replace(get_plotlyjs(), "")
    monkeypatch.setattr(report_page, "escape", str)  # the twin: what this test guards against
    assert len(Elements(page_of(folder)).names) > len(clean.names)
    section = report_page.Section(TAG, TAG, TAG)
    monkeypatch.undo()
    assert TAG not in report_page.render(TAG, [TAG], [section], TAG)


def test_what_base_model_and_adapter_answered_is_shown_as_text_for_the_best_trial_only(tmp_path):
    folder = swept(tmp_path)
    example = {"prompt": f"What is {TAG}?\nSay.", "expected": "nothing", "base": "A & B", "adapter": TAG}
    folder.write_examples({"trial": 5, "examples": [example], "seconds": 1.0})
    page = page_of(folder).replace(get_plotlyjs(), "")
    assert "<th>base model</th><th>with adapter</th>" in page and TAG not in page
    assert "What is &lt;script&gt;alert(1)&lt;/script&gt;?\nSay." in page and "A &amp; B" in page
    folder.write_examples({"trial": 3, "examples": [example]})  # an earlier winner's
    assert "A &amp; B" not in page_of(folder)
    folder.write_examples({"trial": 5, "error": "NotImplementedError: no generate"})
    assert "Not shown: nothing could be generated: NotImplementedError: no generate." in page_of(folder)


def test_a_killed_sweep_has_a_report_and_nothing_else_of_it_is_touched(tmp_path):
    folder = swept(tmp_path)
    for file in (folder.journal, folder.timeline):
        with open(file, "a") as torn:
            torn.write('{"op_code": 4, "tr')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    page = page_of(folder)
    assert "7 trials of 16" in page
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() - before.keys()} == {"report.html"}
    assert all(after[path] == before[path] for path in before)
    Timeline(folder.timeline)  # the twin: the driver opens it for repair
    assert folder.timeline.read_bytes() != before[folder.timeline]


@pytest.mark.parametrize(
    ("outcomes", "space", "why"),
    [
        ((), SPACE, "no trial has reported yet"),
        ((Outcome.COMPLETE,), SPACE, "needs 2 COMPLETE trials, there is 1"),
        ((Outcome.COMPLETE, Outcome.COMPLETE), {"lora.rank": {"choices": [2, 4, 8]}}, "needs 2 parameters that differ"),
    ],
)
def test_a_figure_that_cannot_be_drawn_says_why(tmp_path, outcomes, space, why):
    folder = swept(tmp_path, outcomes, space)
    if not outcomes:
        (folder.trial(0) / "reports.jsonl").unlink()
    page = page_of(folder).replace(get_plotlyjs(), "")
    assert f"Not shown: {why}" in page
    assert "Optuna could not compute it" not in page


def test_the_page_says_what_became_of_the_data(tmp_path):
    folder = swept(tmp_path)
    assert "rows read" not in page_of(folder)
    folder.write_data({"training": "ab"}, [make_account(), make_account("evaluation")])
    page = page_of(folder)
    assert "Data, training at 512 tokens: 60 rows read" in page and "Data, evaluation at 512 tokens" in page


def test_the_page_says_what_predicted_speeds_rest_on(tmp_path):
    folder = swept(tmp_path)
    assert "Predicted for" not in page_of(folder)
    folder.write_card("rtx4090, 23.6 GiB; speed measured here")
    assert "Predicted for rtx4090, 23.6 GiB; speed measured here." in page_of(folder)


def test_no_report_fails_a_sweep_and_an_older_one_stays(tmp_path, monkeypatch):
    folder = swept(tmp_path)
    older, journal = page_of(folder), folder.journal.read_text()
    folder.journal.write_text(f"x\n{journal}")
    with pytest.raises(InputError, match="damaged journal"):
        report.write_report(folder)
    notes: list[str] = []
    report.try_write_report(folder, notes.append)
    folder.journal.write_text(journal)
    monkeypatch.setattr(report, "_page", lambda *_: 1 / 0)
    report.try_write_report(folder, notes.append)
    assert [note.split(" (")[0] for note in notes] == ["WARNING: report.html was not written"] * 2
    assert "ZeroDivisionError" in notes[1] and "\n" not in "".join(notes)
    assert (tmp_path / "report.html").read_text() == older
    with pytest.raises(ZeroDivisionError):  # the twin
        report.write_report(folder)


def test_the_command_writes_it_without_torch_and_refuses_another_folder(tmp_path, capsys):
    folder = swept(tmp_path)
    code = (
        f"import sys; from sweep.report.__main__ import main; print(main([{str(folder.path)!r}]));"
        "print([name for name in ('torch', 'ray', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == [str(tmp_path / "report.html"), "0", "[]"]
    assert main([str(tmp_path / "trials")]) == 2
    assert "must be a sweep folder" in capsys.readouterr().err


def test_each_slot_is_a_bar_whose_parts_add_up_with_legend_and_numbers(tmp_path):
    timeline = Timeline(tmp_path / "timeline.jsonl")
    timeline.start_session(0.0, 2)
    timeline.on_assigned(0, 0.0)
    timeline.on_reported(0, 60.0, {"slot": f"gpu {TAG}", "began_s": 20.0, "parts": {"train": 30.0, "eval": 10.0}})
    timeline.on_ended(0, 100.0, {})  # killed
    times = slot_times(Timeline(tmp_path / "timeline.jsonl", mend=False))
    figure = where_hours_went(times)
    bars = {bar.name: (list(bar.x), list(bar.text)) for bar in figure.data}
    assert bars == {
        "steady training": ([30.0, 0.0], ["30 %", ""]), "evaluation": ([10.0, 0.0], ["10 %", ""]),
        "starting and loading": ([20.0, 0.0], ["20 %", ""]), "idle": ([0.0, 100.0], ["", "100 %"]),
        "not reported": ([40.0, 0.0], ["40 %", ""]),
    }  # fmt: skip
    assert figure.layout.barmode == "stack" and figure.layout.xaxis.title.text == "seconds of the slot"
    names = figure.data[0].y
    shares = ["30 % steady, 40 % with eval", "0 % steady, 0 % with eval"]  # the second slot had no trial
    assert TAG not in names[0] and [name.split("<br>")[1] for name in names] == shares
    assert hours_line(times).startswith("2 slots, 3 min together: 15.0 % steady training, 5.0 % evaluation, 10.0 % starting")
    assert "So 15.0 % steady, 20.0 % with evaluation." in hours_line(times)
    assert where_hours_went([]) == "no slot has been held yet" and hours_line([]) == ""


def test_a_sweep_of_an_older_version_is_not_split(tmp_path):
    timeline = Timeline(tmp_path / "timeline.jsonl")
    timeline.start_session(0.0)
    timeline.on_assigned(0, 0.0)
    timeline.on_ended(0, 100.0, {"slot": "gpu 0", "began_s": 0.0})
    times = slot_times(timeline)
    assert [bar.name for bar in where_hours_went(times).data] == ["not reported"]
    assert "No process told what it did" in hours_line(times) and "<br>not split" in where_hours_went(times).data[0].y[0]


def test_no_slot_lost_time_where_each_held_one_trial(tmp_path):
    spans = Timeline(swept(tmp_path, ()).timeline, mend=False).spans
    assert len(spans) == 1 and dead_time_line(spans) == ""
