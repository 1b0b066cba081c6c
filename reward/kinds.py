"""What a kind of signal is worth: learned from how well it agrees with what people said in so many words.

Thumbs, ratings and preferences are explicit and weigh 1. Every other kind starts from a guess, worth
:data:`GUESS_STRENGTH` signals, and follows how often it pointed the same way as an explicit signal about the same
answer: agreement in half of the cases is no information, and weighs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from feedback.fold import Standing

GUESS_STRENGTH = 20.0
EXPLICIT = frozenset({"thumb", "rating", "preference"})
# A correction says how the answer should have been, not how bad this one was: less than a vote each way.
GUESSES: Mapping[str, float] = {
    "correction": 0.5,
    "reasons": 0.5,
    "verifier": 0.7,
    "judge": 0.4,
    "copied": 0.3,
    "regenerated": 0.2,
    "edited_and_resent": 0.2,
    "abandoned": 0.1,
    "contradicted": 0.4,
}
# Whoever writes an answer anew prefers the new one, however they voted on the old.
LEAST: Mapping[str, float] = {"correction": 0.2}
GOOD_REASONS = frozenset({"well_explained", "exactly_right"})
BEST_RATING = 5


def key_of(signal: Standing) -> str:
    """Return the key under which a signal's weight is learned: its kind, or which implicit act it was."""
    return signal.name or signal.kind if signal.kind == "implicit" else signal.kind


def verdict_of(signal: Standing) -> float | None:
    """Return what a signal says of its answer, 0 bad to 1 good; None where it says neither.

    A preference speaks of two answers; about the first it says "good".
    """
    if signal.kind in ("thumb", "verifier"):
        graded = signal.score if signal.kind == "verifier" else None
        return graded if graded is not None else float(signal.value == 1)
    if signal.kind == "rating":
        return ((signal.value or 1) - 1) / (BEST_RATING - 1)
    if signal.kind == "judge":
        return signal.score
    if signal.kind == "implicit":
        return 1.0 if signal.name == "copied" else 0.0
    if signal.kind == "reasons":
        good = sum(reason in GOOD_REASONS for reason in signal.reasons or ())
        bad = len(signal.reasons or ()) - good
        return None if good == bad else float(good > bad)
    if signal.kind == "preference":
        return 1.0
    return 0.0 if signal.kind == "correction" else None


@dataclass(slots=True)
class Agreement:
    """How often a kind agreed with explicit signals; the guess included."""

    agreed: float
    disagreed: float

    @property
    def weight(self) -> float:
        """What a signal of the kind is worth, 0 to 1."""
        return max(0.0, (self.agreed - self.disagreed) / (self.agreed + self.disagreed))


def _guesses() -> dict[str, Agreement]:
    half = GUESS_STRENGTH / 2.0
    return {key: Agreement(half * (1.0 + guess), half * (1.0 - guess)) for key, guess in GUESSES.items()}


@dataclass(slots=True)
class Kinds:
    """The weights of all kinds."""

    agreements: dict[str, Agreement] = field(default_factory=_guesses)

    def weight(self, key: str) -> float:
        """Return the weight of a kind or act."""
        return 1.0 if key in EXPLICIT else max(self.agreements[key].weight, LEAST.get(key, 0.0))

    def compare(self, signal: Standing, others: list[Standing]) -> None:
        """Learn from the other signals about the same answer, where one of two is explicit."""
        mine = verdict_of(signal)
        if mine is None or mine == 0.5:
            return
        for other in others:
            theirs = verdict_of(other)
            if theirs is None or theirs == 0.5 or (key_of(signal) in EXPLICIT) == (key_of(other) in EXPLICIT):
                continue
            agreement = self.agreements[key_of(other) if key_of(signal) in EXPLICIT else key_of(signal)]
            if (mine > 0.5) == (theirs > 0.5):
                agreement.agreed += 1.0
            else:
                agreement.disagreed += 1.0

    def report(self) -> dict[str, dict[str, float]]:
        """Return the weight of each kind, and how many comparisons it rests on."""
        return {
            key: {
                "weight": self.weight(key),
                "guess": GUESSES[key],
                "compared": a.agreed + a.disagreed - GUESS_STRENGTH,
            }
            for key, a in sorted(self.agreements.items())
        }
