"""Responses as OpenAI's API shows them, made of an episode: one that is being written, or one that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from agent.tools.levels import BUILT_IN
from feedback import items
from feedback.steps import continued, ended_within, spent, with_calls, written

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
    steps: list[dict[str, Any]]


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
        "instructions": _instructions(row),
        "max_output_tokens": row.sampling.get("max_tokens"),
        "model": row.release,
        "output": output(episode_id, row),
        "parallel_tool_calls": not request.get("one_call", False),
        "previous_response_id": continued(row.steps) or row.parent_id,
        "conversation": {"id": row.conversation_id} if row.conversation_id else None,
        "reasoning": None,
        "service_tier": "default",
        "store": not request.get("unstored", False),
        "temperature": row.sampling.get("temperature"),
        "text": {"format": text_format(request.get("response_format"))},
        "tool_choice": request.get("tool_choice", "auto"),
        "tools": request.get("tools", []),
        "top_p": row.sampling.get("top_p"),
        "truncation": request.get("truncation", "disabled"),
        "usage": usage(*_spent(row)),
        "metadata": request.get("metadata") or {},
        **changes,
    }


def status_of(row: Answered) -> str:
    """Return how a response ended: ``completed``, ``incomplete`` where it was cut, ``cancelled`` or ``failed``."""
    if row.finish_reason == "length":
        return "incomplete"
    return STATUS[row.status]


def _instructions(row: Answered) -> str | None:
    said = (row.request or {}).get("instructions")
    if said is True:  # an earlier version kept no more than that there were some
        return str(row.messages[0]["content"])
    return said or None


def _spent(row: Answered) -> tuple[int, int]:
    """Return the tokens that were read and written, in all steps of the answer itself."""
    read, wrote = spent(row.steps)
    if ended_within(row):
        return read, wrote
    return read + row.num_prompt_tokens, wrote + len(row.token_ids)


def output(
    episode_id: str, row: Answered, logprobs: Sequence[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Return what was answered: what the steps said and called, and the answer.

    Of an answer that goes on from another only what is new.
    """
    found = []
    steps = with_calls(row.steps)
    is_within = ended_within(row)
    for number, step in enumerate(steps):
        is_last = number == len(steps) - 1
        if step.get("carried") and not (is_last or not steps[number + 1].get("carried")):
            continue
        if step["text"] and not step.get("carried"):
            told = logprobs if is_last and is_within else None
            found.append(message(episode_id, step["text"], "completed", told, num_steps=number))
        found += calls(step)
    if row.answer and not is_within:
        found.append(message(episode_id, row.answer, status_of(row), logprobs, num_steps=len(steps)))
    return found


def calls(step: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the calls of a step as the items that the official client knows; none of those that were not made.

    What the client is to call is a ``function_call``; what waits for a yes an ``mcp_approval_request``; what the
    server called an ``mcp_call``, whether the tool is built in or an MCP server's.
    """
    shown = [_call(call) for call in step["calls"]]
    return [each for each in shown if each is not None]


def _call(call: Mapping[str, Any]) -> dict[str, Any] | None:
    named = {"name": call["tool"], "arguments": written(call["arguments"])}
    if call["source"] == "client":
        if call["status"] != "handed_over":
            return None
        own = {"id": f"fc_{call['id'].partition('_')[2]}", "call_id": call["id"], "status": "completed"}
        return {"type": "function_call", **own, **named}
    if call["status"] == "skipped":
        return None
    named |= {"id": call["id"], "server_label": "everloop" if call["source"] == BUILT_IN else call["source"]}
    if call["status"] == "pending":
        return {"type": "mcp_approval_request", **named}
    error = call["error"]
    return {
        "type": "mcp_call",
        **named,
        "status": "completed" if error is None else "failed",
        "output": call["result"],
        "error": None if error is None else {"type": "mcp_tool_execution_error", "content": error},
        "approval_request_id": call["id"] if call["level"] == "ask" else None,
    }


def message(
    episode_id: str, text: str, status: str, logprobs: Sequence[dict[str, Any]] | None = None, *, num_steps: int = 0
) -> dict[str, Any]:
    """Return the message that a response says after so many steps; nothing of it yet where `text` is empty."""
    shown = status if status in ("in_progress", "completed") else "incomplete"
    return {
        "id": items.item_id(episode_id, items.answer_part(num_steps)),
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
