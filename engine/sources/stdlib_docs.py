"""Build `builtin:stdlib-docs`: instruction pairs from the docstrings of Python's standard library.

A question names a module, class, function or method with its signature; the answer is its
docstring. The builder parses the sources and never imports them, so no foreign code runs. One
Python version always gives the same files.

Training and evaluation share no top-level module. An evaluation answer that also occurs in training
is dropped: posixpath and ntpath repeat each other.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import platform
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.system.shared_cache import build_once

EVAL_FRACTION = 0.1  # of all pairs, rounded up to whole top-level modules
MIN_CHARS, MAX_CHARS = 40, 1200
MAX_SIGNATURE_CHARS = 160
SEED = "stdlib-docs"
PROGRAMS_AND_TESTS = {"test", "tests", "idlelib", "lib2to3", "turtledemo"}
NOT_LIBRARY = {"lib-dynload", "site-packages", "dist-packages", "sitecustomize", "usercustomize"}
LITTLE_TO_LEARN = {"antigravity", "encodings", "ensurepip", "pydoc_data", "this", "tkinter"}
SKIPPED_PARTS = PROGRAMS_AND_TESTS | NOT_LIBRARY | LITTLE_TO_LEARN
PHRASINGS = {
    "module": (
        "What is the Python module `{name}` for?",
        "Describe the standard library module `{name}`.",
        "When would I use Python's `{name}` module?",
    ),
    "class": (
        "What is the class `{signature}` in Python?",
        "Describe the standard library class `{signature}`.",
        "What does Python's `{signature}` represent?",
    ),
    "function": (
        "What does `{signature}` do?",
        "Explain the Python standard library function `{signature}`.",
        "Document the function `{signature}`.",
        "How does `{signature}` behave in Python?",
    ),
    "method": (
        "What does the method `{signature}` do?",
        "Explain `{signature}` from the Python standard library.",
        "Document the method `{signature}`.",
    ),
}
Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Pair:
    """Hold one question with its answer; `module` is its top-level module."""

    module: str
    name: str
    question: str
    answer: str

    def to_json(self) -> str:
        messages = [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]
        return json.dumps({"messages": messages}, ensure_ascii=False)


def ensure() -> tuple[Path, Path]:
    """Return train.jsonl and eval.jsonl of this Python version, built on first use."""
    folder = build_once(f"stdlib-docs-v1-py{platform.python_version()}", write)
    return folder / "train.jsonl", folder / "eval.jsonl"


def write(folder: Path, library: Path | None = None) -> None:
    """Write train.jsonl and eval.jsonl into `folder`.

    library: folder of sources; None means this Python's standard library.
    """
    train, evaluation = split(list(pairs(library or Path(sysconfig.get_path("stdlib")))))
    for name, part in (("train", train), ("eval", evaluation)):
        (folder / f"{name}.jsonl").write_text("".join(pair.to_json() + "\n" for pair in part), encoding="utf-8")


def split(all_pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Return (train, eval) with about EVAL_FRACTION of the pairs in eval.

    Each answer occurs once, and both lists are in a fixed shuffled order.
    """
    sizes = Counter(pair.module for pair in all_pairs)
    held_out: set[str] = set()
    for module in sorted(sizes, key=_hash):
        if sum(sizes[name] for name in held_out) >= EVAL_FRACTION * len(all_pairs):
            break
        held_out.add(module)
    shuffled = sorted(all_pairs, key=lambda pair: _hash(pair.name))
    train = _distinct([pair for pair in shuffled if pair.module not in held_out], seen=set())
    seen = {_normalised(pair.answer) for pair in train}
    return train, _distinct([pair for pair in shuffled if pair.module in held_out], seen)


def pairs(library: Path) -> Iterator[Pair]:
    """Yield every documented public name under `library` once, in the order of the file names."""
    names = set()
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        module = _module_name(path.relative_to(library))
        for pair in _module_pairs(module, path.read_bytes()) if module else ():
            if pair.name not in names:  # a name may be defined in both branches of an if
                names.add(pair.name)
                yield pair


def _module_name(relative: Path) -> str | None:
    """Return `json.decoder` for `json/decoder.py`; None for private, test and skipped modules."""
    parts = list(relative.with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    skipped = any(part.startswith(("_", "config-")) or part in SKIPPED_PARTS for part in parts)
    return ".".join(parts) if parts and not skipped else None


def _module_pairs(module: str, source: bytes) -> Iterator[Pair]:
    with warnings.catch_warnings():  # old docstrings hold invalid escapes such as \d
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    yield from _pair(module, module, "module", module, ast.get_docstring(tree, clean=False))
    for node in _definitions(tree.body):
        name = f"{module}.{node.name}"
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        yield from _pair(module, name, kind, _signature(name, node), ast.get_docstring(node, clean=False))
        for method in _definitions(node.body) if isinstance(node, ast.ClassDef) else ():
            kind = "class" if isinstance(method, ast.ClassDef) else "method"
            inner = f"{name}.{method.name}"
            yield from _pair(module, inner, kind, _signature(inner, method), ast.get_docstring(method, clean=False))


def _definitions(body: list[ast.stmt]) -> Iterator[Documented]:
    """Yield the public definitions of a body.

    Those under `if` and `try` count too, because the library has its platform variants there.
    """
    for node in body:
        if isinstance(node, Documented):
            if not node.name.startswith("_"):
                yield node
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions([*node.body, *node.orelse])


def _pair(module: str, name: str, kind: str, signature: str, docstring: str | None) -> Iterator[Pair]:
    answer = inspect.cleandoc(docstring).strip() if docstring else ""
    if MIN_CHARS <= len(answer) <= MAX_CHARS:
        phrasings = PHRASINGS[kind]
        phrasing = phrasings[int(_hash(name)[:8], 16) % len(phrasings)]
        yield Pair(module.split(".")[0], name, phrasing.format(name=name, signature=signature), answer)


def _signature(name: str, node: Documented) -> str:
    """Return a signature such as `json.dumps(obj, *, indent=None)`, without self or cls.

    A class is its bare name, and a very long list of arguments becomes `(...)`.
    """
    if isinstance(node, ast.ClassDef):
        return name
    arguments = ast.unparse(node.args)
    for bound in ("self", "cls"):
        if arguments == bound or arguments.startswith(bound + ", "):
            arguments = arguments[len(bound) + 2 :]
    return f"{name}({arguments if len(arguments) <= MAX_SIGNATURE_CHARS else '...'})"


def _distinct(ordered: list[Pair], seen: set[str]) -> list[Pair]:
    """Return the pairs whose answer is not in `seen`, each answer once, and add them to `seen`."""
    kept = []
    for pair in ordered:
        answer = _normalised(pair.answer)
        if answer not in seen:
            seen.add(answer)
            kept.append(pair)
    return kept


def _normalised(answer: str) -> str:
    return " ".join(answer.lower().split())


def _hash(text: str) -> str:
    """Return a shuffling key that is the same in every Python version, unlike random.shuffle."""
    return hashlib.sha256(f"{SEED}:{text}".encode()).hexdigest()
