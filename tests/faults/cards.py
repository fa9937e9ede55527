"""Measure real sweeps with faults on this machine's first two cards: cost and losses of each.

`python -m tests.faults.cards FOLDER [SHAPE [TOKENS]]` trains random weights of a shape that
engine.bench knows (llama-3.2-1b), with so many tokens a trial (1,000,000). Without two cards it
uses two slots of a CPU core each, a tiny model and few tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.bench.shapes import SHAPES
from tests.support.tiny_models import byte_tokenizer

from .nodes import ENV, Nodes
from .sweeps import NUM_RUNGS, Sweep, only_folder

PATIENCE_S = 300.0
ON_CARDS = torch.cuda.device_count() >= 2
REAL = {name: value for name, value in ENV.items() if name != "FAKE_TORCH"}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 512, "max_position_embeddings": 4096}  # fmt: skip


def make_model(folder: Path, shape: str) -> None:
    """Make random weights, a tokenizer of bytes, and words to be said backwards."""
    values = TINY if shape == "tiny" else {name: value for name, value in SHAPES[shape].items() if name != "model_type"}
    torch.manual_seed(0)
    with torch.device("cuda" if ON_CARDS else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**values)).to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    rng, words = random.Random(0), ["red", "green", "blue", "one", "two", "three", "sum", "of", "and", "is"]
    samples = [[rng.choice(words) for _ in range(rng.randint(10, 200))] for _ in range(3000)]
    lines = [{"prompt": f"{' '.join(said)} {i}", "completion": " ".join(reversed(said))} for i, said in enumerate(samples)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@dataclass
class Bench:
    """Holds the folder of the sweeps, and their common options."""

    where: Path
    options: list[str]

    @classmethod
    def of(cls, where: Path, tokens: int) -> Bench:
        length = 1024 if ON_CARDS else 256
        space = (
            f"+space.lora.rank.choices=[8,16] +space.data.max_seq_length.choices=[{length},{2 * length}] "
            "+space.lora.target_modules.choices={attention:[q_proj,v_proj],all-linear:all-linear}"
        )
        options = (
            f"model=local model.path={where}/model data=local data.train={where}/data.jsonl data.eval_max_samples=64 space=none "
            f"data.eval_max_seq_length={length} {space} sampler=grid pruner=none train.max_tokens={tokens} sweep.num_trials=8 "
            f"train.num_reports={NUM_RUNGS} train.tokens_per_step={8 * length} optim.learning_rate=1e-4 "
        )
        more = "train.memory_budget_gib=23.5" if ON_CARDS else "cluster.num_cpu_slots=2"
        return cls(where, [*options.split(), more])

    def start(self, name: str, *options: str) -> subprocess.Popen:
        return self._run(name, *self.options, f"sweep.output_dir={self.where / name}", *options)

    def resume(self, name: str) -> subprocess.Popen:
        return self._run(name, f"resume={self.folder(name)}")

    def folder(self, name: str) -> Path:
        return only_folder(self.where / name)

    def reports(self, name: str) -> dict[int, int]:
        """Return trial -> rungs reported so far."""
        files = (self.where / name).glob("*/trials/*/reports.jsonl")
        return {int(file.parent.name): len(file.read_text().splitlines()) for file in sorted(files)}

    def read(self, name: str) -> str:
        """Describe in words what an ended sweep contains."""
        found = Sweep.read(self.folder(name))
        outcomes = sorted({outcome for _, outcome, _ in found.trials.values()})
        lost = [json.loads(file.read_text())["dead_time_s"] for file in self.folder(name).glob("trials/*/result.json")]
        known = [seconds for seconds in lost if seconds is not None]
        between = f"{statistics.median(known):.2f} s between two trials (at most {max(known):.2f})" if known else "no reuse"
        return f"{len(found.trials)} trials, {', '.join(outcomes)}; {len(found.faults)} faults; best {found.best}; {between}"

    def _run(self, name: str, *options: str) -> subprocess.Popen:
        with open(self.where / f"{name}.log", "a") as log:
            return subprocess.Popen([sys.executable, "-m", "sweep", *options], env=REAL, stdout=log, stderr=log)


def undisturbed(bench: Bench) -> str:
    return f"exit code {bench.start('undisturbed').wait()}: {bench.read('undisturbed')}"


def worker_killed(bench: Bench) -> str:
    """SIGKILL the worker of one slot once both have reported, then stop and resume the sweep.

    SIGTERM goes to the driver once three trials have ended.
    """
    name = "worker-killed"
    driver = bench.start(name)
    _until(lambda: len(bench.reports(name)) >= 2, driver)
    before = sum(bench.reports(name).values())
    _workers(driver)[-1].kill()
    began_s = time.monotonic()
    _until(lambda: sum(bench.reports(name).values()) >= before + 2, driver)
    on_s = time.monotonic() - began_s
    _until(lambda: len(list((bench.where / name).glob("*/trials/*/result.json"))) >= 3, driver)
    code, seconds = _terminated(driver)
    resumed = bench.resume(name).wait()
    return f"two rungs more after {on_s:.1f} s; SIGTERM: {code} after {seconds:.1f} s; resumed: {resumed}; {bench.read(name)}"


def terminated_while_loading(bench: Bench) -> str:
    """Send the driver SIGTERM while the first workers load libraries and model."""
    name = "loading"
    driver = bench.start(name)
    _until(lambda: list((bench.where / name).glob("*/trials/0000/.lock")), driver)
    time.sleep(1.0)
    code, seconds = _terminated(driver)
    return f"exit code {code} after {seconds:.1f} s"


def node_killed(bench: Bench) -> str:
    """SIGKILL one of two nodes with a card each, while another node joins."""
    name, cards = "node-killed", [("card", "0"), ("card", "1")] if ON_CARDS else [("", ""), ("", "")]
    with Nodes(num_cpus=0, env=REAL) as nodes:
        for card in cards:
            nodes.add(1, *card)
        cluster = [f"cluster.address={nodes.address}", "cluster.wait_s=60"]
        driver = bench.start(name, *(["cluster=ray"] if ON_CARDS else []), *cluster, "sweep.num_trials=4")
        _until(lambda: len(bench.reports(name)) >= 2, driver)
        before = sum(bench.reports(name).values())
        nodes.kill(1)
        began_s = time.monotonic()
        nodes.add(1, *cards[1])
        _until(lambda: sum(bench.reports(name).values()) >= before + 2, driver)
        seconds, code = time.monotonic() - began_s, driver.wait()
    return f"two rungs more after {seconds:.1f} s; exit code {code}; {bench.read(name)}"


def _until(is_so: Callable[[], object], driver: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        if driver.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the driver has ended ({driver.poll()}), or {PATIENCE_S:.0f} s are over")
        time.sleep(0.05)


def _workers(driver: subprocess.Popen) -> list[psutil.Process]:
    """Return Ray's processes that train, in the order in which they began."""
    children = psutil.Process(driver.pid).children(recursive=True)
    return sorted((child for child in children if child.name().startswith("ray::")), key=lambda child: child.create_time())


def _terminated(driver: subprocess.Popen) -> tuple[int, float]:
    began_s = time.monotonic()
    os.kill(driver.pid, signal.SIGTERM)
    return driver.wait(PATIENCE_S), time.monotonic() - began_s


DEFAULTS = ("llama-3.2-1b", 1_000_000) if ON_CARDS else ("tiny", 60_000)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.cards", description=__doc__)
    parser.add_argument("folder", type=Path, help="a new one")
    parser.add_argument("shape", nargs="?", default=DEFAULTS[0])
    parser.add_argument("tokens", type=int, nargs="?", default=DEFAULTS[1])
    options = parser.parse_args(arguments)
    where = options.folder.resolve()
    where.mkdir(parents=True)
    make_model(where, options.shape)
    bench = Bench.of(where, options.tokens)
    for scenario in (undisturbed, worker_killed, terminated_while_loading, node_killed):
        try:
            print(f"{scenario.__name__}: {scenario(bench)}", flush=True)
        except RuntimeError as error:
            print(f"{scenario.__name__}: {error}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
