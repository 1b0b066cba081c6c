"""What is sent back: chat completions, whole and in chunks."""

from __future__ import annotations

import json
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
            "message": _message(turn),
            "logprobs": {"content": turn.take_logprobs(), "refusal": None} if turn.body.logprobs else None,
            "finish_reason": turn.recording.finish_reason,
            "episode_id": turn.recording.episode_id,
            **({"steps": turn.recording.steps} if turn.tools.last_step else {}),
        }
        for turn in turns
    ]
    return {**_identity(turns[0], "chat.completion"), "choices": choices, "usage": usage(turns)}


def usage(turns: Sequence[Turn]) -> dict[str, Any]:
    """Return OpenAI's usage object; the prompt, which all choices share, counts once."""
    num_prompt = sum(turn.num_tokens[0] for turn in turns)
    num_prompt -= sum(turn.recording.num_prompt_tokens for turn in turns[1:])
    num_answer = sum(turn.num_tokens[1] for turn in turns)
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


def _message(turn: Turn) -> dict[str, Any]:
    said = {"role": "assistant", "content": turn.recording.answer, "refusal": None}
    calls = handed_over(turn)
    return {**said, "content": turn.recording.answer or None, "tool_calls": calls} if calls else said


def handed_over(turn: Turn) -> list[dict[str, Any]]:
    """Return the calls that the client is to make or to have allowed, as OpenAI's; ``everloop`` says which."""
    return [
        {
            "index": index,
            "id": call["id"],
            "type": "function",
            "function": {"name": call["tool"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
            "everloop": {"source": call["source"], "status": call["status"]},
        }
        for index, call in enumerate(turn.tools.handed_over)
    ]


def step_chunk(first: Turn, turn: Turn, step: dict[str, Any]) -> dict[str, Any]:
    """Return a chunk of ours: what has become of a step's calls so far."""
    return {**_identity(first, "chat.completion.chunk"), "choices": [], "step": step, **_episode(first, turn)}


def _identity(first: Turn, kind: str) -> dict[str, Any]:
    recording = first.recording
    return {"id": recording.episode_id, "object": kind, "created": first.created, "model": recording.release}


def _episode(first: Turn, turn: Turn) -> dict[str, Any]:
    """Name the episode of a choice that is not the one that the response is named by."""
    return {} if turn is first else {"episode_id": turn.recording.episode_id}
