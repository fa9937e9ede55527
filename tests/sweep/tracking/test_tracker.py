"""MLflow shows the sweep, and a broken MLflow server never disturbs the caller."""

import math
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sweep.tracking.mlflow_names import data_points, data_tags, trial_points
from sweep.tracking.mlflow_view import ORDER, view
from sweep.tracking.sqlite_store import local_uri
from sweep.tracking.system_metrics import write_system
from sweep.tracking.tracker import NullTracker, Tracker
from sweep.trials.record import Outcome
from tests.support.reports import make_account, make_report
from tests.support.tracked import CONFIG, trial

LOSS = "eval/loss_nats_per_token"


def history(client, run):
    return [(point.step, point.value, point.timestamp) for point in client.get_metric_history(run.info.run_id, LOSS)]


def test_trials_are_child_runs_of_the_sweep_with_metrics_by_tokens_seen(tracker, runs, client):
    one = tracker()
    one.on_sweep_started({"git.commit": "abc"})
    one.on_trial_updated(trial(3, Outcome.COMPLETE, 2.0, 1.5))
    assert one.close(60) == []
    parent, child = runs()["my sweep"], runs()["0003 COMPLETE"]
    assert parent.data.tags["git.commit"] == "abc"
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params == {"lora.rank": "8"}
    assert history(client, child) == [(1000, 2.0, 1_000_000_001_500), (2000, 1.5, 1_000_000_003_000)]
    assert child.data.metrics["speed/tokens_per_second"] == 700.0
    assert child.data.metrics["memory/peak_allocated_gib"] == 1.25
    assert (child.info.status, child.info.end_time) == ("FINISHED", 1_000_000_060_000)
    assert [file.path for file in client.list_artifacts(child.info.run_id)] == ["train_config.json"]
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["sweep_config.json"]


def test_what_became_of_the_data_are_numbers_that_sort_sweeps(tracker, runs, client):
    accounts = [make_account(max_seq_length=128), make_account(num_lost_tokens=0), make_account("evaluation")]
    for _ in range(2):  # a resume writes the same points
        one = tracker()
        one.on_sweep_started(data_tags(accounts), 1e9, data_points(accounts))
        assert one.close(60) == []
    run = runs()["my sweep"]
    assert {name for name in run.data.tags if name.startswith("data.")} == {
        "data.training.128", "data.training.512", "data.evaluation.512",
    }  # fmt: skip
    metrics = run.data.metrics
    assert metrics["data/training/tokens_lost_share"] == 0.2 == metrics["data/training_at_128/tokens_lost_share"]
    assert metrics["data/training_at_512/tokens_lost_share"] == 0.0
    assert (metrics["data/evaluation/rows_read"], metrics["data/training/targets_share"]) == (60, 0.25)
    assert not any(name.startswith("data/evaluation_at") for name in metrics)
    assert len(client.get_metric_history(run.info.run_id, "data/training/rows_used")) == 1


def test_two_accounts_of_one_length_are_in_one_tag():
    tag = data_tags([make_account(), make_account(num_used=43)])["data.training.512"]
    assert "44 used" in tag and "43 used" in tag


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(Outcome.PRUNED, "FINISHED"), (Outcome.FAILED, "FAILED"), (Outcome.OUT_OF_MEMORY, "FAILED"), (Outcome.RUNNING, "RUNNING"),
     (Outcome.PAUSED, "SCHEDULED"), (Outcome.STOPPED, "SCHEDULED"), (Outcome.INFEASIBLE, "KILLED")],
)  # fmt: skip
def test_the_outcome_is_a_tag_and_sets_the_status(tracker, runs, outcome, status):
    one = tracker()
    one.on_trial_updated(trial(0, outcome, 2.0, error="why"))
    assert one.close(60) == []
    child = runs()[f"0000 {outcome}"]
    assert (child.data.tags["outcome"], child.data.tags["error"], child.info.status) == (outcome.value, "why", status)


def test_a_paused_trial_that_goes_on_keeps_its_run(tracker, runs, client):
    one = tracker()
    for outcome, losses in ((Outcome.PAUSED, (2.0,)), (Outcome.RUNNING, (2.0,)), (Outcome.COMPLETE, (2.0, 1.5))):
        one.on_trial_updated(trial(0, outcome, *losses))
    assert one.close(60) == []
    assert set(runs()) == {"my sweep", "0000 COMPLETE"} and runs()["0000 COMPLETE"].info.status == "FINISHED"
    assert [point[:2] for point in history(client, runs()["0000 COMPLETE"])] == [(1000, 2.0), (2000, 1.5)]


def test_predicted_and_measured_peaks_are_metrics_and_how_it_was_computed_are_tags(tracker, runs):
    computed = trial(0, Outcome.COMPLETE, 2.0, 1.5, predicted_gib=1.0)
    plan = {"num_out_of_memory": 1, "micro_batch_size": 4, "activation_checkpointing": "selective"}
    computed.reports[1] = replace(computed.reports[1], **plan, predicted_peak_gib=1.125)
    refused = trial(1, Outcome.INFEASIBLE, error="needs 30.0 GiB", predicted_gib=28.0)
    spent = trial(2, Outcome.OUT_OF_MEMORY, 2.0, error="out of memory", predicted_gib=20.0, measured_gib=23.5)
    for _ in range(2):  # as a resume writes them again
        one = tracker()
        for record in (computed, refused, spent):
            one.on_trial_updated(record)
        assert one.close(60) == []
    first, second, third = (runs()[name] for name in ("0000 COMPLETE", "0001 INFEASIBLE", "0002 OUT_OF_MEMORY"))
    peaks = [(run.data.metrics.get("memory/predicted_peak_gib"), run.data.metrics.get("memory/peak_allocated_gib"))
             for run in (first, second, third)]  # fmt: skip
    assert peaks == [(1.125, 1.25), (28.0, None), (20.0, 23.5)]
    assert first.data.metrics["memory/num_out_of_memory"] == 1
    assert (first.data.tags["plan.micro_batch_size"], first.data.tags["plan.activation_checkpointing"]) == ("4", "selective")
    assert (second.info.status, second.data.tags["outcome"]) == ("KILLED", "INFEASIBLE")
    assert second.data.tags["error"] == "needs 30.0 GiB"


def test_a_resumed_sweep_finds_its_runs_and_doubles_nothing(tracker, runs, client):
    for outcome, losses in ((Outcome.LOST, (2.0, 1.5)), (Outcome.RUNNING, (2.0, 1.5, 1.4)), (Outcome.COMPLETE, (2.0, 1.5, 1.4))):
        one = tracker()
        one.on_sweep_started({})
        one.on_trial_updated(trial(0, outcome, *losses))
        one.on_trial_updated(trial(0, outcome, *losses))
        assert one.close(60) == []
    assert set(runs()) == {"my sweep", "0000 COMPLETE"}
    assert [point[:2] for point in history(client, runs()["0000 COMPLETE"])] == [(1000, 2.0), (2000, 1.5), (3000, 1.4)]
    assert runs()["0000 COMPLETE"].info.status == "FINISHED"


def test_finalists_with_another_seed_are_child_runs_too_and_no_trials(tracker, runs, client):
    of_seed = {"params": {"lora.rank": 8, "train.seed": 1}, "config": {"train": {"seed": 1}}}
    for outcome, losses in ((Outcome.RUNNING, (2.0,)), (Outcome.COMPLETE, (2.0, 1.6))):  # the second as a resume
        one = tracker()
        one.on_sweep_started({})
        one.on_trial_updated(trial(3, Outcome.COMPLETE, 2.0, 1.5))
        one.on_final_seed_updated(trial(0, outcome, *losses, **of_seed), 3)
        one.on_sweep_finished({"best_eval_loss": 1.5}, trial(3, Outcome.COMPLETE, 2.0, 1.5), None)
        assert one.close(60) == []
    assert set(runs()) == {"my sweep", "0003 COMPLETE (best)", "0003 with seed 1 COMPLETE"}
    parent, again = runs()["my sweep"], runs()["0003 with seed 1 COMPLETE"]
    assert again.data.tags["mlflow.parentRunId"] == parent.info.run_id and again.info.status == "FINISHED"
    assert (again.data.tags["sweep.kind"], again.data.tags["sweep.trial_number"]) == ("final seed", "3")
    assert again.data.params == {"lora.rank": "8", "train.seed": "1"} and "sweep.best" not in again.data.tags
    assert [point[:2] for point in history(client, again)] == [(1000, 2.0), (2000, 1.6)]
    assert [point[:2] for point in history(client, runs()["0003 COMPLETE (best)"])] == [(1000, 2.0), (2000, 1.5)]


def test_another_sweep_of_the_same_experiment_keeps_its_own_runs(tracker, store, tmp_path, request, client):
    for one in (tracker(), Tracker(local_uri(store), request.node.name, "my sweep", tmp_path / "other", CONFIG)):
        one.on_trial_updated(trial(0, Outcome.COMPLETE, 2.0))
        assert one.close(60) == []
    assert len(client.search_runs([client.get_experiment_by_name(request.node.name).experiment_id])) == 4


def test_a_finished_sweep_has_its_summary_and_the_best_adapter(tracker, runs, client, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    one = tracker()
    one.on_sweep_finished({"best_eval_loss": 1.5, "num_complete": 2, "rule": "lowest"}, trial(1, Outcome.COMPLETE, 1.5), adapter)
    assert one.close(60) == []
    two = tracker()  # a resume that finds a better one
    two.on_sweep_finished({"best_eval_loss": 1.2, "num_complete": 2, "rule": "lowest"}, trial(2, Outcome.COMPLETE, 1.2), None)
    assert two.close(60) == []
    parent, former, best = (runs()[name] for name in ("my sweep", "0001 COMPLETE", "0002 COMPLETE (best)"))
    assert parent.info.status == "FINISHED"
    assert (parent.data.metrics, parent.data.tags["rule"]) == (
        {"eval/best_loss_nats_per_token": 1.2, "trials/num_complete": 2.0},
        "lowest",
    )
    assert [file.path for file in client.list_artifacts(former.info.run_id, "adapter")] == ["adapter/adapter_config.json"]
    assert (former.data.tags["sweep.best"], best.data.tags["sweep.best"]) == ("false", "true")
    assert len(client.get_metric_history(parent.info.run_id, "trials/num_complete")) == 1


def test_what_the_hours_went_to_are_metrics_and_a_table_of_the_slots(tracker, runs, client, tmp_path):
    one = tracker()
    reports = [
        make_report(1, train_s=3.0, recording_s=2.0, eval_s=0.5, save_s=0.0, setup_s=1.0, model_s=0.25),
        make_report(2), make_report(3, train_s=4.0, recording_s=0.0, eval_s=0.5, save_s=0.1),
    ]  # fmt: skip
    one.on_trial_updated(replace(trial(0, Outcome.COMPLETE), reports=reports))
    rows = [{"slot": "gpu0", "train_s": 7.00001, "steady_share": 0.7}, {"slot": "", "train_s": 0.0, "steady_share": None}]
    one.on_sweep_finished({"steady_share": 0.7, "train_s": 7.0, "load_s": 1.0, "slots": rows}, None, None)
    assert one.close(60) == []
    parent, child = runs()["my sweep"], runs()["0000 COMPLETE"]
    assert parent.data.metrics == {"time/steady_share": 0.7, "time/train_s": 7.0, "time/load_s": 1.0}
    assert "slots" not in parent.data.tags
    file = client.download_artifacts(parent.info.run_id, "slot_times.csv", str(tmp_path))
    assert Path(file).read_text() == "slot,train_s,steady_share\ngpu0,7.0,0.7\n,0.0,\n"
    seen = {point.step: point.value for point in client.get_metric_history(child.info.run_id, "time/train_s")}
    assert seen == {1000: 3.0, 3000: 7.0}  # sums; a report of an older version has none
    assert child.data.metrics["time/setup_model_s"] == 0.25 and child.data.metrics["time/recording_s"] == 2.0


def test_a_trial_that_is_written_after_the_end_stays_marked_as_the_best(tracker, runs):
    """After a failure the writer goes on with the next job and retries the failed one last."""
    one, best = tracker(), trial(1, Outcome.COMPLETE, 1.5)
    one.on_sweep_finished({}, best, None)
    while one._writer._pending:
        time.sleep(0.01)
    one.on_trial_updated(best)
    one.on_trial_updated(trial(0, Outcome.COMPLETE, 2.0))
    assert one.close(60) == []
    assert {name for name in runs() if name[0] == "0"} == {"0000 COMPLETE", "0001 COMPLETE (best)"}


# --- what the page shows ---


def test_the_view_shows_what_was_sampled_first_and_charts_what_differs_between_trials():
    params = [{"lora.rank": "4", "optim.seed": "1", "lora.alpha": "1"}, {"lora.rank": "8", "optim.seed": "1"}]
    shown = view("abc", params, {"eval/best_loss_nats_per_token", "memory/peak_allocated_gib", "system/process_cpu_percent"})
    assert shown["columnOrder"][2:4] == ["params.`lora.rank`", "params.`lora.alpha`"]  # the seed is the same everywhere
    assert shown["selectedColumns"][3:5] == ["metrics.`eval/best_loss_nats_per_token`", "metrics.`memory/peak_allocated_gib`"]
    assert set(shown["columnOrder"]) >= set(shown["columnWidths"])
    assert "metrics.`memory/predicted_peak_gib`" not in shown["selectedColumns"]  # no trial has it
    (parallel,) = (chart for chart in shown["compareRunCharts"] if chart["type"] == "PARALLEL")
    # the seed is the same everywhere, and one trial has no alpha
    assert parallel["selectedParams"] == ["lora.rank"]
    assert len({chart["uuid"] for chart in shown["compareRunCharts"]}) == len(shown["compareRunCharts"])


def test_the_view_is_in_the_order_of_the_metric_that_decides_and_shows_heads_whole():
    metrics = {"eval/best_loss_nats_per_token", "eval/exact_match", "eval/loss/docs", "eval/loss/orders"}
    shown = view("abc", [{"optim.learning_rate": "1"}], metrics, ["eval/exact_match"], ("eval/exact_match", False))
    assert (shown["orderByKey"], shown["orderByAsc"]) == ("metrics.`eval/exact_match`", False)
    names = [column.partition("`")[2].rstrip("`") for column in shown["selectedColumns"][1:5]]
    assert names == ["eval/exact_match", "eval/best_loss_nats_per_token", "eval/loss/docs", "eval/loss/orders"]
    assert all(shown["columnWidths"][f"metrics.`{name}`"] >= 6 * len(name) + 20 for name in names)
    assert sum(shown["columnWidths"].values()) - 130 - 90 < 1130  # what a window of 1400 has room for
    assert {chart["yaxis"]["key"] for chart in shown["compareRunCharts"] if chart["type"] == "SCATTER"} <= {"eval/exact_match"}
    lines = [chart["metricKey"] for chart in shown["compareRunCharts"] if chart["type"] == "LINE"]
    assert lines == ["eval/exact_match", "eval/loss_nats_per_token"]


@pytest.mark.parametrize(
    ("order", "axis", "curves"),
    [
        (ORDER, "best/loss", ["eval/loss_nats_per_token"]),
        (("eval/f1", False), "best/f1", ["eval/f1", "eval/loss_nats_per_token"]),
    ],
)
def test_the_view_shows_best_values_under_names_that_an_axis_shows_whole(order, axis, curves):
    metrics = {"eval/best_loss_nats_per_token", "best/loss", "eval/f1", "best/f1"}
    shown = view("abc", [{"lora.rank": "1"}, {"lora.rank": "2"}], metrics, ["eval/f1"], order)
    assert (shown["orderByKey"], shown["orderByAsc"]) == (f"metrics.`{axis}`", order[1])
    assert "metrics.`eval/best_loss_nats_per_token`" not in shown["selectedColumns"]
    axes = [name for chart in shown["compareRunCharts"] if chart["type"] == "PARALLEL" for name in chart["selectedMetrics"]]
    assert axes == [axis]
    assert [chart["metricKey"] for chart in shown["compareRunCharts"] if chart["type"] == "LINE"] == curves


def test_a_trial_whose_metric_fell_later_has_its_best_value_too():
    one = trial(0, Outcome.COMPLETE, 2.0, 1.9, 1.8)
    scores = [0.25, 0.75, 0.5]
    reports = [replace(report, metrics={"f1": score}) for report, score in zip(one.reports, scores, strict=True)]
    record = replace(one, reports=reports, config={**one.config, "metrics": {"f1": True, "choose_by": "f1"}})
    points = [(name, value) for name, value, _, _ in trial_points(record, 0)]
    assert [value for name, value in points if name == "best/f1"] == [0.25, 0.75, 0.75] and record.score == -0.75
    assert [value for name, value in points if name == "best/loss"] == [report.best_eval_loss for report in reports]
    assert not any(name == "best/f1" for name, *_ in trial_points(one, 0))


def test_what_the_machine_did_at_each_rung_is_a_metric_against_tokens_seen(tracker, runs, client, tmp_path):
    # a resumed trial passed rung 2 again
    for rung, percent in ((1, 50.0), (2, 60.0), (2, 70.0)):
        write_system(tmp_path, rung, {"gpu_utilization_percent": percent, "gpu_power_watts": 250.0})
    with open(tmp_path / "system.jsonl", "a") as torn:
        torn.write('{"rung": 3, "gpu_')
    one = tracker()
    for _ in range(2):
        one.on_trial_updated(trial(0, Outcome.COMPLETE, 2.0, 1.5, folder=str(tmp_path)))
    assert one.close(60) == []
    run = runs()["0000 COMPLETE"]
    points = client.get_metric_history(run.info.run_id, "system/gpu_utilization_percent")
    assert [(point.step, point.value) for point in points] == [(1000, 50.0), (2000, 70.0)]
    assert run.data.metrics["system/gpu_power_watts"] == 250.0


def test_an_interrupted_sweep_does_not_look_running(tracker, runs):
    one = tracker()
    one.on_sweep_started({})
    one.close(60)
    assert runs()["my sweep"].info.status == "KILLED"


def test_a_start_that_is_written_after_the_end_does_not_bring_a_sweep_back_to_life(tracker, runs):
    one = tracker()
    one.on_sweep_finished({}, None, None)
    one.on_sweep_started({"git.commit": "abc"})
    assert one.close(60) == []
    assert (runs()["my sweep"].info.status, runs()["my sweep"].data.tags["git.commit"]) == ("FINISHED", "abc")


def test_a_loss_that_is_not_finite_is_written_as_such(tracker, runs, client):
    one = tracker()
    one.on_trial_updated(trial(0, Outcome.DIVERGED, 2.0, math.nan))
    assert one.close(60) == []
    assert [math.isnan(point[1]) for point in history(client, runs()["0000 DIVERGED"])] == [False, True]


def test_a_value_that_mlflow_refuses_is_a_warning_and_holds_up_nothing(tracker, runs):
    one = tracker()
    one.on_trial_updated(trial(0, Outcome.COMPLETE, 2.0, params={"not a valid name!": 1}))
    one.on_trial_updated(trial(1, Outcome.COMPLETE, 2.0))
    (warning,) = one.close(60)
    assert "1 update not written (trial 0): refused" in warning
    assert runs()["0001 COMPLETE"].info.status == "FINISHED"


def test_a_dead_server_neither_blocks_nor_raises_and_is_one_warning(tmp_path):
    one = Tracker("http://user:secret@127.0.0.1:9", "demo", "my sweep", tmp_path, CONFIG)
    before = time.perf_counter()
    one.on_sweep_started({})
    for _ in range(100):
        one.on_trial_updated(trial(0, Outcome.RUNNING, 2.0))
    one.on_sweep_finished({}, None, None)
    assert time.perf_counter() - before < 0.1
    (warning,) = one.close(5)
    assert time.perf_counter() - before < 6
    assert "mlflow at http://127.0.0.1:9: 3 updates not written (" in warning
    assert "secret" not in warning


def test_a_server_that_never_answers_does_not_hold_up_close(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = Tracker(f"http://127.0.0.1:{server.getsockname()[1]}", "demo", "my sweep", tmp_path, CONFIG)
        one.on_sweep_started({})
        before = time.perf_counter()
        (warning,) = one.close(1)
        assert 0.9 < time.perf_counter() - before < 2
    assert "no answer within 1 s" in warning


def test_tracking_switched_off_has_the_same_methods():
    off = NullTracker()
    off.on_sweep_started({})
    off.on_trial_updated(trial(0, Outcome.RUNNING))
    off.on_sweep_finished({}, None, None)
    assert off.close(1) == []



# --- the thread ---
