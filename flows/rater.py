"""The built-in rater: a simulated person with a preference that the platform never sees.

It reads one JSON line per answer and writes one: ``{"thumb": -1|0|1, "correction": null|"..."}``. It likes
answers of at most 30 words that end as a sentence. A tenth of its votes are wrong, and one in five of its
down-votes comes with a correction. With ``EVERLOOP_MEASURING=1`` in its environment it votes without error.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from typing import Any

MAX_WORDS = 30
WRONG_VOTES = 0.1
CORRECTED_DOWN_VOTES = 0.2


def likes(answer: str) -> bool:
    """Tell whether the person likes an answer."""
    return len(answer.split()) <= MAX_WORDS and answer.rstrip().endswith((".", "!", "?"))


def as_it_should_be(answer: str) -> str:
    """Return the answer as the person would have had it: its first sentences, at most 30 words."""
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(answer.split())):
        if len(kept) + len(sentence.split()) > MAX_WORDS:
            break
        kept += sentence.split()
    if not kept:
        kept = answer.split()[: MAX_WORDS - 5]
    return " ".join(kept).rstrip(" ,;:-") + ("" if kept[-1:] and kept[-1][-1] in ".!?" else ".")


def rate(request: dict[str, Any], seed: str, measuring: bool) -> dict[str, Any]:
    """Judge one answer; the same answer under the same seed gets the same judgement."""
    good = likes(request["answer"])
    chance = random.Random(f"{seed}:{request['episode_id']}")
    if not measuring and chance.random() < WRONG_VOTES:
        good = not good
    correction = None
    if not good and not measuring and request["answer"].strip() and chance.random() < CORRECTED_DOWN_VOTES:
        correction = as_it_should_be(request["answer"])
    return {"thumb": 1 if good else -1, "correction": correction}


def main() -> None:
    """Rate lines from standard input until it ends."""
    seed = os.environ.get("EVERLOOP_RATER_SEED", "0")
    measuring = os.environ.get("EVERLOOP_MEASURING") == "1"
    for line in sys.stdin:
        print(json.dumps(rate(json.loads(line), seed, measuring)), flush=True)


if __name__ == "__main__":
    main()
