"""The book of turns: who gets which release, and the episode that came of it, as many together as have come."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import anyio.to_thread
import sqlalchemy as sa
from sqlalchemy.orm import Session

from agent.memory import facts, store
from agent.memory.prompts import Remembering
from deploy import head
from deploy.head import Assignment
from feedback import conversations, episodes, tool_calls, users
from feedback.conversations import Place
from feedback.episodes import Recording
from infra.db import Sessions, transaction
from infra.errors import EverloopError, NotFoundError, UnavailableError
from infra.sealing import SubjectKey
from infra.settings import ASSISTANT_MODEL, ToolLevel
from infra.together import Together

log = logging.getLogger("everloop.agent")

NOT_STORABLE = ("22", "54")  # classes of SQLSTATE: data that is not of its type, or over a limit of PostgreSQL's


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asks which model, and where; `trial` is the version of a run in progress that is meant, if one is."""

    user: str
    model: str
    trial: str | None = None
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """What a user gets, the key that seals their words, whether the turn may be learned from, and how far they let
    tools go, where they said.
    """

    assignment: Assignment
    key: SubjectKey
    may_learn: bool
    tool_levels: Mapping[str, ToolLevel] = field(default_factory=dict)


class Book:
    """Begins and ends the turns of one API process in the database.

    Parameters
    ----------
    remembering
        Makes what the model is to see; without it, it sees what the client sends.
    remembers_by_default
        Whether people are remembered across conversations who said nothing about it.
    """

    def __init__(
        self,
        sessions: Sessions,
        learn_by_default: bool,
        remembering: Remembering | None = None,
        remembers_by_default: bool = True,
    ) -> None:
        self.sessions = sessions
        self.learn_by_default = learn_by_default
        self.remembering = remembering
        self.remembers_by_default = remembers_by_default
        self._beginnings: Together[Asked, Begun] = Together(sessions, "beginnings", self._begin)
        self._endings: Together[tuple[Recording, SubjectKey], bool] = Together(sessions, "endings", self._end)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Self]:
        """Write what comes for the length of the block."""
        async with self._beginnings.running(), self._endings.running():
            yield self

    async def begin(self, asked: Asked) -> Begun:
        """Choose a release for a user, who exists from now on.

        Raises
        ------
        NotFoundError
            Code ``model_not_found``, or as :func:`feedback.conversations.refusals` says of the place.
        UnavailableError
        """
        try:
            return await self._beginnings.give(asked)
        except UnavailableError as error:
            if error.code != users.IN_FLUX:
                raise
            # Who is being forgotten keeps nobody else waiting.
            return await anyio.to_thread.run_sync(self._begin_alone, asked)

    async def end(self, recording: Recording, key: SubjectKey) -> bool:
        """Write an episode and its event; return False where its user was forgotten meanwhile."""
        try:
            is_written = await self._endings.give((recording, key))
        except UnavailableError as error:
            if error.code != users.IN_FLUX:
                raise
            is_written = await anyio.to_thread.run_sync(self._end_alone, recording, key)
        if is_written and self.remembering is not None:
            self.remembering.written(recording)
        return is_written

    def _begin_alone(self, asked: Asked) -> Begun:
        with transaction(self.sessions) as session:
            (begun,) = self._begin(session, [asked], wait=True)
            if isinstance(begun, EverloopError):
                raise begun
            return begun

    def _end_alone(self, recording: Recording, key: SubjectKey) -> bool:
        with transaction(self.sessions) as session:
            is_written = episodes.record(session, recording, key)
            self._remember(session, [recording] if is_written else [])
            return is_written

    def _end(self, session: Session, endings: Sequence[tuple[Recording, SubjectKey]]) -> list[bool | EverloopError]:
        now = users.keys_of(session, {recording.user_id for recording, _ in endings}, wait=False)
        outcomes: list[bool | EverloopError] = []
        written = []
        for recording, key in endings:
            known = now.get(recording.user_id)
            if known is None:  # forgotten, or being so
                outcomes.append(users.in_flux())
                continue
            outcomes.append(known.key_id == key.key_id)
            if outcomes[-1]:
                written.append((recording, None))
        episodes.record_many(session, written, now)
        self._remember(session, [recording for recording, _ in written])
        return outcomes

    def _remember(self, session: Session, recordings: Sequence[Recording]) -> None:
        """Have what was written found again; what cannot be is written all the same."""
        try:
            with session.begin_nested():
                store.place_all(session, recordings)
                facts.take_all(session, recordings, by_default=self.remembers_by_default)
        except sa.exc.DBAPIError as error:
            if str(getattr(error.orig, "sqlstate", ""))[:2] not in NOT_STORABLE:
                raise
            log.error("%d turns are kept, but not found again: %s", len(recordings), type(error.orig).__name__)

    def _begin(
        self, session: Session, requests: Sequence[Asked], *, wait: bool = False
    ) -> list[Begun | EverloopError]:
        met = users.meet_many(session, [asked.user for asked in requests], wait=wait)
        assigned = head.assignments(session, {asked.user for asked in requests})
        levels = tool_calls.choices(session, {asked.user for asked in requests})
        refused = conversations.refusals(session, {(asked.user, asked.place) for asked in requests if asked.place})

        def one(asked: Asked) -> Begun | EverloopError:
            user = met[asked.user]
            if isinstance(user, EverloopError):
                return user
            if asked.place and (refusal := refused.get((asked.user, asked.place))):
                return refusal
            try:
                assignment = _assignment(session, asked, assigned[asked.user])
            except NotFoundError:
                return unknown_model(asked.model)
            may_learn = self.learn_by_default if user.learn is None else user.learn
            return Begun(assignment, user.key, may_learn, levels.get(asked.user, {}))

        return [one(asked) for asked in requests]


def _assignment(session: Session, asked: Asked, usual: Assignment) -> Assignment:
    if asked.trial is not None:
        return Assignment(asked.trial, None, "pinned", 1.0, None)
    return usual if asked.model == ASSISTANT_MODEL else head.pinned(session, asked.model)


def unknown_model(name: str) -> NotFoundError:
    """Return the error of who asks for a model that is not served."""
    return NotFoundError(
        f"The model {name!r} does not exist. Use {ASSISTANT_MODEL!r}, or a release that GET /v1/models lists.",
        code="model_not_found",
        param="model",
    )
