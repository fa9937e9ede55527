"""Read the files of conf/: groups, options, help texts, and whether a file is safe to expand."""

from __future__ import annotations

import functools
from pathlib import Path

import yaml

from engine.errors import InputError, first_line

# no defaults list names these groups; they are applied over the rest, in this order
APPENDED = ("experiment", "debug")
MAX_NODES = 10_000  # values in a file after its aliases are expanded; our largest file has 40


def conf_folder() -> Path:
    """Return conf/ inside the installed package, else next to the package in the repository."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def groups() -> dict[str, list[str]]:
    """Return every config group with its options."""
    folders = sorted(path for path in conf_folder().iterdir() if path.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def about(group: str, option: str) -> str:
    """Return an option's help text, the first comment of its file. Empty if there is none."""
    lines = option_file(group, option).read_text(encoding="utf-8", errors="replace").splitlines()
    comments = []
    for line in lines:
        if not line.startswith("# ") or line.startswith("# @package"):
            if comments or not line.startswith("#"):
                break
            continue
        comments.append(line.removeprefix("# "))
    return " ".join(comments)


def option_file(group: str, option: str) -> Path:
    return conf_folder() / group / f"{option}.yaml"


def refuse_faults(file: Path) -> None:
    """Raise InputError, with line and column, if the file is not a YAML mapping or empty.

    A file that holds text alone (`rank:8`, without a space) would be ignored.
    """
    try:
        root = yaml.compose(file.read_bytes(), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise fault_of(error, file) from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise InputError("config", _place(file, root.start_mark), "must hold keys with values, as `section: {key: value}`")


def fault_of(error: Exception, file: Path | None = None) -> InputError:
    """Return the InputError for a file that YAML cannot read: with its name, line and column.

    file: known if the error itself names none.
    """
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or first_line(error)
    hint = "; indent with spaces, not tabs" if "'\\t'" in problem else ""
    where = _place(file, mark)
    if isinstance(error, yaml.reader.ReaderError) and file is not None:
        where, problem = _place(file, _mark_at(file, error.position)), f"{problem}: character {error.character!r}"
    return InputError("config", where, f"must be plain YAML ({problem}){hint}")


def _mark_at(file: Path, position: int) -> yaml.Mark:
    """Return line and column of a position that YAML gives in bytes or characters."""
    before = file.read_bytes()[:position].decode("utf-8", "replace").split("\n")
    return yaml.Mark(str(file), position, len(before) - 1, len(before[-1]), None, None)


def _place(file: Path | None, mark: yaml.Mark | None) -> str:
    name = str(file) if file is not None else (mark.name if mark is not None else "a file of conf/")
    return name if mark is None else f"{name}, line {mark.line + 1}, column {mark.column + 1}"


def refuse_alias_bombs() -> None:
    """Raise InputError for a file of conf/ that would expand to more than MAX_NODES values.

    Composing copies a YAML alias (`*a`) at each use, so a dozen lines can ask for more memory than
    there is. This counts the values without expanding anything.
    """
    for file in sorted(conf_folder().rglob("*.yaml")):
        text = file.read_text(encoding="utf-8", errors="replace")
        if "&" not in text or "*" not in text:
            continue
        try:
            size = _num_values(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise fault_of(error, file) from None
        if size > MAX_NODES:
            raise InputError("config", str(file), f"must hold at most {MAX_NODES:,} values once its aliases are expanded")


@functools.lru_cache(64)
def _num_values(text: str) -> int:
    """Count the values of a YAML text with its aliases expanded. Known texts are not parsed again."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return 0 if root is None else _unfolded(root, {})


def _unfolded(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values under a node, an alias as often as the file uses it.

    A node that contains itself counts as more than MAX_NODES.
    """
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1  # until counted: a node met again by then contains itself
        children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = 0 if isinstance(node, yaml.ScalarNode) else sum(_unfolded(child, known) for child in children)
        known[id(node)] = 1 + inner
    return known[id(node)]
