"""Accepting signals: each once, many in one transaction.

Signals that arrive while a transaction runs are written together by the next one. So the cost of a commit is shared
under load, and nobody waits when there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import anyio.to_thread
import sqlalchemy as sa
from pydantic import BaseModel, Field
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from feedback import episodes
from feedback.signals import MACHINE_KINDS, BaseSignal
from feedback.tables import Episode, Feedback, User
from infra.db import Sessions, transaction
from infra.errors import ConflictError, EverloopError, InvalidRequestError, UnavailableError
from infra.events import FeedbackGiven
from infra.ids import new_id
from infra.log import outbox
from infra.log.outbox import Entry
from infra.sealing import SubjectKey
from infra.tables import SubjectKeyRow

log = logging.getLogger("everloop.feedback")

MAX_TOGETHER = 1000
MAX_WAITING = 10_000
COLUMNS = ("value", "score", "name", "reasons", "over", "text")


class Accepted(BaseModel):
    """Proof that a signal was accepted; what becomes of it is at ``/v1/feedback/{id}/receipt``."""

    id: str
    episode_id: str
    kind: str
    status: Literal["accepted"] = "accepted"
    repeated: bool = Field(description="True where this is the answer to a retry.")


Outcome = Accepted | EverloopError


def accept(session: Session, signal: BaseSignal) -> Accepted:
    """Accept one signal; see :func:`accept_many`.

    Raises
    ------
    NotFoundError
        Code ``episode_not_found``, for somebody else's episode too.
    InvalidRequestError
        Code ``not_the_same_message``: a preference between answers to different messages.
    ConflictError
        Code ``idempotency_key_reused``: the key was used for a different signal.
    """
    outcome = accept_many(session, [signal])[0]
    if isinstance(outcome, EverloopError):
        raise outcome
    return outcome


def accept_many(session: Session, signals: Sequence[BaseSignal]) -> list[Outcome]:
    """Write signals and their events within the caller's transaction, once per rater and idempotency key.

    Returns
    -------
    list of Accepted or EverloopError
        One per signal; one that cannot be accepted does not hold up the others.
    """
    targets = _targets(session, signals)
    outcomes: list[Outcome | None] = [_refusal(session, signal, targets) for signal in signals]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for signal, outcome in zip(signals, outcomes, strict=True):
        if outcome is None and (key := (signal.user, signal.idempotency_key)) not in rows:
            rows[key] = _row(signal)
    inserted = _insert(session, list(rows.values()))
    _report(session, inserted, rows, targets)
    repeated = _first_ones(session, [key for key in rows if key not in inserted])
    answered: set[tuple[str, str]] = set()
    for index, signal in enumerate(signals):
        if outcomes[index] is None:
            key = (signal.user, signal.idempotency_key)
            first = rows[key] if key in inserted else repeated[key]
            outcomes[index] = _answer(signal, first, fresh=key in inserted and key not in answered)
            answered.add(key)
    return [outcome for outcome in outcomes if outcome is not None]


@dataclass(frozen=True, slots=True)
class Target:
    """An episode that a signal names: whose it is, and what seals what is said of it."""

    owner: str
    key: SubjectKey


def _targets(session: Session, signals: Sequence[BaseSignal]) -> dict[str, Target]:
    """Return the named episodes that exist, of users who are not forgotten and will not be before this commits."""
    named = {s.episode_id for s in signals} | {s.over for s in signals if s.kind == "preference"}  # type: ignore[attr-defined]
    rows = session.execute(
        sa.select(Episode.id, User.user_id, User.key_id, SubjectKeyRow.key)
        .join(User, User.user_id == Episode.user_id)
        .join(SubjectKeyRow, SubjectKeyRow.key_id == User.key_id)
        .where(Episode.id.in_(named), SubjectKeyRow.key.is_not(None))
        .with_for_update(of=User, key_share=True, read=True)
    )
    return {
        episode_id: Target(user_id, SubjectKey(key_id, key))
        for episode_id, user_id, key_id, key in rows
        if key is not None
    }


def _refusal(session: Session, signal: BaseSignal, targets: Mapping[str, Target]) -> EverloopError | None:
    target = targets.get(signal.episode_id)
    # Somebody else's episode is not there for them: 403 would say that it exists.
    if target is None or (target.owner != signal.user and signal.kind not in MACHINE_KINDS):
        return episodes.not_found(signal.episode_id)
    if signal.kind == "preference":
        over = str(signal.over)  # type: ignore[attr-defined]
        if over not in targets or targets[over].owner != target.owner:
            return episodes.not_found(over, param="over")
        asked = sa.select(Episode.messages).where(Episode.id.in_([signal.episode_id, over])).distinct()
        if len(session.scalars(asked).all()) != 1:
            return InvalidRequestError(
                "A preference is between two answers to the same message; these two were asked differently.",
                code="not_the_same_message",
                param="over",
            )
    return None


def _row(signal: BaseSignal) -> dict[str, Any]:
    return {
        "id": new_id("fb"),
        "episode_id": signal.episode_id,
        "user_id": signal.user,
        "kind": signal.kind,
        "slot": signal.slot,
        **{name: getattr(signal, name, None) for name in COLUMNS},
        "given_at": signal.given_at,
        "idempotency_key": signal.idempotency_key,
        "body_digest": signal.digest(),
    }


def _insert(session: Session, rows: list[dict[str, Any]]) -> dict[tuple[str, str], int]:
    """Insert the rows that are new; return their sequence numbers by rater and idempotency key.

    The insert itself is the test: of two retries at once, one waits here and then finds the other's row.
    """
    if not rows:
        return {}
    returned = session.execute(
        insert(Feedback)
        .on_conflict_do_nothing(index_elements=["user_id", "idempotency_key"])
        .returning(Feedback.user_id, Feedback.idempotency_key, Feedback.seq),
        rows,
    )
    return {(user_id, key): seq for user_id, key, seq in returned}


def _report(
    session: Session,
    inserted: Mapping[tuple[str, str], int],
    rows: Mapping[tuple[str, str], dict[str, Any]],
    targets: Mapping[str, Target],
) -> None:
    entries = []
    for key, seq in sorted(inserted.items(), key=lambda item: item[1]):
        row = rows[key]
        event = FeedbackGiven(
            feedback_id=row["id"],
            seq=seq,
            **{name: row[name] for name in ("episode_id", "user_id", "kind", "slot", *COLUMNS)},
        )
        # Sealed for the one whom the answer belongs to: a judge's rationale quotes them.
        subject = targets[row["episode_id"]].key
        entries.append(Entry(event, row["episode_id"], row["id"], subject))
    outbox.append_many(session, entries)


def _first_ones(session: Session, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    if not keys:
        return {}
    rows = session.execute(
        sa.select(
            Feedback.user_id,
            Feedback.idempotency_key,
            Feedback.id,
            Feedback.episode_id,
            Feedback.kind,
            Feedback.body_digest,
        ).where(sa.tuple_(Feedback.user_id, Feedback.idempotency_key).in_(keys))
    ).mappings()
    return {(row["user_id"], row["idempotency_key"]): dict(row) for row in rows}


def _answer(signal: BaseSignal, first: Mapping[str, Any], *, fresh: bool) -> Outcome:
    if first["body_digest"] != signal.digest():
        return ConflictError(
            "This idempotency_key was used for a different signal; use a new key for a new signal.",
            code="idempotency_key_reused",
            param="idempotency_key",
        )
    return Accepted(id=first["id"], episode_id=first["episode_id"], kind=first["kind"], repeated=not fresh)


class Intake:
    """Writes the signals of one API process, as many together as have come."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self._waiting: asyncio.Queue[tuple[Sequence[BaseSignal], asyncio.Future[list[Outcome]]]] = asyncio.Queue()
        self._num_waiting = 0

    @contextlib.asynccontextmanager
    async def running(self) -> Any:
        """Write what comes for the length of the block."""
        writer = asyncio.create_task(self._write_all())
        try:
            yield self
        finally:
            writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writer

    async def give(self, signals: Sequence[BaseSignal]) -> list[Outcome]:
        """Accept signals; when this returns, they are safe in the log.

        Raises
        ------
        UnavailableError
            Code ``database_unavailable``, or ``overloaded`` where too many wait.
        """
        if self._num_waiting >= MAX_WAITING:
            raise UnavailableError(
                "Too many signals are waiting to be written; try again in a few seconds.", code="overloaded"
            )
        self._num_waiting += len(signals)
        done: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((signals, done))
        try:
            return await done
        finally:
            self._num_waiting -= len(signals)

    async def _write_all(self) -> None:
        while True:
            requests = [await self._waiting.get()]
            size = len(requests[0][0])
            while size < MAX_TOGETHER and not self._waiting.empty():
                requests.append(self._waiting.get_nowait())
                size += len(requests[-1][0])
            try:
                outcomes = await anyio.to_thread.run_sync(self._write, [signals for signals, _ in requests])
            except Exception as error:
                for _, done in requests:
                    if not done.done():
                        done.set_exception(error)
                continue
            for (_, done), outcome in zip(requests, outcomes, strict=True):
                if not done.done():  # the client may have gone
                    done.set_result(outcome)

    def _write(self, requests: Sequence[Sequence[BaseSignal]]) -> list[list[Outcome]]:
        try:
            outcomes = iter(self._write_together([signal for signals in requests for signal in signals]))
            return [[next(outcomes) for _ in signals] for signals in requests]
        except UnavailableError:
            raise
        except Exception as error:
            if len(requests) == 1:
                raise
            # One of them cannot be written; the others must not suffer for it.
            log.warning("%d requests together failed (%s); one by one", len(requests), type(error).__name__)
            return [self._write_alone(signals) for signals in requests]

    def _write_alone(self, signals: Sequence[BaseSignal]) -> list[Outcome]:
        try:
            return self._write_together(signals)
        except EverloopError as error:
            return [error] * len(signals)
        except Exception:
            log.exception("a request could not be written")
            return [EverloopError("Something went wrong on our side; it is in the log.")] * len(signals)

    def _write_together(self, signals: Sequence[BaseSignal]) -> list[Outcome]:
        with transaction(self.sessions) as session:
            return accept_many(session, signals)
