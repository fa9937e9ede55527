"""A command or an address hears of the end, and a fault of it is one warning that changes no result."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from engine.errors import InputError
from sweep import driver
from sweep.config.sweep import parse_sweep_config
from sweep.folder.sweep_folder import SweepFolder
from sweep.results import on_end
from sweep.results.on_end import check_on_end, tell_end

BOARD = {"best_trial": 3, "outcomes": {"COMPLETE": 2}, "trials": [{"number": 1}, {"number": 3, "eval_loss": 1.5}]}
KEY = "secret-key"


def config_with(on_end):
    return parse_sweep_config({
        "model": {"path": "m"}, "data": {"train": "t"}, "train": {"max_tokens": 400}, "tracking": {"on_end": on_end},
    })  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> SweepFolder:
    (tmp_path / "leaderboard.json").write_text(json.dumps(BOARD))
    return SweepFolder(tmp_path)


def python(code: str) -> str:
    return f'{sys.executable} -c "{code}"'


@pytest.mark.parametrize(
    ("code", "state", "more"),
    [(0, "complete", {"best_trial": 3, "best_eval_loss": 1.5, "outcomes": {"COMPLETE": 2}}), (130, "stopped", {}),
     (None, "failed", {})],
)  # fmt: skip
def test_a_command_gets_the_end_as_json_and_no_shell(folder, code, state, more):
    out = folder.path / "heard.json"
    command = python(f"import sys; open('{out}', 'w').write(sys.stdin.read())") + " '$(touch no)' ; touch no"
    assert tell_end(config_with(command), folder, code) == []
    assert json.loads(out.read_text()) == {"sweep": "sweep", "folder": str(folder.path), "state": state, **more}
    assert not (folder.path / "no").exists()


def test_an_address_gets_a_post_and_its_key_is_not_shown(folder):
    heard = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200 if self.path == f"/{KEY}" else 500)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert tell_end(config_with(f"{address}/{KEY}"), folder, 0) == []
        (warning,) = tell_end(config_with(f"{address}/{KEY}x"), folder, 0)
    finally:
        server.shutdown()
        server.server_close()
    assert heard[0]["best_eval_loss"] == 1.5
    assert warning == "tracking.on_end = http://127.0.0.1/...: answered 500"


def test_a_fault_is_one_warning(folder, monkeypatch):
    monkeypatch.setattr(on_end, "COMMAND_S", 0.2)
    for command, fault in (
        (python("import sys; sys.exit('no network')"), "exit code 1 (no network)"),
        ("/no/such/program", "No such file or directory"),
        (python("import time; time.sleep(9)"), "took longer"), ("http://127.0.0.1:1/x", "refused"),
    ):  # fmt: skip
        (warning,) = tell_end(config_with(command), folder, 0)
        assert fault in warning and "\n" not in warning
    assert tell_end(config_with(None), folder, 0) == []


def test_what_cannot_be_started_is_refused_before_anything_else():
    check_on_end(None)
    check_on_end("https://example.org/x")
    check_on_end(f"{sys.executable} -V")
    with pytest.raises(InputError, match="tracking.on_end = 'no-such-program --x': must begin with a program"):
        check_on_end("no-such-program --x")
    for faulty in ("mail 'me", "  "):
        with pytest.raises(InputError, match="tracking.on_end"):
            config_with(faulty)


def test_every_end_of_the_driver_is_told(folder, monkeypatch):
    told = []
    monkeypatch.setattr(driver, "tell_end", lambda config, folder, code: told.append(code) or [])
    plan = type("Plan", (), {"config": None})
    assert driver._announced(folder, plan, lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        driver._announced(folder, plan, lambda: 1 // 0)
    assert told == [1, None]
