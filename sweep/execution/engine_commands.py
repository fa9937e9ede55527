"""The engine's command line, run as subprocesses: the driver itself never loads torch, so it holds no memory on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from engine.answers import AdapterEvaluation, Facts, PreparedFacts
from engine.config.parsing import load_json
from engine.config.trial import TrainConfig
from engine.errors import EngineError


class CommandFailed(EngineError):
    """An engine command ended with another exit code than 0. `exit_code` 2: bad input, and the text is the engine's one line."""

    def __init__(self, line: str, exit_code: int) -> None:
        self.line, self.exit_code = line, exit_code
        super().__init__(line)

    def __reduce__(self):  # it may come from another node
        return (type(self), (self.line, self.exit_code))


def prepare(configs: list[TrainConfig], module: str) -> PreparedFacts:
    """Check that every config can be trained and fill the caches; CommandFailed where not. Returns the engine's answer."""
    with tempfile.TemporaryDirectory(prefix="sweep-prepare-") as folder:
        request, answer = Path(folder, "configs.json"), Path(folder, "answer.json")
        request.write_text(json.dumps([config.model_dump(mode="json") for config in configs]))
        _run([module, "prepare", str(request), "--answer", str(answer)])
        return PreparedFacts.from_dict(load_json(answer))


def inspect(config: TrainConfig, module: str) -> Facts:
    """The model's shape and the card here, as `engine.prepare.inspect` finds them; CommandFailed where there is no model."""
    with tempfile.TemporaryDirectory(prefix="sweep-inspect-") as folder:
        request, answer = Path(folder, "config.json"), Path(folder, "answer.json")
        request.write_text(json.dumps(config.model_dump(mode="json")))
        _run([module, "inspect", str(request), "--answer", str(answer)])
        return Facts.from_dict(load_json(answer))


def evaluate(trial_folder: Path, module: str, num_examples: int = 0) -> AdapterEvaluation:
    """Losses of the base model and of the exported adapter, from a fresh load of the files on disk, and what both answer to
    num_examples evaluation samples; see `engine.evaluate.evaluate_adapter`."""
    with tempfile.TemporaryDirectory(prefix="sweep-evaluate-") as folder:
        answer = Path(folder, "answer.json")
        config, adapter = trial_folder / "train_config.json", trial_folder / "adapter"
        options = ["--adapter", str(adapter), "--examples", str(num_examples), "--answer", str(answer)]
        _run([module, "evaluate", str(config), *options])
        return AdapterEvaluation.from_dict(load_json(answer))


def _run(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True)
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    text = lines[-1].removeprefix("error: ") if lines else "no message"
    if done.returncode != 2:
        text = f"python -m {' '.join(arguments[:2])} failed with exit code {done.returncode}: {text}"
    raise CommandFailed(text, 2 if done.returncode == 2 else 1)
