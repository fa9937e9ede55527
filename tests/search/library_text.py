"""Read documentation and code out of Python's standard library, and make data sets of both.

The sources are parsed, never imported. One version of Python always gives the same rows. Training
and evaluation share no top-level module, and no text of the evaluation occurs in training. The
library is under the PSF licence.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "lib-dynload", "site-packages", "dist-packages", "pydoc_data"}
EVAL_FRACTION = 0.13  # of all definitions, rounded up to whole top-level modules
SHORTEST, LONGEST_ENTRY = 40, 6000  # characters of a documentation
PAGE = (400, 8000)  # characters of a training page: each page draws its limit from this range
EVAL_PAGE = 500
CODE, EVAL_CODE = (40, 4000), (40, 350)  # characters of a body
EVAL_CODE_QUESTION = 500
TURN, EVAL_TURN, TURNS = 700, 260, (2, 10)  # characters of an answer; turns of a dialogue
FIRST = ("What does `{0}` do?", "Explain `{0}`.", "I found `{0}` in the library. What is it for?", "Document `{0}`.")
NEXT = ("And `{0}`?", "How about `{0}`?", "What is `{0}` then?", "Now the same for `{0}`.")
SOURCE = ("Show me its code.", "How is it written?", "What does the body look like?")


@dataclass(frozen=True)
class Definition:
    """Hold a class, function or module of the library; `doc` and `body` are "" where there is none.

    body: the statements after the documentation, dedented; only of functions.
    """

    module: str
    name: str
    signature: str
    doc: str
    body: str

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def doc_rows() -> tuple[list[Row], list[Row]]:
    """Return (train, eval) rows of pages: the documentation of a module's names, one after the other."""
    train, held_out = _parts(lambda d: d.doc if len(d.doc) >= SHORTEST else "")
    return [{"text": page} for page in _pages(train, PAGE)], [{"text": page} for page in _pages(held_out, (EVAL_PAGE, EVAL_PAGE))]


def code_rows() -> tuple[list[Row], list[Row]]:
    """Return (train, eval) rows of chats: a function's head, with its documentation, and its body."""
    train, held_out = _parts(lambda d: d.body if CODE[0] <= len(d.body) <= CODE[1] else "")
    short = [d for d in held_out if len(d.body) <= EVAL_CODE[1] and len(_head(d)) <= EVAL_CODE_QUESTION]
    return [_chat(_head(d), d.body) for d in train], [_chat(_head(d), d.body) for d in short]


def dialogue_rows() -> tuple[list[Row], list[Row]]:
    """Return (train, eval) rows of chats of several turns about one module's names."""
    train, held_out = _parts(lambda d: d.doc if len(d.doc) >= SHORTEST else "")
    return _dialogues(train, TURNS, TURN), _dialogues(held_out, (2, 2), EVAL_TURN)


def key_of(text: str) -> int:
    """Return a number of 64 bits for shuffling and choosing, the same in every version of Python."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)


@cache
def definitions(library: Path | None = None) -> tuple[Definition, ...]:
    """Return everything defined under `library` (None: this Python's library), in the order of the files."""
    library = library or Path(sysconfig.get_path("stdlib"))
    found: dict[str, Definition] = {}
    for path in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        relative = path.relative_to(library)
        if not SKIPPED & set(relative.parts):
            for definition in _definitions_of(relative, path.read_bytes()):
                found.setdefault(definition.name, definition)  # a name may be defined in both branches of an if
    return tuple(found.values())


def _definitions_of(relative: Path, source: bytes) -> Iterator[Definition]:
    parts = [part for part in relative.with_suffix("").parts if part != "__init__"]
    module = ".".join(parts)
    try:
        text = source.decode()
        with warnings.catch_warnings():  # old texts hold invalid escapes such as \d
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    if module:
        yield Definition(module, module, f"module {module}", _doc(tree), "")
        yield from _inside(module, module, tree.body, text.splitlines())


def _inside(module: str, prefix: str, body: list[ast.stmt], lines: list[str]) -> Iterator[Definition]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            name = f"{prefix}.{node.name}"
            yield Definition(module, name, f"class {node.name}", _doc(node), "")
            yield from _inside(module, name, node.body, lines)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            signature = f"def {node.name}({ast.unparse(node.args)})"
            yield Definition(module, f"{prefix}.{node.name}", signature, _doc(node), _body(node, lines))
        elif isinstance(node, ast.If | ast.Try):
            yield from _inside(module, prefix, [*node.body, *node.orelse], lines)


def _doc(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    doc = ast.get_docstring(node, clean=False)
    return inspect.cleandoc(doc).strip() if doc else ""


def _body(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    has_doc = ast.get_docstring(node, clean=False) is not None
    body = node.body[1:] if has_doc else node.body
    before = node.body[0].end_lineno if has_doc else node.lineno
    if not body or body[0].lineno <= before:  # on the line of the head
        return ""
    return textwrap.dedent("\n".join(lines[body[0].lineno - 1 : body[-1].end_lineno])).strip("\n")


def _parts(text_of: Callable[[Definition], str]) -> tuple[list[Definition], list[Definition]]:
    """Return (train, held out) definitions that have a text, each text once, in a fixed shuffled order."""
    with_text = [d for d in definitions() if text_of(d)]
    sizes: dict[str, int] = {}
    for d in with_text:
        sizes[d.top] = sizes.get(d.top, 0) + 1
    held_out, count = set(), 0
    for top in sorted(sizes, key=key_of):
        if count >= EVAL_FRACTION * len(with_text):
            break
        held_out.add(top)
        count += sizes[top]
    seen: set[str] = set()
    parts: tuple[list[Definition], list[Definition]] = ([], [])
    for d in sorted(with_text, key=lambda d: (d.top in held_out, key_of(d.name))):  # training takes first
        text = " ".join(text_of(d).split())
        if text not in seen:
            seen.add(text)
            parts[d.top in held_out].append(d)
    return parts


def _pages(entries: list[Definition], limits: tuple[int, int]) -> list[str]:
    """Return pages of whole entries of one module, of lengths that spread evenly by factors between the limits."""
    pages: list[str] = []
    for module, of_module in _by_module(entries):
        page, limit = "", 0
        for number, d in enumerate(of_module):
            entry = f"{d.name}\n{d.signature}\n\n{d.doc[:LONGEST_ENTRY]}\n"
            if not page or len(page) + len(entry) > limit:
                pages.append(page)
                page, limit = "", limits[0] * (limits[1] / limits[0]) ** (key_of(f"{module}:{number}") % 1000 / 1000)
            page += ("\n" if page else "") + entry
        pages.append(page)
    return sorted((page for page in pages if page and (limits[0] < limits[1] or len(page) <= limits[1])), key=key_of)


def _dialogues(entries: list[Definition], turns: tuple[int, int], longest: int) -> list[Row]:
    rows = []
    for module, of_module in _by_module(entries):
        left = sorted(of_module, key=lambda d: key_of(f"dialogue:{d.name}"))
        while len(left) >= turns[0]:
            count = turns[0] + key_of(f"{module}:{len(left)}") % (turns[1] - turns[0] + 1)
            messages: list[Row] = []
            for d in left[:count]:
                messages += _turn(d, longest, first=not messages)
            rows.append({"messages": messages})
            left = left[count:]
    return sorted(rows, key=lambda row: key_of(row["messages"][0]["content"]))


def _turn(d: Definition, longest: int, first: bool) -> list[Row]:
    """Return a question and its answer, and in some turns a second question, for the code."""
    pick, phrasings = key_of(f"turn:{d.name}"), FIRST if first else NEXT
    asked = d.name if d.signature.startswith(("class", "module")) else d.name + d.signature[d.signature.index("(") :]
    turn = _chat(phrasings[pick % len(phrasings)].format(asked), _shortened(d.doc, longest))["messages"]
    if pick % 3 == 0 and SHORTEST <= len(d.body) <= longest:
        turn += _chat(SOURCE[pick % len(SOURCE)], d.body)["messages"]
    return turn


def _shortened(text: str, longest: int) -> str:
    """Return whole paragraphs of the text, or else whole lines, up to `longest` characters."""
    if len(text) <= longest:
        return text
    cut = max(text.rfind("\n\n", 0, longest), 0) or max(text.rfind("\n", 0, longest), 0) or longest
    return text[:cut].rstrip()


def _by_module(entries: list[Definition]) -> list[tuple[str, list[Definition]]]:
    groups: dict[str, list[Definition]] = {}
    for d in sorted(entries, key=lambda d: d.name):
        groups.setdefault(d.module, []).append(d)
    return list(groups.items())


def _head(d: Definition) -> str:
    doc = textwrap.indent(f'"""{d.doc}"""\n', "    ") if d.doc else ""
    return f"Write the body of this function of the Python module `{d.module}`.\n\n{d.signature}:\n{doc}"


def _chat(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
