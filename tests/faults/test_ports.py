"""While a sweep runs, only loopback sockets listen, and every call needs a token.

The tests look at the process table.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.paths import ENV

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]
CONFIG = {
    "model": {"path": "m"}, "data": {"train": "t", "max_seq_length": 8},
    "train": {"max_tokens": 400, "num_reports": 4}, "optim": {"eps": 2.0},
    "cluster": {"num_cpu_slots": 2}, "space": {"lora.rank": {"choices": [2, 4]}}, "pruner": {"name": "none"},
}  # fmt: skip
DRIVER = ("-m", "tests.support.fake_driver")
OPEN = f"import ray, runpy; runpy.run_module({DRIVER[1]!r}, run_name='__main__', alter_sys=True)"


def sweep(tmp_path: Path, program: tuple[str, str] = DRIVER, **given: str) -> subprocess.Popen:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**CONFIG, "sweep": {"output_dir": str(tmp_path / "sweeps"), "num_trials": 2}}))
    env = {name: value for name, value in ENV.items() if not name.startswith("RAY_")} | given
    command = [sys.executable, *program, "start", str(file)]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def watch(process: subprocess.Popen) -> tuple[dict[str, set[str]], set[str], str]:
    """Watch the sweep until it ends.

    Returns address -> names of processes that listened on it, tokens seen in environments, and all
    command lines.
    """
    listening: dict[str, set[str]] = {}
    tokens, lines = set(), set()
    while process.poll() is None:
        root = psutil.Process(process.pid)
        for one in [root, *root.children(recursive=True)]:
            try:
                lines.add(" ".join(one.cmdline()))
                tokens.add(one.environ().get("RAY_AUTH_TOKEN", ""))
                for socket in one.net_connections("inet"):
                    if socket.status == psutil.CONN_LISTEN:
                        listening.setdefault(socket.laddr.ip.removeprefix("::ffff:"), set()).add(one.name())
            except psutil.Error:
                continue  # it has just ended
        time.sleep(0.3)
    return listening, tokens - {""}, "\n".join(lines)


def test_a_sweep_listens_on_the_loopback_interface_only_and_its_calls_carry_a_token(tmp_path):
    process = sweep(tmp_path)
    listening, tokens, lines = watch(process)
    assert process.returncode == 0, process.stderr.read()
    assert set(listening) == {"127.0.0.1"}, listening
    # twin: the sockets seen include Ray's own
    assert {"gcs_server", "raylet"} <= listening["127.0.0.1"]
    (token,) = tokens
    assert len(token) == 64 and token not in lines


def test_a_ray_that_would_listen_on_all_interfaces_is_not_used(tmp_path):
    process = sweep(
        tmp_path, ("-c", OPEN), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64
    )  # ray is imported before its environment is set
    process.wait()
    assert process.returncode != 0
    assert "not on 127.0.0.1 alone" in process.stderr.read()
