"""Has questions and turns read by the sentence model, which runs in the reward worker; no answer waits for it long.

Where it does not answer, words find what they can. A turn that was not read is read when its conversation goes on.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from typing import Self

import anyio.to_thread
import httpx
import sqlalchemy as sa

from agent.memory import sentences
from agent.memory.sentences import Sentence
from infra import pgvector
from infra.db import Sessions, transaction
from infra.errors import EverloopError
from infra.settings import Settings
from reward import client
from reward.embedding_wire import MAX_TEXT_CHARS

log = logging.getLogger("everloop.agent")
PATIENCE_S = 0.2  # for a question
REST_S = 5.0  # after nobody answered
AT_ONCE = 4  # turns; a question waits behind no more of them
MOST_ROUNDS = 8  # for one conversation, before others have their turn
READ_S = 30.0  # for turns, for which nobody waits
MOST_ASKED = 16  # at the same time


class Encoding:
    """Asks the reward worker for vectors.

    Parameters
    ----------
    patience_s
        How long a question may take, from when it is asked.
    """

    def __init__(self, sessions: Sessions, settings: Settings, patience_s: float = PATIENCE_S) -> None:
        self.sessions = sessions
        self.patience_s = patience_s
        url = settings.reward_url or "http://reward.invalid"
        self._client = httpx.Client(base_url=url, timeout=READ_S, trust_env=False)
        self._pool = ThreadPoolExecutor(MOST_ASKED, thread_name_prefix="encoding")
        self._resting_until_s = 0.0
        self._encoder: str | None = None
        self._written: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        """Read turns that are written for the length of the block."""
        reader = threading.Thread(target=self._read, name="turns", daemon=True)
        reader.start()
        try:
            yield self
        finally:
            self._written.put(None)
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._client.close()

    def written(self, conversation: str) -> None:
        """Have the turns of a conversation read that were not."""
        self._written.put(conversation)

    def ask(self, question: str) -> Asking:
        """Have a question read while other things are looked up."""
        if not question.strip():
            return NOT_ASKED
        if time.monotonic() < self._resting_until_s:
            return Asking(None, 0.0, is_in_vain=True)
        return Asking(self._pool.submit(self._sentence, question), time.monotonic() + self.patience_s)

    def _sentence(self, question: str) -> Sentence | None:
        try:
            found = client.embed(self._client, [question[:MAX_TEXT_CHARS]])
        except (EverloopError, RuntimeError) as error:  # also a client that was closed
            self._rest(error)
            return None
        self._encoder = found.encoder
        return Sentence(found.encoder, found.vectors[0])

    def _rest(self, error: Exception) -> None:
        self._resting_until_s = time.monotonic() + REST_S
        log.warning("the encoder does not answer, words alone find what was said: %s", error)

    def _read(self) -> None:
        while (conversation := self._written.get()) is not None:
            try:
                if self.read(conversation, MOST_ROUNDS):
                    self._written.put(conversation)
            except (EverloopError, sa.exc.SQLAlchemyError, RuntimeError) as error:
                # It is read when the conversation goes on.
                log.warning("turns of a conversation are not read yet: %s", type(error).__name__)

    def read(self, conversation: str, most_rounds: int) -> bool:
        """Read turns of a conversation that were not read; return whether there are more.

        Raises
        ------
        EverloopError
            Code ``reward_unavailable``.
        """
        if self._encoder is None:
            self._encoder = client.embed(self._client, ["Hello."]).encoder
        for _ in range(most_rounds):
            with transaction(self.sessions) as session:
                found = sentences.missing(session, conversation, self._encoder, AT_ONCE)
            if not found:
                return False
            texts = [text for words in found for text in (words.question, words.answer)]
            asked = [text[:MAX_TEXT_CHARS] for text in texts if text.strip()]
            made = client.embed(self._client, asked) if asked else None
            behind = iter(made.vectors if made else ())
            vectors = [next(behind) if text.strip() else None for text in texts]
            self._encoder = made.encoder if made else self._encoder
            with transaction(self.sessions) as session:
                sentences.keep(session, self._encoder, found, vectors)
        return True


@contextlib.asynccontextmanager
async def reading(sessions: Sessions, settings: Settings) -> AsyncIterator[Encoding | None]:
    """Have turns and questions read for the length of the block, where the settings name an encoder.

    Without its index in the database words alone find what was said; ``everloop doctor`` tells.
    """
    if settings.memory_encoder == "off":
        yield None
        return
    if not await anyio.to_thread.run_sync(pgvector.is_there, settings):
        log.error(
            "the database has no index of vectors: run `everloop migrate`; until then words find what they can"
        )
        yield None
        return
    with Encoding(sessions, settings).running() as encoding:
        yield encoding


class Asking:
    """A question that is being read; `is_in_vain` once it is known that nobody reads it in time."""

    def __init__(self, future: Future[Sentence | None] | None, until_s: float, *, is_in_vain: bool = False) -> None:
        self._future = future
        self._until_s = until_s
        self.is_in_vain = is_in_vain

    def result(self) -> Sentence | None:
        """Wait for it as long as it may take; None where it takes longer."""
        if self._future is None:
            return None
        try:
            found = self._future.result(timeout=max(self._until_s - time.monotonic(), 0.0))
        except LateError:
            self._future.cancel()
            found = None
        self.is_in_vain = found is None
        return found


NOT_ASKED = Asking(None, 0.0)
