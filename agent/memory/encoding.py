"""Has questions and turns read by the sentence model, which runs in the reward worker; no answer waits for it long.

Where it does not answer, words find what they can. A turn that was not read is read when its conversation goes on.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as LateError
from typing import Self

import httpx

from agent.memory import sentences
from agent.memory.sentences import Sentence, Vectors, Words
from infra import connections
from infra.db import Sessions, transaction
from infra.errors import EverloopError
from infra.settings import Settings
from reward import client
from reward.embedding_wire import MAX_TEXT_CHARS, Embedded

log = logging.getLogger("everloop.agent")
PATIENCE_S = 0.2  # for a question
QUESTION_S = 1.0  # after which nobody waits for what it says any more
MOST_LATE = 3  # questions in a row
REST_S = 5.0  # after nobody answered
TURN_S = 30.0  # for a turn, for which nobody waits
TURNS_AT_ONCE = 4  # out of the database
MOST_ROUNDS = 8  # for one conversation, before others have their turn
MOST_ASKED = 16  # at the same time


class Encoding:
    """Asks the reward worker for vectors.

    Parameters
    ----------
    url
        Of the reward worker.
    patience_s
        How long a question may take, from when it is asked.
    """

    def __init__(self, sessions: Sessions, url: str, patience_s: float = PATIENCE_S) -> None:
        self.sessions = sessions
        self.patience_s = patience_s
        self._client = httpx.Client(base_url=url, limits=connections.limits(), trust_env=False)
        self._pool = ThreadPoolExecutor(MOST_ASKED, thread_name_prefix="encoding")
        self._resting_until_s = 0.0
        self._num_late = 0
        self._encoder: str | None = None
        self._written: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._waiting: set[str] = set()
        self._is_over = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        """Read turns that are written for the length of the block."""
        threading.Thread(target=self._read, name="turns", daemon=True).start()
        try:
            yield self
        finally:
            self._is_over.set()
            self._written.put(None)
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._client.close()

    def written(self, conversation: str) -> None:
        """Have the turns of a conversation read that were not."""
        if conversation not in self._waiting:
            self._waiting.add(conversation)
            self._written.put(conversation)

    def ask(self, question: str) -> Asking:
        """Have a question read while other things are looked up."""
        if not question.strip():
            return NOT_ASKED
        if time.monotonic() < self._resting_until_s:
            return Asking(self, None, 0.0, is_in_vain=True)
        return Asking(self, self._pool.submit(self._sentence, question), time.monotonic() + self.patience_s)

    def note(self, *, is_late: bool) -> None:
        """Take into account whether a question was read in time; several that were not, and nobody is asked."""
        self._num_late = self._num_late + 1 if is_late else 0
        if self._num_late >= MOST_LATE:
            self.rest("the encoder takes too long")

    def rest(self, why: object) -> None:
        """Ask nobody for a while."""
        self._num_late = 0
        self._resting_until_s = time.monotonic() + REST_S
        log.warning("words alone find what was said, for %.0f s: %s", REST_S, why)

    def _sentence(self, question: str) -> Sentence | None:
        try:
            found = client.embed(self._client, [question[:MAX_TEXT_CHARS]], QUESTION_S, is_awaited=True)
            self._encoder = found.encoder
            return Sentence(found.encoder, found.vectors[0])
        except Exception as error:  # whatever it is: an answer does not depend on this
            self.rest(error)
            return None

    def _read(self) -> None:
        while (conversation := self._written.get()) is not None:
            self._waiting.discard(conversation)
            self._is_over.wait(max(self._resting_until_s - time.monotonic(), 0.0))
            if self._is_over.is_set():
                return
            try:
                if self.read(conversation, MOST_ROUNDS):
                    self.written(conversation)
            except EverloopError as error:
                log.warning("turns are read when their conversation goes on: %s", error)
            except Exception:  # whatever it is: other conversations are read
                if not self._is_over.is_set():
                    log.exception("turns of a conversation are not read yet")

    def read(self, conversation: str, most_rounds: int) -> bool:
        """Read turns of a conversation that were not read; return whether there are more.

        Raises
        ------
        EverloopError
            What the reward worker, or the database, says.
        """
        encoder = self._encoder or self._embed(["Hello."]).encoder
        for _ in range(most_rounds):
            with transaction(self.sessions) as session:
                found = sentences.missing(session, conversation, encoder, TURNS_AT_ONCE)
            read: dict[str, list[tuple[Words, Vectors]]] = defaultdict(list)
            for words in found:
                name, vectors = self._vectors(words, encoder)
                read[name].append((words, vectors))
            with transaction(self.sessions) as session:
                for name, turns in read.items():
                    sentences.keep(session, name, turns)
            # By another encoder than was thought: turns are read anew when their conversation goes on.
            if len(found) < TURNS_AT_ONCE or set(read) != {encoder}:
                return False
        return True

    def _vectors(self, words: Words, encoder: str) -> tuple[str, Vectors]:
        """Read a question and its answer; return which encoder did. One turn at a time: questions come between."""
        texts = [words.question, words.answer]
        asked = [text[:MAX_TEXT_CHARS] for text in texts if text.strip()]
        if not asked:
            return encoder, (None, None)
        made = self._embed(asked)
        found = iter(made.vectors)
        question, answer = [next(found) if text.strip() else None for text in texts]
        return made.encoder, (question, answer)

    def _embed(self, texts: list[str]) -> Embedded:
        try:
            made = client.embed(self._client, texts, TURN_S)
        except EverloopError as error:
            self.rest(error)
            raise
        self._encoder = made.encoder
        return made


@contextlib.asynccontextmanager
async def reading(sessions: Sessions, settings: Settings) -> AsyncIterator[Encoding | None]:
    """Have turns and questions read for the length of the block, where the settings name an encoder.

    Without pgvector in the database, or without a reward worker, words alone find what was said;
    ``everloop doctor`` tells.
    """
    if settings.memory_encoder == "off":
        yield None
    elif settings.reward_url is None:
        log.error("memory_encoder is on, and there is no reward worker (reward_url) to read what is said")
        yield None
    else:
        with Encoding(sessions, settings.reward_url).running() as encoding:
            yield encoding


class Asking:
    """A question that is being read; `is_in_vain` once it is known that nobody reads it in time."""

    def __init__(
        self,
        encoding: Encoding | None,
        future: Future[Sentence | None] | None,
        until_s: float,
        *,
        is_in_vain: bool = False,
    ) -> None:
        self._encoding = encoding
        self._future = future
        self._until_s = until_s
        self.is_in_vain = is_in_vain

    def fail(self, why: object) -> None:
        """Note that the database finds nothing by it."""
        self.is_in_vain = True
        if self._encoding is not None:
            self._encoding.rest(why)

    def result(self) -> Sentence | None:
        """Wait for it as long as it may take; None where it takes longer."""
        if self._future is None or self._encoding is None:
            return None
        found = None
        try:
            found = self._future.result(timeout=max(self._until_s - time.monotonic(), 0.0))
            self._encoding.note(is_late=False)
        except LateError:
            self._future.cancel()
            self._encoding.note(is_late=True)
        self.is_in_vain = found is None
        return found


NOT_ASKED = Asking(None, None, 0.0)
