"""Encode dialogues with the templates of tests/support/chat_templates.py, and show the targets."""

from __future__ import annotations

from engine.config.data_section import DataConfig
from engine.config.parsing import parse
from engine.dialogue.conversation import Conversation
from engine.dialogue.encoding import Encoder
from tests.support.chat_templates import tokenizer_for

TOOLS = ({"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}},)
ENCODERS: dict = {}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **rest):
    return {"role": "assistant", "content": content, **rest}


def call(city="Paris", days=3):
    return [{"type": "function", "function": {"name": "look_up", "arguments": {"city": city, "days": days}}}]


def encoder_for(name, **options):
    key = (name, repr(options))
    if key not in ENCODERS:
        tokenizer = tokenizer_for(name)
        ENCODERS[key] = tokenizer, Encoder(tokenizer, parse(DataConfig, {"train": "x", **options}))
    return ENCODERS[key]


def encode(name, *messages, tools=None, learned=None, **options):
    """Return the tokenizer, and the rows of one dialogue."""
    tokenizer, encoder = encoder_for(name, **options)
    learned = learned or tuple(message["role"] == "assistant" for message in messages)
    return tokenizer, encoder.encode([encoder.render(Conversation(messages, learned, tools))])[0]


def spans(row):
    """Return (ids before, ids learnt) of each run of targets."""
    edges = [
        i
        for i in range(len(row.input_ids) + 1)
        if (i < len(row.input_ids) and row.is_target[i]) != (i > 0 and row.is_target[i - 1])
    ]
    return [(row.input_ids[:start], row.input_ids[start:end]) for start, end in zip(edges[::2], edges[1::2])]


def learnt(name, *messages, **options):
    """Return the texts with loss, a list for each row."""
    tokenizer, rows = encode(name, *messages, **options)
    return [[tokenizer.decode(ids) for _, ids in spans(row)] for row in rows]
