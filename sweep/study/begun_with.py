"""Read from the journal what a sweep began with, and refuse a config file that was edited since.

The journal is the record. `sweep_config.json` is its copy for people and programs to read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import InputError
from sweep.config.resume_changes import parse_recorded_config, refuse_edits
from sweep.config.sweep import SweepConfig
from sweep.folder.sweep_folder import SweepFolder
from sweep.prior.kept_beginning import Attributes
from sweep.steering.history import with_all_settings
from sweep.study.journal import read_attributes
from sweep.study.kept_commands import taken_commands

CONFIG, INPUTS = "config", "inputs"
NUM_COMMANDS = "num_commands"  # key in the config's text: so many commands had changed it already


@dataclass(frozen=True)
class BegunWith:
    """Hold the config and the digests of the inputs; None where an older version kept none.

    num_commands: how many commands of the journal the config holds the settings of.
    """

    config: SweepConfig | None
    inputs: dict[str, str] | None
    num_commands: int = 0


def as_attributes(config: SweepConfig, inputs: Mapping[str, str], num_commands: int = 0) -> dict[str, str]:
    """Return the study's attributes that `read_begun_with` reads. `space` keeps its order."""
    values = {**config.model_dump(mode="json"), **({NUM_COMMANDS: num_commands} if num_commands else {})}
    return {CONFIG: json.dumps(values), INPUTS: json.dumps(dict(inputs))}


def keep(study: Attributes, attributes: Mapping[str, str]) -> bool:
    """Keep these attributes in the journal. Returns whether it had a config before."""
    known = study.user_attrs
    for name, text in attributes.items():
        if known.get(name) != text:
            study.set_user_attr(name, text)
    return CONFIG in known


def read_begun_with(folder: SweepFolder) -> BegunWith:
    """Return what the journal says. Nothing is changed, and the sweep may be running."""
    return _begun_with(folder, read_attributes(folder))


def _begun_with(folder: SweepFolder, attributes: Mapping[str, Any]) -> BegunWith:
    config, inputs = attributes.get(CONFIG), attributes.get(INPUTS)
    try:
        values = None if config is None else json.loads(config)
        num_commands = 0 if values is None else int(values.pop(NUM_COMMANDS, 0))
        return BegunWith(None if values is None else parse_recorded_config(values), inputs and json.loads(inputs), num_commands)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise InputError("resume", str(folder.journal), f"holds no valid record of the sweep's config ({error})") from None


def read_unedited_config(folder: SweepFolder, attributes: Mapping[str, Any] | None = None) -> SweepConfig:
    """Return the folder's config, as the commands of `sweep.control` have changed it since.

    attributes: the study's own, if they have been read from the journal already. InputError if the
    file differs from the journal in more than a resume may change.
    """
    return _effective_config(folder, refuse_edits, read_attributes(folder) if attributes is None else attributes)


def read_effective_config(folder: SweepFolder) -> SweepConfig:
    """Return the folder's config, with the settings of the commands that came after it. Nothing is changed."""
    return _effective_config(folder, lambda config, recorded: None, read_attributes(folder))


def _effective_config(
    folder: SweepFolder, check: Callable[[SweepConfig, SweepConfig], None], attributes: Mapping[str, Any]
) -> SweepConfig:
    config = folder.read_config()
    begun = _begun_with(folder, attributes)
    if begun.config is not None:
        check(config, begun.config)
    return with_all_settings(config, taken_commands(attributes)[begun.num_commands :])
