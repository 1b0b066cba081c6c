"""The lines that ``feedback import`` reads and ``feedback export`` writes.

A line is an answer that was given elsewhere, with what was said of it, or one signal on an answer that is there
already. Reading a line is a function of the line, its number and the file alone, so a second reading of the same
file gives the same ids and keys.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from feedback.signals import CLOCK_SKEW, MACHINE_KINDS, BaseSignal, Name, read_signal
from feedback.steps import seen
from feedback.users import TOMBSTONE
from infra.access.roles import ANONYMOUS
from infra.errors import InvalidRequestError, TooLargeError
from infra.ids import time_of
from infra.text import CleanText

MAX_MESSAGES = 512
MAX_SIGNALS = 1000
MAX_STEPS = 64
RELEASE = "imported"
FIRST_TIME = datetime(1970, 1, 1, tzinfo=UTC)
# Between a live answer's id (its beginning) and its row (its end) lie seconds; more is a mistake.
MAX_ID_DRIFT = timedelta(days=1)
FILLED_IN = ("episode_id", "idempotency_key")

_own_id = re.compile(r"ep_[0-9a-f]{32}\Z")
_MS = timedelta(milliseconds=1)


class Message(BaseModel):
    """One message of what was asked; text only."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: CleanText = Field(min_length=1)


class OutsideEpisode(BaseModel):
    """An answer that was given elsewhere, with what was said of it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    answer: CleanText = Field(min_length=1)
    user: Name = Field(ANONYMOUS, description="Who asked.")
    created_at: AwareDatetime | None = Field(None, description="When; the date of the file, if unset.")
    learn: bool = Field(True, description="Whether it may be learned from; a user's own no goes first.")
    release: Name = Field(RELEASE, description="What answered.")
    id: Name | None = Field(None, description="Its id elsewhere; by it signals of later lines name the answer.")
    steps: list[dict[str, Any]] = Field(
        default_factory=list, max_length=MAX_STEPS, description="Calls of tools before the answer, as exported."
    )
    signals: list[dict[str, Any]] = Field(
        default_factory=list, max_length=MAX_SIGNALS, description="As for /v1/feedback, without what is filled in."
    )

    @model_validator(mode="after")
    def _an_answer_to_somebody(self) -> OutsideEpisode:
        if self.messages[-1].role == "assistant":
            raise ValueError("The last message must be from the user (or the system); the answer is in `answer`.")
        if not self.answer.strip():
            raise ValueError("The answer is blank.")
        try:
            seen([], self.steps)
            waits = any(call["status"] == "pending" for step in self.steps for call in step.get("calls", ()))
        except (KeyError, TypeError, AttributeError):
            raise ValueError("`steps` are not as `feedback export` writes them.") from None
        if waits:
            raise ValueError("A call in `steps` waits; nobody here can allow it.")
        return self


@dataclass(frozen=True, slots=True)
class Line:
    """What one line of a file says, as the database takes it.

    Parameters
    ----------
    episode
        The answer, if it is one.
    episode_id, created_at
        Of the answer.
    signals
        What was said of it; or, without an answer, the one signal.
    """

    number: int
    signals: list[BaseSignal]
    episode: OutsideEpisode | None = None
    episode_id: str = ""
    created_at: datetime = FIRST_TIME


class LineReader:
    """Reads the lines of one file, in their order: later ones may name the answers of earlier ones by their ids.

    Parameters
    ----------
    file_digest
        SHA-256 of the file, from which ids and keys are made.
    file_date
        Stands in for a missing ``created_at``: no later than the file's are the answers in it.
    """

    def __init__(self, file_digest: str, file_date: datetime, max_bytes: int) -> None:
        self.file_digest = file_digest
        self.file_date = file_date
        self.max_bytes = max_bytes
        self._episode_ids: dict[str, str] = {}

    def read(self, number: int, raw: bytes) -> Line:
        """Return what a line says.

        Raises
        ------
        InvalidRequestError
            Codes ``not_json``, ``duplicate_key``, ``invalid_line``, ``in_the_future``, ``user_reserved``.
        TooLargeError
            Code ``line_too_long``.
        """
        if len(raw) > self.max_bytes:
            raise TooLargeError(
                f"The line has more than {self.max_bytes} bytes; shorten it, or raise EVERLOOP_MAX_REQUEST_BYTES.",
                code="line_too_long",
            )
        body = _parse(raw)
        try:
            return self._episode(number, body) if "messages" in body else self._signal(number, body)
        except ValidationError as error:
            raise _invalid(error) from error

    def _episode(self, number: int, body: dict[str, Any]) -> Line:
        episode = OutsideEpisode.model_validate(body)
        if episode.user.startswith(TOMBSTONE):
            raise InvalidRequestError(
                f"Names that begin with {TOMBSTONE!r} are those of forgotten users; use another.",
                code="user_reserved",
            )
        episode_id, created_at = self._identity(number, episode)
        signals = [
            self._said(number, index, said, episode_id, episode.user) for index, said in enumerate(episode.signals)
        ]
        if episode.id is not None and episode.id != episode_id:
            self._episode_ids[episode.id] = episode_id
        return Line(number, signals, episode, episode_id, created_at)

    def _identity(self, number: int, episode: OutsideEpisode) -> tuple[str, datetime]:
        """Return the id that an answer has here, and when it was given."""
        if episode.id is not None and _own_id.match(episode.id):
            created_at = episode.created_at or _time_of(episode.id)
            _check_time(created_at)
            if abs(_time_of(episode.id) - created_at) > MAX_ID_DRIFT:
                raise _line_error("`created_at` and the time within `id` differ by more than a day.")
            return episode.id, created_at
        created_at = episode.created_at or self.file_date
        _check_time(created_at)
        if episode.id in self._episode_ids:
            return self._episode_ids[episode.id], created_at
        if episode.id is None:
            return episode_id_of(created_at, "line", self.file_digest, number), created_at
        return episode_id_of(created_at, "id", episode.user, episode.id), created_at

    def _signal(self, number: int, body: dict[str, Any]) -> Line:
        if "kind" not in body:
            raise _line_error("A line has `messages` and an `answer`, or it is a signal and has a `kind`.")
        if "user" not in body:
            raise _line_error("user: a signal says who gave it.")
        key = {"idempotency_key": self._key(number, 0)}
        return Line(number, [read_signal.validate_python({**key, **body, **self._names(body)})])

    def _said(self, number: int, index: int, said: Mapping[str, Any], episode_id: str, user: str) -> BaseSignal:
        kind = said.get("kind")
        # Programs and models have names of their own: two judges of one answer do not supersede each other.
        by_machine = isinstance(kind, str) and kind in MACHINE_KINDS
        for name in (*FILLED_IN, *(() if by_machine else ("user",))):
            if name in said:
                raise _line_error(f"signals.{index}.{name}: it is filled in; leave it out.")
        filled = {"user": kind if by_machine else user, **said, **self._names(said)}
        filled |= {"episode_id": episode_id, "idempotency_key": self._key(number, index)}
        try:
            return read_signal.validate_python(filled)
        except ValidationError as error:
            raise _invalid(error, f"signals.{index}.") from error

    def _names(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answers that a signal names, under the ids that they have here."""
        return {name: self._known(said[name]) for name in ("episode_id", "over") if name in said}

    def _known(self, name: Any) -> Any:
        return self._episode_ids.get(name, name) if isinstance(name, str) else name

    def _key(self, number: int, index: int) -> str:
        return f"import-{_hash('key', self.file_digest, number, index)[:32]}"


def episode_id_of(created_at: datetime, *source: object) -> str:
    """Return the id of an answer from elsewhere: the same for the same source, and sorted by time as all ids are.

    The form is that of :func:`infra.ids.new_id`, with a hash in place of the random bits.
    """
    noise = int(_hash("episode", *source)[:32], 16)
    unix_ms = (created_at - FIRST_TIME) // _MS
    value = unix_ms << 80 | 0x7 << 76 | (noise >> 62 & 0xFFF) << 64 | 0b10 << 62 | noise & (1 << 62) - 1
    return f"ep_{value:032x}"


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(["everloop.import", *map(str, parts)]).encode()).hexdigest()


def _time_of(episode_id: str) -> datetime:
    try:
        return time_of(episode_id)
    except ValueError:  # beyond the year 9999
        return datetime.max.replace(tzinfo=UTC)


def _check_time(created_at: datetime) -> None:
    if created_at > datetime.now(UTC) + CLOCK_SKEW:
        raise InvalidRequestError("created_at is in the future; check the clock it is from.", code="in_the_future")
    if created_at < FIRST_TIME:
        raise _line_error("created_at lies before 1970.")


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except InvalidRequestError:
        raise
    except RecursionError as error:
        raise InvalidRequestError("The line is nested too deeply.", code="not_json") from error
    except ValueError as error:
        raise InvalidRequestError(f"The line is not JSON in UTF-8: {error}.", code="not_json") from error
    if not isinstance(body, dict):
        raise _line_error("A line is a JSON object.")
    return body


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        # Which of the two was meant, nobody knows.
        raise InvalidRequestError("A JSON object of the line has the same key twice.", code="duplicate_key")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _invalid(error: ValidationError, prefix: str = "") -> InvalidRequestError:
    first = error.errors(include_url=False, include_input=False)[0]
    where = prefix + ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return _line_error(f"{where}: {message}" if where else message)


def _line_error(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, code="invalid_line")
