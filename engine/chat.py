"""Chat with an adapter on its base model, quantised as in training.

Ctrl-C stops an answer, Ctrl-D ends the chat. transformers' generate writes the answers, with its
own attention and key-value cache: training's attention takes packed rows and keeps no cache. Use it
to try an adapter out, not to serve it.
"""

from __future__ import annotations

import engine.system.no_working_folder  # noqa: F401 (must be the first)

# isort: split
import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import TextStreamer

from engine.adapter.lora import attach, load_adapter_state
from engine.adapter.origin import read_origin
from engine.adapter.portable import read_adapter
from engine.config.permission import FLAG
from engine.dialogue.templates import chat_template
from engine.errors import InputError
from engine.model.base import Base, end_tokens
from engine.model.device import pick_device
from engine.model.load import load_base
from engine.system.command_line import run
from engine.system.limited_child import Bounded, TooCostly
from engine.system.user_path import user_path

EMPTY: Mapping[str, Any] = MappingProxyType({})


class Printer(TextStreamer):
    """Print text word by word and keep it: an interrupted answer stays in the conversation."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        print(text, end="", flush=True)


class Chat:
    """Hold a loaded base model with its adapter, and the turns so far."""

    def __init__(
        self, base: Base, template: str | None, max_new_tokens: int, temperature: float, variables: Mapping[str, Any] = EMPTY
    ) -> None:
        """Set how the model answers.

        template: None passes each prompt to the model as it is, without earlier turns. temperature:
        0 always takes the likeliest token. variables: what the template reads besides messages.
        """
        self._base, self._template, self._messages, self._variables = base, template, [], dict(variables)
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0, "use_cache": True}
        if temperature > 0:
            self._options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        if ends := end_tokens(base):
            # A single sequence is never padded, but generate warns if the pad token is not set.
            self._options |= {"eos_token_id": ends, "pad_token_id": ends[0]}

    @torch.no_grad()
    def answer(self, prompt: str) -> str:
        """Print the answer as it comes and return it. Ctrl-C stops it; the text so far is kept."""
        printer = Printer(self._base.tokenizer)
        inputs = {name: tensor.to(self._base.device) for name, tensor in self._encode(prompt).items()}
        try:
            self._base.model.generate(**inputs, **self._options, streamer=printer)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print(flush=True)
        self._messages.append({"role": "assistant", "content": printer.text})
        return printer.text

    def _encode(self, prompt: str) -> dict[str, torch.Tensor]:
        tokenizer = self._base.tokenizer
        if self._template is None:
            encoded = tokenizer(prompt, return_tensors="pt")
        else:
            self._messages.append({"role": "user", "content": prompt})
            options = {**self._variables, "chat_template": self._template, "add_generation_prompt": True, "tokenize": False}
            try:
                with Bounded(lambda messages: tokenizer.apply_chat_template(messages, **options)) as render:
                    text = render(self._messages)
            except TooCostly as error:
                raise InputError("chat template", self._template, str(error)) from None
            # The template has written the special tokens already.
            encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def load_chat(
    folder: Path, max_new_tokens: int, temperature: float, device: str = "auto", trust_remote_code: bool = False
) -> Chat:
    """Load the adapter on its base model, quantised as its train_config.json says.

    Without a train_config.json the base is held in NF4. trust_remote_code: allow the model's own
    code to run. Raises InputError.
    """
    adapter = read_adapter(folder, takes_rows=True)
    model, config = read_origin(folder, adapter, trust_remote_code=trust_remote_code)
    if adapter.token_rows and not model.train_tokens:
        allowed = "must be named by model.train_tokens of a train_config.json in or above the adapter's folder"
        raise InputError("adapter", sorted(adapter.token_rows), f"has rows of tokens, which {allowed}")
    # Fused layers take packed rows only, which generate does not make.
    model = model.model_copy(update={"layers": "original", "embeddings": "device"})
    base = load_base(model, pick_device(device), attention_name="sdpa")
    layers = attach(base.model, base.linear_names, adapter.lora_config(), seed=0)
    with torch.no_grad():
        load_adapter_state(layers, adapter.state(), "adapter")
    base.model.eval()
    wanted = config.data.chat_template if config else None
    template = chat_template(base.tokenizer, wanted) if wanted or base.tokenizer.chat_template else None
    variables = (config.data.template_kwargs if config else None) or {}
    return Chat(base, template, max_new_tokens, temperature, variables)


def _prompts() -> Iterator[str]:
    """Yield the lines the user types, until Ctrl-D. Ctrl-C clears the line."""
    while True:
        try:
            line = input("> ")
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            return
        if line.strip():
            yield line


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: _main(_options(arguments)))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m engine.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", type=user_path, help="folder with adapter_config.json, such as best/ of a sweep")
    parser.add_argument("--prompt", help="answer this prompt and exit")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(FLAG, action="store_true", help="let the base model's own code run")
    return parser.parse_args(arguments)


def _main(options: argparse.Namespace) -> int:
    if options.max_new_tokens < 1:
        raise InputError("--max-new-tokens", options.max_new_tokens, "must be at least 1")
    if not 0 <= options.temperature < float("inf"):
        raise InputError("--temperature", options.temperature, "must be 0 or more")
    given = (options.max_new_tokens, options.temperature, options.device, options.trust_remote_code)
    chat = load_chat(options.adapter, *given)
    torch.manual_seed(options.seed)
    for prompt in [options.prompt] if options.prompt is not None else _prompts():
        chat.answer(prompt)
    return 0


if __name__ == "__main__":
    sys.exit(main())
