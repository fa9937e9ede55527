"""Make a config's relative paths absolute, so that a sweep can be resumed from any folder."""

from __future__ import annotations

from pathlib import Path

from engine.config.trial import ON_TRAINING_SAMPLES
from sweep.config.sweep import SweepConfig

FIELDS = (("model", "path"), ("data", "train"), ("data", "eval"), ("data", "chat_template"))
SQLITE = "sqlite:///"


def with_absolute_paths(config: SweepConfig, folder: Path) -> SweepConfig:
    """Return the config with the paths of existing files and folders made absolute.

    folder: relative paths start here. A name that is no file or folder there stays as it is, since
    it may be a hub id.
    """
    changes: dict[str, dict[str, str]] = {}
    for section, field in FIELDS:
        value = getattr(getattr(config, section), field)
        if field == "chat_template" and not str(value).endswith(".jinja"):
            continue  # the name of a template, not a file
        if field == "eval" and value == ON_TRAINING_SAMPLES:
            continue
        if value is not None and (folder / Path(value).expanduser()).exists():
            changes.setdefault(section, {})[field] = str(folder / Path(value).expanduser())
    uri = config.tracking.uri
    if uri is not None and uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/"):
        changes["tracking"] = {"uri": f"{SQLITE}{folder / uri.removeprefix(SQLITE)}"}
    updated = {section: getattr(config, section).model_copy(update=fields) for section, fields in changes.items()}
    return config.model_copy(update=updated)
