"""The tools that come with the assistant: a calculator, the date and time, and one's own past."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import anyio.to_thread
from simpleeval import SimpleEval

from agent.tools.tool import Caller, Tool, ToolError
from feedback import conversations
from infra.db import transaction

MAX_BITS = 4096  # of a whole number: longer ones are no answer to anybody, and take their time
MAX_EXPRESSION_CHARS = 500
MAX_DIGITS = 400
FOUND_CHARS = 400
MAX_FOUND = 5


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(*values: Any) -> Any:
        if not all(isinstance(value, int | float) for value in values):
            raise ToolError("The calculator knows numbers only.")
        result = function(*values)
        if isinstance(result, int) and result.bit_length() > MAX_BITS:
            raise ToolError(f"The number has more than {MAX_BITS} bits.")
        return result

    return apply


def _power(base: float, exponent: float) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * max(exponent, 0) > MAX_BITS:
        raise ToolError(f"The power has more than {MAX_BITS} bits.")
    return base**exponent


def _factorial(number: float) -> int:
    if number > 400:
        raise ToolError("The factorial is too large.")
    return math.factorial(number)  # type: ignore[arg-type]


def _round(number: float, digits: int = 0) -> float:
    if abs(digits) > MAX_DIGITS:
        raise ToolError(f"Round to at most {MAX_DIGITS} digits.")
    return round(number, digits) if digits else round(number)


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(math, name) for name in ("sqrt", "exp", "sin", "cos", "tan", "asin", "acos", "atan", "log10")},
    **{name: getattr(math, name) for name in ("log", "log2", "floor", "ceil", "degrees", "radians")},
    "factorial": _factorial,
    "abs": abs,
    "round": _round,
    "min": min,
    "max": max,
}
_TEXTS = (ast.JoinedStr, ast.FormattedValue, ast.Subscript, ast.Attribute)
_EVALUATOR = {
    "operators": {node: _bounded(function) for node, function in _OPERATORS.items()},
    "functions": {name: _bounded(function) for name, function in _FUNCTIONS.items()},
    "names": {"pi": math.pi, "e": math.e},
}


async def calculate(_: Caller, arguments: dict[str, Any]) -> str:
    """Return the value of an arithmetic expression."""
    if ";" in arguments["expression"]:
        raise ToolError("One expression at a time.")
    expression = arguments["expression"].replace("^", "**").replace("×", "*").replace("÷", "/").replace("−", "-")
    try:
        evaluator = SimpleEval(**_EVALUATOR)
        for node in _TEXTS:  # a text can be asked to be as long as memory is
            evaluator.nodes.pop(node, None)
        value = evaluator.eval(expression)
    except ToolError:
        raise
    except ZeroDivisionError:
        raise ToolError("Division by zero.") from None
    except RecursionError:
        raise ToolError("The expression is nested too deeply.") from None
    except Exception as error:  # the library has a class for each of a dozen ways to be no arithmetic
        raise ToolError(f"That is no arithmetic that I know: {str(error)[:200]}") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ToolError("That is not a number.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ToolError("The number is too large.")
    return str(value) if isinstance(value, int) else format(value, ".15g")


async def tell_time(_: Caller, arguments: dict[str, Any]) -> dict[str, str]:
    """Return the date and the time in a time zone."""
    name = arguments.get("time_zone", "UTC")
    try:
        zone = ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ToolError(f"There is no time zone {name[:64]!r}; use an IANA name, such as Europe/Berlin.") from None
    now = datetime.now(UTC).astimezone(zone)
    return {"date_time": now.isoformat(timespec="seconds"), "weekday": now.strftime("%A"), "time_zone": name}


async def search_past(caller: Caller, arguments: dict[str, Any]) -> list[dict[str, str]]:
    """Return turns of the caller's own kept conversations that hold all words, the newest first."""

    def search() -> list[dict[str, str]]:
        with transaction(caller.sessions) as session:
            found = conversations.find_turns(session, caller.user, arguments["words"], MAX_FOUND)
        return [
            {
                "date": turn.created_at.date().isoformat(),
                "question": turn.question[:FOUND_CHARS],
                "answer": turn.answer[:FOUND_CHARS],
            }
            for turn in found
        ]

    return await anyio.to_thread.run_sync(search, abandon_on_cancel=True)


def _object(**properties: Any) -> dict[str, Any]:
    """Return the schema of arguments of which the first is needed."""
    return {
        "type": "object",
        "properties": properties,
        "required": [next(iter(properties))],
        "additionalProperties": False,
    }


def tools() -> list[Tool]:
    """Return all that are built in."""
    text = {"type": "string", "minLength": 1}
    zone = {**text, "maxLength": 64, "description": "IANA name, such as Europe/Berlin; UTC if left out."}
    return [
        Tool(
            "calculator",
            "Work out arithmetic: + - * / // % **, brackets, sqrt, log, sin, round, min, max, pi and the like.",
            _object(expression={**text, "maxLength": MAX_EXPRESSION_CHARS, "description": "Such as (3 + 4) * 12."}),
            calculate,
        ),
        Tool(
            "date_time",
            "Tell the present date, weekday and time in a time zone.",
            {**_object(time_zone=zone), "required": []},
            tell_time,
        ),
        Tool(
            "search_past",
            "Search the person's own earlier conversations for words.",
            _object(words={**text, "maxLength": 200, "description": "Words, all of which must occur in a turn."}),
            search_past,
        ),
    ]
