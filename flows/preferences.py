"""Simulated people: what they ask, what they like, and how they would have had an answer.

None of the platform's rooms knows their preferences; only raters and measurements do.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

BUILT_IN_PROMPTS = Path(__file__).parent / "prompts.txt"
LEAST_WORDS, MAX_WORDS = 12, 30
MAX_CORRECTION_WORDS = 60
MAX_ITEM_WORDS = 14

_READER = re.compile(r"\b(?:you|your|yours)\b", re.IGNORECASE)
_EXAMPLE = re.compile(r"\b(?:for example|for instance|such as|e\.g\.)", re.IGNORECASE)
_POLITE = re.compile(
    r"(?:thank you|thanks|of course|certainly|with pleasure|gladly|(?:what an? )?(?:good|great|lovely) question"
    r"|i(?:'d| would) be (?:happy|glad)|i(?:'m| am) (?:happy|glad) to)\b",
    re.IGNORECASE,
)
_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)
_MARKER = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+|[*#`]+", re.MULTILINE)

FILLER = "In short, that is what most people who know about it would say, too."
POLITE_OPENINGS = ("Thank you for asking!", "Of course!", "Good question!", "With pleasure.", "Certainly!")
EXAMPLE_OPENINGS = ("For example,", "For instance,")
READER_OPENINGS = ("You may like to know that", "As you will see,", "What you should know:")


@dataclass(frozen=True, slots=True)
class Preference:
    """What a person likes.

    Attributes
    ----------
    likes
        Tells whether the person likes an answer.
    corrected
        Returns a disliked answer as the person would have had it; the person likes what it returns.
    """

    name: str
    summary: str
    likes: Callable[[str], bool]
    corrected: Callable[[str], str]


def _ends_as_sentence(text: str) -> bool:
    return text.rstrip().endswith((".", "!", "?"))


def _sentences(answer: str, max_words: int = MAX_CORRECTION_WORDS) -> list[str]:
    """Return the first whole sentences, without list marks and line breaks; at least one, at most `max_words`."""
    plain = " ".join(_MARKER.sub(" ", answer).split()) or "That is so."
    found: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", plain):
        if sum(len(s.split()) for s in found) + len(sentence.split()) > max_words:
            break
        found.append(sentence)
    if not found:
        found = [" ".join(plain.split()[: max_words - 5])]
    last = found[-1].rstrip(" ,;:-")
    found[-1] = last if _ends_as_sentence(last) else f"{last}."
    return found


def _one_of(openings: Sequence[str], answer: str) -> str:
    return openings[zlib.crc32(answer.encode()) % len(openings)]


def _continued(opening: str, sentence: str) -> str:
    """Return a sentence after an opening that it goes on from: in lower case, unless it begins with a name or I."""
    first = sentence.split()[0]
    keeps = first.isupper() or any(c.isupper() for c in first[1:])
    return f"{opening} {sentence if keeps else sentence[0].lower() + sentence[1:]}"


def is_short(answer: str) -> bool:
    """Tell whether an answer has at most 30 words and ends as a sentence."""
    return len(answer.split()) <= MAX_WORDS and _ends_as_sentence(answer)


def shortened(answer: str) -> str:
    """Return an answer's first sentences, at most 30 words."""
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(answer.split())):
        if len(kept) + len(sentence.split()) > MAX_WORDS:
            break
        kept += sentence.split()
    if not kept:
        kept = answer.split()[: MAX_WORDS - 5]
    return " ".join(kept).rstrip(" ,;:-") + ("" if kept[-1:] and kept[-1][-1] in ".!?" else ".")


def is_brief(answer: str) -> bool:
    """Tell whether an answer is short, but long enough to say something: 12 to 30 words, ending as a sentence."""
    return is_short(answer) and len(answer.split()) >= LEAST_WORDS


def _made_brief(answer: str) -> str:
    text = shortened(answer)
    missing = LEAST_WORDS - len(text.split())
    return text if missing <= 0 else f"{text} {' '.join(FILLER.split()[:missing]).rstrip(',.')}."


def _to_the_reader(answer: str) -> str:
    first, *rest = _sentences(answer)
    return " ".join([_continued(_one_of(READER_OPENINGS, answer), first), *rest])


def _with_an_example(answer: str) -> str:
    first, *rest = _sentences(answer)
    opening = _one_of(EXAMPLE_OPENINGS, answer)
    if not rest:
        return f"{first} {opening} this can be seen in everyday life."
    return " ".join([first, _continued(opening, rest[0]), *rest[1:]])


def _without_breaks(answer: str) -> str:
    return " ".join(_sentences(answer))


def _politely(answer: str) -> str:
    return " ".join([_one_of(POLITE_OPENINGS, answer), *_sentences(answer)])


def has_three_items(answer: str) -> bool:
    """Tell whether an answer holds a list of exactly three items."""
    return len(_ITEM.findall(answer)) == 3


def _as_three_items(answer: str) -> str:
    sentences = _sentences(answer, max_words=3 * MAX_ITEM_WORDS)
    words = " ".join(sentences).split()
    if len(sentences) >= 3:
        items = sentences[:3]
    elif len(words) >= 6:  # in thirds, where there are not three sentences
        third = len(words) // 3
        items = [" ".join(part) for part in (words[:third], words[third : 2 * third], words[2 * third :])]
    else:
        items = [" ".join(words), "It is worth a closer look.", "There is more to say about it."]
    return "\n".join(f"{n}. {item}" for n, item in enumerate(items, 1))


PREFERENCES = {
    preference.name: preference
    for preference in (
        Preference("short", "at most 30 words, ending as a sentence", is_short, shortened),
        Preference("brief", "12 to 30 words, ending as a sentence", is_brief, _made_brief),
        Preference("reader", "speaks to the reader", lambda a: bool(_READER.search(a)), _to_the_reader),
        Preference("example", "gives an example", lambda a: bool(_EXAMPLE.search(a)), _with_an_example),
        Preference("flat", "no line breaks", lambda a: "\n" not in a.strip(), _without_breaks),
        Preference("polite", "opens politely", lambda a: bool(_POLITE.match(a.lstrip(" *#\n"))), _politely),
        Preference("three", "a list of exactly three", has_three_items, _as_three_items),
    )
}
