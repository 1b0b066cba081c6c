"""Accepting signals: each once, and each with its event, many in one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from pydantic import BaseModel, Field
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from feedback import episodes
from feedback.signals import MACHINE_KINDS, BaseSignal
from feedback.tables import Episode, Feedback, User
from infra.db import unnest
from infra.errors import ConflictError, EverloopError, InvalidRequestError
from infra.events import FeedbackGiven
from infra.ids import new_id
from infra.log import outbox
from infra.log.outbox import Entry
from infra.sealing import SubjectKey
from infra.tables import SubjectKeyRow

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
    fresh = _write(session, list(rows.values()), targets)
    repeated = _first_ones(session, [key for key, row in rows.items() if row["id"] not in fresh])
    for index, signal in enumerate(signals):
        if outcomes[index] is None:
            row = rows[signal.user, signal.idempotency_key]
            first = row if row["id"] in fresh else repeated[signal.user, signal.idempotency_key]
            outcomes[index] = _answer(signal, first, is_new=row.pop("is_new", row["id"] in fresh))
            row["is_new"] = False  # the same signal again in this batch is a repetition
    return [outcome for outcome in outcomes if outcome is not None]


@dataclass(frozen=True, slots=True)
class Target:
    """An episode that a signal names: whose it is, and what seals what is said of it."""

    owner: str
    key: SubjectKey


def _targets(session: Session, signals: Sequence[BaseSignal]) -> dict[str, Target]:
    """Return the named episodes that exist, of users who are not forgotten and will not be before this commits.

    Of an answer that was deleted the row is left, without words.
    """
    named = {s.episode_id for s in signals} | {s.over for s in signals if s.kind == "preference"}  # type: ignore[attr-defined]
    rows = session.execute(
        sa.select(Episode.id, User.user_id, User.key_id, SubjectKeyRow.key)
        .join(User, User.user_id == Episode.user_id)
        .join(SubjectKeyRow, SubjectKeyRow.key_id == User.key_id)
        .where(Episode.id.in_(named), SubjectKeyRow.key.is_not(None))
        .with_for_update(of=User, key_share=True, read=True)
    )
    found = {
        episode_id: Target(user_id, SubjectKey(key_id, key))
        for episode_id, user_id, key_id, key in rows
        if key is not None
    }
    # Only now: whoever deletes a conversation holds a stronger lock on the user, for which that query has waited.
    deleted = sa.select(Episode.id).where(Episode.id.in_(found), Episode.messages == sa.literal([], JSONB))
    for episode_id in session.scalars(deleted).all():
        del found[episode_id]
    return found


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
        "address_block": signal.address_block,
        "given_at": signal.given_at,
        "idempotency_key": signal.idempotency_key,
        "body_digest": signal.digest(),
        "traceparent": signal.traceparent,  # of the request that brought it: many are written together
    }


def _write(session: Session, rows: list[dict[str, Any]], targets: Mapping[str, Target]) -> set[str]:
    """Write the rows that are new, each with its event, in one statement; return the ids of those.

    The insert itself is the test of a retry: of two at once, one waits here and then finds the other's row.
    """
    if not rows:
        return set()
    session.execute(_LOCK)  # before the numbers are drawn: who reads "up to here" waits for those that are not in
    seqs = session.scalars(_NUMBERS, {"count": len(rows)}).all()
    entries = []
    for row, seq in zip(rows, sorted(seqs), strict=True):
        row["seq"] = seq
        event = FeedbackGiven(feedback_id=row["id"], **{name: row[name] for name in EVENT_FIELDS})
        event.happened_in(row["traceparent"])
        # Sealed for the one whom the answer belongs to: a judge's rationale quotes them.
        entries.append(Entry(event, row["episode_id"], row["id"], targets[row["episode_id"]].key))
    columns = {name: [row[name] for row in rows] for name in COLUMN_TYPES}
    columns["reasons"] = [None if reasons is None else ",".join(reasons) for reasons in columns["reasons"]]
    return set(session.scalars(_WRITE, {**columns, **outbox.columns(entries)}))


_LOCK = sa.text("LOCK TABLE feedback IN ROW EXCLUSIVE MODE")  # what its INSERT takes anyway
_NUMBERS = sa.text("SELECT nextval(pg_get_serial_sequence('feedback', 'seq')) FROM generate_series(1, :count)")
COLUMN_TYPES = {
    "seq": "bigint",
    "id": "text",
    "episode_id": "text",
    "user_id": "text",
    "kind": "text",
    "slot": "text",
    "value": "smallint",
    "score": "float8",
    "name": "text",
    "reasons": "text",
    "over": "text",
    "text": "text",
    "address_block": "text",
    "given_at": "timestamptz",
    "idempotency_key": "text",
    "body_digest": "text",
}
EVENT_FIELDS = ("seq", "episode_id", "user_id", "kind", "slot", "address_block", *COLUMNS)
_NAMES = ", ".join(COLUMN_TYPES)
# In the order of the key: two that write the same signals wait for each other rather than deadlock.
# Arrays of arrays cannot be told apart by unnest, so reasons travel as one text each.
_SELECTED = _NAMES.replace("reasons", "string_to_array(reasons, ',')")
_WRITE = sa.text(
    f"WITH fresh AS (INSERT INTO feedback ({_NAMES}) SELECT {_SELECTED} FROM {unnest(COLUMN_TYPES)} "
    "ORDER BY user_id, idempotency_key "
    "ON CONFLICT (user_id, idempotency_key) DO NOTHING RETURNING id) "
    f"INSERT INTO outbox (event_id, topic, key, value, headers) SELECT event.event_id, topic, key, event.value, "
    f"event.headers FROM {outbox.UNNEST} JOIN fresh ON fresh.id = event.event_id ORDER BY event.place "
    "RETURNING event_id"
)


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


def _answer(signal: BaseSignal, first: Mapping[str, Any], *, is_new: bool) -> Outcome:
    if first["body_digest"] != signal.digest():
        return ConflictError(
            "This idempotency_key was used for a different signal; use a new key for a new signal.",
            code="idempotency_key_reused",
            param="idempotency_key",
        )
    return Accepted(id=first["id"], episode_id=first["episode_id"], kind=first["kind"], repeated=not is_new)
