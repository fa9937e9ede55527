"""Let only the holder of the page's address in, whoever else reaches 127.0.0.1.

Every user of the machine reaches the port, and so does every web page that a browser on it shows.
The address holds a token, and each request must carry it as the first part of its path. There are
no cookies, so another site's request carries nothing that it does not know. A request must also be
addressed to this machine by name (or a site could point its own name here) and come from no other
site.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse

AsgiApp = Callable[..., Awaitable[None]]
OWN_NAMES = ("127.0.0.1", "localhost", "::1")
METHODS = ("GET", "HEAD", "POST")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}


def new_token() -> str:
    """Return 256 random bits as text for an address."""
    return secrets.token_urlsafe(32)


class Gate:
    """Wrap an ASGI application. What is refused gets 403 and never reaches it."""

    def __init__(self, app: AsgiApp, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # no websockets
            return None
        first, slash, rest = scope["path"].lstrip("/").partition("/")
        why = refusal(scope["method"], Headers(scope=scope))
        if why is None and not hmac.compare_digest(first.encode("utf-8", "surrogateescape"), self._token):
            why = "the address lacks the token that the command printed"

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if why is not None:
            return await PlainTextResponse(f"refused: {why}\n", 403)(scope, receive, send_with_headers)
        if not slash:  # the page's own addresses are relative to the token's folder
            return await RedirectResponse(f"/{first}/", 308)(scope, receive, send_with_headers)
        inner = {**scope, "path": f"/{rest}", "raw_path": f"/{rest}".encode()}
        return await self._app(inner, receive, send_with_headers)


def refusal(method: str, headers: Headers) -> str | None:
    """Return why a request is refused for what it is and where it comes from, or None."""
    host, origin = headers.get("host", ""), headers.get("origin")
    if method not in METHODS:
        return f"{method} is not served"
    if _name(host) not in OWN_NAMES:
        return "it is addressed to another machine (Host)"
    if origin is not None and origin != f"http://{host}":
        return "it comes from another site (Origin)"
    if method == "POST" and origin is None:
        return "it does not say where it comes from (Origin)"
    site = headers.get("sec-fetch-site", "none")
    if site not in ("none", "same-origin") and headers.get("sec-fetch-mode") != "navigate":
        return "it comes from another site (Sec-Fetch-Site)"
    return None


def _name(host: str) -> str | None:
    """Return the name in a Host header without its port; None if it is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
