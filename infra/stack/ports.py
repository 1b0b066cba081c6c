"""Choosing ports for the embedded stack."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from infra.errors import SetupError
from infra.settings import Settings
from infra.stack.parts import LOOPBACK, WITH_METRICS, Part

# Below the ports that systems give to outgoing connections: a client that tries again and again to reach a part
# that was killed may be given that part's port for its own end, meet itself there, and keep the part away.
OWN_PORTS = range(20_000, 32_000)
PORT_TRIES = 50


def free_port(wanted: int | None, name: str, held: contextlib.ExitStack, but: Collection[int] = frozenset()) -> int:
    """Return a port that is free now, keeping it bound for the length of `held`.

    Parameters
    ----------
    wanted
        The only one that will do; any of ours, if unset.
    name
        The setting that names it.
    but
        Ports that were promised to others.

    Raises
    ------
    SetupError
        Code ``port_taken``.
    """
    candidates = [wanted] if wanted else random.sample(OWN_PORTS, PORT_TRIES)
    for port in candidates:
        if port in but:
            continue
        sock = held.enter_context(socket.socket())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            sock.bind((LOOPBACK, port))
            sock.listen(1)  # else another socket that may reuse addresses is given the same port
            return port
    raise SetupError(
        f"Port {candidates[-1]} is taken. Free it, or set EVERLOOP_{name.upper()} to another "
        "(unset it to have a free one chosen).",
        code="port_taken",
    )


def with_metrics_ports(settings: Settings, parts: Iterable[Part]) -> list[Part]:
    """Return the parts, those that serve metrics with a port for them: from `metrics_port` on, or any free ones."""
    first, taken = settings.metrics_port, _ports_of(settings)
    found = []
    with contextlib.ExitStack() as held:
        for part in parts:
            if part.name not in WITH_METRICS:
                found.append(part)
                continue
            wanted = None if first is None else first + WITH_METRICS.index(part.name)
            port = free_port(wanted, "metrics_port", held, taken)
            found.append(replace(part, environment={**part.environment, "EVERLOOP_METRICS_PORT": str(port)}))
    return found


def _ports_of(settings: Settings) -> set[int]:
    """Return the ports that the settings have promised to parts."""
    values = settings.model_dump()
    ports = {values[name] for name in values if name.endswith("_port") and name != "metrics_port"}
    ports |= {urlsplit(url).port for name, url in values.items() if name.endswith("_url") and url}
    if settings.kafka_bootstrap:
        ports.add(urlsplit(f"//{settings.kafka_bootstrap}").port)
    return {port for port in ports if port}


def write_targets(settings: Settings, parts: Sequence[Part]) -> None:
    """Write where each part serves its metrics, as Prometheus reads it."""
    places: dict[str, str] = {
        part.name: f"{LOOPBACK}:{port}" for part in parts if (port := part.environment.get("EVERLOOP_METRICS_PORT"))
    }
    if settings.engine_url and any(part.name == "engine" for part in parts):
        places["engine"] = urlsplit(settings.engine_url).netloc
    targets = [{"targets": [place], "labels": {"part": name}} for name, place in sorted(places.items())]
    settings.metrics_targets_file.parent.mkdir(exist_ok=True)
    settings.metrics_targets_file.write_text(json.dumps(targets, indent=2) + "\n")
