"""What releases may be called: names that mean something else are protected."""

from __future__ import annotations

import re

from infra.engine import RUN_PREFIX
from infra.errors import InvalidRequestError
from infra.settings import ASSISTANT_MODEL, BASE_MODEL_NAME

CHAMPION, CHALLENGER = "champion", "challenger"
ALIASES = (CHAMPION, CHALLENGER)  # names of what the deployment head names now
PROTECTED = frozenset({*ALIASES, BASE_MODEL_NAME, ASSISTANT_MODEL})
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_NUMBERED = re.compile(r"r\d+-.*")


def check_name(name: str) -> None:
    """Check a name that somebody chose for a release.

    Raises
    ------
    InvalidRequestError
        Code ``name_protected`` where it means something else, ``name_invalid`` for what is no name.
    """
    if name.lower() in PROTECTED or name.lower().startswith(RUN_PREFIX) or _NUMBERED.fullmatch(name.lower()):
        raise InvalidRequestError(
            f"{name!r} is protected: aliases, the base model, the assistant, runs and numbered releases are "
            "called so. Choose another name.",
            code="name_protected",
            param="name",
        )
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{name[:80]!r} is no name for a release: use up to 64 of a-z, 0-9, dot, dash and underscore, and "
            "begin with a letter or digit.",
            code="name_invalid",
            param="name",
        )
