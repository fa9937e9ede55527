"""Say at a sweep's end what can be done with it next."""

from __future__ import annotations

import os
import shlex

from engine.config.permission import FLAG
from engine.system.files import home_folder
from sweep.config.confirmations import ADDRESS, CODE, ON_END, credentials
from sweep.config.sweep import SweepConfig
from sweep.folder.sweep_folder import SweepFolder
from sweep.space.space import Space


def resume_command(folder: SweepFolder) -> str:
    """Return what to type to go on, with the confirmations that it will be asked for."""
    words, config = [f"resume={folder.path}"], folder.read_config()
    words += [f"{CODE}=true"] if config.model.trust_remote_code else []
    words += [f"metrics.{name}={metric.function}" for name, metric in config.metrics.own.items()]
    words += [f"{ON_END}={config.tracking.on_end}"] if config.tracking.on_end is not None else []
    if config.tracking.uri and credentials(os.environ, home_folder()):
        words.append(f"{ADDRESS}={config.tracking.public_uri}")
    return f"python -m sweep {' '.join(map(shlex.quote, words))}"


def next_steps(folder: SweepFolder, config: SweepConfig, space: Space, has_adapter: bool, is_finished: bool = False) -> str:
    """Return the commands that most users want now, one a line, each with what it does.

    config: as commands have changed it. is_finished: by the command `finish`, which `add` takes back.
    """
    best, permission = shlex.quote(str(folder.best)), f" {FLAG}" if config.model.trust_remote_code else ""
    steps = []
    if has_adapter:
        steps.append(("talk to it", f"python -m engine.chat {best}{permission}"))
        steps.append(("use it elsewhere", f"python -m engine.export {best} --to merged --out DIR{permission}"))
    steps.append(("look at trials", f"python -m sweep.ui {shlex.quote(str(folder.path))}"))
    size, trials = space.size(), config.sweep.num_trials
    if size is None or size > trials:
        more = 2 * trials if size is None else min(2 * trials, size)
        resume, add = resume_command(folder), f"python -m sweep.control {shlex.quote(str(folder.path))} add {more - trials}"
        steps.append(("search on", f"{add} && {resume}" if is_finished else f"{resume} sweep.num_trials={more}"))
    return "\n".join(["", *(f"{what:<17} {command}" for what, command in steps)])
