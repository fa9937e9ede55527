"""Build the text that `python -m sweep --help` prints.

It shows examples, the groups with the purpose of each option, and the keys of a section.
"""

from __future__ import annotations

import textwrap

from engine.errors import InputError
from sweep.cli.config_keys import CHOSEN_BY_NAME, Key, keys, sections, space_paths
from sweep.config.conf_files import about, groups

WIDTH = 120
USAGE = """usage: python -m sweep [group=option ...] [section.key=value ...]

  python -m sweep +experiment=quickstart                       a whole sweep on two CPU cores, in minutes
  python -m sweep +experiment=llama-3.1-8b-24gb data.train=my.jsonl    a whole sweep on 24 GB cards, on your data
  python -m sweep model=llama-3.1-8b data=local data.train=my.jsonl space=rank-targets-long sweep.num_trials=32
  python -m sweep ... +debug=one-trial                         first: does everything work? (overfit-one-batch: does it learn?)
  python -m sweep ... dry_run=true                             print the plan, check model and data, start nothing
  python -m sweep ... cluster.card=rtx4090 dry_run=true        also predict memory, speed and GPU hours there; needs no GPU
  python -m sweep ... --cfg                                    print the composed config, start nothing
  python -m sweep doctor                                       can a sweep run on this machine? what to do where not
  python -m sweep list                                         the sweeps in sweeps/: how each stands, its best loss
  python -m sweep show-sample +experiment=... data.train=my.jsonl      a sample as the model sees it, its targets marked
  python -m sweep resume=sweeps/quickstart-20250101-120000     continue after a kill; num_trials and budget may be raised
  source <(python -m sweep --completion bash)                  Tab completes groups, options, keys, values; zsh and fish too
"""


def help_text(topics: list[str]) -> str:
    """Return the help on everything, or on the groups and sections named.

    Raises InputError for a name that is neither.
    """
    known = list(dict.fromkeys([*groups(), *sections(), "space"]))
    for topic in topics:
        if topic not in known:
            raise InputError("--help", topic, f"must be one of {', '.join(known)}")
    if topics:
        return "\n\n".join(_topic(topic) for topic in topics)
    parts = [USAGE, "groups and their options:"]
    parts += [_group(name) for name in groups()]
    names = ", ".join(f"{name}" for name in [*sections(), "space"])
    parts.append(f"\nkeys of a section: python -m sweep --help SECTION\n  SECTION is one of {names}")
    return "\n".join(parts)


def _topic(name: str) -> str:
    parts = [_group(name)] if name in groups() else []
    if name == "space":
        parts += ["keys that may vary, each as {choices: ...} or {low: ..., high: ..., log: true}:", _wrapped(space_paths())]
    elif name in sections():
        parts += [f"keys of {name}:", *map(_key, keys(name))]
    return "\n".join(parts)


def _group(name: str) -> str:
    lines = [f"  {name}"]
    width = max(len(option) for option in groups()[name]) + 2
    for option in groups()[name]:
        hang = " " * (width + 4)
        lines.append(textwrap.fill(about(name, option), WIDTH, initial_indent=f"    {option:<{width}}", subsequent_indent=hang))
        if not about(name, option):
            lines[-1] = f"    {option}"
    return "\n".join(lines)


def _key(key: Key) -> str:
    of = f" ({key.owner})" if key.owner in CHOSEN_BY_NAME.get(key.path.split(".")[0], {}) else ""
    default = f" = {key.default}" if key.default else ""
    takes = f"{key.kind}. {key.about}" if key.about else key.kind
    text = textwrap.fill(takes, WIDTH, initial_indent="      ", subsequent_indent="      ")
    return f"  {key.path}{default}{of}\n{text}"


def _wrapped(words: list[str]) -> str:
    return textwrap.fill(", ".join(words), WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
