"""The built-in rater: a simulated person with a preference that the platform never sees.

It reads one JSON line per answer and writes one: ``{"thumb": -1|0|1, "correction": null|"..."}``. Which preference
is its one argument, a name of :mod:`flows.preferences` (``short`` if there is none). A tenth of its votes are
wrong, and one in five of its down-votes comes with a correction. With ``EVERLOOP_MEASURING=1`` in its environment
it votes without error.
"""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any

from flows.preferences import PREFERENCES, Preference

DEFAULT_PREFERENCE = "short"
WRONG_VOTES = 0.1
CORRECTED_DOWN_VOTES = 0.2


def rate(preference: Preference, request: dict[str, Any], seed: str, measuring: bool) -> dict[str, Any]:
    """Judge one answer; the same answer under the same seed gets the same judgement."""
    good = preference.likes(request["answer"])
    chance = random.Random(f"{seed}:{request['episode_id']}")
    if not measuring and chance.random() < WRONG_VOTES:
        good = not good
    correction = None
    if not good and not measuring and request["answer"].strip() and chance.random() < CORRECTED_DOWN_VOTES:
        correction = preference.corrected(request["answer"])
    return {"thumb": 1 if good else -1, "correction": correction}


def main() -> None:
    """Rate lines from standard input until it ends."""
    name = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_PREFERENCE
    if name not in PREFERENCES:
        sys.exit(f"There is no preference {name!r}. There are: {', '.join(PREFERENCES)}.")
    seed = os.environ.get("EVERLOOP_RATER_SEED", "0")
    measuring = os.environ.get("EVERLOOP_MEASURING") == "1"
    for line in sys.stdin:
        print(json.dumps(rate(PREFERENCES[name], json.loads(line), seed, measuring)), flush=True)


if __name__ == "__main__":
    main()
