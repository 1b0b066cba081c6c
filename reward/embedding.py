"""Vectors of texts, for whoever looks something up by what it says: the sentence model, in small batches."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from infra import sentence_model
from infra.settings import Settings
from reward.embedding_wire import MAX_TEXT_CHARS, Embedded
from reward.sentence_encoder import SentenceEncoder


class Embedder:
    """Embeds texts; safe to call from several threads. The model is loaded when it is first needed.

    Parameters
    ----------
    num_threads
        Threads that torch may use in this process.
    """

    def __init__(self, settings: Settings, num_threads: int | None = None) -> None:
        self.settings = settings
        self.num_threads = num_threads
        self._encoder: SentenceEncoder | None = None
        self._lock = threading.Lock()
        self._turnstile = Turnstile()

    def load(self) -> SentenceEncoder:
        """Return the loaded model.

        Raises
        ------
        SetupError
            Code ``sentence_model_missing`` or ``sentence_model_unusable``.
        IntegrityError
            Code ``encoder_digest_mismatch``.
        """
        with self._lock:
            if self._encoder is None:
                encoder = SentenceEncoder(sentence_model.directory(self.settings), self.num_threads)
                encoder.load()
                self._encoder = encoder
            return self._encoder

    def embed(self, texts: Sequence[str], *, is_awaited: bool = False) -> Embedded:
        """Return the vectors of texts; a long text is read as far as its beginning goes.

        Raises as :meth:`load` does.
        """
        encoder = self.load()
        vectors = [self._embed(encoder, text[:MAX_TEXT_CHARS], is_awaited) for text in texts]
        return Embedded(encoder=encoder.name, vectors=vectors)

    def _embed(self, encoder: SentenceEncoder, text: str, is_awaited: bool) -> list[float]:
        """Return the vector of a text: window by window, so that nobody waits longer than one takes."""
        with self._turnstile.passing(is_awaited=is_awaited):
            windows = encoder.windows(text)
        vectors = []
        for window, _ in windows:
            with self._turnstile.passing(is_awaited=is_awaited):
                vectors += list(encoder.vectors([window]))
        found: list[float] = encoder.joined(windows, vectors).tolist()
        return found


class Turnstile:
    """Lets one pass at a time; who is awaited goes before all who are not.

    A lock would do neither: in Python whoever releases it may have it again before those who wait.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_taken = False
        self._num_awaited = 0

    @contextmanager
    def passing(self, *, is_awaited: bool) -> Iterator[None]:
        """Wait for one's turn, and have it for the length of the block."""
        with self._changed:
            self._num_awaited += is_awaited
            self._changed.wait_for(lambda: not self._is_taken and (is_awaited or not self._num_awaited))
            self._num_awaited -= is_awaited
            self._is_taken = True
        try:
            yield
        finally:
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()
