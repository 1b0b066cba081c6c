"""The door: refuses bodies over the limit and other sites' pages, and adds the headers that keep ours to itself.

Plain ASGI, because a middleware that wraps the response would hide the client's hanging up.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.errors import EverloopError, ForbiddenError, InvalidRequestError, TooLargeError

# A page loads and calls only what this server gives; nobody frames it, and no text becomes a script or a style.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
}


class Guard:
    """ASGI middleware with the size limit, the origin check and the security headers."""

    def __init__(self, app: ASGIApp, max_request_bytes: int) -> None:
        self.app = app
        self.max_request_bytes = max_request_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await JSONResponse(refusal.envelope(), status_code=refusal.status)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
                if scope["path"].startswith("/static/"):  # or browsers guess how long they may keep it
                    MutableHeaders(scope=message)["Cache-Control"] = "no-cache"
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> EverloopError | None:
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        headers = Headers(scope=scope)
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):  # a page elsewhere, in somebody's browser
            return ForbiddenError("Pages of other sites may not act here.", code="cross_site")
        if scope["method"] == "DELETE":
            return None
        length = headers.get("content-length", "")
        if not length.isdigit():
            return InvalidRequestError("Send a Content-Length.", code="length_required")
        if int(length) > self.max_request_bytes:
            return TooLargeError(f"The body is larger than {self.max_request_bytes} bytes.")
        return None
