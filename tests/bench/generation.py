"""Measure tokens per second of generated answers: ours, and transformers' generate on the same weights.

    python -m tests.bench.generation --model llama-3.1-8b --json FILE
    python -m tests.bench.generation --model tiny --batches 1 2 --tokens 6 --other-tokens 4 --json FILE    # on a CPU

A model of a shape that engine.bench knows has random NF4 weights; other names are taken as
`model.path` takes them. An adapter of rank 16 on all linear layers is attached, with values. Prompts
have 100 to 199 random tokens. The likeliest token is taken each time, and none ends an answer.

| way | answers are made by |
|---|---|
| `ours` | the fused layers, pass after pass from a recording (on a card) |
| `ours-unrecorded` | the fused layers, each pass launched |
| `library` | transformers' layers and its `generate`, under our 4-bit products |
| `library-plain` | the same, with all weights dequantised once |

Every way makes a third of the tokens and then all of them, after a run that is not timed. The
difference gives `steady_tokens_per_second`, free of prompts, recording and dequantising;
`tokens_per_second` counts all. The other ways are slow, so they make fewer tokens. `same_tokens` is
the share that equals ours: with random weights in bf16, near ties part them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from engine.adapter.flat import FlatAdapter
from engine.adapter.lora import attach
from engine.bench.shapes import SHAPES, random_base
from engine.config.trial import LoraConfig, ModelConfig
from engine.evaluation import decoding
from engine.evaluation.decoding import Decoding, generate, original_layers
from engine.model.base import Base
from engine.model.comparison import own_attentions
from engine.model.device import free, pick_device, pick_dtype
from engine.model.load import load_base
from engine.model.pretrained import text_attention
from engine.quant.frozen_linear import FrozenLinear
from engine.system.command_line import run
from engine.system.provenance import provenance
from engine.units import GIB

Record = dict[str, Any]
Prompts = Sequence[np.ndarray]
Answers = list[list[int]]
RANK, SHORTEST, LONGEST, FEWEST = 16, 100, 200, 3


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(lambda: _main(_arguments(arguments)), stopped="stopped; the --json file has the finished rows")


def _main(options: argparse.Namespace) -> int:
    began_s, device = time.perf_counter(), pick_device("auto")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    facts = {"card": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "git.commit": "", **provenance()}
    facts |= {"git.commit": options.commit} if options.commit else {}
    print(f"{options.model}, NF4, r {RANK}, {facts['card']}\n{HEADINGS}", flush=True)
    base = make_base(options.model, device)
    prompts = {batch: make_prompts(batch, base.model.config.get_text_config().vocab_size) for batch in options.batches}
    ours: dict[int, Answers] = {}
    for way in dict.fromkeys(["ours", *options.ways]):
        for batch in options.batches:
            if options.budget_s is not None and time.perf_counter() - began_s >= options.budget_s:
                print(f"{way:<18}{batch:>6}  not measured: --budget-s {options.budget_s:g} is used up")
                continue
            number = options.tokens if way == "ours" else options.other_tokens
            found, answers = measure(base, way, prompts[batch], number)
            if way == "ours" and "error" not in found:
                ours[batch] = answers
            found["same_tokens"] = same_tokens(answers, ours.get(batch, []))
            record = {**facts, "model": options.model, "way": way, "batch": batch, "tokens": number, **found}
            with options.json.open("a") as file:
                file.write(json.dumps(record, sort_keys=True) + "\n")
            print(line(record), flush=True)
    return 0


def make_base(model: str, device: torch.device) -> Base:
    """Return the model, with an adapter that changes what it computes, in evaluation mode."""
    config = ModelConfig(path=model)
    base = random_base(model, device, pick_dtype("auto", device), True) if model in SHAPES else load_base(config, device)
    generator, layers = torch.Generator(device).manual_seed(0), attach(base.model, base.linear_names, LoraConfig(rank=RANK), 0)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_b.normal_(std=0.01, generator=generator)
    FlatAdapter(layers, base.dtype)  # the layers keep its memory, and their 16-bit copies in it
    base.model.eval()
    return base


def make_prompts(count: int, vocab_size: int) -> list[np.ndarray]:
    """Return `count` prompts of random tokens, the same ones each time."""
    random = np.random.default_rng(count)
    lengths = random.integers(SHORTEST, LONGEST, count)
    return [random.integers(10, vocab_size - 10, length).astype(np.int32) for length in lengths]


def measure(base: Base, way: str, prompts: Prompts, number: int) -> tuple[Record, Answers]:
    """Return what answers of `number` tokens to all prompts at once take, and the answers; {"error": reason} and none."""
    prepared, call = WAYS[way]
    try:
        with prepared(base):
            found, answers = _timed(base, lambda steps: call(base, prompts, steps), len(prompts), number)
    except torch.OutOfMemoryError:
        found, answers = {"error": "out of memory"}, []
    free(base.device)
    return found, answers


def _timed(base: Base, call: Callable[[int], Answers], batch: int, number: int) -> tuple[Record, Answers]:
    on_card = base.device.type == "cuda"

    def wait() -> float:
        if on_card:
            torch.cuda.synchronize()
        return time.perf_counter()

    few = number // 3
    call(number)
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    seconds, answers = [], []
    for steps in (few, number):
        began_s = wait()
        answers = call(steps)
        seconds.append(wait() - began_s)
    step_s = (seconds[1] - seconds[0]) / (number - few)
    return {
        "tokens_per_second": batch * number / seconds[1],
        "steady_tokens_per_second": batch / step_s if step_s > 0.0 else None,  # of tiny models, noise hides the difference
        "step_ms": 1e3 * step_s, "seconds": seconds[1],
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if on_card else None,
    }, answers  # fmt: skip


def same_tokens(answers: Answers, ours: Answers) -> float | None:
    """Return the share of the answers' tokens that stand at the same place in ours; None if either has none."""
    pairs = [(a, b) for answer, own in zip(answers, ours) for a, b in zip(answer, own)]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else None


def _by_engine(base: Base, prompts: Prompts, steps: int) -> Answers:
    return generate(base, prompts, [], Decoding(steps, batch_size=len(prompts)))


@torch.no_grad()
def _by_library(base: Base, prompts: Prompts, steps: int) -> Answers:
    """Return what `generate` makes of the prompts, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[i, width - len(prompt) :] = 1
    found = base.model.generate(
        input_ids=ids.to(base.device), attention_mask=mask.to(base.device), max_new_tokens=steps, min_new_tokens=steps,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return found[:, width:].tolist()


def _unrecorded(base: Base) -> AbstractContextManager[Any]:
    return mock.patch.object(decoding, "recorder", lambda base: None)


@contextmanager
def _library_layers(base: Base, plain: bool = False) -> Iterator[None]:
    """Put the library's layers and attention in place inside. plain: with dequantised copies of all weights."""
    config, packed = base.model.config, [one for one in base.model.modules() if isinstance(one, FrozenLinear) and one.is_packed]
    with original_layers(base.model):
        base.model.set_attn_implementation(text_attention(config, own_attentions(base.model)[0]))
        base.model.eval()
        try:
            for module in packed if plain else ():
                module.keep_plain(base.dtype)
            yield
        finally:
            for module in packed:
                module.keep_plain(None)
            base.model.set_attn_implementation(text_attention(config, base.route.attention))


WAYS: dict[str, tuple[Callable[[Base], AbstractContextManager[Any]], Callable[[Base, Prompts, int], Answers]]] = {
    "ours": (lambda base: nullcontext(), _by_engine),
    "ours-unrecorded": (_unrecorded, _by_engine),
    "library": (_library_layers, _by_library),
    "library-plain": (lambda base: _library_layers(base, plain=True), _by_library),
}
"""Way -> what is prepared for it, and what makes the answers."""
HEADINGS = f"{'way':<18}{'batch':>6}{'tokens':>8}{'tok/s':>10}{'steady':>10}{'ms/pass':>9}{'as ours':>9}{'peak GiB':>10}"


def line(record: Record) -> str:
    """Return a row for a terminal."""
    head = f"{record['way']:<18}{record['batch']:>6}"
    if "error" in record:
        return f"{head}  {record['error']}"
    steady, same = record["steady_tokens_per_second"], record["same_tokens"]
    speed = f"{record['tokens_per_second']:>10,.1f}{'-' if steady is None else f'{steady:,.1f}':>10}{record['step_ms']:>9.2f}"
    return f"{head}{record['tokens']:>8}{speed}{'-' if same is None else f'{same:.0%}':>9}{record['peak_gib'] or 0.0:>10.2f}"


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.generation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-3.1-8b", help="a shape that engine.bench knows, or as model.path")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="ours comes first in any case")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64], help="answers at once")
    parser.add_argument("--tokens", type=int, default=96, help="of each of our answers")
    parser.add_argument("--other-tokens", type=int, default=12, help="of each answer in the other ways")
    parser.add_argument("--budget-s", type=float, help="start no more rows after this time")
    parser.add_argument("--json", type=Path, required=True, help="file to add a line to for each row")
    parser.add_argument("--commit", help="commit to record if the code is not in a git checkout")
    options = parser.parse_args(arguments)
    if min(options.batches) < 1:
        parser.error(f"--batches {min(options.batches)}: must be at least 1")
    for name in ("tokens", "other_tokens"):
        if getattr(options, name) < FEWEST:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {FEWEST}")
    return options


if __name__ == "__main__":
    sys.exit(main())
