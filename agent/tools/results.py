"""What a tool returned, made fit to be read by a model and to be kept: text, bounded, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from agent.tools.tool import ToolError

BYTES_PER_TOKEN = 3  # of the densest texts; an estimate from above for most


def estimated_tokens(text: str) -> int:
    """Return about how many tokens a text is, where nobody has counted."""
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


def cleaned(value: Any, max_bytes: int, max_tokens: int, count: Callable[[str], int] = estimated_tokens) -> str:
    """Return a result as the model sees it; what is cut off is said.

    Raises
    ------
    ToolError
        For what is no text: binary, or nothing that JSON could write.
    """
    if isinstance(value, bytes):
        raise ToolError(f"The tool returned {len(value)} bytes that are no text.")
    if isinstance(value, str):
        whole = value
    else:
        try:
            whole = orjson.dumps(value).decode()
        except (TypeError, ValueError, RecursionError):
            raise ToolError("The tool returned what is no text and no JSON.") from None
    whole_bytes = len(whole) if whole.isascii() else len(whole.encode(errors="replace"))
    text = whole[: max_bytes + 1]  # of fifty megabytes nothing is looked at but the beginning
    if _is_binary(text):
        raise ToolError(f"The tool returned {whole_bytes} bytes that are no text.")
    kept = text.encode(errors="replace")[:max_bytes].decode(errors="ignore")
    while kept and (tokens := count(kept)) > max_tokens:
        kept = kept[: min(len(kept) - 1, len(kept) * max_tokens // tokens)]
    num_bytes = len(kept.encode())
    if num_bytes < whole_bytes:
        kept += f"\n[cut off: the first {num_bytes} of {whole_bytes} bytes]"
    return kept


def _is_binary(text: str) -> bool:
    """Tell whether a text has characters that no text has: NUL, or a good share of control or replacement ones."""
    odd = sum(1 for letter in text if (letter < " " and letter not in "\t\n\r\f\x1b") or letter == "\ufffd")
    return "\x00" in text or odd > max(2, len(text) // 20)
