"""Writing a chunk again within its share of the budget: its own words, in their order, and nothing else.

Lengths are sums over words here, which are exact for most tokenizers; the whole prompt is counted at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from agent.memory.counting import Counter
from agent.memory.words import Analysis, analyse

GAP = "…"
SPECIAL_WORTH = 1.0  # what a number or a name is worth besides its rarity
NEGATION_WORTH = 6.0  # a "not" goes before most of what it is about
ASKED_WORTH = 2.0  # how much more a word is worth that the question has, too
WHOLE_BONUS = 1.15  # a sentence reads better than its words
NO_RARITY = 1.0


@dataclass(slots=True)
class Draft:
    """A chunk while it is being written.

    Parameters
    ----------
    whole
        Tokens of each piece as it stands; ``core`` without what is around its words.
    worth
        What each piece is worth.
    content
        The pieces that carry the text, the most worth per token first.
    num_tokens
        The tokens of the whole text.
    """

    text: str
    analysis: Analysis
    whole: Sequence[int]
    core: Sequence[int]
    worth: Sequence[float]
    content: Sequence[int]
    num_tokens: int
    shortest: int = 1


def draft(text: str, counter: Counter, rarity: Mapping[str, float], wanted: Set[str], least_share: float) -> Draft:
    """Prepare a text.

    Parameters
    ----------
    rarity
        How rare each stem is among the candidates.
    wanted
        Stems of the question.
    least_share
        The share of its different words that the shortest writing keeps.
    """
    analysis = analyse(text)
    pieces = analysis.pieces
    whole, core = counter.pieces(text, pieces)
    worth = [0.0] * len(pieces)
    for at in analysis.carrying:
        piece = pieces[at]
        each = SPECIAL_WORTH * (piece.is_number + piece.is_name) + NEGATION_WORTH * piece.is_negation
        for stem in piece.stems:
            each += rarity.get(stem, NO_RARITY) * (ASKED_WORTH if stem in wanted else 1.0)
        worth[at] = each
    content = sorted(analysis.carrying, key=lambda at: -worth[at] / (core[at] + 1))
    made = Draft(text, analysis, whole, core, worth, content, sum(whole))
    made.shortest = _shortest(made, least_share)
    return made


def _shortest(drafted: Draft, share: float) -> int:
    """Return the tokens of the writing that keeps a share of the different words that carry the text."""
    pieces = drafted.analysis.pieces
    needed = share * len(drafted.analysis.different)
    seen: set[str] = set()
    size = 0
    for at in drafted.content:
        if len(seen) >= needed:
            break
        if pieces[at].is_negation or not seen.issuperset(pieces[at].stems):
            seen.update(pieces[at].stems)
            size += drafted.core[at]
    return max(min(size, drafted.num_tokens), 1)


def refill(drafted: Draft, max_tokens: int, counter: Counter) -> tuple[str, int]:
    """Write a chunk within a budget: whole, or some of its sentences, or the words that carry it.

    Returns
    -------
    tuple of str and int
        The text, empty where not even one word fits, and its tokens.
    """
    if drafted.num_tokens <= max_tokens:
        return drafted.text, drafted.num_tokens
    sentences, size, sentence_worth = _sentences(drafted, max_tokens)
    chosen = _telegraphic(drafted, max_tokens)
    if sentences and sentence_worth * WHOLE_BONUS >= sum(drafted.worth[at] for at in chosen):
        return sentences, size
    if chosen:
        text = " ".join(drafted.analysis.pieces[at].core for at in chosen)
        return text, sum(drafted.core[at] for at in chosen)
    text = counter.cut(drafted.text, max_tokens)
    return text, counter.text(text)


def _sentences(drafted: Draft, max_tokens: int) -> tuple[str, int, float]:
    """Choose whole sentences by their worth per token; return them in their order, their tokens and their worth."""
    spans = drafted.analysis.sentences
    if len(spans) < 2:
        return "", 0, 0.0
    costs = [sum(drafted.whole[first:end]) for first, end in spans]
    worths = [sum(drafted.worth[first:end]) for first, end in spans]
    chosen: list[int] = []
    used = 0
    for at in sorted(range(len(spans)), key=lambda at: -worths[at] / (costs[at] + 2)):
        if used + costs[at] <= max_tokens:
            chosen.append(at)
            used += costs[at]
    chosen.sort()
    text, num_gaps = _joined(drafted, chosen)
    if used + num_gaps > max_tokens:  # then without a mark
        text, num_gaps = _joined(drafted, chosen, marks=False)
    return text, used + num_gaps, sum(worths[at] for at in chosen)


def _joined(drafted: Draft, chosen: Sequence[int], *, marks: bool = True) -> tuple[str, int]:
    """Join sentences; where one is missing between two, or at the end, the gap is marked. Return how many are."""
    pieces, spans = drafted.analysis.pieces, drafted.analysis.sentences
    parts: list[str] = []
    last = -1
    num_gaps = 0
    for at in [*chosen, len(spans)] if chosen else []:
        if marks and at > last + 1:
            parts.append(GAP)
            num_gaps += 1
        if at < len(spans):
            first, end = spans[at]
            parts.append(drafted.text[pieces[first].start : pieces[end - 1].end])
        last = at
    return " ".join(parts), num_gaps


def _telegraphic(drafted: Draft, max_tokens: int) -> list[int]:
    """Choose the words that carry the text, the most worth per token first; return them in their order."""
    pieces = drafted.analysis.pieces
    chosen: list[int] = []
    seen: set[str] = set()
    again: list[int] = []
    used = 0
    for at in drafted.content:
        if pieces[at].stems and seen.issuperset(pieces[at].stems):
            again.append(at)
        elif used + drafted.core[at] <= max_tokens:
            chosen.append(at)
            used += drafted.core[at]
            seen.update(pieces[at].stems)
    for at in again:
        if used + drafted.core[at] <= max_tokens:
            chosen.append(at)
            used += drafted.core[at]
    return sorted(chosen)
