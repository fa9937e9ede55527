"""The doctor names what is wrong with a machine and what to do, and ends without a traceback."""

from __future__ import annotations

import http.server
import json
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.command_answers import TorchFacts
from sweep import doctor
from sweep.__main__ import main
from sweep.cluster import machine, ray_folder
from sweep.cluster.findings import Finding, examined, show
from tests.support.paths import ENV

CARD = {"name": "RTX 4090", "memory_gib": 24.0, "free_gib": 23.0, "capability": "8.9", "bfloat16": True}
CUDA = TorchFacts("2.13.0", "12.8", None, [CARD])
LISTED = ["NVIDIA GeForce RTX 4090, 560.35"]


def child(code: str) -> subprocess.Popen:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, "-S", "-c", code], **options)


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    """Put a machine without a card and with a Ray that starts in the place of this one."""
    answers = {"cards": f"print('''{json.dumps(TorchFacts('2.13.0').to_dict())}''')", "try_ray": ""}
    monkeypatch.setattr(doctor, "_start", lambda module: child(answers[module[-1].rpartition(".")[2]]))
    monkeypatch.setattr(doctor, "_nvidia_smi", list)
    monkeypatch.setattr(machine, "check_memory", lambda: Finding("ok", "memory", "9 GiB"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("QLORA_SWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return answers


def test_a_machine_without_a_card_can_run_a_sweep_and_nothing_is_left_behind(healthy, tmp_path, capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[9:22].strip() for line in lines if line[:2] in ("ok", "wa")] == [
        "Python", "packages", "torch", "card", "memory", "/dev/shm", "cache", "hub cache", "output", "TMPDIR", "Ray", "hub",
        "MLflow",
    ]  # fmt: skip
    assert lines[-1].endswith("warning: a sweep can run here") or lines[-1].endswith("warnings: a sweep can run here")
    assert list(tmp_path.iterdir()) == []


def test_a_ray_that_does_not_start_is_a_fault(healthy, capsys):
    healthy["try_ray"] = "import sys; sys.exit('error: AF_UNIX path too long')"
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "fault    Ray           does not start (AF_UNIX path too long)\n" in out and "export TMPDIR=/tmp" in out
    assert "1 fault" in out and out.endswith("no sweep can run here until the faults are gone\n")


def test_a_child_that_hangs_is_named_and_ended(healthy, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHILD_S", 0.2)
    healthy["try_ray"] = "import time; time.sleep(60)"
    assert main(["doctor"]) == 1
    assert "Ray           does not start (no answer within 0.2 s)" in capsys.readouterr().out


def test_the_words_of_a_sweep_are_looked_at_too(healthy, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    code = main(["doctor", "+experiment=quickstart", "sweep.output_dir=taken", "train.device=cuda", "model.path=gated/model"])
    out = capsys.readouterr().out
    assert code == 1 and "4 faults" in out  # MLflow has no place for its file either
    for part in ("fault    card", "fault    output        taken cannot be used", "fault    model         gated/model is not on"):
        assert part in out
    assert main(["doctor", "no.such=key"]) == 2


@pytest.mark.parametrize(
    ("listed", "torch", "device", "level", "said"),
    [
        (LISTED, CUDA, "auto", "ok", "23.0 of 24.0 GiB free, compute capability 8.9, speed guessed"),
        ([], TorchFacts("2.13.0"), "auto", "warning", "no NVIDIA GPU"),
        ([], TorchFacts("2.13.0"), "cuda", "fault", "no NVIDIA GPU"),
        (LISTED, TorchFacts("2.13.0"), "auto", "fault", "torch is a build for the CPU"),
        (LISTED, TorchFacts("2.13.0", "12.8", "driver too old"), "auto", "fault", "cannot use it: driver too old"),
        (LISTED, TorchFacts("2.13.0"), "cpu", "warning", "no NVIDIA GPU that may be used"),
        (LISTED, TorchFacts("2.13.0", "12.8", None, [{**CARD, "free_gib": 3.0}]), "auto", "warning", "3.0 of 24.0 GiB"),
        (LISTED, TorchFacts("2.13.0", "12.8", None, [{**CARD, "bfloat16": False}]), "auto", "warning", "no bfloat16"),
        (LISTED, "libcudart is missing", "auto", "fault", "does not load (libcudart is missing)"),
    ],
)
def test_a_card_is_judged_by_what_driver_and_torch_say(monkeypatch, listed, torch, device, level, said):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = [finding for finding in doctor.check_cards(listed, torch, device) if finding.subject in ("card", "torch")]
    assert found[-1].level == level and said in found[-1].text and bool(found[-1].todo) is (level != "ok")


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does: `good` is a token, gated/model needs it."""

    def do_GET(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        refused = token == "bad" or ("gated" in self.path and token != "good")
        self.send_response(404 if "none" in self.path else 401 if refused else 200)
        self.end_headers()
        self.wfile.write(b'{"name": "me"}')

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    yield lambda token: monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("token", "level", "said"), [(None, "ok", "no token"), ("good", "ok", "as me"),
                                                      ("bad", "warning", "401")])  # fmt: skip
def test_the_hub_is_asked_who_this_is(hub, token, level, said):
    hub(token)
    found = doctor.check_hub()
    assert found.level == level and said in found.text and ("hf auth login" in found.todo) is (token != "good")


@pytest.mark.parametrize(("token", "path", "level"), [(None, "gated/model", "fault"), ("good", "gated/model", "ok"),
                                                      (None, "open/model", "ok"), ("good", "none/such", "fault")])  # fmt: skip
def test_a_gated_model_names_its_page_and_the_login(hub, token, path, level):
    hub(token)
    (found,) = doctor.check_model(path)
    assert found.level == level and (f"/{path}, accept the licence" in found.todo) is (level == "fault")


def test_no_network_is_a_warning(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert doctor.check_hub().level == "warning"
    assert [found.level for found in doctor.check_model("some/model")] == ["fault"]
    assert list(doctor.check_model("builtin:smollm2-135m-instruct")) == list(doctor.check_model(None)) == []


def test_packages_are_compared_with_pyproject(monkeypatch):
    assert [found.level for found in machine.check_python()] == ["ok", "ok"]
    real = machine.metadata.version
    monkeypatch.setattr(machine.metadata, "version", lambda name: "1.0" if name == "optuna" else real(name))
    monkeypatch.setattr(machine.platform, "python_version", lambda: "3.9.1")
    python, packages = machine.check_python()
    assert (python.level, packages.level) == ("fault", "fault") and "optuna is 1.0, needs >=5.0" in packages.text


def test_memory_is_what_machine_or_container_leaves(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 20971520 kB\n")
    assert machine.check_memory(tmp_path / "meminfo", tmp_path).text == "20.0 GiB available"
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.check_memory(tmp_path / "meminfo", tmp_path).level == "ok"
    (tmp_path / "memory.max").write_text(str(4 * 2**30))
    (tmp_path / "memory.current").write_text(str(2**30))
    found = machine.check_memory(tmp_path / "meminfo", tmp_path)
    assert (found.level, found.text) == ("warning", "3.0 GiB left in this container")


def test_a_full_or_closed_folder_and_a_long_temporary_one_are_named(tmp_path, monkeypatch):
    assert machine.check_folder("output", tmp_path / "new" / "deep", "x=...").level == "ok"
    usage = type("Usage", (), {"free": 3 * 2**30})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    assert [machine.check_folder(name, tmp_path, "x=...").level for name in ("output", "cache")] == ["ok", "warning"]
    usage.free = 1000
    assert machine.check_folder("output", tmp_path, "x=...").level == "fault"
    assert machine.check_shared_memory(tmp_path).level == machine.check_shared_memory(tmp_path / "no").level == "warning"


def test_a_temporary_folder_too_long_for_ray_is_no_fault_as_a_sweep_takes_another(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert "so Ray's files are in" not in machine.check_temporary_folder().text
    monkeypatch.setenv("TMPDIR", f"/tmp/{'x' * 84}")
    found = machine.check_temporary_folder()
    assert found.level == "ok" and "too long for Ray's sockets" in found.text and "so Ray's files are in" in found.text
    assert "RAY_TMPDIR" not in os.environ  # only the sweep's own process may have it
    monkeypatch.setattr(ray_folder, "USUAL", ("/nowhere",))
    assert machine.check_temporary_folder().level == "fault"


def test_a_database_is_read_and_never_made(tmp_path):
    assert "will be made" in doctor.check_mlflow({}, tmp_path).text and list(tmp_path.iterdir()) == []
    (tmp_path / "mlflow.db").write_text("no database at all, but text of some length")
    assert doctor.check_mlflow({}, tmp_path).level == "fault"  # a start refuses it, too
    (tmp_path / "mlflow.db").unlink()
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("create table runs (id text)")
    assert doctor.check_mlflow({}, tmp_path).text.endswith("mlflow.db is the database of another program")
    found = doctor.check_mlflow({"uri": "http://me:secret@127.0.0.1:9"}, tmp_path)
    assert found.level == "warning" and "secret" not in found.text
    found = doctor.check_mlflow({"uri": "postgresql://me:secret@host/db"}, tmp_path)
    assert "postgresql" in found.text and "secret" not in found.text and "will be made" not in found.text


def test_the_database_of_the_command_line_is_found_as_a_sweep_finds_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b%.db").touch()
    assert doctor.check_mlflow({"uri": "sqlite:///~/a b%25.db"}, tmp_path).text == f"{tmp_path / 'a b%.db'}"


def test_a_check_that_breaks_is_a_finding_and_its_text_steers_no_terminal(capsys):
    found = examined("odd", lambda: 1 / 0)
    assert [finding.level for finding in found] == ["warning"] and "ZeroDivisionError" in found[0].text
    assert show([*found, Finding("ok", "name", "[bold]\x1b[2J\nx")], sys.stdout) == 0
    assert "[bold]\\x1b[2J\\nx\n" in capsys.readouterr().out


def test_the_doctor_loads_no_torch():
    code = "import sys; from sweep import doctor; doctor.check_hub(); print([*{'torch', 'ray', 'mlflow'} & sys.modules.keys()])"
    environment = {**ENV, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.faults
def test_this_machine_runs_sweeps_so_the_doctor_finds_no_fault(tmp_path):
    done = subprocess.run([sys.executable, "-m", "sweep", "doctor"], env=ENV, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "Traceback" not in done.stdout
    assert list(Path(tmp_path).iterdir()) == []
