"""Run MLflow's server on the loopback interface, behind a proxy that is slow or loses an answer."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def serve(folder: Path, port: int) -> subprocess.Popen:
    """Run an MLflow server on the loopback interface."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/server.db", "--workers", "1",
               "--host", "127.0.0.1", "--port", str(port), "--artifacts-destination", str(folder / "artifacts")]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Slow(ThreadingHTTPServer):
    """Passes calls on after `delay_s`.

    If `loses` is set, it drops the answer to the first create of a trial's run.
    """

    def __init__(self, target: int, delay_s: float, loses: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.delay_s, self.loses, self.calls = target, delay_s, loses, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    def _pass_on(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.calls += 1
        time.sleep(server.delay_s)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "accept-encoding")}
        request = Request(f"http://127.0.0.1:{server.target}{self.path}", body or None, headers, method=self.command)
        try:
            answer = urlopen(request, timeout=30)
        except HTTPError as error:
            answer = error
        content = answer.read()
        if server.loses and self.path.endswith("runs/create") and b'"trial 0"' in body:  # the name it is created under
            server.loses = False
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = _pass_on

    def log_message(self, *arguments) -> None:
        pass
