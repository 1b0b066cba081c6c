"""What can be trained: data with two sides, rows that leave room for an answer, adapters that can be served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.errors import InvalidRequestError
from infra.settings import Settings
from trainer.config import RunConfig
from trainer.recipe import Messages, Rows, UnusableDataError
from trainer.snapshot import Snapshot


def check_sides(data: Snapshot) -> None:
    """Refuse data in which all answers are liked, or none, and nobody says how they should be.

    A reward that saw one side only has nothing to tell answers apart by but how unlike they are to what it saw.

    Raises
    ------
    UnusableDataError
        Codes ``no_data`` and ``one_sided_data``.
    """
    if not data.train:
        raise UnusableDataError("Nothing may be learned from yet; the counts say why.", code="no_data")
    if any(example.corrections or example.preferred_over for example in data.train):
        return
    sides = {example.balance > 0 for example in data.train if example.balance}
    if len(sides) < 2:
        side = "liked" if sides == {True} else "disliked" if sides else "neither liked nor disliked"
        raise UnusableDataError(
            f"All {len(data.train)} answers are {side}: nothing says what the opposite is.", code="one_sided_data"
        )


def check_shape(config: RunConfig, settings: Settings, goes_on_from: Mapping[str, Any] | None) -> None:
    """Refuse an adapter that could not be served, or would not have the shape that the configuration says.

    Parameters
    ----------
    goes_on_from
        The configuration of the run that made the adapter which this one goes on from, if there is one.

    Raises
    ------
    InvalidRequestError
        Code ``adapter_shape``.
    """
    if config.lora_rank > settings.max_lora_rank:
        raise InvalidRequestError(
            f"lora_rank is {config.lora_rank}, and the engine takes adapters of at most {settings.max_lora_rank} "
            "(`max_lora_rank` in everloop.toml).",
            code="adapter_shape",
        )
    for name in ("lora_rank", "lora_alpha"):
        theirs = (goes_on_from or {}).get(name, getattr(config, name))
        if theirs != getattr(config, name):
            raise InvalidRequestError(
                f"The champion's adapter has {name} {theirs}, and the run goes on from it: set it so, or promote "
                "`base` first to begin anew.",
                code="adapter_shape",
            )


def fitting(rows: Rows, settings: Settings, config: RunConfig) -> Rows:
    """Return the rows whose prompts leave room to learn from an answer; the others are counted.

    TRL would leave them out without a word. What a teacher is shown besides its prompt may be as long as a row.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.base_model_dir)
    room = min(config.max_prompt_tokens, settings.max_model_tokens - config.max_answer_tokens)

    def num_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def fits(messages: Messages) -> bool:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return num_tokens(text) <= room

    found = rows.only([n for n, row in enumerate(rows.rows) if fits(row["prompt"])], "prompt_too_long")
    contexts = [num_tokens(row.get("privileged_context", "")) for row in found.rows]
    return found.only(
        [n for n, tokens in enumerate(contexts) if tokens <= config.max_row_tokens], "context_too_long"
    )
