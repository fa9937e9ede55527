"""Name the strategies that replays compare.

To add one of the product, give `product` its sections of a sweep's config. To add another, write a
`clock.Side` and a maker of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .clock import Side
from .peer_sides import OneLookSide, OptunaSearcher, RandomSearcher, RayAshaSide
from .points import Task
from .product_side import ProductSide


@dataclass(frozen=True)
class Setting:
    """Hold what a side is made from.

    seed: of the replay. cost: full trials at which the sweep ends. clock: time in full trials. setup:
    what it costs to begin a trial and to go on with one, see Clock.
    """

    task: Task
    seed: int
    num_slots: int
    cost: float
    clock: Callable[[], float]
    setup: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Strategy:
    """Make a side for a replay.

    is_anytime: the side decides the same whatever the cost, so that one run serves all costs.
    """

    text: str
    make: Callable[[Setting], Side]
    is_anytime: bool = True


def product(text: str, sections: Mapping[str, Any], is_anytime: bool = True, trials_a_cost: float | None = None) -> Strategy:
    """Return a strategy of the product.

    sections: of the sweep's config, such as sampler. trials_a_cost: the sweep begins so many trials
    for each full trial of its cost; None: until the cost is reached.
    """

    def make(setting: Setting) -> Side:
        sweep = {"seed": setting.seed, **sections.get("sweep", {})}
        if trials_a_cost is not None:
            sweep["num_trials"] = max(1, round(trials_a_cost * setting.cost))
        values = {**sections, "sweep": sweep}
        return ProductSide(setting.task, values, setting.num_slots, setting.cost, setting.clock, setting.setup)

    return Strategy(text, make, is_anytime and trials_a_cost is None)


def _one_look(look: float) -> Strategy:
    def make(setting: Setting) -> Side:
        return OneLookSide(setting.task, RandomSearcher(setting.task, setting.seed), setting.cost, look, setting.setup[0])

    return Strategy(f"one look at 1/{round(1 / look)}, keep the best k", make, is_anytime=False)


RANDOM, TPE = {"name": "random"}, {"name": "tpe"}
NO_PRUNER, HALVING = {"name": "none"}, {"name": "successive_halving"}

STRATEGIES: dict[str, Strategy] = {
    "random": product("random, no pruning", {"sampler": RANDOM, "pruner": NO_PRUNER}),
    "random_halving": product("random + halving (factor 2)", {"sampler": RANDOM, "pruner": HALVING}),
    "random_halving_sized": product(
        "random + halving (factor 2), 4 trials for each full trial of cost",
        {"sampler": RANDOM, "pruner": HALVING},
        trials_a_cost=4,
    ),
    "random_halving_4": product("random + halving (factor 4)", {"sampler": RANDOM, "pruner": {**HALVING, "reduction_factor": 4}}),
    "tpe_halving": product("TPE + halving (factor 2)", {"sampler": TPE, "pruner": HALVING}),
    "tpe_halving_4": product("TPE + halving (factor 4)", {"sampler": TPE, "pruner": {**HALVING, "reduction_factor": 4}}),
    "random_hyperband": product("random + Hyperband", {"sampler": RANDOM, "pruner": {"name": "hyperband"}}),
    "random_median": product("random + median", {"sampler": RANDOM, "pruner": {"name": "median"}}),
    "random_asha": Strategy("random + Ray's ASHA", lambda at: RayAshaSide(at.task, RandomSearcher(at.task, at.seed))),
    "optuna_asha": Strategy("OptunaSearch + Ray's ASHA", lambda at: RayAshaSide(at.task, OptunaSearcher(at.task, at.seed))),
    "one_look_16": _one_look(1 / 16),
    "one_look": _one_look(1 / 8),
    "one_look_4": _one_look(1 / 4),
    "random_halving_prior": product(
        "random + halving, with the prior", {"sampler": RANDOM, "pruner": HALVING, "sweep": {"prior": True}}
    ),
    "tpe_halving_prior": product("TPE + halving, with the prior", {"sampler": TPE, "pruner": HALVING, "sweep": {"prior": True}}),
    "freeze_thaw": product("freeze and thaw", {"sampler": {"name": "freeze_thaw"}}, is_anytime=False),
    "freeze_thaw_alone": product(
        "freeze and thaw, without the prior",
        {"sampler": {"name": "freeze_thaw"}, "sweep": {"prior": False}},
        is_anytime=False,
    ),
}
