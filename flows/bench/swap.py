"""``everloop bench swap``: the champion is changed and put back under load; how soon it is seen, what fails."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from deploy import registry
from deploy.promotion import Operator
from flows.bench.adapters import linear_shapes, write_adapter
from flows.bench.stack import own_stack
from infra import report
from infra.settings import Settings

NUM_STREAMS = 8
ANSWER_TOKENS = 32
SETTLE_S = 3.0


@dataclass(slots=True)
class Load:
    """Streams that never end, and what they saw.

    Attributes
    ----------
    first_tokens
        When the first token of an answer came (monotonic), and from which release.
    """

    settings: Settings
    stop: threading.Event = field(default_factory=threading.Event)
    first_tokens: list[tuple[float, str]] = field(default_factory=list)
    num_answers: int = 0
    failures: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Keep the streams busy until told to stop."""
        asyncio.run(self._run())

    async def _run(self) -> None:
        options: dict[str, Any] = {"base_url": self.settings.public_url, "headers": self.settings.credentials}
        async with httpx.AsyncClient(timeout=120, trust_env=False, **options) as client:
            await asyncio.gather(*(self._stream(client, number) for number in range(NUM_STREAMS)))

    async def _stream(self, client: httpx.AsyncClient, number: int) -> None:
        turn = 0
        while not self.stop.is_set():
            turn += 1
            body = {
                "model": "everloop",
                "messages": [{"role": "user", "content": f"Tell me about the number {100 * turn + number}."}],
                "user": f"bench-{number}-{turn}",
                "max_tokens": ANSWER_TOKENS,
                "stream": True,
                "store": False,
            }
            try:
                async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    await self._read(response)
            except httpx.HTTPError as error:
                self.failures.append(repr(error))

    async def _read(self, response: httpx.Response) -> None:
        if response.status_code != 200:
            self.failures.append(f"{response.status_code} {(await response.aread())[:200]!r}")
            return
        begun, whole = False, False
        async for line in response.aiter_lines():
            if not begun and '"content":"' in line.replace('": "', '":"') and '"content":""' not in line:
                begun = True
                model = line.partition('"model":')[2].split('"')[1]
                self.first_tokens.append((time.monotonic(), model))
            whole = whole or line == "data: [DONE]"
        if whole:
            self.num_answers += 1
        else:
            self.failures.append("an answer was broken off")

    def seen_after_s(self, moment_s: float, release: str) -> float | None:
        """Return how long after a moment the first token of a release came."""
        seen = (at_s - moment_s for at_s, model in self.first_tokens if at_s >= moment_s and model == release)
        return next(seen, None)


def measure(rounds: int) -> dict[str, Any]:
    """Promote one of two releases and roll back, again and again.

    Returns
    -------
    dict
        ``swap_s``: from the champion's change to the first token of the new one (median; the slowest too);
        ``command_s``: from the command to it, loading and proving included; ``rollback_s``: from the command of a
        rollback to the first token of the release before; ``failed``; ``answers``.
    """
    parts = {"postgres", "broker", "relay", "ledger", "engine", "reconciler", "api"}
    found: dict[str, list[float]] = {"swap_s": [], "command_s": [], "rollback_s": []}
    with own_stack(parts) as (settings, sessions, _):
        names = []
        for seed in range(rounds):
            directory = settings.home / f"bench-{seed}"
            write_adapter(directory, linear_shapes(settings.base_model_dir), settings.max_lora_rank, seed)
            with sessions.begin() as session:
                names.append(registry.register(session, settings, directory, run_id=None, manifest={}).name)
        operator = Operator(sessions, settings, "bench")
        load = Load(settings)
        thread = threading.Thread(target=load.run)
        thread.start()
        try:
            time.sleep(SETTLE_S)
            with report.Phase("swaps", rounds) as phase:
                for name in names:
                    _round(operator, load, name, found)
                    phase.advance()
        finally:
            load.stop.set()
            thread.join()
    result: dict[str, Any] = {name: round(statistics.median(values), 3) for name, values in found.items()}
    result |= {f"slowest_{name}": round(max(values), 3) for name, values in found.items()}
    failures = {"failed": len(load.failures), "failures": load.failures[:3]}
    return {**result, "n": rounds, "answers": load.num_answers, **failures}


def _round(operator: Operator, load: Load, name: str, found: dict[str, list[float]]) -> None:
    """Promote a release that no replica has yet, wait until people see it, and roll back."""
    asked_s = time.monotonic()
    before, _ = operator.promote(name, "a bench")
    moved_s = time.monotonic()
    found["swap_s"].append(_wait(load, moved_s, name))
    found["command_s"].append(moved_s - asked_s + found["swap_s"][-1])
    time.sleep(SETTLE_S)
    asked_s = time.monotonic()
    operator.roll_back(None, "a bench")
    found["rollback_s"].append(_wait(load, asked_s, before))
    time.sleep(SETTLE_S)


def _wait(load: Load, moment_s: float, release: str, timeout_s: float = 30.0) -> float:
    while (seen_s := load.seen_after_s(moment_s, release)) is None:
        if time.monotonic() - moment_s > timeout_s:
            raise TimeoutError(f"nobody has seen {release} for {timeout_s} s; {load.failures[:3]}")
        time.sleep(0.01)
    return seen_s
