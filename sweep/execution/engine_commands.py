"""Run the engine's commands as subprocesses.

So the driver never loads torch, and holds no memory on a GPU.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path

from engine.command_answers import AdapterEvaluation, Facts, PreparedFacts
from engine.config.parsing import load_json
from engine.config.permission import FLAG, METRICS_FLAG
from engine.config.trial import TrainConfig
from engine.errors import EngineError
from engine.system.child_python import own_environment, python_module
from engine.system.command_line import ProgressBar, read_progress


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
        _run_shown([module, "prepare", str(request), "--answer", str(answer), "--progress"], configs)
        return PreparedFacts.from_dict(load_json(answer))


def inspect(config: TrainConfig, module: str) -> Facts:
    """Return the model's shape and this machine's card, as `python -m engine inspect` finds them.

    Raises CommandFailed if there is no model.
    """
    with tempfile.TemporaryDirectory(prefix="sweep-inspect-") as folder:
        request, answer = Path(folder, "config.json"), Path(folder, "answer.json")
        request.write_text(json.dumps(config.model_dump(mode="json")))
        _run([module, "inspect", str(request), "--answer", str(answer)], [config])
        return Facts.from_dict(load_json(answer))


def print_sample(config: TrainConfig, module: str, options: list[str]) -> int:
    """Let `python -m engine show-sample` write to this process's output. Returns its exit code."""
    with tempfile.TemporaryDirectory(prefix="sweep-sample-") as folder:
        request = Path(folder, "config.json")
        request.write_text(json.dumps(config.model_dump(mode="json")))
        command = _command([module, "show-sample", str(request), *options], [config])
        return subprocess.run(command, env=own_environment()).returncode


def calibrate(module: str, say: Callable[[str], None]) -> None:
    """Have `python -m engine calibrate` measure this machine's card, if nobody has; pass on its lines.

    Another process that measures it is waited for. Raises CommandFailed if it cannot be measured.
    """
    command = python_module(module, "calibrate", "--if-missing")
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=own_environment(), stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):
        try:
            for line in child.stdout:
                say(line.rstrip("\n"))
            code = child.wait()
        except BaseException:  # Ctrl-C
            child.kill()
            raise
        if code:
            errors.seek(0)
            raise _failure(code, errors.read(), [module, "calibrate"])


class Standby:
    """Hold a process that loads the engine's libraries beforehand and waits for one command.

    It has read no file of the sweep by then. Where it cannot run the command, a new process does.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._child: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process; a second call does nothing. A machine that cannot start it now is no fault of the sweep."""
        if self._child is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            with suppress(OSError):  # too many files or processes, or no memory for one more
                self._child = subprocess.Popen(python_module(self._module, "standby"), env=own_environment(), text=True, **pipes)

    def has_run(self, command: list[str]) -> bool:
        """Run an engine command. Returns whether it succeeded; False also without a process."""
        if self._child is None or self._child.poll() is not None:
            return False
        try:
            self._child.communicate(json.dumps(command) + "\n")
        except BaseException:  # Ctrl-C
            self._child.kill()
            raise
        return self._child.returncode == 0

    def close(self) -> None:
        """End a process that got no command."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()


def evaluate(
    config: TrainConfig, adapter: Path, module: str, num_examples: int = 0, inputs: Mapping[str, str] | None = None,
    standby: Standby | None = None,
) -> AdapterEvaluation:  # fmt: skip
    """Return the losses of base model and exported adapter, from a fresh load of the files on disk.

    config: the trial's, as the driver knows it; the file in the trial's folder may have been edited.
    num_examples: how many evaluation samples both answer. inputs: the digests that the sweep
    recorded. standby: runs the command, if it can. Raises CommandFailed. See `engine.evaluation.reevaluate.evaluate_adapter`.
    """
    with tempfile.TemporaryDirectory(prefix="sweep-evaluate-") as folder:
        request, answer = Path(folder, "config.json"), Path(folder, "answer.json")
        request.write_text(json.dumps(config.model_dump(mode="json")))
        options = ["--adapter", str(adapter), "--examples", str(num_examples), "--answer", str(answer)]
        if inputs:
            known = Path(folder, "inputs.json")
            known.write_text(json.dumps(dict(inputs)))
            options += ["--inputs", str(known)]
        _run([module, "evaluate", str(request), *options], [config], standby)
        return AdapterEvaluation.from_dict(load_json(answer))


def _command(arguments: list[str], configs: list[TrainConfig]) -> list[str]:
    """Return the command. It may run a model's own code, and the user's metrics, if the driver's own config says so."""
    return python_module(*arguments, *_permission(configs))


def _permission(configs: list[TrainConfig]) -> list[str]:
    own = [METRICS_FLAG] if any(config.metrics.own for config in configs) else []
    return ([FLAG] if any(config.model.trust_remote_code for config in configs) else []) + own


def _run(arguments: list[str], configs: list[TrainConfig], standby: Standby | None = None) -> None:
    if standby is not None and standby.has_run([*arguments[1:], *_permission(configs)]):
        return
    done = subprocess.run(_command(arguments, configs), env=own_environment(), capture_output=True, text=True)
    if done.returncode:
        raise _failure(done.returncode, done.stderr, arguments[:2])


def _run_shown(arguments: list[str], configs: list[TrainConfig]) -> None:
    """Run a command that tells how far it is, and show that."""
    bar = ProgressBar(sys.stdout)
    with (
        closing(bar),
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            _command(arguments, configs), env=own_environment(), stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child,
    ):
        try:
            while child.poll() is None:
                if not select.select([child.stdout], [], [], 1.0)[0]:
                    bar.tick()
                elif (told := read_progress(child.stdout.readline())) is not None:
                    bar(*told)
        except BaseException:  # Ctrl-C
            child.kill()
            raise
        if child.returncode:
            errors.seek(0)
            raise _failure(child.returncode, errors.read(), arguments[:2])


def _failure(code: int, errors: str, command: list[str]) -> CommandFailed:
    lines = [line for line in errors.splitlines() if line.strip()]
    text = lines[-1].removeprefix("error: ") if lines else "no message"
    if code != 2:
        text = f"python -m {' '.join(command)} failed with exit code {code}: {text}"
    return CommandFailed(text, 2 if code == 2 else 1)
