"""How long it takes to build a context out of PostgreSQL, of a short conversation and of a very long one."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import httpx
import numpy as np
import sqlalchemy as sa
import uvicorn

from agent.book import Asked, Book
from agent.memory import store
from agent.memory.encoding import Encoding
from agent.memory.prompts import Remembering, Wanted
from feedback import conversations, episodes, users
from feedback.conversations import Place
from feedback.episodes import Recording
from infra.db import Sessions, connect, transaction
from infra.settings import ASSISTANT_MODEL, Settings
from infra.stack import embedded
from infra.stack.database import database_alone
from infra.stack.parts import LOOPBACK
from infra.stack.ports import free_port
from reward.embedding import Embedder
from reward.scoring import Scorer
from reward.server import build

USER = "bench"
BUDGET = 1024
LENGTHS = (100, 10_000)  # messages
AT_ONCE = 500
ROUNDS = 60


def build_ms(settings: Settings, texts: Sequence[str], questions: Sequence[str]) -> dict[str, float]:
    """Measure on a database of its own.

    Parameters
    ----------
    texts
        What is said in the conversations, over and over.
    questions
        What is asked, in turn.

    Returns
    -------
    dict
        ``build_ms_100`` and ``build_ms_10000``: medians over turns that alternate between the two conversations,
        reading from the database included; ``build_ratio``. ``turn_ms_100`` and ``turn_ms_10000``: what goes before
        it included, as the question is read meanwhile.
    """
    settings = settings.model_copy(update={"memory_tokens": BUDGET})
    with _database(settings) as sessions, _encoding(sessions, settings) as encoding:
        memory = Remembering(sessions, settings, encoding)
        lasts = {length: _talk(sessions, texts, length) for length in LENGTHS}
        if encoding is not None:
            _read(sessions, encoding, [conversation for conversation, _ in lasts.values()])
        times = asyncio.run(_times(memory, lasts, questions))
    found = {name: round(float(np.median(each)), 2) for name, each in times.items()}
    return {**found, "build_ratio": round(found[f"build_ms_{LENGTHS[1]}"] / found[f"build_ms_{LENGTHS[0]}"], 2)}


async def _times(
    memory: Remembering, lasts: Mapping[int, tuple[str, str]], questions: Sequence[str]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = defaultdict(list)
    async with Book(memory.sessions, learn_by_default=True, remembering=memory).running() as book:
        for number in range(-6, ROUNDS):  # the first few warm up
            for length, (conversation, parent) in lasts.items():
                asked = [{"role": "user", "content": questions[number % len(questions)]}]
                wanted = Wanted(USER, asked, conversation, parent, max_answer_tokens=64)
                built_ms = await _ms(asyncio.to_thread(memory.prompt, wanted))
                turn_ms = await _ms(_turn(book, memory, wanted))
                if number >= 0:
                    times[f"build_ms_{length}"].append(built_ms)
                    times[f"turn_ms_{length}"].append(turn_ms)
    return times


async def _turn(book: Book, memory: Remembering, wanted: Wanted) -> None:
    """Do what :class:`agent.turn.Turn` does until there is a prompt."""
    assert wanted.conversation is not None
    asking = memory.ask(wanted.messages, wanted.conversation, wanted.parent)
    await book.begin(Asked(USER, ASSISTANT_MODEL, None, Place(wanted.conversation, wanted.parent)))
    await asyncio.to_thread(memory.prompt, replace(wanted, asking=asking))


async def _ms(act: Awaitable[object]) -> float:
    started_s = time.perf_counter()
    await act
    return 1000.0 * (time.perf_counter() - started_s)


def _read(sessions: Sessions, encoding: Encoding, conversations: Sequence[str]) -> None:
    """Have all turns read, as they are while people chat."""
    for conversation in conversations:
        while encoding.read(conversation, most_rounds=1000):
            pass
    with transaction(sessions) as session:
        session.execute(sa.text("ANALYZE turn_vectors"))  # as the server does by itself, sooner or later


@contextmanager
def _encoding(sessions: Sessions, settings: Settings) -> Iterator[Encoding | None]:
    """Run the sentence model as the reward worker does: in a process of its own, at the lowest priority."""
    if settings.memory_encoder == "off":
        yield None
        return
    with ExitStack() as held:
        port = free_port(None, "reward_port", held)
    worker = multiprocessing.get_context("spawn").Process(target=_serve, args=[settings, port], daemon=True)
    worker.start()
    try:
        url = f"http://{LOOPBACK}:{port}"
        while not _answers(f"{url}/healthz"):
            time.sleep(0.1)
            if not worker.is_alive():
                raise RuntimeError("The process with the sentence model has ended; see above.")
        with Encoding(sessions, url).running() as encoding:
            yield encoding
    finally:
        worker.terminate()
        worker.join()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=1.0).status_code == 200
    except httpx.TransportError:
        return False


def _serve(settings: Settings, port: int) -> None:
    os.nice(10)
    application = build(cast(Scorer, None), Embedder(settings, num_threads=1))  # nobody asks for scores
    uvicorn.run(application, host=LOOPBACK, port=port, log_config=None, access_log=False)


@contextmanager
def _database(settings: Settings) -> Iterator[Sessions]:
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="everloop-bench-")))
        alone = stack.enter_context(database_alone(Settings(home=home, memory_encoder=settings.memory_encoder)))
        embedded.migrate(alone)
        sessions = connect(alone.need("database_url"))
        stack.callback(sessions.kw["bind"].dispose)
        yield sessions


def _talk(sessions: Sessions, texts: Sequence[str], num_messages: int) -> tuple[str, str]:
    """Write a conversation as turns are written; return its id and that of its last turn."""
    with transaction(sessions) as session:
        users.meet(session, USER)
        conversation = conversations.create(session, USER, None).id
    parent: str | None = None
    for begin in range(0, num_messages, AT_ONCE):
        recordings = []
        for at in range(begin, min(begin + AT_ONCE, num_messages), 2):
            recording = _recording(conversation, parent, texts[at % len(texts)], texts[(at + 1) % len(texts)])
            parent = recording.episode_id
            recordings.append(recording)
        with transaction(sessions) as session:
            keys = users.keys_of(session, {USER})
            episodes.record_many(session, [(recording, None) for recording in recordings], keys)
            store.place_all(session, recordings)
    assert parent is not None
    return conversation, parent


def _recording(conversation: str, parent: str | None, question: str, answer: str) -> Recording:
    return Recording(
        episode_id=episodes.new_episode_id(),
        user_id=USER,
        release="base",
        adapter_digest=None,
        canary_id=None,
        arm="champion",
        propensity=1.0,
        messages=[{"role": "user", "content": question}],
        sampling={},
        learn=False,
        answer=answer,
        status="complete",
        conversation_id=conversation,
        parent_id=parent,
    )
