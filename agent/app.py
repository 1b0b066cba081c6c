"""The composition root of the API: builds everything and hands it down."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.staticfiles import StaticFiles

import agent.access_api
import agent.api
import agent.completions
import agent.health
import agent.memory.api
import agent.oidc
import agent.responses.api
import agent.stored
import agent.tools.api
import deploy.api
import deploy.decisions_api
import deploy.pages
import deploy.releases_api
import deploy.runs_api
import feedback.api
import feedback.conversations_api
import reward.api
from agent.best_of import BestOf
from agent.book import Book
from agent.guard import Guard
from agent.memory.encoding import reading
from agent.memory.prompts import Remembering
from agent.request_headers import RequestHeaders
from agent.responses.input import KINDS as ITEM_KINDS
from agent.schema import ErrorEnvelope
from agent.self_evaluation import SelfEvaluator
from agent.serving import Server
from agent.tools.toolbox import Toolbox
from deploy.followers import Followers
from deploy.pages.live import Pulse
from deploy.serving import RouteTable
from feedback.intake import Intake
from feedback.signals import KINDS
from infra import connections, db
from infra.access.gate import Gate, needs
from infra.access.roles import Role
from infra.errors import (
    EverloopError,
    InvalidRequestError,
    SetupError,
    TooManyError,
    UnauthorizedError,
    UnavailableError,
)
from infra.fleet import Fleet
from infra.fleet_metrics import FleetCollector
from infra.log.metrics import LogCollector
from infra.parameters import UNKNOWN, UNSUPPORTED
from infra.process import tell_of_itself
from infra.settings import Settings, load
from infra.stack import door
from infra.telemetry import exposition, tracing
from infra.telemetry.http import Observed

# What the framework itself refuses; a body nested too deeply for the parser arrives here as a 400.
HTTP_CODES = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}


operations = APIRouter(dependencies=[needs(Role.OPERATOR)])
ROUTERS = (
    *(
        agent.api.router,
        agent.completions.router,
        agent.responses.api.router,
        agent.stored.router,
        agent.api.public,
        agent.access_api.public,
        agent.access_api.router,
        agent.access_api.admin,
    ),
    *(agent.oidc.router, agent.tools.api.router, agent.memory.api.router),
    *(feedback.api.router, feedback.conversations_api.router, reward.api.router),
    *(deploy.api.router, deploy.releases_api.router, deploy.runs_api.router, deploy.decisions_api.router),
    *deploy.pages.ROUTERS,
)


@operations.get("/metrics", include_in_schema=False)
def metrics(request: Request) -> Response:
    """Return Prometheus metrics of this process, of the log and of the engines as it sees them."""
    return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)


def _reward_client(settings: Settings) -> httpx.AsyncClient:
    """Return a client of the reward worker; features of 64 answers take their time on a CPU."""
    url = settings.reward_url or "http://reward.invalid"  # without a worker, requests end in reward_unavailable
    return httpx.AsyncClient(base_url=url, timeout=120.0, limits=connections.limits(), trust_env=False)


def _compressed(directory: Path) -> GZipMiddleware:
    """Return an application that serves a folder."""
    return GZipMiddleware(StaticFiles(directory=directory), minimum_size=1024)


def build_app(settings: Settings) -> FastAPI:
    """Return the API on the given settings."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.settings = settings
        app.state.sessions = db.connect(settings.need("database_url"), pool_size=10)
        app.state.gate = Gate(app.state.sessions, settings)
        app.state.canary_followers = Followers()
        app.state.pulse = Pulse(app.state.sessions)
        routes = RouteTable(app.state.sessions)
        async with routes.kept_fresh(), Fleet(settings, routes, routes.read).running() as fleet:
            app.state.fleet = fleet
            evaluator = SelfEvaluator(app.state.sessions, fleet, settings)
            async with (
                reading(app.state.sessions, settings) as encoding,
                Intake(app.state.sessions).running() as app.state.intake,
                Book(
                    app.state.sessions,
                    settings.learn_by_default,
                    Remembering(app.state.sessions, settings, encoding),
                    settings.memory,
                ).running() as app.state.book,
                Toolbox(settings, app.state.sessions).running() as app.state.toolbox,
                evaluator.running() as app.state.self_evaluator,
                _reward_client(settings) as app.state.reward,
            ):
                app.state.best_of = BestOf(app.state.reward, fleet, settings)
                with exposition.telling(LogCollector(app.state.sessions), FleetCollector(fleet)):
                    yield

    app = FastAPI(
        title="Everloop",
        version=version("everloop"),
        lifespan=lifespan,
        docs_url=None,  # the framework's own page loads its script from elsewhere
        redoc_url=None,
        responses={"4XX": {"model": ErrorEnvelope}, "503": {"model": ErrorEnvelope}},
    )
    app.state.is_stopping = app.state.must_end = lambda: False  # until a server says so
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    app.add_exception_handler(EverloopError, _everloop_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(RequestHeaders)
    app.add_middleware(Observed)
    for router in ROUTERS:
        app.include_router(router)
    app.include_router(operations)
    app.include_router(agent.health.router)
    app.mount("/static/deploy", _compressed(deploy.api.STATIC_DIR), name="static-deploy")
    app.mount("/static", _compressed(agent.api.STATIC_DIR), name="static")
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document without the framework's own 422, which no request is answered with here."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for methods in document["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
    return app.openapi_schema or {}


def _error_response(request: Request, error: EverloopError) -> Response:
    if isinstance(error, UnauthorizedError) and _is_page(request):
        return RedirectResponse(f"/login?{urlencode({'next': _asked(request)})}", status_code=303)
    if request.url.path.startswith(deploy.pages.PREFIX):
        return deploy.pages.failed(request, error)
    headers = {}
    if isinstance(error, UnavailableError | TooManyError):
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.envelope(), status_code=error.status, headers=headers)


def _asked(request: Request) -> str:
    return f"{request.url.path}?{request.url.query}" if request.url.query else request.url.path


def _is_page(request: Request) -> bool:
    return request.method == "GET" and "text/html" in request.headers.get("accept", "")


async def _everloop_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, EverloopError)
    return _error_response(request, error)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = _field_path(first["loc"])
    code = {"json_invalid": "invalid_json", UNSUPPORTED: UNSUPPORTED, UNKNOWN: UNKNOWN}.get(
        first["type"], "invalid_request"
    )
    if first["type"] == "json_invalid":
        path = []
    if "param" in (told := first.get("ctx") or {}):
        path.append(told["param"])
    param = ".".join(path) or None
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    return _error_response(request, InvalidRequestError(message, code=code, param=param))


def _field_path(location: tuple[str | int, ...]) -> list[str]:
    """Return where a request is wrong, as its sender would say it: without the schema's own turns."""
    path = [str(part) for part in location if part != "body"]
    at = 2 if path[:1] == ["signals"] else 0
    if len(path) > at and path[at] in KINDS:
        del path[at]  # which signal of the union it was
    if path[:1] == ["input"] and len(path) > 2 and path[2] in ITEM_KINDS:
        del path[2]  # which item
    return path


async def _unexpected_error(request: Request, error: Exception) -> Response:
    """Answer in the envelope; the framework logs the stack."""
    return _error_response(request, EverloopError("Something went wrong on our side; it is in the log."))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = HTTP_CODES.get(error.status_code, f"http_{error.status_code}")
    wrapped = InvalidRequestError(str(error.detail), code=code)
    wrapped.status = error.status_code
    response = _error_response(request, wrapped)
    response.headers.update(error.headers or {})
    return response


def _is_loopback(host: str) -> bool:
    return host == "localhost" or ipaddress.ip_address(host).is_loopback


def main() -> None:
    """Run the API as a process."""
    settings = load()
    tell_of_itself("api", settings)
    if settings.access == "open" and not _is_loopback(settings.api_host):
        raise SetupError(
            f"EVERLOOP_ACCESS=open lets in whoever reaches the port, and {settings.api_host} is not this machine "
            "alone. Use EVERLOOP_ACCESS=accounts, or EVERLOOP_API_HOST=127.0.0.1.",
            code="open_to_all",
        )
    server = Server(build_app(settings), settings.api_host, settings.api_port or 8080)
    held = door.listening_socket(settings)
    server.run([held] if held is not None else None)
    tracing.stop()


if __name__ == "__main__":
    main()
