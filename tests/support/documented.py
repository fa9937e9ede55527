"""Check that commands and settings in a Markdown document are valid today. Start nothing.

Commands, overrides (`section.key=value`), keys (`train.seed`) and YAML are in fenced blocks and
between backticks. The reader fills in names in <angle brackets> and CAPITALS.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.errors import EngineError
from sweep.__main__ import compose, main
from sweep.cli.config_keys import keys, sections
from sweep.config.compose import run_keys
from sweep.config.sweep import parse_sweep_config
from sweep.space.parse import parse_space
from tests.support.paths import ROOT

BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)
OVERRIDE = re.compile(r"[~+]*[a-z_]+(\.[a-z_0-9]+)*=\S")
KEY = re.compile(rf"({'|'.join([*sections(), 'space'])})(\.[a-z_]+)+")
PLACES = ("doctor", "show-sample")  # words of `python -m sweep` that start no sweep
BASE = "+experiment=quickstart"
ELSEWHERE = ("pip", "pytest", "mlflow")  # modules of other packages
_SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
CONSOLE = {name: entry.partition(":")[0].removesuffix(".__main__") for name, entry in _SCRIPTS.items()}
"""Console command -> the module that `python -m` starts in its place."""


class Wrong(Exception):
    """A piece of a document is not valid as written."""


class _Accepted(BaseException):
    """argparse accepted the arguments; the command itself does not run."""


@dataclass(frozen=True)
class Document:
    """Everything in one document that can be checked, as (text, kind)."""

    commands: list[str]
    overrides: list[str]
    keys: list[str]
    yaml: list[str]


def read(text: str) -> Document:
    """Collect the checkable pieces of a document's text."""
    blocks = BLOCK.findall(text)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]
    typed = [span for span in spans if not _only_named(_words(span))]
    lines = [line.strip().removeprefix("$ ") for kind, block in blocks if kind != "yaml" for line in block.splitlines()]
    return Document(
        [line for line in [*lines, *typed] if _words(line)[:1] in (["python"], ["make"])],
        [span for span in spans if OVERRIDE.match(span.lstrip("'"))],
        [span for span in spans if KEY.fullmatch(span) and not span.endswith(".json")],  # data.json is a file
        [block for kind, block in blocks if kind == "yaml"],
    )


def _words(line: str) -> list[str]:
    """Split the line as bash would, without its comment; empty if it is no command line.

    A console command becomes its `python -m` form.
    """
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return []
    if not words:
        return []
    program = words[0].removeprefix(".venv/bin/")
    return [*(["python", "-m", CONSOLE[program]] if program in CONSOLE else [program]), *words[1:]]


def _only_named(words: list[str]) -> bool:
    """`python -m sweep` in a sentence names a command; a reader would type it with arguments."""
    return words == ["python"] or (words[:2] == ["python", "-m"] and len(words) == 3 and _exists(words[2]))


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


class Checker:
    """Checks one piece of a document after the other.

    sweep_folder: a real one, for `sweeps/<...>`. place: the working folder, for other placeholders.
    """

    def __init__(self, sweep_folder: Path, place: Path) -> None:
        self._sweep_folder = str(sweep_folder)
        self._model = str(place / "model")

    def command(self, line: str) -> None:
        """Raise Wrong if the tool would refuse the command as written."""
        program, *words = _words(self._filled(line))
        if program == "make":
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
            _expect(all(word in targets or "=" in word for word in words), line, "no such target")
        elif words[:1] == ["-m"] and words[1] == "sweep":
            self._sweep(line, words[2:])
        elif words[:1] == ["-m"] and words[1].split(".")[0] not in ELSEWHERE:
            with _argparse_only(line, words[1:]):
                _main_of(words[1])(words[2:])
        elif words[:1] == ["-m"]:
            _expect(all((ROOT / word).exists() for word in words if word.startswith("tests")), line, "no such file")
        else:
            _expect((ROOT / words[0]).is_file(), line, "no such file")
            with _argparse_only(line, words):
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")

    def _sweep(self, line: str, words: list[str]) -> None:
        if words[0] in PLACES:  # the rest describes a sweep
            words = [word for word in words[1:] if not word.startswith("--") and not word.isdigit()] or [BASE]
        if words == ["list"]:
            words = ["list", str(Path(self._sweep_folder).parent)]
        harmless = {"--help", "-h", "--cfg", "--completion", "list"} & set(words)
        words = [BASE if word == "..." else word for word in words]
        code = main(words if harmless else [*(word for word in words if word != "dry_run=true"), "dry_run=true"])
        _expect(code == 0, line, f"exit code {code}")

    def overrides(self, text: str) -> None:
        """Check a span in a sentence, with each of the alternatives that `a|b` means."""
        words = _words(self._filled(text))
        if any(word.startswith("resume=") for word in words):
            return self._sweep(text, [word if word != "resume=..." else f"resume={self._sweep_folder}" for word in words])
        key, _, value = words[0].partition("=")
        for one in value.split("|") if len(words) == 1 and "{" not in value else [value]:
            self._goes_with_a_base(text, [f"{key}={one}", *words[1:]])

    def _goes_with_a_base(self, text: str, words: list[str]) -> None:
        """Accept settings that need several objectives, or an experiment as base."""
        with _engine_errors(text):
            _, words = run_keys(words)
        base = [] if any(word.startswith("+experiment=") for word in words) else [BASE]
        for several in ([], ["sweep.objectives=[eval_loss,peak_allocated_gib]"]):
            try:
                with _engine_errors(text):
                    parse_space(parse_sweep_config(compose([*base, "model.path=m", "data.train=d", *several, *words])).space)
                return
            except Wrong as error:
                refused = error
        raise refused

    def key(self, path: str) -> None:
        """Check a dotted path that a sentence names: a key, or a prefix of keys."""
        bare = path.removeprefix("space.")
        known = [key.path for section in sections() for key in keys(section)]
        place = ROOT / path.replace(".", "/")
        a_module = place.is_dir() or place.with_suffix(".py").is_file()
        _expect(a_module or any(f"{name}.".startswith(f"{bare}.") for name in known), path, "no such key")

    def yaml(self, text: str) -> None:
        """Check a piece of a config by merging it into the quickstart's config."""
        raw = compose([BASE])
        with _engine_errors(text):
            for section, values in yaml.safe_load(text).items():
                raw[section] = values if section == "space" else {**raw.get(section, {}), **values}
            parse_space(parse_sweep_config(raw).space)

    def _filled(self, text: str) -> str:
        return re.sub(r"<[^>]*>", self._model, re.sub(r"sweeps/<[^>]*folder>", self._sweep_folder, text))


def _expect(holds: bool, what: str, why: str) -> None:
    if not holds:
        raise Wrong(f"{what}: {why}")


@contextmanager
def _engine_errors(what: str) -> Any:
    try:
        yield
    except EngineError as error:
        raise Wrong(f"{what}: {error}") from None


@contextmanager
def _argparse_only(line: str, words: list[str]) -> Any:
    """End any command called inside once argparse has accepted its arguments.

    A program without argparse counts by its exit code.
    """
    real, argv = argparse.ArgumentParser.parse_args, sys.argv

    def parse_args(self: argparse.ArgumentParser, *given: Any) -> None:
        real(self, *given)
        raise _Accepted

    argparse.ArgumentParser.parse_args, sys.argv = parse_args, words
    try:
        yield
    except _Accepted:
        pass
    except SystemExit as error:
        _expect(not error.code, line, "not an option it has")
    finally:
        argparse.ArgumentParser.parse_args, sys.argv = real, argv


def _main_of(module: str) -> Callable[[list[str]], Any]:
    found = importlib.import_module(module if module != "engine" and not _has_main(module) else f"{module}.__main__")

    def call(arguments: list[str]) -> None:
        takes = found.main.__code__.co_argcount
        raise SystemExit(found.main(arguments) if takes else found.main())

    return call


def _has_main(module: str) -> bool:
    return (ROOT / module.replace(".", "/") / "__main__.py").is_file()
