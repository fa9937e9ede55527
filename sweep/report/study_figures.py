"""Draw Optuna's figures for the report: importance, parallel coordinates, slices.

They are drawn from a copy in memory, so nothing in the study changes. The copy has short names and
escapes its text, so that nothing can be taken for a tag.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from html import escape
from typing import Any

import optuna
import plotly.graph_objects as go
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from engine.errors import first_line

LOSS = "eval loss (nats)"
MIN_COMPLETE = 2
COLOURS = "Viridis"
FIGURES = {
    "Parameter importance": (2, optuna.visualization.plot_param_importances),
    "Parallel coordinates": (1, optuna.visualization.plot_parallel_coordinate),
    "Slices": (1, optuna.visualization.plot_slice),
}
"""Map of title -> (least number of parameters, Optuna's function that draws it)."""


def study_figures(trials: list[FrozenTrial]) -> dict[str, go.Figure | str]:
    """Return the figures by title; a str says why Optuna cannot draw a figure."""
    study = _copy(trials)
    return {title: _draw(study, *how) for title, how in FIGURES.items()}


def _draw(study: optuna.Study, min_params: int, plot: Callable[..., go.Figure]) -> go.Figure | str:
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    values = {name: {str(trial.params.get(name)) for trial in complete} for trial in complete for name in trial.params}
    varied = sorted(name for name, seen in values.items() if len(seen) > 1)
    if len(complete) < MIN_COMPLETE:
        return f"needs {MIN_COMPLETE} COMPLETE trials, there {'is' if len(complete) == 1 else 'are'} {len(complete)}"
    if len(varied) < min_params:
        many = "1 parameter differs" if len(varied) == 1 else f"{len(varied)} parameters differ"
        return f"needs {min_params} parameters that differ between COMPLETE trials; {many}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna warns about experimental features
            figure = plot(study, params=varied, target=lambda trial: trial.user_attrs["eval_loss"], target_name=LOSS)
        # Optuna's blues end in white, which would hide the worst line and the first trial's point
        figure.update_traces(line={"colorscale": COLOURS}, selector={"type": "parcoords"})
        return figure.update_traces(marker={"colorscale": COLOURS, "size": 9}, selector={"type": "scatter"})
    except Exception as error:  # a missing figure must not cost the whole report
        return f"Optuna could not draw it ({first_line(error)})"


def _copy(trials: list[FrozenTrial]) -> optuna.Study:
    """Return a study with the COMPLETE trials.

    A parameter is named by the last part of its path if that is unique. The other trials are kept
    without their params, so that trial numbers do not change.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    paths = {path for trial in trials for path in trial.params}
    last = Counter(path.rsplit(".", 1)[-1] for path in paths)
    names = {path: escape(path if last[path.rsplit(".", 1)[-1]] > 1 else path.rsplit(".", 1)[-1]) for path in paths}
    study = optuna.create_study()
    for trial in trials:
        if trial.state is not TrialState.COMPLETE:
            study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))
            continue
        distributions = {path: _as_text(distribution) for path, distribution in trial.distributions.items()}
        # with several objectives, it need not be the first value
        loss = min(trial.intermediate_values.values())
        study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE,
                value=loss,
                params={names[path]: _label(distributions[path], value) for path, value in trial.params.items()},
                distributions={names[path]: distribution for path, distribution in distributions.items()},
                user_attrs={"eval_loss": loss},
            )
        )
    return study


def _as_text(distribution: BaseDistribution) -> BaseDistribution:
    if not isinstance(distribution, CategoricalDistribution):
        return distribution
    choices = [_escaped(choice) for choice in distribution.choices]
    return CategoricalDistribution(choices)


def _label(distribution: BaseDistribution, value: Any) -> Any:
    return _escaped(value) if isinstance(distribution, CategoricalDistribution) else value


def _escaped(value: Any) -> Any:
    return escape(value) if isinstance(value, str) else value
