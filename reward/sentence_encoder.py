"""A sentence-transformers model as encoder: small, whatever the size of the base model that is served."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.errors import SetupError
from infra.sentence_model import hidden_size
from infra.weights import base_model_digest
from reward.encoder import RECIPE, Answer, Encoder, Message, check_digest, projection

BATCH_WINDOWS = 8
# With these each part varies by about 1 in all (sum of variances, over 160 answers to 160 questions).
CONTENT_SCALE = 1.0
PROMPT_SCALE = 5.0


class SentenceEncoder(Encoder):
    """Embeddings of the answer, and of the last thing that the user said.

    Parameters
    ----------
    model_dir
        Directory in sentence-transformers' format.
    num_threads
        Threads that torch may use in this process; its own choice, if unset.

    A text longer than the model's window (256 tokens for all-MiniLM-L6-v2) is cut into windows, one after the
    other; its embedding is the mean of theirs, weighted by their tokens and brought back to unit length.
    """

    def __init__(self, model_dir: Path, num_threads: int | None = None) -> None:
        dim = hidden_size(model_dir)
        self.model_dir = model_dir
        self._digest = base_model_digest(model_dir)
        super().__init__(f"{self._digest[:16]}.sentence.{RECIPE}", dim, num_threads)
        self._projection = projection(dim)
        self._model: Any = None

    def _load(self) -> None:
        from sentence_transformers import SentenceTransformer

        check_digest(self.model_dir, self._digest)
        self._model = SentenceTransformer(str(self.model_dir), device="cpu", local_files_only=True)
        if (found := self._model.get_embedding_dimension()) != self.layout.content:
            raise SetupError(
                f"{self.model_dir} embeds in {found} dimensions, {self.layout.content} inside: models with a "
                "layer behind the pooling are not supported. Name another in EVERLOOP_SENTENCE_MODEL.",
                code="sentence_model_unusable",
            )

    def _num_tokens(self, text: str) -> int:
        return len(self._model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _embed(self, answers: Sequence[Answer]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        questions = [last_user_text(messages) for messages, _ in answers]
        texts = list(dict.fromkeys([text for _, text in answers] + questions))  # one prompt has many answers
        row_of = {text: row for row, text in enumerate(texts)}
        embedded = self.embedded(texts)
        content = embedded[[row_of[text] for _, text in answers]]
        prompt = embedded[[row_of[text] for text in questions]] @ self._projection
        return CONTENT_SCALE * content, (PROMPT_SCALE * prompt).astype(np.float32)

    def embedded(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return embeddings of unit length, shape ``(n, content)``."""
        windows = [self.windows(text) for text in texts]
        vectors = iter(self.vectors([window for each in windows for window, _ in each]))
        rows = [self.joined(each, [next(vectors) for _ in each]) for each in windows]
        return np.array(rows, np.float32).reshape(len(texts), self.layout.content)

    def vectors(self, windows: Sequence[str]) -> NDArray[np.float32]:
        """Return what the model makes of texts that fit its window, shape ``(n, content)``."""
        found = self._model.encode(list(windows), batch_size=BATCH_WINDOWS, show_progress_bar=False)
        return np.asarray(found, np.float32)

    def joined(
        self, windows: Sequence[tuple[str, int]], vectors: Sequence[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Return a text's embedding of those of its windows, shape ``(content,)``."""
        total = np.zeros(self.layout.content, np.float32)
        for (_, num_tokens), vector in zip(windows, vectors, strict=True):
            total += num_tokens * vector
        return np.asarray(total / np.linalg.norm(total), np.float32)

    def windows(self, text: str) -> list[tuple[str, int]]:
        """Cut a text where the model's window ends; return the pieces and their numbers of tokens."""
        tokenizer = self._model.tokenizer
        size = self._model.max_seq_length - tokenizer.num_special_tokens_to_add()
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        blocks = [spans[start : start + size] for start in range(0, len(spans), size)]
        return [(text[block[0][0] : block[-1][1]], len(block)) for block in blocks] or [(text, 1)]


def last_user_text(messages: Sequence[Message]) -> str:
    """Return what the user said last, or nothing."""
    said = [message.get("content") for message in messages if message.get("role") == "user"]
    return str(said[-1] or "") if said else ""
