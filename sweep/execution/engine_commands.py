"""Run the engine's commands as subprocesses.

So the driver never loads torch, and holds no memory on a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from engine.command_answers import AdapterEvaluation, Facts, PreparedFacts
from engine.config.parsing import load_json
from engine.config.trial import TrainConfig
from engine.errors import EngineError


class CommandFailed(EngineError):
    """Report that an engine command ended with an exit code other than 0.

    exit_code: 2 for bad input, with the engine's one line as text; 1 for any other fault.
    """

    def __init__(self, line: str, exit_code: int) -> None:
        self.line, self.exit_code = line, exit_code
        super().__init__(line)

    def __reduce__(self):  # Ray pickles the error on another node
        return (type(self), (self.line, self.exit_code))


def prepare(configs: list[TrainConfig], module: str) -> PreparedFacts:
    """Check that every config can be trained, and fill the caches.

    Returns the engine's answer. Raises CommandFailed if a config cannot be trained.
    """
    with tempfile.TemporaryDirectory(prefix="sweep-prepare-") as folder:
        request, answer = Path(folder, "configs.json"), Path(folder, "answer.json")
        request.write_text(json.dumps([config.model_dump(mode="json") for config in configs]))
        _run([module, "prepare", str(request), "--answer", str(answer)])
        return PreparedFacts.from_dict(load_json(answer))


def inspect(config: TrainConfig, module: str) -> Facts:
    """Return the model's shape and this machine's card, as `python -m engine inspect` finds them.

    Raises CommandFailed if there is no model.
    """
    with tempfile.TemporaryDirectory(prefix="sweep-inspect-") as folder:
        request, answer = Path(folder, "config.json"), Path(folder, "answer.json")
        request.write_text(json.dumps(config.model_dump(mode="json")))
        _run([module, "inspect", str(request), "--answer", str(answer)])
        return Facts.from_dict(load_json(answer))


def evaluate(trial_folder: Path, module: str, num_examples: int = 0) -> AdapterEvaluation:
    """Return the losses of base model and exported adapter, from a fresh load of the files on disk.

    num_examples: how many evaluation samples both answer. Raises CommandFailed. See
    `engine.evaluation.reevaluate.evaluate_adapter`.
    """
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
