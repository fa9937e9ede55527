"""Run a Python process with a time limit that returns a result, or the reason for its failure.

No torch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARK = "RESULT "
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_DISABLE_AUTO_UPDATES": "1"}
NOTHING_MORE: Mapping[str, str] = {}
ERROR_LINE = re.compile(r"[\w.]+(Error|Exception|Interrupt|Exit)\b")


@contextmanager
def scratch_folder(wanted: Path | None, prefix: str) -> Iterator[Path]:
    """Yield the folder that was asked for, made if it is not there, or else a temporary one of this prefix."""
    if wanted:
        wanted.mkdir(parents=True, exist_ok=True)
        yield wanted.resolve()
        return
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        yield Path(folder).resolve()


def run_python(
    arguments: list[str], folder: Path, timeout_s: float, variables: Mapping[str, str] = NOTHING_MORE
) -> dict[str, Any]:
    """Return the last result that the process gave to `hand_back`, or {"error": reason}."""
    return run_python_all(arguments, folder, timeout_s, variables)[-1]


def run_python_all(
    arguments: list[str], folder: Path, timeout_s: float, variables: Mapping[str, str] = NOTHING_MORE
) -> list[dict[str, Any]]:
    """Return all results that the process gave to `hand_back`, then {"error": reason} if it failed.

    It runs in `folder`, because Unsloth writes its compiled modules to the working directory.
    Output goes to files, because a compiler's workers may hold a pipe open after a kill. variables:
    of the process, over this one's. This code comes first in PYTHONPATH in any case.
    """
    environment = {**os.environ, **ENVIRONMENT, **variables}
    given = [os.path.abspath(entry) for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *given])
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        code = None
        try:
            command = [sys.executable, *arguments]
            code = subprocess.run(command, stdout=out, stderr=err, cwd=folder, env=environment, timeout=timeout_s).returncode
        except subprocess.TimeoutExpired:
            pass
        out.seek(0)
        err.seek(0)
        results = [json.loads(line.removeprefix(MARK)) for line in out if line.startswith(MARK)]
        if code == 0 and results:
            return results
        return [*results, {"error": "timed out" if code is None else _reason(err.read(), code)}]


def hand_back(result: dict[str, Any]) -> None:
    """Print a result for the parent process. Libraries may print other lines around it."""
    print(f"\n{MARK}{json.dumps(result)}", flush=True)


def _reason(stderr: str, code: int) -> str:
    """Return the reason as one line, and print the end of `stderr` to this process's stderr."""
    if "OutOfMemoryError" in stderr:
        return "out of memory"
    lines = [line for line in stderr.splitlines() if line.strip()]
    print("\n".join(lines[-15:]), file=sys.stderr)
    errors = [line for line in lines if ERROR_LINE.match(line)]
    return (errors or lines or [f"exit code {code}"])[-1].removeprefix("error: ")
