"""Runs the calls of one step: checked, each in its time, together; whatever happens is told in their entries."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from prometheus_client import Counter, Histogram

from agent.tools.protocol import Call
from agent.tools.results import cleaned
from agent.tools.tool import Caller, ToolError
from agent.tools.toolbox import Offer
from infra.ids import new_id
from infra.settings import Settings

log = logging.getLogger("everloop.tools")

MAX_ARGUMENTS_CHARS = 16_384
MAX_ERROR_BYTES = 2000
UNKNOWN = "unknown"
CALLS = Counter(
    "everloop_tool_calls", "Calls of tools, by built-in tool or MCP server, and outcome.", ["tool", "outcome"]
)
DURATION = Histogram(
    "everloop_tool_call_seconds",
    "How long calls of tools took that were made.",
    ["tool"],
    buckets=(0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 60),
)

Entry = dict[str, Any]


def entry(call: Call, offer: Offer | None, source: str | None = None) -> Entry:
    """Return what an episode says of a call before anything has come of it."""
    return {
        "id": new_id("call"),
        "tool": call.tool.replace("\x00", "").encode("utf-8", "replace").decode(),
        "source": source or (offer.tool.source if offer else UNKNOWN),
        "arguments": _arguments(call),
        "level": offer.level if offer else None,
        "status": "waiting",
        "result": None,
        "error": None,
        "started_at": None,
        "ms": None,
    }


def _arguments(call: Call) -> Any:
    """Return the arguments as JSON, or (where they are none) as the text that the model wrote."""
    text = call.arguments.replace("\x00", "").encode("utf-8", "replace").decode()
    if call.is_broken or len(text) > MAX_ARGUMENTS_CHARS:
        return text[:MAX_ARGUMENTS_CHARS]
    try:
        arguments = json.loads(text or "{}")
        # Escapes may bring back what was taken out: half a surrogate pair, or a NUL.
        written = json.dumps(arguments, ensure_ascii=False).encode("utf-8", "replace").decode()
        return json.loads(written.replace("\\u0000", ""))
    except (ValueError, RecursionError):
        return text


def check(call: Entry, offers: Mapping[str, Offer]) -> bool:
    """Tell whether a call may be made; where not, its entry says why, as an error that the model can act on."""
    offer = offers.get(call["tool"])
    if offer is None:
        if not call["tool"]:
            return _refuse(call, "invalid", 'Write a call as {"name": "…", "arguments": {…}}, in valid JSON.')
        names = ", ".join(sorted(offers)) or "none"
        return _refuse(call, "unknown", f"There is no tool of this name. Those that you may call: {names}.")
    if complaint := offer.tool.complaint(call["arguments"]):
        return _refuse(call, "invalid", f"The arguments do not fit. {complaint}")
    return True


def _refuse(call: Entry, status: str, message: str) -> bool:
    call["status"], call["error"] = status, message
    return False


async def run(
    calls: Iterable[Entry],
    offers: Mapping[str, Offer],
    caller: Caller,
    settings: Settings,
    count: Callable[[str], int],
) -> None:
    """Make calls, all together; their entries have the results. Whoever cancels this ends them.

    Parameters
    ----------
    count
        Counts the tokens of a text.
    """
    await asyncio.gather(*(_run_one(call, offers[call["tool"]], caller, settings, count) for call in calls))


async def _run_one(
    call: Entry, offer: Offer, caller: Caller, settings: Settings, count: Callable[[str], int]
) -> None:
    began_s = time.perf_counter()
    call["status"], call["started_at"] = "running", datetime.now(UTC).isoformat(timespec="milliseconds")
    try:
        async with asyncio.timeout(settings.tool_timeout_s):
            value = await offer.tool.run(caller, call["arguments"])
        text = cleaned(value, settings.tool_result_max_bytes, settings.tool_result_max_tokens, count)
        call["status"], call["result"] = "ok", text
    except TimeoutError:
        call["status"] = "timed_out"
        call["error"] = f"The tool did not answer within {settings.tool_timeout_s:g} s."
    except ToolError as error:
        # What a tool says of its failure is its words as much as a result is.
        call["status"], call["error"] = (
            "error",
            cleaned(str(error), MAX_ERROR_BYTES, settings.tool_result_max_tokens, count),
        )
    except asyncio.CancelledError:
        call["status"], call["error"] = "interrupted", "Given up before it ended."
        raise
    except Exception as error:
        log.exception("the tool %s failed", call["tool"])
        call["status"], call["error"] = "error", f"The tool failed ({type(error).__name__})."
    finally:
        seconds = time.perf_counter() - began_s
        call["ms"] = round(seconds * 1000.0, 2)
        DURATION.labels(offer.label).observe(seconds)


def count(calls: Iterable[Entry], offers: Mapping[str, Offer]) -> None:
    """Count calls of which something has come."""
    for call in calls:
        offer = offers.get(call["tool"])
        CALLS.labels(offer.label if offer else UNKNOWN, call["status"]).inc()
