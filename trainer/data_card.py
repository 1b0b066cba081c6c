"""The card of a dataset: what is in it and what is not, in numbers. It quotes nobody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reward.style import num_words

if TYPE_CHECKING:
    from trainer.snapshot import Example, Snapshot

# What each reason means, for the page; kinds of personal data are named redacted_KIND.
REASONS = {
    "answer_empty": "signals on answers without a word",
    "answer_waits": "signals on answers that stopped for a tool",
    "answer_failed": "signals on answers that failed",
    "answer_interrupted": "signals on answers that were broken off",
    "conversation_held_out": "signals in conversations kept for gates (one in five)",
    "conversation_trains": "signals of held-out users in conversations that train: they neither train nor judge",
    "kind_not_trained": "signals of kinds that teach the reward model only",
    "no_consent": "signals on answers whose users do not consent",
    "over_user_cap": "signals beyond what one user may be of the whole",
    "rater_banned": "signals of users whom an operator has banned",
    "rater_quarantined": "signals of users in a burst that nobody has looked at",
    "rater_set_aside": "signals of users who are wrong on gold probes",
    "superseded_or_withdrawn": "signals that their users replaced or took back",
    "user_held_out": "signals of users kept for gates (one in ten, but for the first twenty)",
}


def card_of(snapshot: Snapshot) -> dict[str, Any]:
    """Return the card as plain data; the same for the same snapshot."""
    return {
        "digest": snapshot.digest,
        "last_signal_seq": snapshot.last_signal_seq,
        "users": snapshot.num_users,
        "train": _counts(snapshot.train),
        "gate": _counts(snapshot.gate),
        "well_rated_words": list(snapshot.well_rated_words()),
        "set_aside": snapshot.set_aside,
    }


def _counts(examples: Sequence[Example]) -> dict[str, int]:
    words = sorted(num_words(example.answer) for example in examples)
    return {
        "answers": len(examples),
        "conversations": len({example.conversation for example in examples}),
        "signals": sum(len(example.feedback_ids) for example in examples),
        "liked": sum(example.balance > 0 for example in examples),
        "disliked": sum(example.balance < 0 for example in examples),
        "corrections": sum(len(example.corrections) for example in examples),
        "preferences": sum(len(example.preferred_over) for example in examples),
        "median_words": words[len(words) // 2] if words else 0,
    }


def page_of(card: dict[str, Any]) -> str:
    """Return the card as Markdown."""
    low, high = card["well_rated_words"]
    lines = [
        f"# Dataset {card['digest'][:12]}",
        "",
        f"Answers of {card['users']} consenting users and what they said of them, up to signal "
        f"{card['last_signal_seq']}. Personal data is redacted. Well-rated answers have {low} to {high} words.",
        "",
        "| | trains | judges |",
        "|---|---|---|",
        *(f"| {name.replace('_', ' ')} | {card['train'][name]} | {card['gate'][name]} |" for name in card["train"]),
        "",
        "## Not in it",
        "",
        *(f"- {count} {_sentence(reason)}" for reason, count in card["set_aside"].items()),
    ]
    return "\n".join(lines) + "\n"


def _sentence(reason: str) -> str:
    if reason.startswith("redacted_"):
        return f"times {reason.removeprefix('redacted_').replace('_', ' ')}, replaced in the texts"
    return REASONS.get(reason, reason.replace("_", " "))
