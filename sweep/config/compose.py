"""Compose conf/ and the overrides into one plain config, with Hydra.

This uses Hydra's compose API and not its decorator. There is no output folder, no logging setup and
no change of the working folder, and errors can become one line.

Overrides of values are forced in (`++`), so that an unknown key reaches the config model, whose
error names the known keys. A config may come from someone else, so harmful content is refused
before it is expanded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MissingMandatoryValue, OmegaConf
from omegaconf.errors import ConfigTypeError, InterpolationKeyError, OmegaConfBaseException

from engine.config.trial import TrainConfig
from engine.errors import InputError, did_you_mean, first_line
from sweep.config import conf_files
from sweep.config.interpolation import Interpolations
from sweep.config.sweep import SweepConfig
from sweep.config.typed_paths import in_hydras_grammar
from sweep.space.parse import WEIGHT, flattened
from sweep.space.unsearchable import UNSEARCHABLE

RANGE = re.compile(r"\.(?:choices|low|high|log|step|when)(?:\.|$)")  # what a dimension of the space is written with
RUN_KEYS = {"resume": None, "dry_run": False}


def compose(overrides: list[str]) -> dict[str, Any]:
    """Return the composed, resolved config as plain data.

    Raises InputError for a wrong override or a missing required value.
    """
    conf_files.refuse_alias_bombs()
    with initialize_config_dir(str(conf_files.conf_folder()), version_base="1.3"):
        try:
            config = hydra_compose("config", _in_order([_for_hydra(override) for override in overrides]))
            Interpolations(OmegaConf.to_container(config, resolve=False)).check()
            return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            raise InputError(str(error.full_key), "???", f"required; give it as {error.full_key}=...") from None
        except (HydraException, OmegaConfBaseException) as error:
            _refuse_other_kind(error.__cause__, overrides)
            _refuse_unknown_removal(overrides)
            if isinstance(error, InterpolationKeyError):
                allowed = f"{first_line(error)}; ${{section.key}} names a key of the composed config, which --cfg prints"
                raise InputError(error.full_key, _typed(error.full_key, overrides), allowed) from None
            line = " ".join(str(error if str(error) else error.__cause__).split("\n\n")[0].split())
            raise InputError("overrides", " ".join(overrides), line) from None
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise conf_files.fault_of(error) from None


def _refuse_other_kind(cause: BaseException | None, overrides: list[str]) -> None:
    """Raise InputError that names the key, if an override gives a section where a list stands, or a list for a section."""
    if isinstance(cause, ConfigTypeError) and cause.full_key:
        text = _typed(cause.full_key, overrides)
        if cause.object_type is list and text.startswith("{"):
            raise InputError(cause.full_key, text, f"must be a list: [{text}]") from None
        if cause.object_type is dict and text.startswith("["):
            raise InputError(cause.full_key, text, "must be a section: {key: value}") from None


def _refuse_unknown_removal(overrides: list[str]) -> None:
    """Raise InputError that names the first removal `~key` of what the config does not have."""
    kept = [override for override in overrides if not override.startswith("~")]
    if len(kept) < len(overrides):
        config = hydra_compose("config", _in_order([_for_hydra(override) for override in kept]))
        for key in (_split(override)[0] for override in overrides if override.startswith("~")):
            bare = key.removeprefix("~")
            if OmegaConf.select(config, bare) is None:
                leaves = flattened("", OmegaConf.to_container(config, resolve=False))
                known = dict.fromkeys(RANGE.split(path)[0].removeprefix(".") for path, _ in leaves)
                beside = [path for path in known if path.split(".")[0] == bare.split(".")[0]]
                allowed = f"is not in the config, so it cannot be removed; there are {', '.join(beside)}"
                raise InputError("argument", key, f"{allowed}{did_you_mean(bare, beside)}") from None


def _typed(key: str, overrides: list[str]) -> str:
    """Return the text that the command line last gave this key; empty if none."""
    return next((value for name, value in map(_split, reversed(overrides)) if name.lstrip("+") == key), "")


def to_yaml(raw: dict[str, Any]) -> str:
    """Return the composed config as `--cfg` prints it."""
    return OmegaConf.to_yaml(OmegaConf.create(raw))


def run_keys(overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Split resume and dry_run, which concern this run and not the sweep, from the other overrides.

    Returns the values of the two, and the other overrides.
    """
    run, rest = dict(RUN_KEYS), []
    for override in overrides:
        if _split(override)[0].lstrip("+") in RUN_KEYS:
            key, value = parsed(override)
            run[key.lstrip("+")] = value
        else:
            rest.append(override)
    if not isinstance(run["dry_run"], bool):
        raise InputError("dry_run", run["dry_run"], "must be true or false")
    return run, rest


def parsed(override: str) -> tuple[str, Any]:
    """Parse an override with Hydra's grammar. Returns (dotted key, value).

    Raises InputError if it is malformed.
    """
    key, value = _split(override)
    bare = key.lstrip("+")
    try:
        found = OverridesParser.create().parse_override(f"{key}={in_hydras_grammar(bare, value)}" if value else override)
        if found.is_sweep_override():
            over = bare.split(".")[0] in TrainConfig.model_fields and bare not in UNSEARCHABLE
            search = f", values to search over space.{bare}.choices=[{value}]" if over else ""
            raise InputError(bare, value, f"must be one value; a list is written {bare}=[{value}]{search}")
        return found.key_or_group, found.value()
    except (HydraException, ValueError) as error:  # ValueError: a number of more than 4,300 digits
        way_out = f"text with other characters is quoted: '{bare}=\"...\"'"
        if value.startswith("{"):  # Hydra has no quotes around keys
            way_out = r"a key is not quoted, and brackets in it have a backslash: '{layers.\[0-3\].*: 8}'"
        allowed = f"must be in Hydra's grammar ({first_line(error)}); {way_out}"
        raise InputError("argument", override, allowed) from None


def given_keys(overrides: list[str]) -> dict[str, Any]:
    """Return dotted key -> value of all values on the command line, without groups and removals.

    A chosen pruner is among them as `pruner.name`, because another group can switch it off. Of a key
    that is given twice, the last value counts.
    """
    return dict(_given(overrides))


def repeated_keys(overrides: list[str]) -> list[str]:
    """Return a warning for each value on the command line that a later one replaces."""
    given: dict[str, Any] = {}
    lines = []
    for name, value in _given(overrides):
        if name in given and given[name] != value:
            lines.append(f"{name} = {given[name]} has no effect, because a later argument sets {name} = {value}")
        given[name] = value
    return lines


def _given(overrides: list[str]) -> Iterator[tuple[str, Any]]:
    for override in overrides:
        key, value = _split(override)
        key = key.lstrip("+")
        if key == "pruner":
            yield "pruner.name", value
        elif not key.startswith("~") and key not in conf_files.groups():
            yield from flattened(key, parsed(override)[1])


def _for_hydra(override: str) -> str:
    """Check an override, and write it in Hydra's grammar.

    A group keeps Hydra's meaning, and its option must exist. A value is forced in.
    """
    key, value = _split(override)
    bare = key.lstrip("+~")
    known = conf_files.groups()
    if bare not in known:
        _check_section(bare, value)
        if key.startswith("~"):
            return override
        parsed(override)
        return f"++{bare}={in_hydras_grammar(bare, value)}"
    if value not in known[bare]:
        raise InputError(bare, value, f"must be one of {', '.join(known[bare])}{did_you_mean(value, known[bare])}")
    conf_files.refuse_faults(conf_files.option_file(bare, value))
    # Hydra appends a group that no defaults list names only with a plus; users may leave it out
    return f"+{bare}={value}" if bare in conf_files.APPENDED else f"{bare}={value}"


def _in_order(overrides: list[str]) -> list[str]:
    """Sort the appended groups into their fixed order, wherever they stand on the command line.

    The later one of them wins.
    """
    places = {f"+{group}": place for place, group in enumerate(conf_files.APPENDED, 1)}
    return sorted(overrides, key=lambda override: places.get(override.partition("=")[0], 0))


def _check_section(key: str, value: str) -> None:
    """Refuse an unknown section before Hydra asks for required values.

    A mistyped section is the likelier mistake.
    """
    sections = [*SweepConfig.model_fields, *conf_files.APPENDED, *RUN_KEYS]
    if key.split(".")[0] not in sections:
        hint = did_you_mean(key.split(".")[0], sections)
        raise InputError(key, value, f"unknown key; known: {', '.join(sections)}{hint}")
    for path, why in UNSEARCHABLE.items():
        if f"{key}.".startswith(f"space.{path}.") and not WEIGHT.match(key.removeprefix("space.")):
            raise InputError(key, value, f"cannot be searched over: {why}")


def _split(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    if not equals and not key.startswith("~"):
        raise InputError("argument", override, "must be group=option or section.key=value; see --help")
    return key, value
