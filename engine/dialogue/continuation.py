"""Find the answer where a template writes another text than the generation prompt in a dialogue.

The model reads the generation prompt, so the answer is learnt behind it. Only differences whose
meaning is known are taken: a header, white space, a thought that is opened or closed, a reminder.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

from engine.dialogue.dialect import Dialect, Messages
from engine.dialogue.templates import MARKS, SWITCHES, common_prefix, thought_of
from engine.dialogue.ways_out import OtherPromptError

OPENER = re.compile(r"<think>|<\|START_THINKING\|>|\[THINK\]|<seed:think>|<\|channel>thought")
OPENED = re.compile(r"\s*(?:<think>|<\|START_THINKING\|>|\[THINK\]|<seed:think>)(\s*)")
CLOSED = re.compile(rf"\s*(?:{OPENER.pattern}).*(?:</think>|<\|END_THINKING\|>|\[/THINK\]|</seed:think>|<channel\|>)\s*", re.S)
CLOSER = re.compile(r"(?:</think>|<\|END_THINKING\|>|\[/THINK\]|</seed:think>|<channel\|>)\s*$")
OPENED_LAST = re.compile(rf"(?:{OPENER.pattern})\s*$")
NO_THOUGHT = "answers without a thought close the one that the generation prompt opens"


def continued(dialect: Dialect, messages: Messages, i: int, tools: Any, prompt: str, whole: str) -> tuple[str, tuple[str, ...]]:
    """Return the answer behind a generation prompt that the template does not write in a dialogue.

    It is known where the generation prompt is the message's header and a thought, or white
    space. A thought that it opens is closed before the answer. OtherPromptError where it is not known.
    """
    header, thought = dialect.header(messages[:i], tools), thought_of(messages[i])
    if "".join(header.split()) == "".join(prompt.split()) and whole.startswith(header):
        return whole[len(header) if prompt[-1:].isspace() else len(header.rstrip()) :], ()
    before = dialect.attempt(messages[:i], False, tools)
    found = before and (answer_between(before.text, prompt, header, whole) or behind_more(before.text, prompt, whole))
    if found:
        return found, ()
    own = header.removeprefix(before.text) if before else header
    if own != header and own.strip() and prompt.endswith(own) and whole.startswith(header):
        return whole[len(header) :], ()  # the generation prompt says more before the same header
    base = len(header) if prompt.startswith(header) else max((tag.start() for tag in OPENER.finditer(prompt)), default=0)
    extra, rest = prompt[base:], whole[base:]
    if thought and thought.strip() and prompt.startswith(header) and rest.startswith(thought.strip()):
        return rest, ()  # the generation prompt opens the thought with words
    opened = OPENED.fullmatch(extra)
    is_known = opened or not extra.strip() or CLOSED.fullmatch(extra)
    if CLOSER.search(prompt) and thought and thought.strip() and thought.strip() in rest:
        raise _differs(prompt, whole)  # no thought follows one that the prompt has closed
    if not (base and is_known and header.startswith(prompt[:base]) and whole.startswith(prompt[:base])):
        if (found := behind_same_words(prompt, whole)) and ((thought and thought.strip()) or not OPENED_LAST.search(prompt)):
            return found, ()
        raise _differs(prompt, whole)
    if not opened:  # a header that closes a thought is in the prompt already
        return rest.removeprefix(header[base:]) if prompt.endswith(header[base:]) else rest, ()
    if thought is None and not any(dialect.template.variables.get(name) is False for name in SWITCHES):
        raise _differs(prompt, whole)
    tag, line = extra.strip(), "\n" if opened[1] else ""
    close = tag.replace("START", "END") if "START" in tag else f"{tag[0]}/{tag[1:]}"
    answer = rest.lstrip("\n") if thought is not None and not dialect.template.reads_thoughts else rest
    return f"{thought or ''}{line}{close}{2 * line}{answer}", () if thought else (NO_THOUGHT,)


def answer_between(before: str, prompt: str, header: str, whole: str) -> str | None:
    """Return the answer where the generation prompt's own text is the header, or where there is no header.

    before, prompt: the messages before the answer, without and with the generation prompt. header,
    whole: the same with the begin of an answer, and with the answer. A template may write a
    reminder behind the last message, which then stands before the generation prompt.
    """
    opening = prompt.removeprefix(before)
    if opening == prompt or not opening.strip() or OPENER.search(opening) or not whole.startswith(header):
        return None
    if header == before:  # answers have no header
        return whole[len(header) :]
    base = header.removesuffix(opening)
    reminder = before.removeprefix(base)
    fits = base != header and reminder not in ("", before) and whole.endswith(reminder)
    return whole[len(header) : len(whole) - len(reminder)] if fits else None


def behind_more(before: str, prompt: str, whole: str) -> str | None:
    """Return the answer where the prompt says more in front of the last message than a dialogue does.

    Such is a system text that is written only where an answer is asked for. Arguments: see `answer_between`.
    """
    tail = before[len(common_prefix(before, prompt)) :]
    at = prompt.rfind(tail)
    opening, written = prompt[at + len(tail) :], whole[len(before) :]
    fits = tail.strip() and at >= 0 and opening.strip() and not OPENER.search(opening)
    return written[len(opening) :] if fits and whole.startswith(before) and written.startswith(opening) else None


def behind_same_words(prompt: str, whole: str) -> str | None:
    """Return the answer where prompt and dialogue differ in white space alone."""
    words = "".join(prompt.split())
    if not words or not "".join(whole.split()).startswith(words):
        return None
    at = next(itertools.islice((k for k, letter in enumerate(whole, 1) if not letter.isspace()), len(words) - 1, None))
    return whole[at:].lstrip() if prompt[-1:].isspace() else whole[at:]


def _differs(prompt: str, whole: str) -> OtherPromptError:
    """Return the error that shows both texts where they part."""
    prompt, whole = (text.replace(MARKS[0], "").replace(MARKS[1], "") for text in (prompt, whole))
    at = max(0, len(common_prefix(prompt, whole)) - 20)
    shown = [json.dumps(text[at : at + 60], ensure_ascii=False) for text in (prompt, whole)]
    is_of_thoughts = OPENER.search("".join(shown)) or re.search("think|reason", prompt[at:], re.I)
    text = f"the generation prompt has {shown[0]} where the chat template writes {shown[1]}"
    return OtherPromptError(text, bool(is_of_thoughts))
