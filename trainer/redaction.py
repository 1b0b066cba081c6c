"""Redaction: personal data leaves a text before anything is trained on it.

What is found is replaced by a placeholder that says its kind, so a model learns that an address stood there and not
which. A text is searched between the placeholders that it already holds, and what a search leaves is searched again
until nothing is found; redacting twice is therefore the same as redacting once. No text is ever logged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from trainer.credentials import find_credentials
from trainer.identifiers import find_cards, find_emails, find_machine_addresses, find_phones
from trainer.person_names import NameFinder, PresidioNames

__all__ = ["KINDS", "NameFinder", "PresidioNames", "Redacted", "redact", "redact_messages"]

# The most specific first: of two finds of the same length the earlier kind names the placeholder.
KINDS = ("secret", "email", "card", "phone", "address", "name")

# Taking one find away can bring out another beside it. Each round is linear, so their number bounds the time; no
# text is known that needs more than three.
MAX_ROUNDS = 8

_PLACEHOLDER = re.compile(rf"\[(?:{'|'.join(KINDS)})\]")
_LONGEST_PLACEHOLDER = max(map(len, KINDS)) + 2  # characters
_SHORTEST = 6  # characters: nothing shorter is found by anything but a name finder

Find = tuple[int, int, str]


@dataclass(frozen=True, slots=True)
class Redacted:
    """A text without personal data, and how many placeholders of each kind were put in."""

    text: str
    counts: Counter[str] = field(default_factory=Counter)


def redact(text: str, *, region: str | None = None, names: NameFinder | None = None) -> Redacted:
    """Replace personal data by placeholders such as ``[email]``.

    Parameters
    ----------
    text
        Any text; placeholders that stand in it already stay and are not counted.
    region
        ISO 3166 code, such as ``US``, of the country whose national phone numbers are found too; without it only
        numbers with a leading plus are.
    names
        Finder of people's names, such as :class:`PresidioNames`; without it names stay.

    Raises
    ------
    InvalidRequestError
        No phone numbers are known for `region`.
    """
    counts: Counter[str] = Counter()
    text = _without_identifiers(text, region, counts)
    if names is not None:
        for _ in range(MAX_ROUNDS):
            found = _between_placeholders(text, names.find(text))
            if not found:
                break
            text = "".join(_pieces(text, _merged(found), counts))
            text = _without_identifiers(text, region, counts)
    return Redacted(text, counts)


def redact_messages(
    messages: Sequence[dict[str, Any]], *, region: str | None = None, names: NameFinder | None = None
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Redact the content of chat messages, as :func:`redact` does; the messages given are not changed.

    Content may be a string or OpenAI's list of parts, of which the texts are redacted. All other fields stay.
    """
    counts: Counter[str] = Counter()

    def clean(text: str) -> str:
        redacted = redact(text, region=region, names=names)
        counts.update(redacted.counts)
        return redacted.text

    def clean_content(content: Any) -> Any:
        if isinstance(content, str):
            return clean(content)
        if isinstance(content, list):
            return [clean_part(part) for part in content]
        return content

    def clean_part(part: Any) -> Any:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            return {**part, "text": clean(part["text"])}
        return part

    return [
        {key: clean_content(value) if key == "content" else value for key, value in message.items()}
        for message in messages
    ], counts


def _without_identifiers(text: str, region: str | None, counts: Counter[str]) -> str:
    for _ in range(MAX_ROUNDS):
        edges = [0, *(edge for match in _PLACEHOLDER.finditer(text) for edge in match.span()), len(text)]
        pieces: list[str] = []
        num_found = counts.total()
        for index, (start, end) in enumerate(pairwise(edges)):
            part = text[start:end]
            is_placeholder = index % 2 == 1
            if is_placeholder or len(part) < _SHORTEST:
                pieces.append(part)
            else:
                pieces += _pieces(part, _merged(_identifiers(part, region)), counts)
        if counts.total() == num_found:
            break
        text = "".join(pieces)
    return text


def _identifiers(text: str, region: str | None) -> list[Find]:
    found = {
        "secret": find_credentials(text),
        "email": find_emails(text),
        "card": find_cards(text),
        "phone": find_phones(text, region),
        "address": find_machine_addresses(text),
    }
    return [(start, end, kind) for kind, spans in found.items() for start, end in spans]


def _merged(found: list[Find]) -> list[Find]:
    """Join finds that overlap, so that no part of any stays; the longest names the whole."""
    merged: list[Find] = []
    longest = (0, 0)
    for start, end, kind in sorted(found):
        rank = (end - start, -KINDS.index(kind))
        if merged and start < merged[-1][1]:
            first, last, named = merged[-1]
            merged[-1] = (first, max(last, end), kind if rank > longest else named)
            longest = max(longest, rank)
        else:
            merged.append((start, end, kind))
            longest = rank
    return merged


def _pieces(text: str, found: list[Find], counts: Counter[str]) -> list[str]:
    pieces: list[str] = []
    position = 0
    for start, end, kind in found:
        pieces += [text[position:start], f"[{kind}]"]
        counts[kind] += 1
        position = end
    pieces.append(text[position:])
    return pieces


def _between_placeholders(text: str, spans: Iterable[tuple[int, int]]) -> list[Find]:
    """Cut placeholders out of names: a model may take ``[email]`` for a part of one, or for one."""
    found: list[Find] = []
    for start, end in spans:
        reach = max(0, start - _LONGEST_PLACEHOLDER), end + _LONGEST_PLACEHOLDER
        edges = [start]
        for placeholder in _PLACEHOLDER.finditer(text, *reach):
            edges += [min(max(edge, start), end) for edge in placeholder.span()]
        edges.append(end)
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            if any(character.isalnum() for character in text[first:last]):
                found.append((first, last, "name"))
    return found
