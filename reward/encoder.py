"""Features of an answer in its context: what it says, what was asked, and its style.

:class:`Encoder` is the interface; what all encoders share is here: the order of the parts, the refusals, and
the check that a model is what its name says. The implementations are :mod:`reward.base_model_encoder` and
:mod:`reward.sentence_encoder`; :func:`open_encoder` chooses. Features are computed once per answer and cached
for good under the encoder's name, which holds all that they depend on.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra import sentence_model
from infra.errors import IntegrityError, InvalidRequestError
from infra.settings import Settings
from infra.weights import weights_digest
from reward.style import STYLE_NAMES, style_features

Message = dict[str, Any]
Answer = tuple[Sequence[Message], str]

RECIPE = "v3"  # goes into every encoder's name: to be raised with any change of what features are
BATCH_ANSWERS = 8
CHUNK_ANSWERS = 4 * BATCH_ANSWERS  # enough to sort by length
MAX_ANSWER_TOKENS = 8192
# No prose has as many characters to a token: what is longer need not be tokenised to be refused.
MAX_ANSWER_CHARS = 16 * MAX_ANSWER_TOKENS
PROMPT_DIM = 16
PROJECTION_SEED = 20_260_301
STYLE_SCALE = 0.7
_LOADING = threading.Lock()  # one model after the other: transformers cannot be imported by two threads at once


class UnusableAnswerError(InvalidRequestError):
    """No features can be made of an answer: sending it again will not help."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each part of a feature vector stands, so that its share of a score can be shown.

    Parameters
    ----------
    content
        Number of features of the answer itself.
    prompt
        Number of features that depend on the prompt alone, and so are equal for all answers to it.
    style
        Number of features of the answer's surface (:data:`reward.style.STYLE_NAMES`).
    constant
        The last feature, always 1.
    """

    content: int
    prompt: int = PROMPT_DIM
    style: int = len(STYLE_NAMES)
    constant: int = 1

    @property
    def dim(self) -> int:
        """Number of features in all."""
        return self.content + self.prompt + self.style + self.constant

    @property
    def slices(self) -> dict[str, slice]:
        """The parts by name, in their order: ``content``, ``prompt``, ``style``, ``constant``."""
        ends = np.cumsum([self.content, self.prompt, self.style, self.constant]).tolist()
        names = ("content", "prompt", "style", "constant")
        return {name: slice(start, end) for name, start, end in zip(names, [0, *ends], ends, strict=False)}


class Encoder(ABC):
    """Turns answers in context into feature vectors.

    Parameters
    ----------
    name
        The cache key: digest of the weights, what is taken from them, and :data:`RECIPE`.
    content_dim
        Number of features of the answer itself.
    num_threads
        Threads that torch may use in this process; its own choice, if unset.

    The model is loaded when it is first needed (or by :meth:`load`): a worker that finds its features in the cache
    is back at work a second after it was killed.
    """

    def __init__(self, name: str, content_dim: int, num_threads: int | None = None) -> None:
        self.name = name
        self.layout = Layout(content=content_dim)
        self.num_threads = num_threads
        self._loaded = False

    @property
    def dim(self) -> int:
        """Number of features."""
        return self.layout.dim

    def load(self) -> None:
        """Load the model, unless it is loaded; safe to call from a thread that does nothing else.

        Raises
        ------
        IntegrityError
            The weights are not those that the model's note names (code ``encoder_digest_mismatch``).
        """
        if self._loaded:
            return
        with _LOADING:
            if self._loaded:
                return
            if self.num_threads is not None:
                import torch

                torch.set_num_threads(self.num_threads)
            self._load()
            self._loaded = True

    def refusal(self, answer: str) -> UnusableAnswerError | None:
        """Return why no features can be made of an answer, or None. Costs nothing for answers of usual length.

        The codes are ``answer_empty`` and ``answer_too_long`` (more than :data:`MAX_ANSWER_TOKENS` tokens).
        """
        if not answer.strip():
            return UnusableAnswerError(
                "The answer is empty: there is nothing to score. Leave it out.", code="answer_empty"
            )
        if len(answer) > MAX_ANSWER_CHARS:
            return _too_long(f"{len(answer)} characters")
        # A token has at least one byte: only what has more bytes than tokens are allowed is worth counting.
        if len(answer.encode(errors="replace")) > MAX_ANSWER_TOKENS:
            self.load()
            if (num_tokens := self._num_tokens(answer)) > MAX_ANSWER_TOKENS:
                return _too_long(f"{num_tokens} tokens")
        return None

    def encode_usable(
        self, answers: Sequence[Answer], on_done: Callable[[int], None] = lambda done: None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return features, shape ``(n, dim)``, zeros for answers that are refused, and which ones are not.

        Parameters
        ----------
        on_done
            Told now and then how many answers are done.
        """
        usable = np.array([self.refusal(text) is None for _, text in answers], dtype=bool)
        features = np.zeros((len(answers), self.dim), np.float32)
        for start in range(0, len(answers), CHUNK_ANSWERS):
            chosen = (start + np.flatnonzero(usable[start : start + CHUNK_ANSWERS])).tolist()
            features[chosen] = self.encode([answers[i] for i in chosen])
            on_done(min(start + CHUNK_ANSWERS, len(answers)))
        return features, usable

    def encode(self, answers: Sequence[Answer]) -> NDArray[np.float32]:
        """Return features of (messages, answer) pairs, shape ``(n, dim)``, in the order of :attr:`layout`.

        Raises
        ------
        UnusableAnswerError
            One of the answers is refused (see :meth:`refusal`), before any is computed; or features came out
            infinite or not a number (code ``features_not_finite``).
        """
        for _, text in answers:
            if (refusal := self.refusal(text)) is not None:
                raise refusal
        if not answers:
            return np.zeros((0, self.dim), dtype=np.float32)
        self.load()
        content, prompt = self._embed(answers)
        style = STYLE_SCALE * np.array([style_features(text) for _, text in answers])
        constant = np.ones((len(answers), self.layout.constant))
        features = np.concatenate([content, prompt, style, constant], axis=1, dtype=np.float32)
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if bad.size:
            raise UnusableAnswerError(
                f"{bad.size} of {len(answers)} answers have features that are not finite, the first being number "
                f"{bad[0]}. Leave them out; if it happens to all, the model {self.name} is broken.",
                code="features_not_finite",
            )
        return features

    @abstractmethod
    def _load(self) -> None:
        """Check the weights against their note, and load them."""

    @abstractmethod
    def _num_tokens(self, text: str) -> int:
        """Return the number of tokens of a text; the model is loaded."""

    @abstractmethod
    def _embed(self, answers: Sequence[Answer]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return content ``(n, layout.content)`` and prompt features ``(n, layout.prompt)``, scaled.

        Both to about unit variance over answers, in all, so that a prior variance of 1 suits every part.
        """


def open_encoder(settings: Settings, num_threads: int | None = None) -> Encoder:
    """Return the encoder that the settings name (`reward_encoder`); nothing is loaded yet."""
    if settings.reward_encoder == "sentence":
        from reward.sentence_encoder import SentenceEncoder

        return SentenceEncoder(sentence_model.directory(settings), num_threads)
    from reward.base_model_encoder import BaseModelEncoder

    return BaseModelEncoder(settings.base_model_dir, settings.encoder_layer, num_threads)


def projection(dim: int) -> NDArray[np.float64]:
    """Return a fixed matrix with orthonormal columns, shape ``(dim, PROMPT_DIM)``.

    The Q factor of a seeded normal matrix, with the signs that make the diagonal of R positive: QR leaves
    them open, and libraries differ.
    """
    normal = np.random.Generator(np.random.PCG64(PROJECTION_SEED)).standard_normal((dim, PROMPT_DIM))
    q, r = np.linalg.qr(normal)
    return q * np.sign(np.diag(r))


def check_digest(model_dir: Path, expected: str) -> None:
    """Raise an IntegrityError if weights are not those of a digest (code ``encoder_digest_mismatch``)."""
    if (found := weights_digest(model_dir)) != expected:
        raise IntegrityError(
            f"The weights in {model_dir} have the digest {found[:16]}…, and {expected[:16]}… was expected: they "
            "were changed or are damaged, and their features would be mixed with earlier ones. Restore them (or "
            "remove the directory, if `everloop up` made it) and start again.",
            code="encoder_digest_mismatch",
        )


def _too_long(length: str) -> UnusableAnswerError:
    return UnusableAnswerError(
        f"The answer has {length}; at most {MAX_ANSWER_TOKENS} tokens can be scored. Shorten it or leave it out.",
        code="answer_too_long",
    )
