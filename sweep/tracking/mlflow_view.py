"""Describe the table and charts of a sweep on MLflow's page, as its Share button stores them.

Plain data, no mlflow. MLflow does not document this format: the fields are those of MLflow 3.17. A
page that does not know them shows its defaults, where run names and metric groups say the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.config.metrics_section import EVAL_LOSS
from sweep.tracking.mlflow_names import METRICS, SET_LOSS, best_name

LOSS, BEST, TASK = METRICS["eval_loss"], METRICS["best_eval_loss"], "eval/"
ORDER = (BEST, True)
SHOWN = (METRICS["tokens_per_second"], METRICS["peak_allocated_gib"], METRICS["predicted_peak_gib"])
WIDTHS = {"attributes.`Run Name`": 175, "tags.`outcome`": 130, "runDateAndNestInfo": 60, "duration": 90}
LETTER, MARGIN = 6, 24  # of a column's head, in pixels
PARAM_WIDTHS, METRIC_WIDTHS = (90, 150), (90, 220)  # least and most
MAX_RUNS = 1000  # a chart shows 10 runs by default
SECTION = "Compare trials"
CHART = {"deleted": False, "isGenerated": False, "runsCountToCompare": MAX_RUNS, "metricSectionId": SECTION}
LINE = {
    "xAxisKey": "step",
    "useGlobalXaxisKey": False,
    "xAxisScaleType": "linear",
    "scaleType": "linear",
    "lineSmoothness": 0,
    "useGlobalLineSmoothing": False,
    "displayPoints": True,
    "yAxisKey": "metric",
    "yAxisExpressions": [],
    "selectedXAxisMetricKey": "",
    "range": {},
    # by default the page drops the lowest and highest points of each curve
    "ignoreOutliers": False,
}


def page_queries(key: str) -> dict[str, str]:
    """Return the queries of the page's address that open a stored view's table and charts."""
    table = f"workflowType=machine_learning&viewStateShareKey={key}"
    return {"table": table, "charts": f"{table}&compareRunsMode=CHART"}


def view(
    sweep_id: str,
    params: Sequence[Mapping[str, str]],
    metrics: set[str],
    tasks: Sequence[str] = (),
    order: tuple[str, bool] = ORDER,
) -> dict[str, Any]:
    """Show the sweep's trials, best first: sampled values, what each reached, outcome.

    params: path -> value of each trial; metrics: the names that any trial has. tasks: of these, the
    task metrics. order: the metric that decides, and whether the lower is the better.

    What decides is shown by its best value, unless trials of an older version have its last one alone.
    """
    best, decides = shown_best(BEST, metrics), shown_best(order[0], metrics)
    names = sorted({name for sampled in params for name in sampled})
    sets = sorted(name for name in metrics if name.startswith(SET_LOSS))
    others = [name for name in tasks if name != order[0]]
    wanted = dict.fromkeys((decides, best, *sets, *others, *SHOWN))
    shown = [f"metrics.`{name}`" for name in wanted if name in metrics]
    # a run's name says its outcome too, so what was sampled can stand next to it
    varied = _varied(names, params)
    first = [*varied, *(name for name in names if name not in varied)]
    columns = [*(f"params.`{name}`" for name in first), *shown, "tags.`outcome`"]
    widths = {column: _width(column) for column in columns} | WIDTHS
    return {
        "searchFilter": f"tags.`sweep.id` = '{sweep_id}' and tags.`sweep.kind` = 'trial'",
        "orderByKey": f"metrics.`{decides}`",
        "orderByAsc": order[1],
        "selectedColumns": [*columns, "attributes.`Duration`"],
        "columnOrder": ["0", "attributes.`Run Name`", *columns, "runDateAndNestInfo", "duration"],
        "columnWidths": widths,
        "runsHiddenMode": "SHOW_ALL",
        "hideEmptyCharts": True,
        **_charts(varied, metrics, decides, LOSS if order[0] == BEST else order[0]),
    }


def shown_best(name: str, metrics: set[str]) -> str:
    """Return the metric with the best values of the one that decides; its own name if no trial has one."""
    best = best_name(EVAL_LOSS if name == BEST else name.removeprefix(TASK))
    return best if best in metrics else name


def _width(column: str) -> int:
    """Return a width that shows a column's whole head, as far as that leaves room for others."""
    least, most = METRIC_WIDTHS if column.startswith("metrics") else PARAM_WIDTHS
    return round(min(max(LETTER * len(column.partition("`")[2].rstrip("`")) + MARGIN, least), most))


def _varied(names: list[str], params: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the params with more than one value.

    A chart leaves out a trial that lacks one of its params. So params that all trials have come
    first; the others count only if there are none.
    """
    varied = [name for name in names if len({sampled.get(name) for sampled in params}) > 1]
    common = [name for name in varied if all(name in sampled for sampled in params)]
    return common or varied


def _charts(varied: list[str], metrics: set[str], decides: str, curve: str) -> dict[str, Any]:
    """Return one section of charts that compare trials. curve: what decides, at each rung.

    The page adds one section behind it for each group of metrics.
    """
    curves = {curve: curve.removeprefix(TASK), LOSS: "eval loss"}
    charts: list[dict[str, Any]] = [
        {"type": "PARALLEL", "selectedParams": varied, "selectedMetrics": [decides], "showAllRuns": True},
        *(
            {"type": "LINE", "metricKey": name, "selectedMetricKeys": [name], "displayName": f"{title} by tokens seen", **LINE}
            for name, title in curves.items()
        ),
        *(_scatter({"key": name, "type": "PARAM"}, decides) for name in varied),
    ]
    if METRICS["peak_allocated_gib"] in metrics:
        charts.append(_scatter({"key": METRICS["peak_allocated_gib"], "type": "METRIC"}, decides))
    kept = [{"uuid": f"sweep-{number}", **CHART, **chart} for number, chart in enumerate(charts)]
    section = {"uuid": SECTION, "name": SECTION, "display": True, "isReordered": True, "deleted": False, "isGenerated": False}
    section |= {"columns": 1, "cardHeight": 400}  # two would be 220 pixels wide each in a window of 1400
    return {"compareRunCharts": kept, "compareRunSections": [section], "isAccordionReordered": True}


def _scatter(axis: dict[str, str], decides: str) -> dict[str, Any]:
    return {"type": "SCATTER", "xaxis": axis, "yaxis": {"key": decides, "type": "METRIC"}}
