"""Errors that help: each has a stable code, says what was wrong, and what to do.

Under ``/v1`` an :class:`EverloopError` becomes OpenAI's error envelope; on the command line it
becomes one sentence and exit status 1.
"""

from __future__ import annotations

from typing import Any


class EverloopError(Exception):
    """Base of all errors that a user or an operator can meet.

    Parameters
    ----------
    message
        What was wrong and what to do, in one or two sentences.
    code
        Stable identifier; clients may branch on it.
    param
        The request field at fault, if one is.
    """

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param

    def envelope(self) -> dict[str, Any]:
        """Return OpenAI's error envelope."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequestError(EverloopError, ValueError):
    """The request cannot be served as it stands; sending it again will not help."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class NotFoundError(EverloopError, LookupError):
    """The thing that the request names does not exist."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ConflictError(EverloopError):
    """The request contradicts what is already there."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class UnauthorizedError(EverloopError):
    """It is not known who asks."""

    status = 401
    type = "authentication_error"
    code = "not_signed_in"


class ForbiddenError(EverloopError):
    """Whoever asks may not do this."""

    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class TimedOutError(EverloopError):
    """The client took too long."""

    status = 408
    type = "invalid_request_error"
    code = "request_timed_out"


class TooLargeError(EverloopError, ValueError):
    """The request is larger than the configured limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class TooManyError(EverloopError):
    """Somebody asks for more than they may; later they may again."""

    status = 429
    type = "rate_limit_error"
    code = "too_many_requests"

    def __init__(self, message: str, *, retry_after_s: int, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class UnavailableError(EverloopError):
    """A part that is needed is away; trying again later will help."""

    status = 503
    type = "server_error"
    code = "unavailable"
    retry_after_s = 5


class SetupError(EverloopError):
    """The machine or the settings lack something; the message says what to do."""

    code = "setup"


class IntegrityError(EverloopError):
    """Something is not what its digest or its probe says it should be."""

    status = 409
    type = "invalid_request_error"
    code = "integrity"
