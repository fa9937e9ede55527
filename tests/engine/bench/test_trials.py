"""Trials in one process with a resident base: one line each, whose parts add up to its time."""

import gc
import json

import pytest

from engine.bench import trials
from engine.training import loop
from engine.trial_report import SAVING, TRAIN

TINY = ["--model", "tiny", "--tokens", "500", "--length", "32", "--reports", "2", "--samples", "60", "--trials", "3"]


def test_trials_run_in_one_process_and_each_line_says_where_its_time_went(tmp_path, monkeypatch, capsys):
    loads = []
    monkeypatch.setattr(trials, "load_base", lambda *given, load=trials.load_base: loads.append(given) or load(*given))
    monkeypatch.setattr(loop, "load_base", None)  # a trial that loads the model itself fails
    file = tmp_path / "trials.jsonl"
    assert trials.main([*TINY, "--scratch", str(tmp_path / "scratch"), "--json", str(file), "--commit", "abc"]) == 0
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    assert [found["name"] for found in lines] == ["first", "other values", "dropout"] and len(loads) == 1
    for found in lines:
        parts = found["parts_s"]
        assert sum(parts.values()) == pytest.approx(found["wall_s"], abs=1e-3) and parts[TRAIN] > 0 and parts[SAVING] > 0
        assert found["steady_share"] == pytest.approx(parts[TRAIN] / found["wall_s"], abs=1e-3)
        assert found["setup_s"] < found["wall_s"] and found["tokens"] >= 500 and found["num_reports"] == 2
        assert found["git.commit"] == "abc" and found["version.torch"]
    assert len({tuple(found["eval_loss"]) for found in lines}) == 3  # each is another trial
    printed = capsys.readouterr().out.splitlines()
    assert [text.split(":")[0] for text in printed[-3:]] == ["trial 0 (first)", "trial 1 (other values)", "trial 2 (dropout)"]
    assert gc.get_freeze_count() == 0
    assert not list((tmp_path / "scratch").glob("trial-*"))


def test_the_samples_are_ragged_and_the_same_each_time(tmp_path):
    for name in "ab":
        trials.write_samples(tmp_path / name, 200)
    text = (tmp_path / "a").read_text()
    assert text == (tmp_path / "b").read_text()
    lengths = sorted(len(row["prompt"] + row["completion"]) for row in map(json.loads, text.splitlines()))
    assert lengths[100] < 400 and lengths[-1] > 900 and lengths[0] < 100


@pytest.mark.parametrize("wrong", ["--trials 0", "--samples 0", "--tokens 0", "--reports 0", "--length 0"])
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, capsys, wrong):
    given = [*TINY, "--scratch", str(tmp_path / "scratch"), "--json", str(tmp_path / "a.jsonl"), *wrong.split()]
    try:
        code = trials.main(given)
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and "at least" in capsys.readouterr().err.replace("greater than or equal to", "at least")
    assert not list(tmp_path.iterdir())
