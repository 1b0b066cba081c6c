"""Vectors of texts, for whoever looks something up by what it says: the sentence model, in small batches."""

from __future__ import annotations

import threading
from collections.abc import Sequence

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

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Return the vectors of texts; a long text is read as far as its beginning goes.

        Raises as :meth:`load` does.
        """
        encoder = self.load()
        with self._lock:
            rows = encoder.embedded([text[:MAX_TEXT_CHARS] for text in texts])
        return Embedded(encoder=encoder.name, vectors=rows.tolist())
