"""Features of an answer that can be read off its surface: length, shape, address.

They carry preferences about form, which hidden states carry badly, and are kept apart so that their share
of a score can be shown. Each is bounded, so that a linear head cannot be led beyond what people rated.
"""

from __future__ import annotations

import math
import re

import numpy as np
from numpy.typing import NDArray

STYLE_NAMES = (
    "log_words",
    "under_16_words",
    "under_32_words",
    "under_64_words",
    "under_128_words",
    "ends_as_sentence",
    "line_breaks",
    "list",
    "question",
    "first_person",
    "second_person",
    "words_per_sentence",
)

# Powers of two: a preference for some length can be composed of them, and none is favoured.
LENGTH_KNOTS = (16, 32, 64, 128)

_LIST = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
_FIRST = re.compile(r"\b(?:i|i'm|my|me)\b", re.IGNORECASE)
_SECOND = re.compile(r"\b(?:you|your|yours)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_CLOSERS = "\"')]”’*"


def num_words(text: str) -> int:
    """Count words separated by white space."""
    return len(text.split())


def ends_as_sentence(text: str) -> bool:
    """Tell whether the text ends with a full stop, an exclamation or a question mark."""
    return text.rstrip().rstrip(_CLOSERS).endswith((".", "!", "?"))


def style_features(answer: str) -> NDArray[np.float64]:
    """Return the style features of `answer`, shape ``(len(STYLE_NAMES),)``, each about in [-1, 1]."""
    words = num_words(answer)
    log_words = math.log(min(max(words, 4), 400) / 40.0) / math.log(10.0)
    sentences = max(len(_SENTENCE_END.findall(answer)), 1)
    return np.array(
        [
            log_words,
            *(_step_down(words, knot) for knot in LENGTH_KNOTS),
            1.0 if ends_as_sentence(answer) else -1.0,
            min(answer.count("\n"), 8) / 4.0 - 1.0,
            1.0 if _LIST.search(answer) else -1.0,
            1.0 if "?" in answer else -1.0,
            1.0 if _FIRST.search(answer) else -1.0,
            1.0 if _SECOND.search(answer) else -1.0,
            min(words / sentences, 60.0) / 30.0 - 1.0,
        ]
    )


def _step_down(words: int, at: int) -> float:
    """Return a smooth step from 1 (well below `at` words) to -1 (well above)."""
    return math.tanh(4.0 * math.log2(at / max(words, 1)))
