"""Find what the model has to write of a conversation, in the context in which it writes it.

The context of an answer is the generation prompt for the messages before it. The answer runs up to
the token that ends generation. Answers share a text as long as each one's context is its beginning.
Where a template writes earlier turns differently once later ones follow, the others get texts of
their own: exactly what the model sees when it has to answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.dialogue import templates
from engine.dialogue.conversation import Conversation, SampleError, TargetText
from engine.dialogue.templates import MARKS, ChatTemplate, Rendered, common_prefix, reads, thought_of, with_thought_apart

Messages = list[dict[str, Any]]
OPENER = re.compile(r"<think>|<\|START_THINKING\|>|\[THINK\]|<seed:think>|<\|channel>thought")
OPENED = re.compile(r"\s*(?:<think>|<\|START_THINKING\|>|\[THINK\]|<seed:think>)(\s*)")
CLOSED = re.compile(rf"\s*(?:{OPENER.pattern}).*(?:</think>|<\|END_THINKING\|>|\[/THINK\]|</seed:think>|<channel\|>)\s*", re.S)
SWITCHES = ("enable_thinking", "thinking", "thinking_mode", "enable_reasoning")
PROBES = ("qxquestionzw", "qxanswerzw")
SPEAKERS = tuple({"role": role, "content": PROBES[0]} for role in ("user", "system", "tool"))
MAX_SHAPES = 10_000
MAX_HEADER = 200  # characters of a message's header
MARKED = "special tokens in messages are learnt as the text they are"
UNASKED = "answers before the first question are not learnt"
NO_END = "the chat template ends answers with no token; the tokenizer's end token was added"
NO_THOUGHT = "answers without a thought close the one that the generation prompt opens"


class Spans:
    """Turn conversations into texts, with one template."""

    def __init__(self, template: ChatTemplate, ends: Sequence[str], eos: str | None, added: Sequence[str], turns: str) -> None:
        """Set what the tokenizer knows.

        ends: the tokens that end generation. eos: the one of them to add where the template writes
        none. added: all special tokens. turns: all, or last.
        """
        self._template, self._eos, self._turns = template, eos, turns
        self._given, self._special = tuple(ends), any_of([*ends, *added])
        self._ends: re.Pattern[str] | None = None
        self._prompt = self._opening = ""  # a question, and the generation prompt behind it
        self._wants_parts = self._wants_json = self._wants_none = False
        self._reads_thoughts, self._tags_thoughts = template.reads_thoughts, "</think>" in template.text
        self._seen: set[Any] = set()

    def answers(self, conversation: Conversation) -> list[TargetText]:
        """Return the conversation's texts.

        SampleError, with the message's number where it is one message's fault, if none can be right.
        """
        if self._ends is None:
            self._learn_ends()
        try:
            return self._texts(conversation)
        except SampleError as error:
            if not any(message.get("tool_calls") for message in conversation.messages):
                raise
            self._wants_json = not self._wants_json
            try:
                return self._texts(conversation)
            except SampleError as other:
                self._wants_json = not self._wants_json
                raise (other if "refused it" in str(error) else error) from None

    def _texts(self, conversation: Conversation) -> list[TargetText]:
        messages = self._template.prepared([self._read(message) for message in conversation.messages])
        tools = self._template.prepared(conversation.tools) or None
        messages, learned, notes = self._asked(messages, [i for i, wanted in enumerate(conversation.learned) if wanted], tools)
        if not learned:
            raise SampleError("has no answer behind a question, so there is nothing to learn")
        learned = learned[-1:] if self._turns == "last" else learned
        answers = self._answers(messages, learned, tools)
        templates.check_written(messages, learned, tools, answers)
        known = templates.shape([messages, tools, learned])
        if known not in self._seen:
            self._check_words(messages, learned, tools)
            if len(self._seen) < MAX_SHAPES:
                self._seen.add(known)
        answers[-1] = self._with_rest(messages, learned[-1], tools, answers[-1])
        if MARKS[0] in json.dumps([messages, tools], ensure_ascii=False):
            notes = [*notes, MARKED]
        return [TargetText(t.text, t.spans, (*notes, *t.notes)) for t in answers]

    def _asked(self, messages: Messages, learned: list[int], tools: Any) -> tuple[Messages, list[int], list[str]]:
        """Return the conversation without what no one asked for, if the template cannot write it."""
        others = ("assistant", "system", "developer")
        question = next((i for i, message in enumerate(messages) if message["role"] not in others), len(messages))
        unasked = [i for i in learned if i < question and (i == 0 or not self._renders(messages[:i], tools))]
        learned = [i for i in learned if i not in unasked]
        before = [i for i in range(question) if messages[i]["role"] == "assistant"]
        if before and learned and learned[0] > question and not self._renders(messages[: learned[0]], tools):
            messages = [m for i, m in enumerate(messages) if i not in before]
            learned = [i - len(before) for i in learned]
        return messages, learned, [UNASKED] if unasked else []

    def _answers(self, messages: Messages, learned: list[int], tools: Any) -> list[TargetText]:
        found = []
        for i in learned:
            try:
                found.append(self._answer(messages, i, tools))
            except SampleError as error:
                raise SampleError(f"message {i + 1} (assistant): {error}") from error
        return found

    def _answer(self, messages: Messages, i: int, tools: Any) -> TargetText:
        prompt = self._render(messages[:i], True, tools).text
        whole = self._render(messages[: i + 1], False, tools)
        if self._template.has_tags:
            return self._tagged(messages[:i], tools, prompt, whole)
        if whole.text.startswith(prompt):
            unasked = messages[i - 1]["role"] == "assistant" and whole.text.startswith(prompt + self._opening)
            return self._ended(messages, i, tools, whole.text, len(prompt + self._opening * unasked))
        answer, notes = self._continued(messages, i, tools, prompt, whole.text)
        return self._ended(messages, i, tools, prompt + answer, len(prompt), notes)

    def _tagged(self, before: Messages, tools: Any, prompt: str, whole: Rendered) -> TargetText:
        """Return what the template's own `{% generation %}` tags mark of the last message.

        Its header is not learnt, and neither is white space behind the end token.
        """
        text, common = whole.text, len(common_prefix(prompt, whole.text))
        tags = [(start, end) for start, end in whole.tags if end > common]
        if not tags:
            raise SampleError("the chat template marks nothing of it as generation")
        first = len(prompt) if common == len(prompt) else tags[0][0]
        if tags[0][0] < common < len(prompt):
            first = len(self._header(before, tools))
        *spans, (start, end) = [(max(start, first), end) for start, end in tags if end > first]
        if found := self._ends.search(text, start):
            between = text[min(end, found.end()) : max(end, found.start())]
            end = end if self._ends.sub("", between).strip() else found.end()
        return TargetText(text, (*spans, (start, end)))

    def _continued(self, messages: Messages, i: int, tools: Any, prompt: str, whole: str) -> tuple[str, tuple[str, ...]]:
        """Return the answer behind a generation prompt that the template does not write in a dialogue.

        It is known where the generation prompt is the message's header and a thought, or white
        space. A thought that it opens is closed before the answer.
        """
        header, thought = self._header(messages[:i], tools), thought_of(messages[i])
        before = self._try(messages[:i], False, tools)
        own = prompt.removeprefix(before.text) if before else prompt
        if not prompt.startswith(header) and own != prompt and own.strip() and own in header[-MAX_HEADER:]:
            # The new message changed how earlier ones are written, as it does not when it is asked for.
            return whole[header.rindex(own) + len(own) :], ()
        base = len(header) if prompt.startswith(header) else max((tag.start() for tag in OPENER.finditer(prompt)), default=0)
        extra, rest = prompt[base:], whole[base:]
        opened = OPENED.fullmatch(extra)
        is_known = opened or not extra.strip() or CLOSED.fullmatch(extra)
        if not (base and is_known and header.startswith(prompt[:base]) and whole.startswith(prompt[:base])):
            raise SampleError(self._differs(prompt, whole, thought))
        if not opened:  # a header that closes a thought is in the prompt already
            return rest.removeprefix(header[base:]) if prompt.endswith(header[base:]) else rest, ()
        if thought is None and not any(self._template.variables.get(name) is False for name in SWITCHES):
            raise SampleError(self._differs(prompt, whole, thought))
        tag, line = extra.strip(), "\n" if opened[1] else ""
        close = tag.replace("START", "END") if "START" in tag else f"{tag[0]}/{tag[1:]}"
        answer = rest.lstrip("\n") if thought is not None and not self._reads_thoughts else rest
        return f"{thought or ''}{line}{close}{2 * line}{answer}", () if thought else (NO_THOUGHT,)

    def _differs(self, prompt: str, whole: str, thought: str | None) -> str:
        """Return both texts where they part, and the way out."""
        prompt, whole = (text.replace(MARKS[0], "").replace(MARKS[1], "") for text in (prompt, whole))
        at = max(0, len(common_prefix(prompt, whole)) - 20)
        shown = [json.dumps(text[at : at + 60], ensure_ascii=False) for text in (prompt, whole)]
        opens = thought is None and "think" in prompt[at:].lower()
        switches = (reads(self._template.text, SWITCHES)[:1] or SWITCHES[:opens]) if OPENER.search("".join(shown)) else ()
        ways = [f"data.template_kwargs.{switch}={'true' if thought else 'false'}" for switch in switches]
        end = ", or give the answer its thought (reasoning_content)" if opens else ""
        ways = " or ".join([*ways, "data.chat_template"])
        return f"the generation prompt has {shown[0]} where the chat template writes {shown[1]}; set {ways}{end}"

    def _header(self, before: Messages, tools: Any) -> str:
        """Return what the template writes before the content of a plain answer."""
        answers = ([*before, {"role": "assistant", "content": word}] for word in "1Z")
        return common_prefix(*(self._render(messages, False, tools).text for messages in answers))

    def _ended(self, messages: Messages, i: int, tools: Any, text: str, start: int, notes: tuple[str, ...] = ()) -> TargetText:
        """Return the answer from `start` up to the token that ends generation.

        Where the template writes it with the next message only, it is taken from there. Where it
        writes none, the tokenizer's is added.
        """
        if found := self._ends.search(text, start):
            return TargetText(text, ((start, found.end()),), notes)
        written = text[:start] + text[start:].rstrip()
        special = [found.end() for found in self._special.finditer(text, start)]
        if special and special[-1] == len(written):
            return TargetText(text, ((start, len(written)),), notes)
        if end := self._next_end(messages, i, tools, written):
            return TargetText(written + end, ((start, len(written + end)),), notes)
        text = written + (self._eos or "")
        return TargetText(text, ((start, len(text)),), (*notes, NO_END))

    def _next_end(self, messages: Messages, i: int, tools: Any, written: str) -> str | None:
        """Return what a template writes behind an answer once a message follows, up to an end token.

        A token that depends on who speaks next is a header. It ends an answer only if the model is
        known to stop at it.
        """
        role = "tool" if messages[i].get("tool_calls") else "user"
        following = messages[i + 1 : i + 2] or [{"role": role, "content": PROBES[0]}]
        found = [self._try([*messages[: i + 1], other], False, tools) for other in (*following, *SPEAKERS)]
        tails = [later.text[len(written) :] for later in found if later is not None and later.text.startswith(written)]
        ends = [self._special.match(tail, len(tail) - len(tail.lstrip())) for tail in tails]
        if found[0] is None or not ends or ends[0] is None:
            return None
        is_marker = ends[0][0] not in self._prompt and all(end and end[0] == ends[0][0] for end in ends)
        return tails[0][: ends[0].end()] if is_marker or ends[0][0] in self._given else None

    def _with_rest(self, messages: Messages, i: int, tools: Any, answer: TargetText) -> TargetText:
        """Return the last answer with the messages behind it, where the template adds them."""
        later = self._try(messages, False, tools) if i + 1 < len(messages) else None
        fits = later is not None and later.text.startswith(answer.text[: answer.end])
        return TargetText(later.text, answer.spans, answer.notes) if fits else answer

    def _check_words(self, messages: Messages, learned: list[int], tools: Any) -> None:
        """Raise LeftOutError if the template leaves out words that cannot stand there by chance."""
        messages, tools = templates.with_unique_words([messages, tools])
        try:
            answers = self._answers(messages, learned, tools)
        except SampleError:  # the template wants certain words
            return
        templates.check_written(messages, learned, tools, answers)

    def _learn_ends(self) -> None:
        """Find the template's own end token, and the form in which it takes content."""
        user, answer = ({"role": role, "content": word} for role, word in zip(("user", "assistant"), PROBES))
        self._ends = any_of(self._given)
        prompt = self._try([user], False, None)
        if prompt is None or PROBES[0] not in prompt.text:
            self._wants_parts = True
            prompt = self._try([user], False, None)
            self._wants_parts = prompt is not None and PROBES[0] in prompt.text and "'type'" not in prompt.text
        call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}
        empty, none = (self._try([user, {**call, "content": content}], False, None) for content in ("", None))
        self._wants_none = bool(empty and none) and empty.text != none.text and empty.text.startswith(none.text)
        self._prompt = prompt.text if prompt else ""
        self._opening = asked.text.removeprefix(self._prompt) if (asked := self._try([user], True, None)) else ""
        one, two = self._try([user, answer], False, None), self._try([user, answer, user], False, None)
        if one is None:
            return
        tail = one.text.rpartition(PROBES[1])[2]
        kept = common_prefix(tail, two.text.partition(PROBES[1])[2]) if two else tail
        tokens = self._special.findall(kept) or self._special.findall(tail)[:1]
        known = [token for token in tokens if token in self._given] or tokens[-1:]
        self._ends = any_of([*self._given, *known])

    def _read(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return the message with a thought that stands in its content put beside it."""
        read = with_thought_apart(message) if self._tags_thoughts or self._reads_thoughts else dict(message)
        if self._wants_json and message.get("tool_calls"):
            read["tool_calls"] = [_with_json(call) for call in message["tool_calls"]]
        return read

    def _form(self, message: Mapping[str, Any], is_new: bool) -> dict[str, Any]:
        """Return the message in the form that this template takes.

        is_new: it is the answer to learn. Earlier ones are passed as the data have them.
        """
        thought, content = thought_of(message) if message["role"] == "assistant" else None, message.get("content")
        joins = self._tags_thoughts and not self._reads_thoughts and (is_new or templates.WAS_INLINE in message)
        if thought is not None and joins:
            content = f"<think>\n{thought}\n</think>\n\n{content or ''}"
        if self._wants_parts and isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if content == "" and message.get("tool_calls") and self._wants_none:
            content = None  # else an empty answer is written behind the call
        return {**message, "content": content} if "content" in message else dict(message)

    def _render(self, messages: Messages, generate: bool, tools: Any) -> Rendered:
        new = -1 if generate else len(messages) - 1
        return self._template.render([self._form(message, i == new) for i, message in enumerate(messages)], generate, tools)

    def _try(self, messages: Messages, generate: bool, tools: Any) -> Rendered | None:
        try:
            return self._render(messages, generate, tools)
        except SampleError:
            return None

    def _renders(self, messages: Messages, tools: Any) -> bool:
        return self._try(messages, True, tools) is not None


def _with_json(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    written = {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}
    return {**call, "function": written} if "function" in call else written


def any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern for these tokens where they stand as tokens, not as text."""
    longest_first = sorted({token for token in tokens if token.strip()}, key=len, reverse=True)
    return re.compile(f"(?<!{MARKS[0]})(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})")
