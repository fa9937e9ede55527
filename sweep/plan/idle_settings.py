"""Find settings that change nothing because of another setting, so that nobody believes in them.

A setting of the command line is refused with both names. One from a file of conf/ is a warning,
because the file may serve other sweeps too. Options of a pruner that is off give none: the plan says
that the whole pruner is off, and the user may have set none of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from engine.config.data_section import ON_TRAINING_SAMPLES, as_list
from engine.config.optim_section import LIONS
from engine.errors import InputError
from engine.sources.builtin import PREFIX
from engine.sources.hub_ids import is_only_on_hub
from engine.system.user_path import user_path
from sweep.config.sweep import SweepConfig
from sweep.space.space import Choice, Space

MISSING = object()


@dataclass(frozen=True)
class Settings:
    """Hold a config and its space, and say which values a field can have in a trial."""

    config: SweepConfig
    space: Space

    def base(self, path: str) -> Any:
        """Return the config's own value, MISSING if this kind of sampler or pruner has no such key."""
        value: Any = self.config
        for part in path.split("."):
            if isinstance(value, tuple) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                value = getattr(value, part, MISSING)
        return value

    def always(self, path: str, holds: Callable[[Any], bool]) -> bool:
        """Return whether this holds for every value that the field has in some trial."""
        varied = next((dimension for dimension in self.space.dimensions if dimension.path == path), None)
        values = [] if varied is not None and not varied.when else [self.base(path)]
        if varied is not None:
            values += list(varied.values.values()) if isinstance(varied, Choice) else varied.corners()
        return all(map(holds, values))


Rule = Callable[[Settings], str | None]
"""Returns why the field changes nothing, or None if it does change something."""


def _if_equal(path: str, value: Any) -> Rule:
    return lambda given: f"{path} = {value}" if given.always(path, lambda found: found == value) else None


def _unless_equal(path: str, value: Any) -> Rule:
    """The field has its effect only with this value of another one."""
    return lambda given: f"no trial has {path} = {value}" if given.always(path, lambda found: found != value) else None


def _if_set(path: str) -> Rule:
    return lambda given: f"{path} is given" if given.always(path, lambda found: found is not None) else None


def _if_unset(path: str) -> Rule:
    return lambda given: f"{path} is not given" if given.base(path) is None else None


def _if_here(path: str) -> Rule:
    """The source is a file, a folder or built in, so nothing is asked of the hub."""
    return lambda given: f"{path} is not on the hub" if _is_here(given.base(path)) else None


def _first(*rules: Rule) -> Rule:
    return lambda given: next(filter(None, (rule(given) for rule in rules)), None)


def _own_evaluation(given: Settings) -> str | None:
    source = given.config.data.train
    is_builtin = not given.config.data.mixture and as_list(source)[0].startswith(PREFIX)
    return f"data.train = {source} brings its own evaluation samples" if is_builtin else None


def _none_held_out(given: Settings) -> str | None:
    return None if given.config.data.holds_out else "data.eval is given"


def _no_pruner(given: Settings) -> str | None:
    if given.config.pauses_trials:
        return f"sampler={given.config.sampler.name} pauses trials instead of pruning them (others, such as sampler=tpe, prune)"
    return "sweep.objectives has several" if len(given.config.sweep.objectives) > 1 else None


def _chosen_pruner(given: Settings) -> str | None:
    return None if given.config.pruner.name == "none" else _no_pruner(given)


def _if_no_folder(path: str) -> Rule:
    """The source is no folder and not on the hub; only those two have splits and configurations."""

    def reason(given: Settings) -> str | None:
        source = given.base(path)
        is_folder = isinstance(source, str) and os.path.isdir(user_path(source))
        return f"{path} is no folder and not on the hub" if _is_here(source) and not is_folder else None

    return reason


def _is_here(source: str | tuple[str, ...] | None) -> bool:
    return source is not None and source != ON_TRAINING_SAMPLES and not is_only_on_hub(source)


def _no_metric(given: Settings) -> str | None:
    return None if given.config.metrics.names else "no metric is named, such as metrics.exact_match=true"


def _no_answers(given: Settings) -> str | None:
    return None if given.config.metrics.generates else "no metric that generates answers is named"


def _no_time_limit(given: Settings) -> str | None:
    metrics = given.config.metrics
    return None if metrics.own or metrics.regex else "neither a function of yours nor metrics.regex is named"


def _muon_alone(given: Settings) -> str | None:
    """Muon steps A and B by their momentum; DoRA's magnitudes beside them take AdamW's steps."""
    is_muon = given.always("optim.name", lambda found: found == "muon")
    return "Muon has beta1 alone" if is_muon and given.always("lora.use_dora", lambda found: not found) else None


def _lion(given: Settings) -> str | None:
    return "Lion has no eps" if given.always("optim.name", lambda found: found in LIONS) else None


_NO_EVAL = (_if_unset("data.eval"), _if_equal("data.eval", ON_TRAINING_SAMPLES))


RULES: dict[str, Rule] = {
    "model.revision": _if_here("model.path"),
    "model.double_quantization": _if_equal("model.quantization", "none"),
    "data.train_split": _if_no_folder("data.train"),
    "data.train_name": _if_no_folder("data.train"),
    "data.train_revision": _if_here("data.train"),
    "data.train_files": _if_here("data.train"),
    "data.eval_fraction": _first(_none_held_out, _own_evaluation),
    "data.eval_split": _first(*_NO_EVAL, _if_no_folder("data.eval")),
    "data.eval_name": _first(*_NO_EVAL, _if_no_folder("data.eval")),
    "data.eval_revision": _first(*_NO_EVAL, _if_here("data.eval")),
    "data.eval_files": _first(*_NO_EVAL, _if_here("data.eval")),
    "data.chat_template": _if_equal("data.format", "text"),
    "data.template_kwargs": _if_equal("data.format", "text"),
    "data.turns": _if_equal("data.format", "text"),
    "data.date": _if_equal("data.format", "text"),
    "optim.decay_ratio": _unless_equal("optim.lr_schedule", "wsd"),
    "optim.beta2": _muon_alone,
    "optim.eps": _first(_lion, _muon_alone),
    "metrics.at": _no_metric,
    "metrics.max_samples": _no_metric,
    "metrics.max_new_tokens": _no_answers,
    "metrics.temperature": _no_answers,
    "metrics.batch_size": _no_answers,
    "metrics.function_timeout_s": _no_time_limit,
    "optim.min_lr_ratio": _if_equal("optim.lr_schedule", "constant"),
    "train.num_reports": _if_set("train.report_at_tokens"),
    "train.gradient_accumulation_steps": _if_set("train.tokens_per_step"),
    "train.memory_budget_gib": _if_equal("train.device", "cpu"),
    "sweep.prior": _if_equal("sampler.name", "grid"),
    "cluster.num_gpus": _if_equal("train.device", "cpu"),
    "cluster.num_cpu_slots": _if_equal("train.device", "cuda"),
    "cluster.wait_s": _first(_if_unset("cluster.address"), _if_equal("cluster.num_gpus", "auto")),
    "tracking.uri": _if_equal("tracking.name", "none"),
    "tracking.registered_model": _if_equal("tracking.name", "none"),
    "tracking.metrics_host": _if_unset("tracking.metrics_port"),
    "pruner.name": _chosen_pruner,
    "pruner.min_rung": _no_pruner,
    "pruner.reduction_factor": _no_pruner,
    "pruner.min_early_stopping_rate": _no_pruner,
    "pruner.num_startup_trials": _no_pruner,
    "pruner.num_warmup_rungs": _no_pruner,
    "pruner.patience": _no_pruner,
    "pruner.min_delta": _no_pruner,
    "pruner.inner": _no_pruner,
}
"""RULES maps a field to what makes it idle. Add a field here when another one can switch it off."""


def refuse_idle_overrides(config: SweepConfig, space: Space, given: Mapping[str, Any]) -> None:
    """Raise InputError for a value of the command line that changes nothing.

    given: dotted key -> value of the command line. null asks for nothing, so it is taken.
    """
    settings, varied = Settings(config, space), {dimension.path: dimension for dimension in space.dimensions}
    for path, value in given.items():
        dimension = varied.get(path)
        if dimension is not None and not dimension.when:
            allowed = f"has no effect, because space.{path} varies it ({dimension.describe()}); to fix it, add '~space.{path}'"
            raise InputError(path, value, allowed)
        rule = next((rule for field, rule in RULES.items() if _is_of(path, field)), None)
        reason = rule(settings) if rule is not None and value is not None else None
        if reason:
            raise InputError(path, value, f"has no effect, because {reason}; leave one of the two out")


def idle_settings(config: SweepConfig, space: Space, given: Mapping[str, Any]) -> Iterator[str]:
    """Yield a warning for each setting of the config that is not the default and changes nothing."""
    settings = Settings(config, space)
    for dimension in space.dimensions:
        base = settings.base(dimension.path)
        if not dimension.when and not dimension.holds(base) and base != _default(config, dimension.path):
            yield f"{dimension.path} = {base} has no effect, because space.{dimension.path} varies it ({dimension.describe()})"
        if dimension.path in RULES and (reason := RULES[dimension.path](settings)):
            yield f"space.{dimension.path} has no effect, because {reason}: trials that differ in nothing else are equal"
    for path, rule in RULES.items():
        section, value, reason = path.split(".")[0], settings.base(path), rule(settings)
        if reason and path not in given and section != "pruner" and value not in (MISSING, _default(config, path)):
            yield f"{path} = {value} has no effect, because {reason}"


def _is_of(path: str, field: str) -> bool:
    """Return whether the key is this field, or a part of its leaf in the space."""
    return path == field or path.startswith(f"{field}.") or f"{path}.".startswith(f"space.{field}.")


def _default(config: SweepConfig, path: str) -> Any:
    *owner, field = path.split(".")
    model: type[BaseModel] = type(Settings(config, Space(())).base(".".join(owner)))
    return model.model_fields[field].default
