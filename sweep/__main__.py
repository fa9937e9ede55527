"""python -m sweep: composes conf/ with Hydra, once, and hands a plain dict to the driver. Hydra enters only here.

Hydra's compose API, not its decorator: no output folder, no logging setup, no change of the working folder, and errors that can
be turned into one line. Overrides of values are forced in (`++`), so that an unknown key reaches the config model, which names
the known ones. Interpolation may name other keys of the config and nothing else: a resolver (`${oc.env:...}`) would carry what it
reads of this machine into the sweep folder and MLflow, and a config may come from elsewhere.
"""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any

import yaml

from engine.errors import EngineError, InputError, first_line

RUN_KEYS = {"resume": None, "dry_run": False}
USAGE = """usage: python -m sweep [group=option ...] [section.key=value ...]

  python -m sweep +experiment=quickstart                       a whole sweep on two CPU cores, in minutes
  python -m sweep model=llama-3.1-8b data=local data.train=my.jsonl space=rank-targets-length sweep.num_trials=32
  python -m sweep +experiment=quickstart dry_run=true          print the plan, start nothing
  python -m sweep ... cluster.card=rtx4090 dry_run=true        and what it needs there: memory, speed, GPU hours; without a GPU
  python -m sweep +experiment=quickstart --cfg                 print the composed config, start nothing
  python -m sweep resume=sweeps/quickstart-20250101-120000     go on after a kill; sweep.num_trials and sweep.budget may be raised
"""


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 1 no trial completed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _main(arguments)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _main(arguments: list[str]) -> int:
    if {"--help", "-h"} & set(arguments):
        print(_help())
        return 0
    from sweep import driver

    overrides = [argument for argument in arguments if argument != "--cfg"]
    run, rest = _run_keys(overrides)
    if run["resume"] is not None:
        return driver.resume(str(run["resume"]), dict(map(_parsed, rest)), dry_run=run["dry_run"])
    raw = compose(rest)
    if "--cfg" in arguments:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(OmegaConf.create(raw)), end="")
        return 0
    return driver.start(raw, dry_run=run["dry_run"])


def conf_folder() -> Path:
    """conf/ inside the package where it was installed, else beside the package in the repository."""
    here = Path(__file__).resolve().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def groups() -> dict[str, list[str]]:
    """Every config group and its options."""
    folders = sorted(path for path in conf_folder().iterdir() if path.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def compose(overrides: list[str]) -> dict[str, Any]:
    """The composed, resolved config as plain data; InputError where an override or a required value is wrong."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import MissingMandatoryValue, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        try:
            config = hydra_compose("config", [_for_hydra(override) for override in overrides])
            _refuse_resolvers(OmegaConf.to_container(config, resolve=False))
            return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            raise InputError(str(error.full_key), "???", f"required; give it as {error.full_key}=...") from None
        except (HydraException, OmegaConfBaseException) as error:
            line = " ".join(str(error).split("\n\n")[0].split())
            raise InputError("overrides", " ".join(overrides), line) from None
        except (yaml.YAMLError, RecursionError, UnicodeError) as error:
            raise InputError("config", " ".join(overrides), f"must be plain YAML ({first_line(error)})") from None


def _refuse_resolvers(node: Any, path: str = "") -> None:
    """InputError where a value interpolates anything but a key of the config. Looked at before anything is resolved."""
    from omegaconf.grammar_parser import OmegaConfGrammarParser, parse

    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            _refuse_resolvers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, str) and "${" in node:
        waiting = [parse(node)]
        while waiting:
            part = waiting.pop()
            if isinstance(part, OmegaConfGrammarParser.InterpolationResolverContext):
                raise InputError(path, node, "may refer to keys of the config only, as ${section.key}; resolvers are not run")
            waiting += getattr(part, "children", None) or []


def _for_hydra(override: str) -> str:
    """A group keeps Hydra's meaning, and must exist; a value is forced in."""
    key, value = _split(override)
    bare = key.lstrip("+~")
    known = groups()
    if bare not in known:
        _check_section(bare, value)
        return override if key.startswith("~") else f"++{bare}={value}"
    if value not in known[bare]:
        raise InputError(bare, value, f"must be one of {', '.join(known[bare])}")
    # experiment is not in the defaults list: it must be appended, and whoever leaves the plus out means the same
    return f"+{bare}={value}" if bare == "experiment" else f"{bare}={value}"


def _check_section(key: str, value: str) -> None:
    """Before Hydra asks for required values: a mistyped section is the likelier fault."""
    from sweep.config import SweepConfig

    sections = [*SweepConfig.model_fields, "experiment", *RUN_KEYS]
    if key.split(".")[0] not in sections:
        near = difflib.get_close_matches(key.split(".")[0], sections, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(key, value, f"unknown key; known: {', '.join(sections)}{hint}")


def _split(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    if not equals and not key.startswith("~"):
        raise InputError("argument", override, "must be group=option or section.key=value; see --help")
    return key, value


def _parsed(override: str) -> tuple[str, Any]:
    """An override as (dotted key, value), in Hydra's own grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    _split(override)
    try:
        parsed = OverridesParser.create().parse_override(override)
        return parsed.key_or_group, parsed.value()
    except HydraException as error:
        raise InputError("argument", override, " ".join(str(error).split())) from None


def _run_keys(overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Split off resume and dry_run, which are about this run and not about the sweep."""
    run, rest = dict(RUN_KEYS), []
    for override in overrides:
        if _split(override)[0].lstrip("+") in RUN_KEYS:
            key, value = _parsed(override)
            run[key] = value
        else:
            rest.append(override)
    if not isinstance(run["dry_run"], bool):
        raise InputError("dry_run", run["dry_run"], "must be true or false")
    return run, rest


def _help() -> str:
    lines = [USAGE, "groups:"]
    lines += [f"  {name:<11} {', '.join(options)}" for name, options in groups().items()]
    return "\n".join([*lines, "", "values: any key of the composed config; --cfg prints them all"])


if __name__ == "__main__":
    sys.exit(main())
