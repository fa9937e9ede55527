"""Run `python -m sweep`: compose conf/ once, and pass the plain config to the driver."""

from __future__ import annotations

import sweep.cli.no_foreign_modules  # noqa: F401 (must be the first)

# isort: split
import argparse
import sys
from typing import Any, NoReturn

from engine.errors import InputError
from engine.system.command_line import run
from sweep.cli.lasting_output import lasting_output
from sweep.cluster.early_ray import end_process
from sweep.config.compose import compose, given_keys, parsed, repeated_keys, run_keys, to_yaml
from sweep.config.conf_files import groups

SKIP = {"--no-calibrate": "cluster.calibrate=false"}

__all__ = ["compose", "groups", "main"]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 1 no trial completed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return run(lambda: _main(arguments), output=lasting_output)


def _main(arguments: list[str]) -> int:
    if {"--help", "-h"} & set(arguments):
        from sweep.cli.help import help_text  # reads all of conf/, which a sweep need not wait for

        print(help_text([argument for argument in arguments if argument not in ("--help", "-h")]))
        return 0
    if arguments[:1] == ["--completion"] or arguments[:1] == ["--complete"]:
        return _complete(*arguments)
    if arguments[:1] == ["doctor"]:
        from sweep.doctor import diagnose  # loads what only it needs

        return diagnose(arguments[1:])
    if arguments[:1] == ["list"]:
        from sweep.results.sweeps_list import print_sweeps  # loads Optuna, slowly

        return print_sweeps(arguments[1:])
    from sweep import driver  # loads most of the program, help does not need it
    from sweep.cli.console import warn

    if arguments[:1] == ["show-sample"]:
        return driver.show_sample(*_sample_options(arguments[1:]))
    overrides = [argument for argument in arguments if argument != "--cfg"]
    overrides = [SKIP.get(argument, argument) for argument in overrides]
    keys, rest = run_keys(overrides)
    warn(repeated_keys(rest))
    if keys["resume"] is not None:
        if "--cfg" in arguments:
            allowed = "prints the config of a new sweep; sweep_config.json in the folder is this one's"
            raise InputError("--cfg", f"resume={keys['resume']}", allowed)
        return driver.resume(str(keys["resume"]), dict(map(parsed, rest)), dry_run=keys["dry_run"])
    raw, given = compose(rest), given_keys(rest)
    if "--cfg" in arguments:
        print(to_yaml(raw), end="")
        return 0
    return driver.start(raw, given=given, dry_run=keys["dry_run"])


def _sample_options(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the composed config, and the options that the engine's command gets."""
    parser = argparse.ArgumentParser(prog="python -m sweep show-sample", add_help=False)
    parser.add_argument("--sample", type=int, default=1)
    parser.add_argument("--eval", action="store_true")
    options, overrides = parser.parse_known_args(arguments)
    return compose(run_keys(overrides)[1]), ["--sample", str(options.sample), *(["--eval"] if options.eval else [])]


def _complete(option: str, value: str = "", *rest: str) -> int:
    """Print the script for `--completion SHELL`, or the candidates for `--complete WORD`."""
    from sweep.cli.completion import candidates, script  # only where a shell asks

    print(script(value) if option == "--completion" else "\n".join(candidates(value)))
    return 0


def command() -> NoReturn:
    """Run, and end the process with the exit code."""
    end_process(main())


if __name__ == "__main__":
    command()
