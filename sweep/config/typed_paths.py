"""Take a path on the command line as it was typed, and leave all other values to Hydra's grammar.

That grammar has its own meaning for quotes, brackets, commas, `=`, `~` and more, and refuses most
other characters outside of ASCII. File names hold any of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from engine.system.user_path import user_path

PATHS = (
    "model.path", "data.train", "data.eval", "data.chat_template", "lora.start_from", "sweep.output_dir", "tracking.uri",
    "resume",
)  # fmt: skip
COMMANDS = ("tracking.on_end",)  # taken as typed too: quotes in it are its own
LISTS = ("sweep.warm_start",)
PATH_OR_LIST = ("data.train", "data.eval")  # [a.jsonl,b.jsonl] is a list, unless a file has that very name
AS_HYDRA_HAS_IT = ("null", "???")  # no value, and a value that is still missing
# {}, {name: ...} and [{path: ...}, ...]
SEVERAL = re.compile(r"\{\s*(['\"]?\w[\w-]*['\"]?\s*:.*)?\}|\[.*\{\s*[a-z]+\s*:.*\}.*\]", re.DOTALL)
QUOTED = re.compile(r"'(\\.|[^'\\])*'|\"(\\.|[^\"\\])*\"", re.DOTALL)
ITEM = re.compile(rf"\s*({QUOTED.pattern})\s*|(\\.|\$\{{[^}}]*\}}|[^,\\])*", re.DOTALL)


def in_hydras_grammar(key: str, value: str) -> str:
    """Return the value of a path key, quoted so that Hydra reads what was typed.

    key: without `+`. A value that the user has quoted stays as it is, and so does one of any other
    key. In a list, Hydra reads the items that it can read. OmegaConf still replaces `${section.key}`.
    """
    is_list = value.startswith("[") and value.endswith("]")
    if key in PATH_OR_LIST and SEVERAL.fullmatch(value) and not os.path.exists(user_path(value)):
        return value  # a mixture of sources, or evaluation sets by name, in Hydra's grammar
    if key in PATH_OR_LIST and is_list and not os.path.exists(user_path(value)):
        return f"[{','.join(_items(value[1:-1]))}]"
    if key in PATHS:
        return _quoted(value)
    if key in COMMANDS:
        return value if value == "null" else _as_typed(value)
    if key in LISTS:
        if is_list:
            return f"[{','.join(_items(value[1:-1]))}]"
        return value if value in AS_HYDRA_HAS_IT or value.startswith("${") else f"[{_quoted(value)}]"
    return value


def _quoted(value: str) -> str:
    if value in AS_HYDRA_HAS_IT or QUOTED.fullmatch(value):
        return value
    return _as_typed(value)


def _as_typed(value: str) -> str:
    # Hydra removes one half of the backslashes before a quote, and only there
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


def _items(text: str) -> Iterator[str]:
    place = 0
    while text.strip() and place <= len(text):
        found = ITEM.match(text, place)
        item = found[0].strip()
        yield item if _is_readable(item) else _quoted(item)
        place = found.end() + 1


def _is_readable(item: str) -> bool:
    """Return whether Hydra reads the item as text. It would read a folder 2024 as a number."""
    try:
        return isinstance(OverridesParser.create().parse_override(f"key={item}").value(), str)
    except HydraException:
        return False
