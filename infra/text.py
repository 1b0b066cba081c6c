"""Text that every part can store: no NUL bytes, no lone surrogates."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator


def _storable(text: str) -> str:
    if "\x00" in text:
        raise ValueError("Text must not contain NUL bytes.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("Text must be valid Unicode (no lone surrogates).") from error
    return text


CleanText = Annotated[str, AfterValidator(_storable)]
