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
    "refusal",
    "over_400_words",
)

# Powers of two: a preference for some length can be composed of them, and none is favoured.
LENGTH_KNOTS = (16, 32, 64, 128)
MOST_WORDS = 400

_LIST = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
_FIRST = re.compile(r"\b(?:i|i'm|my|me)\b", re.IGNORECASE)
_SECOND = re.compile(r"\b(?:you|your|yours)\b", re.IGNORECASE)
# What assistants say when they decline, or speak of what they are instead of answering. "I can't believe it" and
# "I'm sorry to hear that" are not refusals: what cannot be done, or what follows the apology, has to be named.
_REFUSAL = re.compile(
    r"""
    \bI(?:\s+(?:can\s?not|can't|won't|will\s+not|couldn't|could\s+not)|(?:'m|\s+am)\s+(?:unable|not\s+able)\s+to)
      \s+(?:\w+ly\s+)?(?:help|assist|answer|provide|do\s+(?:that|this)|comply|fulfil?l|discuss|engage|give|offer|
      support|create|write|generate|share|recommend|advise|access|browse|participate|respond)\b
    | \bI(?:'m|\s+am)\s+(?:so\s+|very\s+|really\s+)?(?:sorry|afraid)\b,?\s+(?:but\s+|that\s+)?
      (?:I\s*(?:'m|am|can't|can\s?not|won't|do\s+not|don't)\b|as\s+an\b|th(?:at|is)\s+is\s+not\b)
    | \b(?:sorry|apologi[sz]e|apologies),?\s+but\b
    | \bas\s+an?\s+(?:AI|artificial\s+intelligence|(?:large\s+)?language\s+model|digital\s+assistant|
      virtual\s+assistant|chatbot)\b
    | \bI(?:'m|\s+am)\s+(?:just\s+|only\s+)?an?\s+(?:AI|(?:large\s+)?language\s+model)\b
    | \bI(?:\s+do\s+not|\s+don't)\s+feel\s+comfortable\b | \bI(?:'m|\s+am)\s+not\s+comfortable\b
    | \bI\s+(?:must|have\s+to)\s+(?:respectfully\s+)?(?:decline|refuse)\b
    | \b(?:against|violates?)\s+(?:my|our)\s+(?:\w+\s+)?(?:guidelines|polic(?:y|ies)|programming|principles)\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_CLOSERS = "\"')]”’*"


def num_words(text: str) -> int:
    """Count words separated by white space."""
    return len(text.split())


def ends_as_sentence(text: str) -> bool:
    """Tell whether the text ends with a full stop, an exclamation or a question mark."""
    return text.rstrip().rstrip(_CLOSERS).endswith((".", "!", "?"))


def is_refusal(text: str) -> bool:
    """Tell whether the text declines to answer, in the words that assistants use for it (English only)."""
    return _REFUSAL.search(text.replace("’", "'")) is not None


def style_features(answer: str) -> NDArray[np.float64]:
    """Return the style features of `answer`, shape ``(len(STYLE_NAMES),)``, each in [-1, 1], the last in [0, 2]."""
    words = num_words(answer)
    log_words = math.log(min(max(words, 4), MOST_WORDS) / 40.0) / math.log(10.0)
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
            1.0 if is_refusal(answer) else -1.0,
            # Zero for nearly all answers, so the weight stays unknown: at extreme lengths the model is unsure.
            min(max(math.log2(max(words, 1) / MOST_WORDS), 0.0), 2.0),
        ]
    )


def _step_down(words: int, at: int) -> float:
    """Return a smooth step from 1 (well below `at` words) to -1 (well above)."""
    return math.tanh(4.0 * math.log2(at / max(words, 1)))
