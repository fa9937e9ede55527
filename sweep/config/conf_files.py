"""The files of conf/: which groups and options there are, what each says of itself, and whether one is safe to unfold."""

from __future__ import annotations

from pathlib import Path

import yaml

from engine.errors import InputError, first_line

APPENDED = ("experiment", "debug")  # groups that no defaults list names, in the order in which they are laid over the rest
MAX_NODES = 10_000  # of a file, with its aliases unfolded; the largest of ours has 40


def conf_folder() -> Path:
    """conf/ inside the package where it was installed, else beside the package in the repository."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def groups() -> dict[str, list[str]]:
    """Every config group and its options."""
    folders = sorted(path for path in conf_folder().iterdir() if path.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def about(group: str, option: str) -> str:
    """What the option's file says of itself: its first comment; nothing where it has none."""
    lines = (conf_folder() / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    comments = []
    for line in lines:
        if not line.startswith("# ") or line.startswith("# @package"):
            if comments or not line.startswith("#"):
                break
            continue
        comments.append(line.removeprefix("# "))
    return " ".join(comments)


def refuse_alias_bombs() -> None:
    """InputError where a file of conf/ would grow beyond MAX_NODES values: each alias of YAML (`*a`) is a copy once composed,
    so a dozen lines can ask for more memory than there is. Counted without unfolding anything."""
    for file in sorted(conf_folder().rglob("*.yaml")):
        text = file.read_text(encoding="utf-8", errors="replace")
        if "&" not in text or "*" not in text:
            continue
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            size = 0 if root is None else _unfolded(root, {})
        except (yaml.YAMLError, RecursionError) as error:
            raise InputError("config", str(file), f"must be plain YAML ({first_line(error)})") from None
        if size > MAX_NODES:
            raise InputError("config", str(file), f"must hold at most {MAX_NODES:,} values once its aliases are unfolded")


def _unfolded(node: yaml.Node, known: dict[int, int]) -> int:
    """Values under a node, each alias counted as often as it stands there; one that stands inside itself counts as too many."""
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1  # until it is known: what meets it again is inside it
        children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = 0 if isinstance(node, yaml.ScalarNode) else sum(_unfolded(child, known) for child in children)
        known[id(node)] = 1 + inner
    return known[id(node)]
