"""The page for Prometheus shows what the dashboards' queries ask for."""

from __future__ import annotations

import ast
import json
import re
import socket
import subprocess
import urllib.request
from pathlib import Path

import promql_parser
import pytest
import ray
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from engine.errors import InputError
from sweep import driver
from sweep.config.resume_changes import apply_resume_changes
from sweep.config.sweep import TrackingConfig, parse_sweep_config
from sweep.folder.timeline import Timeline
from sweep.tracking.prometheus import SweepMetrics, serve
from sweep.trials.record import Outcome, TrialRecord
from tests.support.fake_driver import ENGINE
from tests.support.fake_sweeps import BASE, results, sweep_folder
from tests.support.paths import ROOT
from tests.support.reports import make_report

DASHBOARDS = ROOT / "dashboards"
TARGET_LABELS = {"job", "instance"}  # Prometheus adds these to what it reads
# from Ray's C++ code, as the page of a Ray 2.60 node shows them
RAY_LABELS = {"ray_resources": {"Name", "State"}}


def scrape(address: str) -> dict[tuple[str, tuple], float]:
    """Return (name of the sample, its labels) -> value."""
    with urllib.request.urlopen(address, timeout=10) as page:
        return samples(page.read().decode())


def samples(text: str) -> dict[tuple[str, tuple], float]:
    families = text_string_to_metric_families(text)
    found = [(s.name, tuple(sorted(s.labels.items())), s.value) for family in families for s in family.samples]
    assert len({(name, labels) for name, labels, _ in found}) == len(found), "Prometheus refuses a page with a sample twice"
    return {(name, labels): value for name, labels, value in found}


def shown(metrics: SweepMetrics) -> dict[str, float]:
    """Return samples by name and labels without the sweep's: trials{outcome="LOST"} -> 1."""
    registry = CollectorRegistry()
    registry.register(metrics)
    found = {}
    for (name, labels), value in samples(generate_latest(registry).decode()).items():
        assert dict(labels)["sweep"] == "s-1"
        rest = ",".join(f'{key}="{label}"' for key, label in labels if key != "sweep")
        found[name.removeprefix("qlora_sweep_") + (f"{{{rest}}}" if rest else "")] = value
    return found


def record(number: int, outcome: Outcome, slot: str | None = None, *tokens: int, source: str | None = None) -> TrialRecord:
    reports = [
        make_report(rung, 3.0 - rung / 10 + number, tokens_seen=seen, peak_allocated_gib=2.0, predicted_peak_gib=2.5)
        for rung, seen in enumerate(tokens, 1)
    ]
    return TrialRecord(number, {}, {}, outcome, "", reports, started_s=float(number), slot=slot, source=source)


def test_counters_count_from_this_driver_on_and_gauges_over_all_sessions(tmp_path):
    file, now_s = tmp_path / "timeline.jsonl", 1000.0
    earlier = Timeline(file)
    earlier.start_session(0.0)
    earlier.on_assigned(0, 0.0)
    earlier.on_reported(0, 100.0, {"slot": "a", "dead_time_s": 7.0})
    timeline = Timeline(file)
    metrics = SweepMetrics("s-1", num_trials=4, num_slots=2, clock=lambda: now_s)
    metrics.on_trial_updated(record(0, Outcome.RUNNING, "a", 100))
    timeline.start_session(now_s)
    metrics.begin(timeline)
    assert shown(metrics)["tokens_total"] == shown(metrics)["slot_busy_seconds_total"] == 0.0
    timeline.on_assigned(0, 1000.0)
    timeline.on_assigned(1, 1010.0)
    for at_s in (1020.0, 1030.0):
        timeline.on_reported(1, at_s, {"slot": "b", "dead_time_s": 0.5, "parts": {"train": 6.0}})
    timeline.on_ended(1, 1030.0, {})
    metrics.on_trial_updated(record(0, Outcome.RUNNING, "a", 100, 250))
    metrics.on_trial_updated(record(1, Outcome.PRUNED, "b", 100))
    now_s = 1040.0
    page = shown(metrics)
    assert (page["tokens_total"], page["slot_busy_seconds_total"]) == (250.0, 40.0 + 20.0)
    assert (page["dead_time_seconds_count"], page["dead_time_seconds_sum"]) == (1.0, 0.5)
    assert (page["occupied_seconds"], page["elapsed_seconds"]) == (100.0 + 60.0, 100.0 + 40.0)
    assert (page['part_seconds{part="train"}'], page['part_seconds{part="idle"}']) == (12.0, 8.0)
    assert "expected_seconds_left" not in page  # before the first report of a trial
    assert (page["slots"], page["slots_busy"], page["last_event_timestamp_seconds"]) == (2.0, 1.0, 1030.0)


def test_the_page_shows_outcomes_losses_and_what_runs_in_each_slot(tmp_path):
    metrics = SweepMetrics("s-1", num_trials=4, num_slots=2)
    assert shown(metrics) == {}
    timeline = Timeline(tmp_path / "timeline.jsonl")
    metrics.begin(timeline)
    # the twin: no loss is not a loss of 0
    assert not any("loss" in name for name in shown(metrics))
    for each in (
        record(0, Outcome.PRUNED, "a", 100), record(1, Outcome.COMPLETE, "a", 100, 200), record(2, Outcome.RUNNING, "a", 100),
        record(3, Outcome.RUNNING, "a", 100), record(4, Outcome.RUNNING), record(5, Outcome.COMPLETE, None, 9, source="x"),
    ):  # fmt: skip
        metrics.on_trial_updated(each)
    page = shown(metrics)
    assert {name: value for name, value in page.items() if name.startswith("trials{") and value} == {
        'trials{outcome="COMPLETE"}': 1.0, 'trials{outcome="PRUNED"}': 1.0, 'trials{outcome="RUNNING"}': 3.0}  # fmt: skip
    assert page["best_eval_loss"] == pytest.approx(3.8) and page["lowest_eval_loss"] == pytest.approx(2.9)
    assert page["tokens_total"] == 500.0  # a trial of an earlier sweep was not trained here
    # two records of one slot, after a resume: the later one holds it
    assert page['slot_trial{slot="a"}'] == 3.0
    assert page['slot_peak_memory_bytes{kind="measured",slot="a"}'] == 2.0 * 2**30
    assert page['slot_peak_memory_bytes{kind="predicted",slot="a"}'] == 2.5 * 2**30


def test_the_page_is_for_this_machine_alone_and_gone_when_the_sweep_ends():
    said = []
    with serve(TrackingConfig(metrics_port=0), said.append):
        address = said[0].removeprefix("metrics ").strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", address)
        assert scrape(address) == {}
    with pytest.raises(OSError):
        scrape(address)


@pytest.mark.parametrize(
    ("tracking", "line"),
    [
        ({"metrics_port": "taken"}, "tracking.metrics_port = {port}: must be free on 127.0.0.1; another process uses it"),
        ({"metrics_port": 0, "metrics_host": "192.0.2.99"}, "tracking.metrics_host = '192.0.2.99': must be an address of this"),
        ({"metrics_port": 0, "metrics_host": "no such host"}, "tracking.metrics_host = 'no such host': must be an address"),
        ({"metrics_port": 70_000}, "tracking.metrics_port = 70000: input should be less than or equal to 65535"),
        ({"metrics_port": True}, "tracking.metrics_port = True: input should be a valid integer"),
    ],
)  # fmt: skip
def test_a_page_that_cannot_be_had_is_refused_before_anything_is_written(tmp_path, tracking, line):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        if tracking["metrics_port"] == "taken":
            tracking = {"metrics_port": port}
        output = tmp_path / "sweeps"
        with pytest.raises(InputError) as refused:
            driver.start({**BASE, "tracking": {"name": "none", **tracking}, "sweep": {"output_dir": str(output)}}, engine=ENGINE)
    assert line.format(port=port) in str(refused.value)
    assert not output.exists()


def test_a_resume_may_move_the_page():
    config = parse_sweep_config({**BASE, "tracking": {"name": "none", "metrics_port": 9464}})
    assert apply_resume_changes(config, {"tracking.metrics_port": 9465}).tracking.metrics_port == 9465
    assert apply_resume_changes(config, {"tracking.metrics_port": None}).tracking.metrics_port is None
    with pytest.raises(InputError):
        apply_resume_changes(config, {"tracking.metrics_port": -1})


@pytest.fixture
def exported(watched) -> dict[str, set[str]]:
    """Return the samples of a whole sweep under Ray: name -> names of its labels."""
    seen: dict[tuple[str, tuple], float] = {}
    for page in watched.pages:
        seen |= samples(page)
    ended = results(sweep_folder(Path(watched.folder)))
    outcomes = {dict(labels)["outcome"]: value for (name, labels), value in seen.items() if name == "qlora_sweep_trials"}
    assert len(ended) == 16 == sum(outcomes.values())  # the last state of the page is the folder's
    names: dict[str, set[str]] = {}
    for name, labels in seen:
        names.setdefault(name, set()).update(label for label, _ in labels)
    return names


def of_ray() -> dict[str, set[str]]:
    """Return the metrics of Ray's agents: name -> labels.

    They are read from Ray's source, because importing it needs ray[default].
    """
    from ray.dashboard import consts

    source = (Path(ray.__file__).parent / "dashboard/modules/reporter/reporter_agent.py").read_text()
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and len(node.args) == 4]
    gauges = [call.args for call in calls if getattr(call.func, "id", "") == "Gauge"]
    found = {f"ray_{name.value}": set(getattr(consts, labels.id)) for name, _, _, labels in gauges}
    assert len(found) > 40
    return found | RAY_LABELS


def queries() -> list[tuple[str, str]]:
    """Return (where, PromQL) of all dashboards and alerts, with variables filled in."""
    found = []
    for file in sorted(DASHBOARDS.glob("grafana/*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            found += [(f"{file.stem}: {panel['title']}: {target['legendFormat']}", target["expr"]) for target in panel["targets"]]
    for group in yaml.safe_load((DASHBOARDS / "alerts.yml").read_text())["groups"]:
        found += [(f"alerts: {rule['alert']}", rule["expr"]) for rule in group["rules"]]
    return found


def strangers(expression: str, known: dict[str, set[str]]) -> list[str]:
    """Return the names in a query that nothing exports.

    These are names of metrics, and labels that none of the query's metrics has.
    """
    missing, labels, waiting = [], set(TARGET_LABELS), [promql_parser.parse(expression)]
    used: set[str] = set()
    while waiting:
        node = waiting.pop()
        node = getattr(node, "vector_selector", node)
        if isinstance(node, promql_parser.VectorSelector):
            own = known.get(node.name, set())
            labels |= own
            missing += [] if node.name in known else [node.name]
            missing += [f"{node.name}{{{m.name}}}" for m in node.matchers.matchers if m.name not in own | TARGET_LABELS]
        modifier = getattr(node, "modifier", None)
        used |= set(getattr(getattr(modifier, "matching", modifier), "labels", None) or [])
        waiting += [getattr(node, part) for part in ("lhs", "rhs", "expr") if hasattr(node, part)]
        waiting += getattr(node, "args", [])
    return missing + sorted(used - labels)


def test_every_query_of_the_dashboards_reads_what_a_sweep_and_ray_export(exported):
    known = exported | of_ray() | {"up": set()}
    assert {name for name in exported if name.startswith("qlora_sweep_")} == set(exported)
    assert len(queries()) > 30
    for where, expression in queries():
        assert strangers(expression, known) == [], where
        legend = set(re.findall(r"{{(\w+)}}", where))
        assert legend <= set().union(*known.values()) | TARGET_LABELS, where
    # the twins: a metric, a label and a grouping that nothing exports
    for wrong in ("qlora_sweep_trails", 'rate(qlora_sweep_trials{result="LOST"}[5m])', "sum by (slot) (qlora_sweep_trials)"):
        assert strangers(wrong, known)


def test_every_metric_of_a_sweep_is_on_a_dashboard(exported):
    text = " ".join(expression for where, expression in queries() if where.startswith("sweep:"))
    unused = {name for name in exported if not re.search(rf"\b{name}\b", text)}
    # for a user's alerts and budgets
    assert unused == {"qlora_sweep_elapsed_seconds", "qlora_sweep_slots_busy"}


def test_promtool_finds_no_fault():
    """Runs only if Prometheus is installed (Debian's package `prometheus`)."""
    try:
        for check in (["config", "prometheus.yml"], ["rules", "alerts.yml"]):
            done = subprocess.run(["promtool", "check", check[0], str(DASHBOARDS / check[1])], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    except FileNotFoundError:
        pytest.skip("no promtool")
