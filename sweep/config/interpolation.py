"""Check `${...}` in a config: it may name other keys, and must not grow without bound.

A resolver (`${oc.env:...}`) would copy what it reads on this machine into the sweep folder and
MLflow, and a config may come from someone else. A chain of keys that each name the next one twice
doubles at every step. The size of the result is therefore counted before anything is resolved. The
grammar is OmegaConf's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf.grammar_parser import OmegaConfGrammarParser, parse

from engine.errors import InputError

MAX_CHARACTERS = 1_000_000
RESOLVERS = "must name a key of the config, as ${section.key}, and not a resolver or an environment variable"


class Interpolations:
    """Check an unresolved config, given as plain data. Sizes are characters after resolution."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config, self._sizes = config, {}

    def check(self) -> None:
        """Raise InputError if a value would run a resolver, or grow beyond MAX_CHARACTERS."""
        self._size(self._config, ())

    def _size(self, node: Any, path: tuple[str, ...]) -> int:
        if path in self._sizes:
            return self._sizes[path]
        self._sizes[path] = 0  # OmegaConf itself reports a value that refers to itself
        if isinstance(node, dict | list):
            size = 1 + sum(self._size(value, (*path, key)) for key, value in _children(node))
        else:
            size = 1 + len(str(node))
            if isinstance(node, str) and "${" in node:
                size += sum(self._target_size(key, path) for key in _keys(node, ".".join(path)))
        if size > MAX_CHARACTERS:
            raise InputError(".".join(path) or "config", _shown(node), f"must not grow beyond {MAX_CHARACTERS:,} characters")
        self._sizes[path] = size
        return size

    def _target_size(self, key: str, path: tuple[str, ...]) -> int:
        """Return the size of the value that `key` names.

        Returns 0 if there is none, which OmegaConf reports itself.
        """
        bare = key.lstrip(".")
        start = path[: len(path) - (len(key) - len(bare))] if key != bare else ()
        target, node = start, self._config
        for part in start:
            node = dict(_children(node)).get(part)
        for part in filter(None, bare.replace("[", ".").replace("]", "").split(".")):
            if not isinstance(node, dict | list):  # inside another interpolation's value
                break
            target, node = (*target, part), dict(_children(node)).get(part)
        return self._size(node, target)


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list):
        yield from ((str(key), value) for key, value in (node.items() if isinstance(node, dict) else enumerate(node)))


def _keys(text: str, where: str) -> Iterator[str]:
    """Yield the keys that a value names.

    Raises InputError for a resolver, and for a key that is itself composed of other keys.
    """
    waiting = [parse(text)]
    while waiting:
        part = waiting.pop()
        if isinstance(part, OmegaConfGrammarParser.InterpolationResolverContext):
            raise InputError(where, text, RESOLVERS)
        if isinstance(part, OmegaConfGrammarParser.InterpolationNodeContext):
            name = part.getText()[2:-1]
            if "${" not in name:
                yield name
            elif ":" not in name:
                raise InputError(where, text, "must name its key directly, as ${section.key}")
        waiting += getattr(part, "children", None) or []


def _shown(node: Any) -> Any:
    return node if isinstance(node, str) else "..."
