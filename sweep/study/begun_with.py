"""Read from the journal what a sweep began with, and refuse a config file that was edited since.

The journal is the record. `sweep_config.json` is its copy for people and programs to read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import InputError
from sweep.config.resume_changes import refuse_edits
from sweep.config.sweep import SweepConfig, parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.study.journal import read_attributes

CONFIG, INPUTS = "config", "inputs"


@dataclass(frozen=True)
class BegunWith:
    """Hold the config and the digests of the inputs; None where an older version kept none."""

    config: SweepConfig | None
    inputs: dict[str, str] | None


def as_attributes(config: SweepConfig, inputs: Mapping[str, str]) -> dict[str, str]:
    """Return the study's attributes that `read_begun_with` reads. `space` keeps its order."""
    return {CONFIG: json.dumps(config.model_dump(mode="json")), INPUTS: json.dumps(dict(inputs))}


def read_begun_with(folder: SweepFolder) -> BegunWith:
    """Return what the journal says. Nothing is changed, and the sweep may be running."""
    attributes = read_attributes(folder)
    config, inputs = attributes.get(CONFIG), attributes.get(INPUTS)
    try:
        return BegunWith(None if config is None else parse_sweep_config(json.loads(config)), inputs and json.loads(inputs))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError("resume", str(folder.journal), f"holds no valid record of the sweep's config ({error})") from None


def read_unedited_config(folder: SweepFolder) -> SweepConfig:
    """Return the folder's config.

    InputError if the file differs from the journal in more than a resume may change.
    """
    config, recorded = folder.read_config(), read_begun_with(folder).config
    if recorded is not None:
        refuse_edits(config, recorded)
    return config
