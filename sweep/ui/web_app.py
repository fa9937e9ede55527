"""Answer the page's requests: its own files, what has changed in a sweep, a figure, a command."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from engine.errors import InputError
from sweep.report.chart_data import COLOURS
from sweep.report.page import plotly_script
from sweep.ui.drawn_figures import FIGURES, ON_DARK
from sweep.ui.gate import AsgiApp, Gate
from sweep.ui.live_sweep import LiveSweep
from sweep.ui.page_commands import Main, give

STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PLOTLY = "plotly.min.js"
MOST_BYTES = 10_000  # of a command's body


def make_app(sweeps: Sequence[LiveSweep], token: str, control: Main | None = None) -> AsgiApp:
    """Return the application behind its gate. control: what takes commands, None: none are taken."""
    pages = Answers(sweeps, control)
    app = Starlette(routes=[
        Route("/", pages.static),
        Route("/static/{name}", pages.static),
        Route("/api/sweeps", pages.sweeps),
        Route("/api/sweeps/{index:int}/changes", pages.changes),
        Route("/api/sweeps/{index:int}/figure", pages.figure),
        Route("/api/sweeps/{index:int}/command", pages.command, methods=["POST"]),
    ])  # fmt: skip
    return Gate(GZipMiddleware(app, minimum_size=2048, compresslevel=4), token)


class Answers:
    """Hold the sweeps that the page shows."""

    def __init__(self, sweeps: Sequence[LiveSweep], control: Main | None) -> None:
        self._all, self._control = list(sweeps), control

    async def static(self, request: Request) -> Response:
        """Return one of the page's own files. A name is looked up, never joined to a path."""
        name = request.path_params.get("name", "page.html")
        found = static_files().get(name)
        if found is None:
            return PlainTextResponse("no such file\n", 404)
        text = plotly_script() if name == PLOTLY else found.read_text(encoding="utf-8")
        return Response(text, media_type=TYPES[Path(name).suffix])

    async def sweeps(self, request: Request) -> Response:
        """Return what stays as it is: the sweeps' folders, colours of outcomes, whether commands are taken."""
        folders = [{"index": index, "folder": live.folder.path.name} for index, live in enumerate(self._all)]
        light = {outcome.value: colour for outcome, colour in COLOURS.items()}
        dark = {outcome: ON_DARK.get(colour, colour) for outcome, colour in light.items()}
        shown = {"sweeps": folders, "figures": list(FIGURES), "takes_commands": self._control is not None}
        return JSONResponse({**shown, "colours": {"light": light, "dark": dark}})

    async def changes(self, request: Request) -> Response:
        live = self._sweep(request)
        return await _answer(live and (lambda: json.dumps(live.changes(request.query_params.get("cursor")), allow_nan=False)))

    async def figure(self, request: Request) -> Response:
        live, asked = self._sweep(request), request.query_params
        have = int(asked["have"]) if asked.get("have", "").isdecimal() else None
        return await _answer(live and (lambda: live.figure(asked.get("title", ""), asked.get("theme") == "dark", have)))

    async def command(self, request: Request) -> Response:
        """Give a command to the sweep: `{"line": "stop 3"}`."""
        live = self._sweep(request)
        if self._control is None:
            return JSONResponse({"is_done": False, "text": "error: this version takes no commands"}, 501)
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return PlainTextResponse("a command is sent as JSON\n", 415)
        line = await _line(request)
        if live is None or line is None:
            return PlainTextResponse("no such sweep, or no command\n", 400)
        answer = await run_in_threadpool(give, live.folder.path, line, self._control)
        return JSONResponse({"is_done": answer.is_done, "text": answer.text}, 200 if answer.is_done else 409)

    def _sweep(self, request: Request) -> LiveSweep | None:
        index = request.path_params["index"]
        return self._all[index] if index < len(self._all) else None


@lru_cache(maxsize=1)
def static_files() -> dict[str, Path]:
    """Return the page's files by name."""
    return {file.name: file for file in STATIC.iterdir() if file.suffix in TYPES} | {PLOTLY: Path(PLOTLY)}


async def _answer(read: Callable[[], str | None] | None) -> Response:
    """Return the JSON that `read` makes in a thread. 404 for None."""
    try:
        text = None if read is None else await run_in_threadpool(read)
    except (InputError, OSError) as error:
        return PlainTextResponse(f"{error}\n", 500)
    return PlainTextResponse("no such thing\n", 404) if text is None else Response(text, media_type="application/json")


async def _line(request: Request) -> str | None:
    """Return the command line of a request's body; None if there is none."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            return None
    try:
        found: Any = json.loads(body)
    except (ValueError, RecursionError):
        return None
    line = found.get("line") if isinstance(found, dict) else None
    return line if isinstance(line, str) else None
