"""A trial that finds other data or another model gets no score: the sweep stops, and the trial goes on later."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from engine.config.trial import TrainConfig
from engine.data.views import identify, load_data
from engine.errors import InputsChanged, StorageError
from engine.model.inspect import load_tokenizer
from engine.trial_report import read_reports
from sweep.execution.safe_stop import SafeStop
from sweep.execution.searcher import LedgerSearcher
from sweep.execution.worker import TrialWorker
from sweep.ledger.ledger import Next
from sweep.trials.record import Outcome
from tests.support.studies import WIDE, config_for, ledger_in, report
from tests.support.trials import build

LINE = "data.train = 'x': the training samples changed"


def spec(config: TrainConfig, trial_folder: Path, inputs: dict[str, str]) -> dict:
    engine = {"train": "engine.training.loop", "model": "engine.model.load", "command": "engine"}
    return {
        "number": 0, "trial_folder": str(trial_folder), "device": "cpu", "num_threads": 1, "engine": engine,
        "report_timeout_s": None, "num_heard": len(read_reports(trial_folder)), "stop_file": str(trial_folder.parent / ".stop"),
        "train_config": config.model_dump_json(), "inputs": json.dumps(inputs),
    }  # fmt: skip


def to_its_end(worker: TrialWorker) -> list[dict]:
    heard = [worker.step()]
    while not heard[-1]["done"]:
        heard.append(worker.step())
    return heard


def test_a_trial_after_the_change_has_no_score_and_goes_on_once_it_is_undone(tmp_path, tiny_config):
    data = tmp_path / "data.jsonl"
    shutil.copy(tiny_config["data"]["train"], data)
    config = build(tiny_config, data={"train": str(data)})
    tokenizer = load_tokenizer(config.model)
    inputs = identify(config, tokenizer, load_data(config.data, tokenizer))
    worker = object.__new__(TrialWorker)
    worker.setup(spec(config, tmp_path / "first", inputs))
    worker.step()
    content = data.read_text()
    data.write_text(content + content.splitlines()[0].replace("plus", "minus") + "\n")
    assert to_its_end(worker)[-1]["outcome"] == "COMPLETE"  # it had begun, and reads what it began with
    worker.reset_config(spec(config, tmp_path / "second", inputs))
    (ended,) = to_its_end(worker)
    assert ended["outcome"] == "RUNNING" and ended["has_changed_inputs"] and not ended["report"]
    assert "the training samples changed since the sweep began" in ended["error"]
    assert not read_reports(tmp_path / "second")
    data.write_text("{")  # half written
    worker.reset_config(spec(config, tmp_path / "second", inputs))
    assert to_its_end(worker)[-1]["has_changed_inputs"]
    data.write_text(content)
    worker.reset_config(spec(config, tmp_path / "second", inputs))
    assert to_its_end(worker)[-1]["outcome"] == "COMPLETE"
    trained = [[one.eval_loss for one in read_reports(tmp_path / name)] for name in ("first", "second")]
    assert trained[0] == trained[1]


def test_a_model_that_is_gone_before_a_worker_has_loaded_it_stops_the_sweep_too(tmp_path, tiny_config):
    config = build(tiny_config, model={"path": str(tmp_path / "gone")})
    for inputs, outcome in (({"weights": "then"}, "RUNNING"), ({}, "FAILED"), ({"commit": "then"}, "FAILED")):
        worker = object.__new__(TrialWorker)
        worker.setup(spec(config, tmp_path / "trial", inputs))
        ended = to_its_end(worker)[-1]
        assert ended["outcome"] == outcome and ended["has_changed_inputs"] is (outcome == "RUNNING")


def test_the_ledger_starts_no_other_trial_and_keeps_this_one_for_a_resume(tmp_path):
    config = config_for(WIDE, num_trials=4)
    ledger = ledger_in(tmp_path, config)
    searcher = LedgerSearcher(ledger, lambda proposal: {"number": proposal.number})
    first, second = searcher.suggest("a")["number"], searcher.suggest("b")["number"]
    ended = {"outcome": "RUNNING", "report": "", "error": LINE, "memory": "{}", "timing": "{}"}
    searcher.on_trial_complete("a", {**ended, "has_changed_inputs": True})
    assert ledger.changed_inputs == f"trial {first}: {LINE}" and ledger.storage_fault is None
    assert searcher.suggest("c") is None and ledger.next_trial() is Next.WAIT
    assert not ledger.reported(second, report(1, 2.0))  # who runs goes on until it has saved
    assert [record.outcome for record in ledger.records] == [Outcome.RUNNING, Outcome.RUNNING]
    assert ledger_in(tmp_path, config).recover() == [first, second]


@pytest.mark.parametrize("is_full", [True, False])
def test_the_driver_ends_with_the_line_once_running_trials_have_saved(is_full):
    live, asked, changed, fault = [1], [], [None], [None]
    stop = SafeStop(lambda: fault[0], lambda: asked.append(1), lambda: live[0], changed_inputs=lambda: changed[0])
    with pytest.raises(StorageError if is_full else InputsChanged, match="full" if is_full else LINE), stop.catching():
        assert not stop.stop_all() and not asked
        changed[0] = LINE
        assert not stop.stop_all() and not stop.stop_all() and asked == [1]
        live[0], fault[0] = (1, "full") if is_full else (0, None)
        stop.stop_all()
        pytest.fail("it goes on")
