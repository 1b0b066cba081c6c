"""The door: refuses bodies over the limit and other sites' pages, and adds the headers that keep ours to itself.

Who asks, and what they may, is for the gate (:mod:`infra.access.gate`), which knows the routes.

Plain ASGI, because a middleware that wraps the response would hide the client's hanging up.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.access.gate import SAFE_METHODS
from infra.errors import EverloopError, ForbiddenError, InvalidRequestError, TimedOutError, TooLargeError
from infra.settings import Settings

BODILESS = SAFE_METHODS | {"DELETE"}
MAX_BODY_S = 30.0  # whoever sends a byte now and then keeps a connection, but no more than that
# A page loads and calls only what this server gives; nobody frames it, and no text becomes a script or a style.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
}


STRICT_TRANSPORT = {"Strict-Transport-Security": "max-age=31536000"}


class Guard:
    """ASGI middleware with the limits of size and time, the origin check and the security headers."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.max_request_bytes = settings.max_request_bytes
        self.is_open = settings.access == "open"
        self.public_url = settings.public_url or ""
        is_secure = self.public_url.startswith("https:")
        self.headers = SECURITY_HEADERS | (STRICT_TRANSPORT if is_secure else {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None and scope["method"] not in BODILESS:
            try:
                with anyio.fail_after(MAX_BODY_S):
                    receive = await _read(receive)
            except TimeoutError:
                refusal = TimedOutError(f"The body was not here after {MAX_BODY_S:.0f} s.")
        if refusal is not None:
            answer = JSONResponse(refusal.envelope(), status_code=refusal.status, headers=self.headers)
            await answer(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
                if scope["path"].startswith("/static/"):  # or browsers guess how long they may keep it
                    MutableHeaders(scope=message)["Cache-Control"] = "no-cache"
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> EverloopError | None:
        headers = Headers(scope=scope)
        if self.is_open and not _is_local(headers.get("host", "")):
            # A name of somebody else's that leads here: their page would be one of ours to a browser.
            return ForbiddenError("Use the address that `everloop up` printed.", code="unknown_host")
        if scope["method"] in SAFE_METHODS:
            return None
        origin = headers.get("origin")
        is_elsewhere = origin is not None and not self._is_own(origin, headers.get("host", ""))
        if is_elsewhere or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return ForbiddenError("Pages of other sites may not act here.", code="cross_site")
        if scope["method"] in BODILESS:
            return None
        length = headers.get("content-length", "")
        if not length.isdigit():
            return InvalidRequestError("Send a Content-Length.", code="length_required")
        if int(length) > self.max_request_bytes:
            return TooLargeError(f"The body is larger than {self.max_request_bytes} bytes.")
        return None

    def _is_own(self, origin: str, host: str) -> bool:
        """Tell whether a page is ours: at the public address, or (a proxy may change the host) where it asks."""
        site = _site(origin)
        # Behind a proxy the scheme is the public address's; without one we speak http.
        return site is not None and site in (_site(self.public_url), _site(f"http://{host}"))


def _site(url: str) -> tuple[str, str, int] | None:
    """Return scheme, host and port of an address; None for what is none."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        return None
    return (parts.scheme, parts.hostname, port) if parts.hostname else None


async def _read(receive: Receive) -> Receive:
    """Have the whole body, and pass it on in one piece."""
    body = bytearray()
    message: Message = {"more_body": True}
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body += message.get("body", b"")
    whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]
    if message["type"] == "http.disconnect":
        whole = [message]

    async def replay() -> Message:
        return whole.pop() if whole else await receive()

    return replay


def _is_local(host: str) -> bool:
    """Tell whether a host is an address, or this machine: no name that somebody else could lead here."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return name == "localhost"
    return True
