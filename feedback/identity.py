"""Whom a request is about: whoever asks, or whom a caller names who acts for others."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import unquote

from fastapi import Depends, Header
from pydantic import TypeAdapter, ValidationError

from feedback.users import refuse_tombstone
from infra.access.gate import SignedIn
from infra.access.roles import ANONYMOUS
from infra.errors import InvalidRequestError
from infra.text import CleanText

MAX_CHARS = 128
_text: TypeAdapter[str] = TypeAdapter(CleanText)


UserHeader = Annotated[
    str | None,
    Header(
        description="For callers that act for others: whom this is about, as the `user` of the chat requests, "
        "percent-encoded; `anonymous` if unset. Everybody else speaks for themselves."
    ),
]


def current_user(caller: SignedIn, x_everloop_user: UserHeader = None) -> str:
    """Return the name of the user whom a request is about.

    Raises
    ------
    ForbiddenError
        Code ``not_you`` where somebody else is named.
    InvalidRequestError
        Code ``invalid_user`` for a name that no user can have, ``user_reserved`` for that of a tombstone.
    """
    return caller.speaks_for(named(x_everloop_user)) or ANONYMOUS


def named_user(caller: SignedIn, x_everloop_user: UserHeader = None) -> str:
    """Return the name of the user whom a request is about that concerns all they ever said.

    Raises
    ------
    ForbiddenError
        Code ``not_you`` where somebody else is named.
    InvalidRequestError
        Code ``user_required`` where a caller who acts for others gives no name: ``anonymous`` is many people.
    """
    name = caller.speaks_for(named(x_everloop_user))
    if name is None:
        raise InvalidRequestError(
            "Say who you are in the header X-Everloop-User; what everybody said without a name belongs to nobody.",
            code="user_required",
            param="X-Everloop-User",
        )
    return name


def named(x_everloop_user: str | None) -> str | None:
    """Return the user whom the header names; None where it names none.

    Raises
    ------
    InvalidRequestError
        Codes ``invalid_user`` and ``user_reserved``.
    """
    if x_everloop_user is None:
        return None
    try:
        name = _text.validate_python(unquote(x_everloop_user, errors="strict"))
    except (ValidationError, UnicodeDecodeError):
        name = ""
    if not 0 < len(name) <= MAX_CHARS:
        raise InvalidRequestError(
            f"X-Everloop-User must be 1 to {MAX_CHARS} characters of percent-encoded UTF-8, without NUL.",
            code="invalid_user",
            param="X-Everloop-User",
        )
    refuse_tombstone(name)
    return name


CurrentUser = Annotated[str, Depends(current_user)]
NamedUser = Annotated[str, Depends(named_user)]
