"""The words of a text: where its sentences end, which words carry what it says, how they are compared."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import Stemmer

from agent.memory.word_lists import NEGATIONS, NUMBER_WORDS, STOP

_stemmer = Stemmer.Stemmer("english", 0)
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_PIECE = re.compile(r"\S+")
_SENTENCE_END = re.compile(r"[.!?…。！？]+[\"'”’)\]]*(?=\s|$)|\n+|(?<=[。！？])")
_EDGES = '.,;:!?…"“”()[]{}*'
KEPT_ANALYSES = 4096
GRAM = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """What stands between two spaces.

    ``stems`` are those of its content words; ``is_name`` is said of a capital where no sentence begins.
    """

    start: int
    end: int
    core: str
    stems: tuple[str, ...]
    is_number: bool
    is_name: bool
    is_negation: bool


@dataclass(frozen=True, slots=True)
class Analysis:
    """A text's pieces, its sentences as ranges of them, all its words, and those that carry each sentence.

    ``carrying`` are the pieces that a writing in a few words is made of, ``different`` their stems.
    """

    pieces: tuple[Piece, ...]
    sentences: tuple[tuple[int, int], ...]
    words: frozenset[str]
    content: tuple[tuple[str, ...], ...]
    num_numbers: int
    num_names: int
    carrying: tuple[int, ...]
    different: frozenset[str]

    @property
    def all_content(self) -> list[str]:
        """The words that carry the text, each once in its sentence."""
        return [word for sentence in self.content for word in sentence]

    @property
    def stems(self) -> list[str]:
        """The stems of the content words, in order."""
        return [each for piece in self.pieces for each in piece.stems]


@lru_cache(maxsize=50_000)
def stem(word: str) -> str:
    """Return a word's stem."""
    return str(_stemmer.stemWord(word))


@lru_cache(maxsize=50_000)
def grams(term: str) -> frozenset[str]:
    """Return the character n-grams of a term; a short one is its own."""
    padded = f"^{term}"
    return frozenset(padded[at : at + GRAM] for at in range(max(len(padded) - GRAM + 1, 1)))


@lru_cache(maxsize=KEPT_ANALYSES)
def analyse(text: str) -> Analysis:
    """Return the analysis of a text."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    pieces: list[Piece] = []
    sentences: list[tuple[int, int]] = []
    words: set[str] = set()
    by_piece: list[list[str]] = []
    begin = at_end = 0
    for match in _PIECE.finditer(text):
        while at_end < len(ends) and ends[at_end] <= match.start():
            if len(pieces) > begin:
                sentences.append((begin, len(pieces)))
                begin = len(pieces)
            at_end += 1
        found = _WORD.findall(match.group())
        low = [word.lower().replace("’", "'") for word in found]
        words.update(low)
        by_piece.append([word for word in low if word not in STOP])
        content = tuple(stem(word.removesuffix("'s")) for word in low if word not in STOP)
        number = any(word in NUMBER_WORDS or any(map(str.isdigit, word)) for word in low)
        negates = any(word in NEGATIONS for word in low)
        name = len(pieces) > begin and bool(content) and any(word[0].isupper() for word in found)
        pieces.append(
            Piece(match.start(), match.end(), match.group().strip(_EDGES), content, number, name, negates)
        )
    if len(pieces) > begin:
        sentences.append((begin, len(pieces)))
    in_sentences = [
        dict.fromkeys(word for each in by_piece[first:end] for word in each) for first, end in sentences
    ]
    carrying = tuple(
        at
        for at, piece in enumerate(pieces)
        if piece.core and (piece.stems or piece.is_number or piece.is_negation)
    )
    return Analysis(
        tuple(pieces),
        tuple(sentences),
        frozenset(words),
        tuple(tuple(each) for each in in_sentences if each),
        sum(piece.is_number for piece in pieces),
        sum(piece.is_name for piece in pieces),
        carrying,
        frozenset(each for at in carrying for each in pieces[at].stems),
    )
