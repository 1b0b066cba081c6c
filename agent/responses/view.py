"""Responses as OpenAI's API shows them, made of an episode: one that is being written, or one that is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from feedback import items

STATUS = {"complete": "completed", "failed": "failed", "interrupted": "cancelled"}


class Answered(Protocol):
    """What episodes have in common, growing or kept (:class:`feedback.tables.Episode`)."""

    release: str
    messages: list[dict[str, Any]]
    answer: str
    status: str
    finish_reason: str | None
    sampling: dict[str, Any]
    token_ids: list[int]
    num_prompt_tokens: int
    request: dict[str, Any] | None
    conversation_id: str | None
    parent_id: str | None


def response(episode_id: str, created_at_s: int, row: Answered, **changes: Any) -> dict[str, Any]:
    """Return a ``response``; `changes` are fields that differ from what the episode says."""
    request = row.request or {}
    status = status_of(row)
    return {
        "id": episode_id,
        "object": "response",
        "created_at": created_at_s,
        "status": status,
        "background": False,
        "error": error("server_error", "The answer broke off.") if status == "failed" else None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": row.messages[0]["content"] if request.get("instructions") else None,
        "max_output_tokens": row.sampling.get("max_tokens"),
        "model": row.release,
        "output": [message(episode_id, row.answer, status)] if row.answer else [],
        "parallel_tool_calls": True,
        "previous_response_id": row.parent_id,
        "conversation": {"id": row.conversation_id} if row.conversation_id else None,
        "reasoning": None,
        "service_tier": "default",
        "store": not request.get("unstored", False),
        "temperature": row.sampling.get("temperature"),
        "text": {"format": text_format(request.get("response_format"))},
        "tool_choice": "auto",
        "tools": [],
        "top_p": row.sampling.get("top_p"),
        "truncation": "disabled",
        "usage": usage(row.num_prompt_tokens, len(row.token_ids)),
        "metadata": request.get("metadata") or {},
        **changes,
    }


def status_of(row: Answered) -> str:
    """Return how a response ended: ``completed``, ``incomplete`` where it was cut, ``cancelled`` or ``failed``."""
    if row.finish_reason == "length":
        return "incomplete"
    return STATUS[row.status]


def message(
    episode_id: str, text: str, status: str, logprobs: Sequence[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Return the message that a response says; nothing of it yet where `text` is empty."""
    shown = status if status in ("in_progress", "completed") else "incomplete"
    return {
        "id": items.item_id(episode_id, items.ANSWER),
        "type": "message",
        "role": "assistant",
        "status": shown,
        "content": [part(text, logprobs)] if text else [],
    }


def part(text: str, logprobs: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return a part of a message that is text."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs or ())}


def text_format(form: dict[str, Any] | None) -> dict[str, Any]:
    """Return the form that was asked for, as responses tell it."""
    if form is None:
        return {"type": "text"}
    return {"type": form["type"], **form.get("json_schema", {})}


def usage(num_prompt_tokens: int, num_answer_tokens: int) -> dict[str, Any]:
    """Return what a response took."""
    return {
        "input_tokens": num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": num_answer_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_prompt_tokens + num_answer_tokens,
    }


def error(code: str, message: str) -> dict[str, Any]:
    """Return why a response failed."""
    return {"code": code, "message": message}
