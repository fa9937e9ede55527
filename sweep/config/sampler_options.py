"""Define the samplers that a sweep can name, with their options."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from engine.config.parsing import StrictModel

SmallCount = Annotated[int, Field(ge=1, le=100_000)]
"""A number of trials or candidates: Optuna holds them all in memory, and more would not end."""
Population = Annotated[int, Field(ge=2, le=100_000)]
SetupTokens = Literal["auto"] | Annotated[int, Field(ge=0, le=10**12)]


class TpeConfig(StrictModel):
    """Propose trials with the tree-structured Parzen estimator (Bergstra et al., 2011)."""

    name: Literal["tpe"] = "tpe"
    num_startup_trials: SmallCount = Field(5, description="random trials before the model proposes")
    num_ei_candidates: SmallCount = 24
    multivariate: bool = Field(True, description="model the parameters jointly")


class RandomConfig(StrictModel):
    """Draw every trial independently."""

    name: Literal["random"] = "random"


class GridConfig(StrictModel):
    """Try every point of the space once, in an order shuffled by sweep.seed."""

    name: Literal["grid"] = "grid"


class CmaEsConfig(StrictModel):
    """Propose numeric parameters with CMA-ES (Hansen, 2001), and draw choices at random."""

    name: Literal["cmaes"] = "cmaes"
    num_startup_trials: SmallCount = 5
    population_size: Population | None = None


class GpConfig(StrictModel):
    """Propose trials with a Gaussian process and expected improvement.

    Optuna fits it with torch, so the driver imports torch for this sampler.
    """

    name: Literal["gp"] = "gp"
    num_startup_trials: SmallCount = 5


class Nsga2Config(StrictModel):
    """Propose trials with a non-dominated sorting genetic algorithm, NSGA-II (Deb et al., 2002).

    It suits several objectives and many trials.
    """

    name: Literal["nsga2"] = "nsga2"
    population_size: Population = 16


class FreezeThawConfig(StrictModel):
    """Pause trials at rungs, and continue those whose curves promise most (Swersky et al., arXiv:1406.3896).

    It also decides which trial goes on, so it takes no pruner.
    """

    name: Literal["freeze_thaw"] = "freeze_thaw"
    setup_tokens: SetupTokens = Field(
        "auto", description="tokens that beginning a trial costs beside its own; auto: measured on the first trials; 0: none"
    )


SamplerConfig = TpeConfig | RandomConfig | GridConfig | CmaEsConfig | GpConfig | Nsga2Config | FreezeThawConfig
SAMPLERS = {model.model_fields["name"].default: model for model in get_args(SamplerConfig)}
