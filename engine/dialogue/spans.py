"""Find what the model has to write of a conversation, in the context in which it writes it.

The context of an answer is the generation prompt for the messages before it. The answer runs up to
the token that ends generation. Answers share a text as long as each one's context is its beginning.
Where a template writes earlier turns differently once later ones follow, the others get texts of
their own: exactly what the model sees when it has to answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from engine.dialogue import left_out
from engine.dialogue.continuation import continued
from engine.dialogue.conversation import Conversation, SampleError, TargetText
from engine.dialogue.dialect import PROBES, QUESTION, Dialect, Messages
from engine.dialogue.templates import MARKS, ChatTemplate, Rendered, common_prefix
from engine.dialogue.ways_out import OtherPromptError, with_way_out

SPEAKERS = tuple({"role": role, "content": PROBES[0]} for role in ("user", "system", "tool"))
MAX_SHAPES = 10_000
MARKED = "special tokens in messages are learnt as the text they are"
UNASKED = "answers before the first question are not learnt"
NO_END = "the chat template ends answers with no token; the tokenizer's end token was added"
THOUGHT_LEFT_OUT = "the chat template does not write the thoughts of some answers, so these are not learnt"
Remake = Callable[[str, dict[str, Any]], "Spans"]  # template, variables -> spans


class Spans:
    """Turn conversations into texts, with one template."""

    def __init__(
        self, template: ChatTemplate, ends: Sequence[str], eos: str | None, added: Sequence[str], turns: str, remake: Remake
    ) -> None:
        """Set what the tokenizer knows.

        ends: the tokens that end generation. eos: the one of them to add where the template writes
        none. added: all special tokens. turns: all, or last. remake: for another template.
        """
        self._template, self._eos, self._turns, self._remake = template, eos, turns, remake
        self._given = (tuple(ends), tuple(added))
        self._known: Dialect | None = None
        self._seen: dict[Any, list[str]] = {}
        self._ways: dict[Any, str] = {}

    @property
    def _dialect(self) -> Dialect:
        if self._known is None:
            self._known = Dialect(self._template, *self._given)
        return self._known

    def answers(self, conversation: Conversation) -> list[TargetText]:
        """Return the conversation's texts.

        SampleError, with the message's number where it is one message's fault and with a way out, if
        none can be right.
        """
        try:
            return self.tried(conversation)
        except SampleError as error:
            raise with_way_out(error, conversation, self._template, self._remake, self._ways) from error

    def tried(self, conversation: Conversation) -> list[TargetText]:
        """Return the conversation's texts. SampleError, without a way out, if none can be right."""
        dialect = self._dialect
        try:
            return self._texts(conversation)
        except SampleError as error:
            if not any(message.get("tool_calls") for message in conversation.messages):
                raise
            dialect.wants_json = not dialect.wants_json
            try:
                return self._texts(conversation)
            except SampleError as other:
                dialect.wants_json = not dialect.wants_json
                raise (other if "refused it" in str(error) else error) from None

    def _texts(self, conversation: Conversation) -> list[TargetText]:
        messages, tools = self._dialect.prepared(conversation.messages), self._template.prepared(conversation.tools) or None
        kept, learned, notes = self._asked(messages, [i for i, wanted in enumerate(conversation.learned) if wanted], tools)
        if not learned:
            raise SampleError("has no answer behind a question, so there is nothing to learn")
        learned = learned[-1:] if self._turns == "last" else learned
        try:
            return self._learnt([messages[i] for i in kept], [kept.index(i) for i in learned], tools, notes)
        except SampleError as error:
            raise left_out.renumbered(error, kept) from error

    def _learnt(self, messages: Messages, learned: list[int], tools: Any, notes: list[str]) -> list[TargetText]:
        answers = self._answers(messages, learned, tools)
        lacks_thought = left_out.check_written(messages, learned, tools, answers)
        is_marked = MARKS[0] in json.dumps([messages, tools], ensure_ascii=False)
        if is_marked:
            self._check_tokens(messages, learned, tools, answers)
        known = left_out.shape([messages, tools, learned])
        if known not in self._seen and len(self._seen) < MAX_SHAPES:
            self._seen[known] = self._check_words(messages, learned, tools)
        notes = [*notes, *([THOUGHT_LEFT_OUT] if lacks_thought else self._seen.get(known, []))]
        answers[-1] = self._with_rest(messages, learned[-1], tools, answers[-1])
        notes = [*notes, *([MARKED] if is_marked else [])]
        return [TargetText(t.text, t.spans, (*notes, *t.notes)) for t in answers]

    def _asked(self, messages: Messages, learned: list[int], tools: Any) -> tuple[list[int], list[int], list[str]]:
        """Return which messages to keep and to learn, without what no one asked for and no template can write."""
        others = ("assistant", "system", "developer")
        question = next((i for i, message in enumerate(messages) if message["role"] not in others), len(messages))
        unasked = [i for i in learned if i < question and (i == 0 or not self._renders(messages[:i], tools))]
        learned = [i for i in learned if i not in unasked]
        before = [i for i in range(question) if messages[i]["role"] == "assistant"]
        drops = before and learned and learned[0] > question and not self._renders(messages[: learned[0]], tools)
        kept = [i for i in range(len(messages)) if not (drops and i in before)]
        return kept, learned, [UNASKED] if unasked else []

    def _answers(self, messages: Messages, learned: list[int], tools: Any) -> list[TargetText]:
        found = []
        for i in learned:
            try:
                found.append(self._answer(messages, i, tools))
            except left_out.LeftOutError:
                raise
            except SampleError as error:
                raise error.at(f"message {i + 1} (assistant): ") from error
        return found

    def _answer(self, messages: Messages, i: int, tools: Any) -> TargetText:
        prompt = self._dialect.render(messages[:i], True, tools).text
        whole = self._dialect.render(messages[: i + 1], False, tools)
        if self._template.has_tags:
            return self._tagged(messages[:i], tools, prompt, whole)
        if whole.text.startswith(prompt):
            start = self._header_end(whole.text, len(prompt)) if messages[i - 1]["role"] == "assistant" else len(prompt)
            return self._ended(messages, i, tools, whole.text, start)
        try:
            answer, notes = continued(self._dialect, messages, i, tools, prompt, whole.text)
        except OtherPromptError:
            for offered in (tools, None)[: 1 + bool(tools)] if messages[0] is not QUESTION else ():
                if found := self._behind_a_question(messages[i], offered, prompt, whole.text):
                    return found
            for j in range(i + 1):  # what is not written is worth more than where two texts part
                if lacks := left_out.fault(messages, j, whole.text if j == i else prompt):
                    raise lacks from None
            raise
        return self._ended(messages, i, tools, prompt + answer, len(prompt), notes)

    def _header_end(self, text: str, start: int) -> int:
        """Return where an answer behind an answer begins.

        A template may write the header there, and before it the earlier answer's end token.
        """
        opening, end = self._dialect.opening, self._dialect.ends.match(text, start)
        behind = end.end() if end else start
        starts = (start, behind, len(text) - len(text[behind:].lstrip()))
        return next((at + len(opening) for at in starts if opening and text.startswith(opening, at)), start)

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
            first = len(self._dialect.header(before, tools))
        *spans, (start, end) = [(max(start, first), end) for start, end in tags if end > first]
        if found := self._dialect.ends.search(text, start):
            between = text[min(end, found.end()) : max(end, found.start())]
            end = end if self._dialect.ends.sub("", between).strip() else found.end()
        elif self._eos and not text[end:].strip() and not self._dialect.special.search(text, start):
            text = text[:start] + text[start:].rstrip() + self._eos
            return TargetText(text, (*spans, (start, len(text))), (NO_END,))
        return TargetText(text, (*spans, (start, end)))

    def _behind_a_question(self, message: dict[str, Any], tools: Any, prompt: str, whole: str) -> TargetText | None:
        """Return the answer as the template writes it behind a plain question, or None.

        A new message may change how earlier ones are written, or go on with an earlier answer. The
        model reads the same generation prompt nonetheless, so it writes the same behind it.
        """
        plain, asked = (self._dialect.attempt([QUESTION], generate, tools) for generate in (False, True))
        try:
            answer = self._answer([QUESTION, message], 1, tools)
        except SampleError:
            return None
        opening, written = asked.text.removeprefix(plain.text if plain else ""), answer.text[answer.start : answer.end]
        last = next((found.start() for found in self._dialect.special.finditer(written) if found.end() == len(written)), None)
        is_same = whole.rstrip().endswith((written, written[:last].rstrip())) and written[:last].strip()
        if opening == asked.text or not is_same or not prompt.endswith(opening):
            return None
        return TargetText(prompt + written, ((len(prompt), len(prompt + written)),), answer.notes)

    def _ended(self, messages: Messages, i: int, tools: Any, text: str, start: int, notes: tuple[str, ...] = ()) -> TargetText:
        """Return the answer from `start` up to the token that ends generation.

        Where the template writes it with the next message only, it is taken from there. Where it
        writes none, the tokenizer's is added.
        """
        if found := self._dialect.ends.search(text, start):
            return TargetText(text, ((start, found.end()),), notes)
        written = text[:start] + text[start:].rstrip()
        special = [found.end() for found in self._dialect.special.finditer(text, start)]
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
        found = [self._dialect.attempt([*messages[: i + 1], other], False, tools) for other in (*following, *SPEAKERS)]
        tails = [later.text[len(written) :] for later in found if later is not None and later.text.startswith(written)]
        ends = [self._dialect.special.match(tail, len(tail) - len(tail.lstrip())) for tail in tails]
        if found[0] is None or not ends or ends[0] is None:
            return None
        is_marker = ends[0][0] not in self._dialect.prompt and all(end and end[0] == ends[0][0] for end in ends)
        return tails[0][: ends[0].end()] if is_marker or ends[0][0] in self._dialect.given else None

    def _with_rest(self, messages: Messages, i: int, tools: Any, answer: TargetText) -> TargetText:
        """Return the last answer with the messages behind it, where the template adds them."""
        later = self._dialect.attempt(messages, False, tools) if i + 1 < len(messages) else None
        fits = later is not None and later.text.startswith(answer.text[: answer.end])
        return TargetText(later.text, answer.spans, answer.notes) if fits else answer

    def _check_words(self, messages: Messages, learned: list[int], tools: Any) -> list[str]:
        """Return notes. LeftOutError if the template leaves out words that cannot stand there by chance."""
        messages, tools = left_out.with_unique_words([messages, tools])
        try:
            answers = self._answers(messages, learned, tools)
        except SampleError:  # the template wants certain words
            return []
        return [THOUGHT_LEFT_OUT] if left_out.check_written(messages, learned, tools, answers) else []

    def _check_tokens(self, messages: Messages, learned: list[int], tools: Any, answers: list[TargetText]) -> None:
        """Raise SampleError if the template acts on a special token in the text of an answer."""
        plain, words = left_out.with_plain_tokens(messages)
        for i, answer in zip(learned, answers):
            written = answer.text[answer.start : answer.end]
            try:
                other = self._answer(plain, i, tools)
                text = other.text[other.start : other.end]
            except SampleError:
                text = ""
            for word, token in words.items():
                text = text.replace(word, token)
            if MARKS[0] in written and text != written:
                raise SampleError(f"message {i + 1} (assistant): the chat template acts on a special token in its content")

    def _renders(self, messages: Messages, tools: Any) -> bool:
        return self._dialect.attempt(messages, True, tools) is not None
