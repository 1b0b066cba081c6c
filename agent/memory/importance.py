"""How much each chunk of the past matters for the answer to come.

The importance of a chunk is ``exp(weights . features)``, so that feedback on answers moves the weights by a plain
gradient (:mod:`agent.memory.learning`). The features are of the chunk alone, or of it beside the question and the
other candidates; each lies about between 0 and 1.
"""

from __future__ import annotations

import math
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from numpy.typing import NDArray

from agent.memory.vectors import WordVectors
from agent.memory.words import Analysis, analyse, grams, stem

K1, B = 1.2, 0.6  # of BM25
RECENT = 3.0  # messages, after which the weight of recency is down to a third
OPENING = 4  # messages
FUZZY_LEAST = 0.34  # share of the n-grams below which two words have nothing to do with each other
FIRST_PERSON = frozenset(
    ("i", "i'm", "i've", "i'd", "i'll", "my", "mine", "we", "we're", "our", "ours", "me", "us")
)
ASKED_FOR_TIME = frozenset(("when", "date", "day", "month", "year", "deadline", "until", "expire"))
ASKED_FOR_NUMBER = frozenset(
    ("many", "much", "old", "age", "long", "number", "code", "price", "cost", "time", "far")
)
ASKED_FOR_NAME = frozenset(("who", "whom", "whose", "name", "called", "title", "author"))
ASKED_FOR_PLACE = frozenset(("where", "place", "city", "country", "town"))
AT_A_PLACE = frozenset(("in", "at", "from", "to", "near", "under", "behind", "on"))


@dataclass(frozen=True, slots=True)
class Chunk:
    """A message of the past, or a part of a long one.

    Parameters
    ----------
    turn
        Id of the turn that it is of; None where the client sent it.
    position
        Number of its message in the conversation, the oldest is 0.
    nearness
        To the question, as the encoder finds it (cosine); None where it has not read both.
    """

    role: str
    text: str
    turn: str | None = None
    position: int = 0
    pinned: bool = False
    corrected: bool = False
    nearness: float | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """What each feature weighs; in the order of :func:`features`."""

    recency: float = 0.5
    opening: float = 0.15
    relevance: float = 0.5
    meaning: float = 7.0
    alike: float = 0.5
    neighbour: float = 0.3
    replies: float = 2.5
    kind: float = 0.5
    surprisal: float = 0.15
    number: float = 0.5
    name: float = 0.5
    personal: float = 0.4
    asks: float = -0.5
    referenced: float = 0.1
    by_user: float = 0.15
    corrected: float = 0.5
    pinned: float = 10.0
    sentence: float = 0.0

    def vector(self) -> NDArray[np.float64]:
        """Return the weights as an array, in the order of the features."""
        return np.array(list(asdict(self).values()), np.float64)

    @classmethod
    def of(cls, vector: Sequence[float] | NDArray[np.float64]) -> Weights:
        """Return weights from an array."""
        return cls(*(float(value) for value in vector))


# Where no vectors are at hand, words must do all of it.
BY_WORDS_ALONE = Weights(relevance=1.4, meaning=0.0, alike=0.2, replies=1.5, surprisal=0.3)
# Where the encoder has read question and past, it tells better what belongs together.
BY_SENTENCES = Weights(meaning=0.0, sentence=10.0)
NAMES = tuple(field.name for field in fields(Weights))


def defaults(*, has_vectors: bool, has_sentences: bool = False) -> Weights:
    """Return the weights for what is at hand: words, their vectors, those of sentences."""
    if has_sentences:
        return BY_SENTENCES
    return Weights() if has_vectors else BY_WORDS_ALONE


class Bag:
    """The candidates as bags of stems, and how rare each stem is among them, in nats."""

    def __init__(self, analyses: Sequence[Analysis]) -> None:
        self.tallies = [Tally(analysis.stems) for analysis in analyses]
        self.lengths = np.array([sum(tally.values()) for tally in self.tallies], np.float64)
        self.where: dict[str, list[int]] = defaultdict(list)
        for at, tally in enumerate(self.tallies):
            for term in tally:
                self.where[term].append(at)
        self.mean_length = float(self.lengths.mean()) if len(analyses) else 1.0
        num = len(analyses)
        self.rarity = {
            term: math.log(1.0 + (num - len(places) + 0.5) / (len(places) + 0.5))
            for term, places in self.where.items()
        }
        self.rarest = math.log(1.0 + (num + 0.5) / 0.5)

    def scores(self, query: dict[str, float]) -> NDArray[np.float64]:
        """Return the BM25 score of each candidate; the query's terms are weighted."""
        found = np.zeros(len(self.tallies))
        for term, weight in query.items():
            places = self.where.get(term)
            if not places:
                continue
            counts = np.array([self.tallies[at][term] for at in places], np.float64)
            norm = K1 * (1.0 - B + B * self.lengths[places] / max(self.mean_length, 1.0))
            found[places] += weight * self.rarity[term] * counts * (K1 + 1.0) / (counts + norm)
        return found


@dataclass(frozen=True, slots=True)
class Candidates:
    """Chunks that may be kept, with what is known of them whatever is asked."""

    chunks: Sequence[Chunk]
    analyses: Sequence[Analysis]
    bag: Bag

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> Candidates:
        """Analyse chunks."""
        analyses = [analyse(chunk.text) for chunk in chunks]
        return cls(chunks, analyses, Bag(analyses))


def features(
    candidates: Candidates, question: str, before: str = "", vectors: WordVectors | None = None
) -> NDArray[np.float64]:
    """Return the features of each chunk, shape (n, number of weights).

    Parameters
    ----------
    question
        The message to be answered.
    before
        What was said just before it, which says what the question is about where it does not say so itself.
    vectors
        Without them, words are alike that are written alike, and the feature of meaning is 0.
    """
    chunks, analyses, bag = candidates.chunks, candidates.analyses, candidates.bag
    asked = analyse(question)
    query = _query(asked, analyse(before))
    relevance = _scaled(bag.scores(query), _best_possible(bag, query))
    if vectors is None:
        meaning = np.zeros(len(chunks))
        alike = _scaled(bag.scores(_similar(bag, query)), _best_possible(bag, query))
        near = np.maximum(relevance, alike)
    else:
        meaning, alike = _meanings(candidates, asked, vectors)
        near = meaning
    positions = np.array([chunk.position for chunk in chunks], np.float64)
    age = positions.max(initial=0.0) - positions
    asks = np.array([chunk.text.rstrip().endswith("?") for chunk in chunks], float)
    columns = {
        "recency": np.exp(-age / RECENT),
        "opening": (positions < OPENING).astype(float),
        "relevance": relevance,
        "meaning": meaning,
        "alike": alike,
        "neighbour": np.maximum(_beside(positions, relevance, -1), 0.7 * _beside(positions, relevance, 1)),
        "replies": _beside(positions, near * asks, -1),
        "kind": np.array([_answers(asked, analysis) for analysis in analyses]),
        "surprisal": _surprisal(bag),
        "number": _saturated([analysis.num_numbers for analysis in analyses]),
        "name": _saturated([analysis.num_names for analysis in analyses]),
        "personal": np.array([_is_personal(c, a) for c, a in zip(chunks, analyses, strict=True)], float),
        "asks": asks,
        "referenced": _referenced(bag, positions),
        "by_user": np.array([chunk.role == "user" for chunk in chunks], float),
        "corrected": np.array([chunk.corrected for chunk in chunks], float),
        "pinned": np.array([chunk.pinned for chunk in chunks], float),
        "sentence": _nearness(chunks),
    }
    return np.stack([columns[name] for name in NAMES], axis=1)


def _meanings(
    candidates: Candidates, asked: Analysis, vectors: WordVectors
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return how near each chunk is to the question, and how near its nearest words are to each word of it."""
    bag, num = candidates.bag, len(candidates.chunks)
    meaning, alike = np.zeros(num), np.zeros(num)
    owners = np.array([at for at, analysis in enumerate(candidates.analyses) for _ in analysis.content], np.int64)
    if not asked.content or not len(owners):
        return meaning, alike
    sentences = [sentence for analysis in candidates.analyses for sentence in analysis.content]
    words = {word: at for at, word in enumerate({word for sentence in sentences for word in sentence})}
    places = np.array([words[word] for sentence in sentences for word in sentence])
    sizes = np.array([len(sentence) for sentence in sentences])
    starts = np.cumsum(sizes) - sizes
    asked_for = list(dict.fromkeys(asked.all_content))
    table, question = vectors.of(list(words)), vectors.of(asked_for)
    rarity = np.array([bag.rarity.get(stem(word), bag.rarest) for word in asked_for])
    share = rarity / rarity.sum()
    wanted = (share @ question) / max(float(np.linalg.norm(share @ question)), 1e-6)
    sums = np.add.reduceat(table[places], starts)
    # The sentences of a chunk follow each other, so each chunk is a range of them, and of their words.
    own, first = np.unique(owners, return_index=True)
    best = np.maximum.reduceat(_cosine(sums, wanted), first)
    whole = _cosine(np.add.reduceat(sums, first), wanted)
    meaning[own] = 0.5 * (np.maximum(best, 0.0) + np.maximum(whole, 0.0))
    nearest = np.maximum.reduceat((table @ question.T)[places], starts[first])
    alike[own] = np.maximum(nearest, 0.0) @ share
    return meaning, alike


def _cosine(rows: NDArray[np.float64], unit: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(rows @ unit / np.maximum(np.linalg.norm(rows, axis=1), 1e-6), np.float64)


def _query(asked: Analysis, before: Analysis) -> dict[str, float]:
    query = dict.fromkeys(before.stems, 0.2)
    query.update(dict.fromkeys(asked.stems, 1.0))
    return query


def _similar(bag: Bag, query: dict[str, float]) -> dict[str, float]:
    """Return other stems among the candidates that are written like those of the query."""
    similar: dict[str, float] = {}
    for term, weight in query.items():
        if len(term) < 4:
            continue
        own = grams(term)
        for other in bag.where:
            if other == term or len(other) < 4:
                continue
            theirs = grams(other)
            shared = len(own & theirs)
            if shared and (share := shared / min(len(own), len(theirs))) > FUZZY_LEAST:
                similar[other] = max(similar.get(other, 0.0), weight * share)
    return similar


def _best_possible(bag: Bag, query: dict[str, float]) -> float:
    return sum(weight * bag.rarity[term] for term, weight in query.items() if term in bag.where)


def _scaled(scores: NDArray[np.float64], best: float) -> NDArray[np.float64]:
    top = scores.max(initial=0.0)
    return scores / max(top, 0.5 * best) if top > 0 else scores


def _beside(positions: NDArray[np.float64], scores: NDArray[np.float64], step: int) -> NDArray[np.float64]:
    """Return the score of the message before (step -1) or after (1) each; of several parts, the best."""
    best: dict[int, float] = {}
    for position, score in zip(positions, scores, strict=True):
        best[int(position)] = max(best.get(int(position), 0.0), float(score))
    return np.array([best.get(int(position) + step, 0.0) for position in positions])


def _answers(asked: Analysis, analysis: Analysis) -> float:
    """Tell whether a text has what a question of this kind asks for: a time, a number, a name, a place."""
    wanted = [
        (ASKED_FOR_TIME, analysis.num_numbers > 0),
        (ASKED_FOR_NUMBER, analysis.num_numbers > 0),
        (ASKED_FOR_NAME, analysis.num_names > 0),
        (ASKED_FOR_PLACE, bool(analysis.words & AT_A_PLACE)),
    ]
    return float(any(has and asked.words & words for words, has in wanted))


def _surprisal(bag: Bag) -> NDArray[np.float64]:
    """How much a chunk says that the others do not: the rarity of its words in all, saturating."""
    total = np.array([sum(map(bag.rarity.__getitem__, tally)) for tally in bag.tallies])
    return total / (total + 20.0)


def _nearness(chunks: Sequence[Chunk]) -> NDArray[np.float64]:
    """How near chunks are by the encoder; what it has not read yet is as near as the others are in the mean."""
    known = np.array([np.nan if chunk.nearness is None else max(chunk.nearness, 0.0) for chunk in chunks], float)
    missing = np.isnan(known)
    if not missing.all():
        known[missing] = known[~missing].mean()
    return np.asarray(np.nan_to_num(known), np.float64)


def _saturated(counts: Sequence[int]) -> NDArray[np.float64]:
    found = np.array(counts, float)
    return found / (found + 1.0)


def _is_personal(chunk: Chunk, analysis: Analysis) -> bool:
    return chunk.role == "user" and bool(analysis.words & FIRST_PERSON) and "?" not in chunk.text


def _referenced(bag: Bag, positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much later chunks come back to the rare words of one."""
    found = np.zeros(len(bag.tallies))
    for term, places in bag.where.items():
        if 1 < len(places) <= 4:
            first = min(places, key=lambda at: positions[at])
            if positions[places].max() - positions[first] > 2:
                found[first] += bag.rarity[term]
    return found / (found + 10.0)
