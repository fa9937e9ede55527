"""Read a path as a person types it: `~` is the home folder, every other character is itself."""

from __future__ import annotations

import glob
import os
from pathlib import Path


def user_path(text: str | Path) -> Path:
    """Return the path with a leading `~` or `~user` expanded.

    A shell expands it only at the start of a word, so not in `--out=~/x` or `data.train=~/x`. If
    there is no such home folder, the path stays as it is.
    """
    return Path(os.path.expanduser(text))


def names_something(text: str, folder: Path = Path()) -> bool:
    """Return whether a file or folder has this name, seen from `folder`, or fits this pattern."""
    path = str(folder / user_path(text))
    return os.path.exists(path) or (glob.has_magic(text) and next(glob.iglob(path, recursive=True), None) is not None)
