"""Check the code's layout: where files are, what they are called and what they import.

Each check takes the repository's folder and returns the places that break its rule.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

HALVES = ("engine", "sweep")
MOST_IN_A_ROOT = 8
FEWEST_IN_A_ROOM, MOST_IN_A_ROOM = 3, 12
MAY_REPEAT = {"__init__", "__main__", "config"}
PATH = re.compile(r"(?<![\w./<>{}-])(?:engine|sweep|conf|tests|docs|dashboards)/[\w./*-]*")


def crowded_or_empty(root: Path) -> list[str]:
    """A half's own folder holds at most 8 code files, a room 3 to 12."""
    found = []
    for folder, is_room in _packages(root):
        count = len([file for file in folder.glob("*.py") if file.name != "__init__.py"])
        fewest, most = (FEWEST_IN_A_ROOM, MOST_IN_A_ROOM) if is_room else (0, MOST_IN_A_ROOT)
        if not fewest <= count <= most:
            found.append(f"{folder.relative_to(root)}: {count} files")
    return found


def rooms_without_their_sentence(root: Path) -> list[str]:
    """A room's __init__ holds one sentence and nothing else."""
    found = []
    for folder, is_room in _packages(root):
        file = folder / "__init__.py"
        body = _tree(file).body if file.is_file() else []
        text = ast.get_docstring(ast.Module(body, [])) or ""
        if is_room and not (len(body) == 1 and text.endswith(".") and not re.search(r"[.!?]\s", text)):
            found.append(str(file.relative_to(root)))
    return found


def repeated_file_names(root: Path) -> list[str]:
    """A file's name has one meaning over both halves."""
    places = defaultdict(list)
    for file in _code(root):
        if file.stem not in MAY_REPEAT:
            places[file.stem].append(str(file.relative_to(root)))
    return [" and ".join(files) for files in places.values() if len(files) > 1]


def repeated_class_names(root: Path) -> list[str]:
    """A class name, even a private one, has one meaning over both halves."""
    places = defaultdict(list)
    for file in _code(root):
        for node in _tree(file).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(file.relative_to(root)))
    return [f"{name}: {' and '.join(files)}" for name, files in places.items() if len(files) > 1]


def tests_that_import_tests(root: Path) -> list[str]:
    """Code that test files share is in tests/support/, or is a fixture of a conftest.py."""
    found = []
    for file in sorted((root / "tests").rglob("test_*.py")):
        for node in ast.walk(_tree(file)):
            parts = {part for name in _named(node) for part in name.split(".")}
            found += [f"{file.relative_to(root)}: {part}" for part in sorted(parts) if _is_a_tests_name(part)]
    return found


def tests_without_a_room(root: Path) -> list[str]:
    """Every test is in a folder; a room's tests are in a folder of the room's name."""
    found = [str(file.relative_to(root)) for file in sorted((root / "tests").glob("test_*.py"))]
    for half in HALVES:
        for folder in sorted({file.parent for file in (root / "tests" / half).rglob("test_*.py")}):
            if not (root / folder.relative_to(root / "tests") / "__init__.py").is_file():
                found.append(str(folder.relative_to(root)))
    return found


def import_circles(root: Path) -> list[str]:
    """No file needs itself while it is loaded.

    Imports in functions and for type checkers alone do not count.
    """
    files = [*_code(root), *sorted((root / "tests").rglob("*.py"))]
    modules = {_module(file.relative_to(root)): file for file in files}
    graph = {module: _loaded_by(file, module, set(modules)) - {module} for module, file in modules.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][:0:-1]  # each imports the next
        first = circle.index(min(circle))
        return [" -> ".join([*circle[first:], *circle[:first], circle[first]])]
    return []


def missing_paths(root: Path, text: str) -> list[str]:
    """Paths that a document names between backticks, alone or in a command, exist.

    A path with a * must match something.
    """
    spans = re.findall(r"```.*?```|`[^`]+`", text, re.S)
    paths = dict.fromkeys(path.rstrip(".-") for span in spans for path in PATH.findall(span))
    return [path for path in paths if not (any(root.glob(path)) if "*" in path else (root / path).exists())]


def _packages(root: Path) -> Iterator[tuple[Path, bool]]:
    """Return the folders with code, and whether each is a room."""
    for half in HALVES:
        for folder in sorted({file.parent for file in (root / half).rglob("*.py")}):
            yield folder, folder != root / half


def _code(root: Path) -> list[Path]:
    return [file for half in HALVES for file in sorted((root / half).rglob("*.py"))]


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def _is_a_tests_name(part: str) -> bool:
    return part.startswith("test_") or part == "conftest"


def _named(node: ast.AST) -> list[str]:
    """Return the modules that an import names, and the names that it takes from them."""
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(alias.name for alias in node.names)]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _loaded_by(file: Path, module: str, known: set[str]) -> set[str]:
    """Return the modules of the project that are loaded together with this one."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in _run_on_import(_tree(file).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{source}.{alias.name}" for alias in node.names}
            found |= (inner & known) or {source}
    return found & known


def _run_on_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from _run_on_import(node.orelse)
            continue
        for name in ("body", "orelse", "handlers", "finalbody"):
            for inner in getattr(node, name, []):
                yield from _run_on_import(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])
