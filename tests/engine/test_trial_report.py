"""A report as plain data: it is itself again, files of older versions are read, and what is no report is one line."""

from __future__ import annotations

import json

import pytest

from engine.errors import InputError
from engine.trial_report import TrialReport, read_reports
from tests.support.reports import make_report

NEWER = ("predicted_peak_gib", "peak_reserved_gib", "num_out_of_memory", "micro_batch_size", "activation_checkpointing",
         "setup_s", "model_s", "data_s", "attach_s", "train_s", "recording_s", "eval_s", "save_s",
         "raw_eval_loss", "ema_eval_loss", "metrics", "metrics_error", "metrics_s", "eval_losses", "eval_excess")  # fmt: skip


def test_a_report_is_itself_again_after_json():
    for report in (make_report(), make_report(3, 0.1 + 0.2, predicted_peak_gib=2.5, activation_checkpointing="offload")):
        assert TrialReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert list(make_report().to_dict()) == list(TrialReport.__dataclass_fields__)


def test_files_of_older_versions_are_read_and_keys_of_later_ones_ignored():
    values = make_report(micro_batch_size=4).to_dict()
    assert TrialReport.from_dict({**values, "predicted_peak_gib": 0.0}) == make_report(micro_batch_size=4)
    assert TrialReport.from_dict({**values, "predicted_peak_gib": 0.5}).predicted_peak_gib == 0.5  # twin
    assert TrialReport.from_dict({k: v for k, v in values.items() if k not in NEWER}) == make_report()
    assert TrialReport.from_dict({**values, "of_tomorrow": 1}) == make_report(micro_batch_size=4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval_loss": "x"}, "report.eval_loss = 'x': input should be a valid number"),
        ({"eval_loss": 10**400}, "report.eval_loss = 1000"),
        ({"step": True}, "report.step = True: input should be a valid integer"),
        ({"tokens_seen": None}, "report.tokens_seen = None"),
        ({"activation_checkpointing": False}, "report.activation_checkpointing = False: must be text"),
        ({"predicted_peak_gib": []}, "report.predicted_peak_gib"),
    ],
)
def test_a_value_of_the_wrong_type_is_one_line(changes, said):
    with pytest.raises(InputError, match=said) as error:
        TrialReport.from_dict({**make_report().to_dict(), **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in TrialReport.__dataclass_fields__ if name not in NEWER])
def test_each_required_field_is_missed_by_its_name(name):
    values = {other: value for other, value in make_report().to_dict().items() if other != name}
    with pytest.raises(InputError, match=f"report.{name} = None: required, but missing"):
        TrialReport.from_dict(values)


def test_a_file_of_reports_is_read_to_its_last_whole_line_or_refused_with_the_line(tmp_path):
    assert read_reports(tmp_path) == []
    file, whole = tmp_path / "reports.jsonl", [make_report(1), make_report(2, 0.5)]
    lines = [json.dumps(report.to_dict()) + "\n" for report in whole]
    file.write_text("".join(lines) + '{"rung": 3, "ev')
    assert read_reports(tmp_path) == whole
    for damaged, said in (
        (lines[1], "but its rung is not 1"),
        ("{}\n", "but report.rung = None: required, but missing"),
        ("5\n", "but report = 5"),
        ("[" * 100_000 + "\n", "but it is not valid JSON"),
        ("\0\n", "but it is not valid JSON"),
    ):
        file.write_text(damaged)
        with pytest.raises(InputError, match=f"line 1 must be the report of rung 1, {said}"):
            read_reports(tmp_path)
