"""Read the items of one JSON list from a file of any size, holding little more than one of them."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

CHUNK = 1 << 20  # bytes that are read at once
LITERAL = 16  # characters that no number's end, literal or escape exceeds: behind them more may come
SPACE = re.compile(r"[ \t\n\r]*")
UNTERMINATED = "Unterminated string"


class NoListError(Exception):
    """Say that the file holds something else than a list; the text is its kind."""


class DamagedJson(Exception):
    """Say what in the file is no JSON, with its line and character."""


class JsonItems:
    """Yield the items of the list in `handle`, each with a fault that is this item's alone.

    NoListError, DamagedJson or UnicodeDecodeError for what the whole file is not. parse: the
    decoder of an item; its hooks raise ValueError for what they refuse.
    """

    def __init__(self, begin: bytes, handle: BinaryIO, parse: json.JSONDecoder) -> None:
        """begin: what was read of the file before."""
        self._handle, self._parse, self._lenient = handle, parse, json.JSONDecoder(parse_int=str, parse_float=str)
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._ended = self._decoder.decode(begin), 0, False
        self._line, self._column = 1, 1  # of the first character of _text

    def __iter__(self) -> Iterator[tuple[Any, ValueError | None]]:
        if not self._next():  # an empty file
            return
        if self._next() != "[":
            raise NoListError(self._kind())
        self._at += 1
        if self._next() == "]":
            self._at += 1
        else:
            more = True
            while more:
                yield self._item()
                if self._next() not in (",", "]"):
                    raise self._error("Expecting ',' or ']'", self._at)
                more = self._text[self._at] == ","
                self._at += 1
        if self._next():
            raise self._error("Extra data", self._at)

    def _kind(self) -> str:
        """Return what the file holds instead of a list. DamagedJson if that is no JSON."""
        while not self._ended:
            self._more()
        return type(self._decoded(self._lenient)).__name__

    def _item(self) -> tuple[Any, ValueError | None]:
        self._next()
        try:
            return self._decoded(self._parse), None
        except UnicodeDecodeError:
            raise
        except ValueError as error:  # of a hook or a number, so the item itself is JSON
            self._decoded(self._lenient)
            return None, error
        except RecursionError:
            raise self._error("an item is nested too deeply", self._at) from None

    def _decoded(self, decoder: json.JSONDecoder) -> Any:
        """Return the value that begins here, and pass over it."""
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith(UNTERMINATED) or error.pos >= len(self._text) - LITERAL
                if self._ended or not is_cut:
                    raise self._error(error.msg, error.pos) from None
            else:
                if end < len(self._text) - LITERAL or self._ended:
                    self._at = end
                    return value
            self._more()

    def _next(self) -> str:
        """Pass over white space, drop what was read, and return the next character; "" at the end."""
        while True:
            self._at = SPACE.match(self._text, self._at).end()
            if self._at < len(self._text) or self._ended:
                break
            self._more()
        if self._at > CHUNK or self._at == len(self._text):
            self._drop()
        return self._text[self._at : self._at + 1]

    def _more(self) -> None:
        """Read on: a chunk, or as much as is held, so that a long item is begun few times."""
        self._drop()
        data = self._handle.read(max(CHUNK, len(self._text)))
        self._ended = not data
        self._text += self._decoder.decode(data, final=self._ended)

    def _drop(self) -> None:
        self._line, self._column = self._place(self._at)
        self._text, self._at = self._text[self._at :], 0

    def _place(self, at: int) -> tuple[int, int]:
        lines = self._text.count("\n", 0, at)
        return self._line + lines, at - self._text.rfind("\n", 0, at) if lines else self._column + at

    def _error(self, why: str, at: int) -> DamagedJson:
        line, column = self._place(at)
        return DamagedJson(f"{why}: line {line}, character {column}")
