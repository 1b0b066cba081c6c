"""A connection at rest is closed by who asks, not by who answers: a request sent at that moment would be lost."""

import asyncio
import http.client
import threading
import time

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request

import reward.server
from agent.serving import Server
from infra import connections
from infra.engine import EngineClient
from tests.conftest import wait_until
from tests.tamper import free_port

USUAL_IDLE_S = uvicorn.Config(app="unused").timeout_keep_alive  # what servers do that nobody has told otherwise


def serve_api(port):
    app = FastAPI()
    app.get("/healthz")(lambda: {})
    server = Server(app, "127.0.0.1", port)
    server.install_signal_handlers = lambda: None
    threading.Thread(target=server.run, daemon=True).start()


def serve_reward(port):
    reward.server.serve(None, None, "127.0.0.1", port)


def answers(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("serve", [serve_api, serve_reward])
def test_a_server_keeps_a_connection_for_longer_than_clients_do(serve):
    port = free_port()
    serve(port)
    wait_until(lambda: answers(port))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    statuses = []
    for pause_s in (USUAL_IDLE_S + 0.7, 0.0):
        connection.request("GET", "/healthz")
        response = connection.getresponse()
        statuses.append((response.status, response.read() != b""))
        sock = connection.sock
        time.sleep(pause_s)
        assert connection.sock is sock, "it would be made anew"
    assert statuses == [(200, True)] * 2


def test_a_client_makes_a_connection_anew_before_a_server_may_close_it(monkeypatch):
    assert connections.CLIENT_IDLE_S < USUAL_IDLE_S < 60 < connections.SERVER_IDLE_S
    monkeypatch.setattr(connections, "CLIENT_IDLE_S", 0.3)
    port, seen, app = free_port(), [], FastAPI()

    @app.get("/v1/models")
    def models(request: Request):
        seen.append(request.client.port)
        return {"data": []}

    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    wait_until(lambda: server.started)

    async def ask():
        async with EngineClient(f"http://127.0.0.1:{port}") as engine:
            for pause_s in (0.0, 0.5, 0.0):
                await engine.models()
                await asyncio.sleep(pause_s)

    asyncio.run(ask())
    server.should_exit = True
    first, again, anew = seen
    assert first == again != anew
