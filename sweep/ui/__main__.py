"""Show sweeps on a live page: python -m sweep.ui <sweep folder> [<another> ...]."""

from __future__ import annotations

import sweep.cli.no_foreign_modules  # noqa: F401 (must be the first)

# isort: split
import argparse
import os
import signal
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from html import escape
from pathlib import Path

from engine.errors import InputError
from engine.system.command_line import run
from sweep.folder.sweep_folder import SweepFolder

HOST = "127.0.0.1"
PORT = 5000
TRIES = 20  # ports to try if the usual one is taken


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0 closed by Ctrl-C, 1 MLflow did not start, 2 bad input."""
    return run(lambda: _main(_options(arguments)))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    about = "Show sweeps on a live page, from their folders alone. Ctrl-C closes it."
    parser = argparse.ArgumentParser(prog="python -m sweep.ui", description=about)
    parser.add_argument("folders", nargs="+", metavar="folder", help="sweep folder; several are compared; a sweep may be running")
    parser.add_argument(
        "--port", type=int, choices=range(1, 65536), metavar="PORT", help=f"default: {PORT}, or the next free one"
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    parser.add_argument("--mlflow", action="store_true", help="show MLflow's page on one sweep instead")
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="with --mlflow: the sweep's server, if your credentials may be sent to it"
    )
    options = parser.parse_args(arguments)
    if options.tracking_uri is not None and not options.mlflow:
        parser.error("--tracking-uri belongs to --mlflow; the live page reads the folder alone")
    return options


def _main(options: argparse.Namespace) -> int:
    folders = [SweepFolder.open(path, "folder") for path in options.folders]
    if options.mlflow:
        if len(folders) > 1:
            raise InputError("folder", options.folders[1], "must be left out with --mlflow: its page shows all sweeps")
        from sweep.tracking import mlflow_server  # late: it loads MLflow, which takes seconds

        return mlflow_server.show(folders[0], options.port, options.tracking_uri, options.open)
    known = [folder.path.resolve() for folder in folders]
    if twice := [path for path, place in zip(options.folders, known) if known.count(place) > 1]:
        raise InputError("folder", twice[-1], "must be named once: a sweep is compared with others")
    return _serve(folders, options.port, options.open)


def _serve(folders: list[SweepFolder], port: int | None, browser: bool) -> int:
    """Serve the page until Ctrl-C or SIGTERM."""
    import uvicorn  # late: an error of the arguments needs no server

    from sweep.ui.gate import new_token
    from sweep.ui.live_sweep import LiveSweep
    from sweep.ui.page_commands import find_control
    from sweep.ui.web_app import make_app

    token, sweeps = new_token(), [LiveSweep(folder) for folder in folders]
    app = make_app(sweeps, token, find_control())
    config = uvicorn.Config(
        app, log_level="error", access_log=False, server_header=False, lifespan="off", ws="none", timeout_graceful_shutdown=1
    )
    with bound_socket(port) as listener:
        address = f"http://{HOST}:{listener.getsockname()[1]}/{token}/"
        print(f"page    {address}\nThe address is a password: it opens this page alone. Press Ctrl-C to close it", flush=True)
        for live in sweeps:  # so that the first look at the page does not wait for it
            threading.Thread(target=live.changes, args=(None,), daemon=True).start()
        with _opened(address) if browser else nullcontext():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            with suppress(KeyboardInterrupt):  # uvicorn raises the signal again once it has closed
                uvicorn.Server(config).run(sockets=[listener])
    return 0


@contextmanager
def bound_socket(port: int | None) -> Iterator[socket.socket]:
    """Yield a socket that listens on the port; None: the usual one, or the next free one.

    Raises InputError if there is none.
    """
    for number in range(PORT, PORT + TRIES) if port is None else (port,):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, number))
            listener.listen(128)
        except OSError:
            listener.close()
            continue
        with listener:
            yield listener
        return
    taken = f"ports {PORT} to {PORT + TRIES - 1} are" if port is None else f"port {port} is"
    raise InputError("--port", PORT if port is None else port, f"{taken} taken; name another one")


@contextmanager
def _opened(address: str) -> Iterator[None]:
    """Open the page in a browser.

    Every user can read a command line, the browser's too. So it gets a file that only its owner can
    read, which leads to the page.
    """
    handle, name = tempfile.mkstemp(suffix=".html", prefix="sweep-page-")  # mode 600
    with open(handle, "w", encoding="utf-8") as file:
        file.write(f'<meta charset="utf-8"><meta http-equiv="refresh" content="0;url={escape(address)}">')
    webbrowser.open(Path(name).as_uri())
    try:
        yield
    finally:
        os.unlink(name)


if __name__ == "__main__":
    sys.exit(main())
