"""What is sent back: chat completions, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent.best_of import step_of
from agent.turn import Turn

Logprobs = list[dict[str, Any]]


def chunk(first: Turn, turn: Turn, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    """Return one ``chat.completion.chunk`` of a choice; `first` is the turn that the response is named by."""
    told = turn.take_logprobs()
    choice = {
        "index": turn.index,
        "delta": delta,
        "logprobs": {"content": told, "refusal": None} if told else None,
        "finish_reason": finish_reason,
    }
    return {**_identity(first, "chat.completion.chunk"), "choices": [{**choice, **_episode(first, turn)}]}


def last_chunk(turns: Sequence[Turn]) -> dict[str, Any]:
    """Return the chunk with what all choices took together."""
    return {**_identity(turns[0], "chat.completion.chunk"), "choices": [], "usage": usage(turns)}


def completion(turns: Sequence[Turn]) -> dict[str, Any]:
    """Return a whole ``chat.completion``."""
    choices = [
        {
            "index": turn.index,
            "message": {"role": "assistant", "content": turn.recording.answer, "refusal": None},
            "logprobs": {"content": turn.take_logprobs(), "refusal": None} if turn.body.logprobs else None,
            "finish_reason": turn.recording.finish_reason,
            "episode_id": turn.recording.episode_id,
        }
        for turn in turns
    ]
    return {**_identity(turns[0], "chat.completion"), "choices": choices, "usage": usage(turns)}


def usage(turns: Sequence[Turn]) -> dict[str, Any]:
    """Return OpenAI's usage object; the prompt, which all choices share, counts once."""
    num_prompt = turns[0].recording.num_prompt_tokens
    num_answer = sum(len(turn.recording.token_ids) for turn in turns)
    chosen = step_of(turns[0].recording.steps)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
        **({"best_of": shown(chosen)} if chosen else {}),
    }


def shown(step: dict[str, Any]) -> dict[str, Any]:
    """Return what choosing among several answers took, as usage tells it."""
    return {name: step[name] for name in ("n", "num_candidates", "chosen", "extra_tokens", "ms", "outcome")}


def _identity(first: Turn, kind: str) -> dict[str, Any]:
    recording = first.recording
    return {"id": recording.episode_id, "object": kind, "created": first.created, "model": recording.release}


def _episode(first: Turn, turn: Turn) -> dict[str, Any]:
    """Name the episode of a choice that is not the one that the response is named by."""
    return {} if turn is first else {"episode_id": turn.recording.episode_id}
