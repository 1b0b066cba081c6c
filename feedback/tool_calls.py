"""Calls that wait for somebody's yes, and how far people let tools go.

What is asked for stands in the episode's steps alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from feedback import users
from feedback.tables import Episode, ToolCall, ToolChoice
from infra.db import among
from infra.errors import ConflictError, NotFoundError
from infra.settings import ToolLevel

if TYPE_CHECKING:
    from feedback.episodes import Recording

Status = Literal["pending", "approved", "denied", "expired"]
STATUSES: tuple[Status, ...] = get_args(Status)
_is_late = sa.and_(ToolCall.status == "pending", ToolCall.expires_at <= sa.func.now())


@dataclass(frozen=True, slots=True)
class Asked:
    """A call, with what somebody is asked to allow."""

    id: str
    episode_id: str
    tool: str
    source: str
    arguments: Any
    status: Status
    created_at: datetime
    expires_at: datetime
    continued_by: str | None


def not_found(call_id: str) -> NotFoundError:
    """Return the error for a call that is not there, or not there for the one who asks."""
    return NotFoundError(
        f"No call {call_id!r} waits, or waited, for you. GET /v1/tool_calls lists those that do.",
        code="tool_call_not_found",
        param="tool_call_id",
    )


def keep(session: Session, recordings: Iterable[Recording]) -> None:
    """Note the calls of new episodes that wait, within the caller's transaction."""
    rows = [
        {
            "id": call["id"],
            "episode_id": recording.episode_id,
            "user_id": recording.user_id,
            "expires_at": datetime.fromisoformat(call["expires_at"]),
        }
        for recording in recordings
        for call in _calls(recording.steps)
        if call["status"] == "pending"
    ]
    if rows:
        session.execute(sa.insert(ToolCall), rows)


def _calls(steps: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [call for step in steps for call in step.get("calls", ())]


def page(session: Session, user_id: str, status: Status | None, limit: int) -> list[Asked]:
    """Return a user's calls, the newest first."""
    wanted: sa.ColumnElement[bool] = sa.true()
    if status == "expired":
        wanted = _is_late
    elif status is not None:
        wanted = sa.and_(ToolCall.status == status, ~_is_late)
    query = sa.select(ToolCall).where(ToolCall.user_id == user_id, wanted).order_by(ToolCall.id.desc())
    return _asked(session, session.scalars(query.limit(limit)).all())


def of_episodes(session: Session, episode_ids: Iterable[str], user_id: str) -> list[Asked]:
    """Return the calls of some of a user's episodes."""
    query = sa.select(ToolCall).where(among(ToolCall.episode_id, episode_ids), ToolCall.user_id == user_id)
    return _asked(session, session.scalars(query.order_by(ToolCall.id)).all())


def _asked(session: Session, rows: Iterable[ToolCall]) -> list[Asked]:
    rows = list(rows)
    query = sa.select(Episode.steps).where(among(Episode.id, {row.episode_id for row in rows}))
    said = {call["id"]: call for steps in session.scalars(query) for call in _calls(steps)}
    return [_view(row, said[row.id]) for row in rows if row.id in said]  # without words there is nothing to allow


def _view(row: ToolCall, said: Mapping[str, Any]) -> Asked:
    is_late = row.status == "pending" and row.expires_at <= datetime.now(UTC)
    status: Any = "expired" if is_late else row.status
    asked = said["tool"], said["source"], said["arguments"]
    return Asked(row.id, row.episode_id, *asked, status, row.created_at, row.expires_at, row.continued_by)


def decide(session: Session, call_id: str, user_id: str, *, approve: bool) -> Asked:
    """Allow a call or not, within the caller's transaction; saying the same twice is harmless.

    Raises
    ------
    NotFoundError
        Code ``tool_call_not_found``, for somebody else's, too.
    ConflictError
        Codes ``tool_call_expired`` and ``tool_call_decided`` (otherwise, before).
    """
    row = session.get(ToolCall, call_id, with_for_update=True)
    if row is None or row.user_id != user_id:
        raise not_found(call_id)
    found = _asked(session, [row])
    if not found:
        raise not_found(call_id)
    status = "approved" if approve else "denied"
    if found[0].status == "expired":
        raise ConflictError("The call waited too long and is given up; ask again.", code="tool_call_expired")
    if row.status not in ("pending", status):
        raise ConflictError(f"The call is {row.status} already.", code="tool_call_decided")
    row.status = status
    session.flush()
    return _asked(session, [row])[0]


def claim(session: Session, episode_id: str, user_id: str, continued_by: str) -> dict[str, bool]:
    """Take the calls of an episode to be made, once; return for each whether it is allowed.

    Raises
    ------
    NotFoundError
        Code ``episode_not_found`` where no call of it waits, or waited, for this user.
    ConflictError
        Codes ``tool_call_undecided``, ``tool_call_expired`` and ``already_continued``.
    """
    query = sa.select(ToolCall).where(ToolCall.episode_id == episode_id, ToolCall.user_id == user_id)
    rows = session.scalars(query.order_by(ToolCall.id).with_for_update()).all()
    if not rows or not _asked(session, rows):
        raise NotFoundError(
            f"No call of {episode_id!r} waits for you.", code="episode_not_found", param="episode_id"
        )
    if rows[0].continued_by is not None:
        raise _went_on(session, rows[0].continued_by)
    statuses = {asked.status for asked in _asked(session, rows)}
    if "expired" in statuses:
        raise ConflictError("A call waited too long and is given up; ask again.", code="tool_call_expired")
    if "pending" in statuses:
        raise ConflictError(
            "A call still waits: approve or deny each with POST /v1/tool_calls/{id}.", code="tool_call_undecided"
        )
    for row in rows:
        row.continued_by = continued_by
    session.flush()
    return {row.id: row.status == "approved" for row in rows}


def _went_on(session: Session, as_: str) -> ConflictError:
    why = f"It went on already, as {as_}."
    if session.get(Episode, as_) is None:
        why = f"It goes on just now, as {as_}. If no such answer comes, its process ended within a call: ask anew."
    return ConflictError(f"{why} A call is made once.", code="already_continued")


def choices(session: Session, user_ids: Iterable[str]) -> dict[str, dict[str, ToolLevel]]:
    """Return the levels that each of these users chose, by tool."""
    found: dict[str, dict[str, ToolLevel]] = {}
    for row in session.scalars(sa.select(ToolChoice).where(among(ToolChoice.user_id, user_ids))):
        found.setdefault(row.user_id, {})[row.tool] = row.level  # type: ignore[assignment]
    return found


def choose(session: Session, user_id: str, tool: str, level: ToolLevel | None) -> None:
    """Note how far somebody lets a tool go; None for what holds for who says nothing."""
    users.meet(session, user_id)
    if level is None:
        session.execute(sa.delete(ToolChoice).where(ToolChoice.user_id == user_id, ToolChoice.tool == tool))
        return
    row = {"user_id": user_id, "tool": tool, "level": level}
    statement = insert(ToolChoice).values(row)
    session.execute(statement.on_conflict_do_update(index_elements=["user_id", "tool"], set_={"level": level}))
