"""Serve the live page of sweeps in a thread, and open it in a browser that notes every fault."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from sweep.folder.sweep_folder import SweepFolder
from sweep.ui.__main__ import bound_socket
from sweep.ui.gate import new_token
from sweep.ui.live_sweep import LiveSweep
from sweep.ui.web_app import make_app
from tests.support.browser import Tab

TROUBLES = """
window.troubles = [];
addEventListener('securitypolicyviolation', (event) => troubles.push(`${event.violatedDirective} ${event.blockedURI}`));
addEventListener('error', (event) => troubles.push(String(event.message)));
addEventListener('unhandledrejection', (event) => troubles.push(String(event.reason)));
window.alert = (text) => troubles.push(`alert ${text}`);
"""


@contextmanager
def served(*folders: SweepFolder, control: Callable | None = None) -> Iterator[str]:
    """Serve the page of these sweeps in a thread; yields its address."""
    token = new_token()
    app = make_app([LiveSweep(folder) for folder in folders], token, control)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    with bound_socket(None) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/{token}/"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def opened(path: Path, address: str, **size) -> Iterator[Tab]:
    tab = Tab(path, **size)
    try:
        tab.before_each_page(TROUBLES)
        tab.open(address)
        yield tab
        assert tab.ask("troubles") == []
    finally:
        tab.close()
