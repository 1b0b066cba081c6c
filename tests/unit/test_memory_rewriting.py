"""What the model writes again is held against what was said; what does not hold is not used."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agent.memory.context import build
from agent.memory.counting import Counter
from agent.memory.importance import BY_WORDS_ALONE, Chunk
from agent.memory.rewriting import invented, rewritten
from infra.errors import UnavailableError

RAW = "On Tuesday my sister Marlene moved to Lisbon, and she does not eat fish any more since the summer of 2019."


@pytest.mark.parametrize(
    ("version", "found"),
    [
        ("Sister Marlene moved to Lisbon, does not eat fish.", []),
        ("Marlene moved to Porto, not fish.", ["porto"]),
        ("Marlene moved in 2020, not fish.", ["2020"]),
        ("Marlene does eat fish.", ["not"]),
    ],
)
def test_what_was_invented_or_turned_round_is_found(version: str, found: list[str]) -> None:
    assert invented(version, RAW) == found


@pytest.mark.parametrize(
    ("answer", "is_used"),
    [("Marlene moved to Lisbon, not fish.", True), ("Marlene moved to Porto, not fish.", False), (None, False)],
)
def test_only_what_holds_is_used_and_the_budget_stays(
    base_model_dir: Path, answer: str | None, is_used: bool
) -> None:
    counter = Counter(base_model_dir)
    talk = [Chunk("user", f"Number {at} of our long talk about trains.", str(at), at) for at in range(1, 40)]
    chunks = [Chunk("user", f"{RAW} " * 4, "0", 0), *talk]
    context = build(chunks, "Where does my sister Marlene live?", 130, BY_WORDS_ALONE, counter)
    assert "0" in {kept.chunk.turn for kept in context.kept}

    async def ask(messages: list[dict[str, str]], max_tokens: int) -> str:
        assert RAW in messages[0]["content"]
        if answer is None:
            raise UnavailableError("no engine")
        return answer

    made = asyncio.run(rewritten(context, ask, counter))
    text = "\n".join(message["content"] for message in made.messages)
    assert (answer is not None and answer in text) is is_used
    assert counter.prompt(made.messages) == made.used <= 130
    assert any(chunk.get("by_model") for chunk in made.record()["chunks"]) is is_used
