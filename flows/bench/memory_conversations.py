"""Long conversations with facts in them: real chats of people, and planted among them what is asked for later.

The chats are those of the wheel chitchat-dataset. Facts and chats of the two sets differ: weights are chosen on
one, and what is reported of the other was not seen while they were.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from flows.bench.sources import MISSING, wheel_file
from infra.errors import SetupError

FACTS = Path(__file__).parent / "memory_facts.json"
LENGTHS = (60, 120, 240, 400)  # turns
FACTS_EACH = 10
REPLIES = ("Good to know.", "Thanks for telling me!", "Oh, nice.", "I see, noted.", "Sure, got it.", "Alright.")
Set = Literal["tune", "held_out"]


def conversations(which: Set, num: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return conversations in the format of ``everloop bench memory --conversations``.

    Some have their facts early, some within longer turns of the chat, the others anywhere in turns of their own.
    """
    rng = random.Random(f"{which} {seed}")
    facts = json.loads(FACTS.read_text())[which]
    chats = _chats(which, rng)
    return [_conversation(number, facts, chats, rng) for number in range(num)]


def _chats(which: Set, rng: random.Random) -> Iterator[list[str]]:
    path = wheel_file("chitchat_dataset", "dataset.json")
    if path is None:
        raise SetupError(MISSING.format("chitchat-dataset"), code="wheel_missing")
    rows = sorted(json.loads(path.read_text()).items())
    texts = [
        [" ".join(message["text"] for message in turn).strip() for turn in row["messages"] if turn]
        for number, (_, row) in enumerate(rows)
        if (number % 2 == 0) == (which == "tune")
    ]
    texts = [turns for turns in texts if len(turns) >= 6]
    rng.shuffle(texts)
    return iter(texts)


def _conversation(
    number: int, facts: list[dict[str, Any]], chats: Iterator[list[str]], rng: random.Random
) -> dict[str, Any]:
    length = LENGTHS[number % len(LENGTHS)]
    style = ("anywhere", "early", "inside", "anywhere")[(number // len(LENGTHS)) % 4]
    turns: list[dict[str, str]] = []
    while len(turns) < length:
        for text in next(chats):
            turns.append({"role": ("user", "assistant")[len(turns) % 2], "text": text or "..."})
    planted = rng.sample(facts, FACTS_EACH)
    questions = []
    for fact in planted:
        evidence = [_plant(turns, said, fact.get("before"), style, rng) for said in fact["said"]]
        questions += [{"question": q, "evidence": evidence, "answer": fact["answer"]} for q in fact["questions"]]
    for at, turn in enumerate(turns):
        turn["id"] = f"t{at}"
    for question in questions:
        question["evidence"] = [turn["id"] for turn in question["evidence"]]
    return {"id": f"c{number}", "style": style, "turns": turns, "questions": questions}


def _plant(
    turns: list[dict[str, str]], said: dict[str, str], before: dict[str, str] | None, style: str, rng: random.Random
) -> dict[str, str]:
    end = len(turns) - 6
    limit = max(end // 5, 4) if style == "early" else end
    if style == "inside" and before is None:
        own = [turn for turn in turns[:limit] if turn["role"] == said["role"] and "planted" not in turn]
        if own:
            turn = rng.choice(own)
            first, second = rng.choice([(turn["text"], said["text"]), (said["text"], turn["text"])])
            turn["text"], turn["planted"] = f"{first} {second}", "yes"
            return turn
    turn = {"role": said["role"], "text": said["text"], "planted": "yes"}
    reply = {"role": "assistant" if said["role"] == "user" else "user", "text": rng.choice(REPLIES)}
    pair = [before, turn] if before else [turn, reply]
    # An even place keeps the roles in turn; whoever speaks first of the two decides about it.
    at = rng.randrange(max(limit // 2, 1)) * 2 + (pair[0]["role"] == "assistant")
    turns[at:at] = [dict(each, planted="yes") if each is before else each for each in pair]
    return turn
