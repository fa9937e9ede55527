"""Say whether a sweep can run on this machine, and what to do where it cannot.

`python -m sweep doctor [group=option ...]` looks at Python, cards, memory, disk, Ray, the hub and
MLflow. With the words of a sweep it also looks at that sweep's model and folders. It writes
nothing, loads no torch and starts processes of its own for what may hang.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.command_answers import TorchFacts
from engine.config.trial import HUB_ID
from engine.errors import first_line
from engine.planning.cards import found_card
from engine.planning.known_cards import speed_basis, with_known_rates
from engine.sources.builtin import PREFIX
from engine.system.child_python import own_environment, python_module
from engine.system.files import home_folder
from engine.system.shared_cache import CACHE_VARIABLE, cache_root
from engine.system.user_path import user_path
from sweep.cluster import machine
from sweep.cluster.findings import Finding, examined, show
from sweep.config.absolute_paths import absolute_uri
from sweep.config.compose import compose, run_keys
from sweep.execution.worker_config import REAL_ENGINE
from sweep.tracking.sqlite_store import database_file, find_fault
from sweep.tracking.tracker import local_uri

CHILD_S, HUB_S, SMI_S = 60.0, 3.0, 20.0  # seconds to wait for a child process, for the hub, for nvidia-smi
HUB = "https://huggingface.co"
CPU_ONLY = "trials run on the CPU: enough for the quickstart, too slow for more; on a GPU machine, install NVIDIA's driver"
ANSWERS = {401: "needs a licence and a login", 403: "needs a licence and a login", 404: "is not on the hub, or is private"}


def diagnose(overrides: list[str], engine_command: str = REAL_ENGINE.command) -> int:
    """Print the findings. Returns the exit code: 0, or 1 if a sweep certainly cannot run."""
    raw = compose(run_keys(overrides)[1]) if overrides else {}
    asked = {
        "torch": _start([engine_command, "cards"]),
        "Ray": _start(["sweep.cluster.try_ray"]),
    }
    try:
        return 1 if show(_findings(raw, asked), sys.stdout) else 0
    finally:
        for child in asked.values():
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # Ray's processes too
            child.wait()


def _findings(raw: dict[str, Any], asked: dict[str, subprocess.Popen]) -> Iterator[Finding]:
    output = user_path(raw.get("sweep", {}).get("output_dir", "sweeps"))
    device = raw.get("train", {}).get("device", "auto")
    yield from examined("Python", machine.check_python)
    yield from examined("card", lambda: check_cards(_nvidia_smi(), _torch_facts(asked["torch"]), device))
    yield from examined("memory", machine.check_memory)
    yield from examined("/dev/shm", machine.check_shared_memory)
    yield from examined("cache", lambda: machine.check_folder("cache", cache_root(), f"export {CACHE_VARIABLE}=..."))
    yield from examined("hub cache", lambda: machine.check_folder("hub cache", hub_cache(), "export HF_HOME=..."))
    yield from examined("output", lambda: machine.check_folder("output", output, "sweep.output_dir=..."))
    yield from examined("TMPDIR", machine.check_temporary_folder)
    yield from examined("Ray", lambda: _ray(asked["Ray"]))
    yield from examined("hub", check_hub)
    yield from examined("model", lambda: check_model(raw.get("model", {}).get("path")))
    experiment = str(raw.get("sweep", {}).get("name", ""))
    yield from examined("MLflow", lambda: check_mlflow(raw.get("tracking", {}), output, experiment))


def _start(module: list[str]) -> subprocess.Popen:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(python_module(*module), env=own_environment(), **options)


def _ended(child: subprocess.Popen) -> tuple[str, str | None]:
    """Return what the child printed, and one line if it failed or took too long."""
    try:
        out, err = child.communicate(timeout=CHILD_S)
    except subprocess.TimeoutExpired:
        return "", f"no answer within {CHILD_S:g} s"
    lines = [line for line in err.splitlines() if line.strip()]
    said = lines[-1] if lines else f"exit code {child.returncode}"
    return out, None if child.returncode == 0 else said.removeprefix("error: ")


def _torch_facts(child: subprocess.Popen) -> TorchFacts | str:
    out, fault = _ended(child)
    return fault if fault is not None else TorchFacts.from_dict(json.loads(out))


def _nvidia_smi() -> list[str]:
    """Return a line of name and driver for each card of NVIDIA's driver; empty without one."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def check_cards(listed: list[str], torch: TorchFacts | str, device: str) -> Iterator[Finding]:
    """Compare the cards of NVIDIA's driver with those that torch can use. device: train.device."""
    if isinstance(torch, str):
        yield Finding("fault", "torch", f"does not load ({torch})", "install it again: make quickstart")
        return
    yield Finding("ok", "torch", f"{torch.torch}, {f'for CUDA {torch.cuda}' if torch.cuda else 'for the CPU'}")
    if not torch.cards and (not listed or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or device == "cpu"):
        hidden = " that may be used" if listed else ""
        yield Finding("fault" if device == "cuda" else "warning", "card", f"no NVIDIA GPU{hidden}", CPU_ONLY)
        return
    if not torch.cards:
        why = torch.error or ("torch is a build for the CPU" if torch.cuda is None else "it gives no reason")
        todo = "install a driver that is new enough, or a torch for this driver: https://pytorch.org/get-started/locally"
        yield Finding("fault", "card", f"the driver lists {listed[0]}, but torch cannot use it: {why}", todo)
        return
    drivers = {line.rpartition(",")[2].strip() for line in listed}
    yield Finding("ok", "driver", ", ".join(sorted(drivers)) or "not known, as nvidia-smi does not answer")
    for number, card in enumerate(torch.cards):
        yield _card(number, **card)
    yield machine.check_compiler()


def _card(number: int, name: str, memory_gib: float, free_gib: float, capability: str, bfloat16: bool) -> Finding:
    text = f"{number}: {name}, {free_gib:.1f} of {memory_gib:.1f} GiB free, compute capability {capability}"
    if not bfloat16:
        return Finding("warning", "card", f"{text}, no bfloat16", "model.dtype=float32, or a card of the Ampere family or newer")
    if free_gib < 0.9 * memory_gib:
        todo = "`nvidia-smi` shows who holds the rest; end it, or set train.memory_budget_gib to what may be used"
        return Finding("warning", "card", text, todo)
    speed = speed_basis(with_known_rates(found_card(name, memory_gib), here=True))
    return Finding("ok", "card", f"{text}, speed {speed}")


def _ray(child: subprocess.Popen) -> Finding:
    _, fault = _ended(child)
    if fault is None:
        return Finding("ok", "Ray", "starts on this machine alone, and stops")
    todo = "a shorter TMPDIR (export TMPDIR=/tmp), more room in /dev/shm, or `ulimit -n 65536` are the usual ways out"
    return Finding("fault", "Ray", f"does not start ({fault})", todo)


def hub_cache() -> Path:
    """Return the folder of the Hugging Face libraries' downloads."""
    home = Path(os.environ.get("HF_HOME") or (home_folder() or Path("/")) / ".cache" / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def check_hub() -> Finding:
    """Ask the hub who this user is. Being offline is fine for models and data on this machine."""
    from huggingface_hub import get_token

    if is_offline():
        return Finding("ok", "hub", "not asked: HF_HUB_OFFLINE is set, so only models and data of this machine are used")
    token, login = get_token(), "for gated models: accept the licence on the model's page, then `hf auth login`"
    try:
        if token is None:
            _ask("/api/models?limit=1", None)
            return Finding("ok", "hub", "reachable, no token: open models only", login)
        name = json.loads(_ask("/api/whoami-v2", token)).get("name")
        return Finding("ok", "hub", f"reachable, as {name}")
    except urllib.error.HTTPError as error:
        return Finding("warning", "hub", f"refuses the token ({error.code})", "`hf auth login` with a new token")
    except (OSError, ValueError) as error:
        said = first_line(getattr(error, "reason", None) or error)
        todo = "fine for models and data in folders and for the quickstart; else check proxy and HF_ENDPOINT"
        return Finding("warning", "hub", f"cannot be reached ({said})", todo)


def check_model(path: str | None) -> Iterator[Finding]:
    """Look for the model that the command line names: a folder, a download, or on the hub."""
    if path is None or path.startswith(PREFIX):
        return
    if user_path(path).is_dir() or not HUB_ID.fullmatch(path):
        there = (user_path(path) / "config.json").is_file()
        todo = "" if there else "model.path must be a folder with config.json, or a hub id"
        yield Finding("ok" if there else "fault", "model", f"{path}{'' if there else ' holds no model'}", todo)
        return
    from huggingface_hub import get_token, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(path, "config.json"), str):
        yield Finding("ok", "model", f"{path} is in the hub cache")
        return
    if is_offline():
        yield Finding("fault", "model", f"{path} is not on this machine", "unset HF_HUB_OFFLINE to download it, or name a folder")
        return
    try:
        _ask(f"/{path}/resolve/main/config.json", get_token())
        yield Finding("ok", "model", f"{path} can be downloaded")
    except urllib.error.HTTPError as error:
        todo = f"open {_hub()}/{path}, accept the licence there, then `hf auth login` on this machine"
        yield Finding("fault", "model", f"{path} {ANSWERS.get(error.code, f'gets answer {error.code}')}", todo)
    except OSError as error:
        said = first_line(getattr(error, "reason", None) or error)
        yield Finding("fault", "model", f"{path} is not on this machine, and the hub cannot be reached ({said})", "name a folder")


def _hub() -> str:
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def is_offline() -> bool:
    """Return whether the Hugging Face libraries are told to stay off the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _ask(path: str, token: str | None) -> bytes:
    request = urllib.request.Request(_hub() + path, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=HUB_S) as answer:
        return answer.read(1 << 20)


def check_mlflow(tracking: dict[str, Any], output: Path, experiment: str = "") -> Finding:
    """Open the database that the sweep writes to, or ask its server. Creates neither.

    experiment: the name of the sweep that the command line names.
    """
    if tracking.get("name") == "none":
        return Finding("ok", "MLflow", "off (tracking=none)")
    uri = absolute_uri(str(tracking.get("uri") or local_uri(output)), Path.cwd())
    if uri.startswith("http"):
        shown = uri.rpartition("@")[2]
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=HUB_S):
                return Finding("ok", "MLflow", f"{shown} answers")
        except (OSError, ValueError) as error:
            todo = "start the server; a sweep runs without it, and a resume writes what is missing"
            return Finding("warning", "MLflow", f"{shown} does not answer ({first_line(error)})", todo)
    file = database_file(uri)
    if file is None:
        return Finding("ok", "MLflow", f"a {uri.partition(':')[0]} database is not asked here; a sweep's start asks it")
    if (fault := find_fault(file, experiment)) is not None:
        return Finding("fault", "MLflow", f"{file} {fault}", "move it away, or tracking=none")
    return Finding("ok", "MLflow", f"{file}{'' if file.exists() else ' (will be made)'}")
