"""Who asks. This version has no accounts: the name in a header is believed, as the ``user`` field of a chat is."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import unquote

from fastapi import Depends, Header
from pydantic import TypeAdapter, ValidationError

from feedback.users import refuse_tombstone
from infra.errors import InvalidRequestError
from infra.text import CleanText

ANONYMOUS = "anonymous"
MAX_CHARS = 128
_text: TypeAdapter[str] = TypeAdapter(CleanText)


UserHeader = Annotated[
    str | None,
    Header(description="Who asks: the `user` of the chat requests, percent-encoded; `anonymous` if unset."),
]


def current_user(x_everloop_user: UserHeader = None) -> str:
    """Return the name of the user who asks.

    Raises
    ------
    InvalidRequestError
        Code ``invalid_user`` for a name that no user can have, ``user_reserved`` for that of a tombstone.
    """
    return ANONYMOUS if x_everloop_user is None else _name(x_everloop_user)


def named_user(x_everloop_user: UserHeader = None) -> str:
    """Return the name of the user who asks for what concerns all that they ever said; they must give it.

    Raises
    ------
    InvalidRequestError
        Code ``user_required`` where no name is given: ``anonymous`` is many people.
    """
    if x_everloop_user is None:
        raise InvalidRequestError(
            "Say who you are in the header X-Everloop-User; what everybody said without a name belongs to nobody.",
            code="user_required",
            param="X-Everloop-User",
        )
    return _name(x_everloop_user)


def _name(x_everloop_user: str) -> str:
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
