"""``everloop feedback export``: what may be learned from, as a file for other programs.

Rows stream through cursors of the server within one snapshot of the database, so memory does not grow with the log.
The file appears under its name when it is whole.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session, aliased

from feedback.acceptance import COLUMNS
from feedback.export_files import appearing, write_lines, write_parquet
from feedback.fold import standing_ids
from feedback.interchange import MAX_SIGNALS
from feedback.signals import MACHINE_KINDS
from feedback.steps import plain, seen
from feedback.tables import Episode, Feedback
from feedback.users import TOMBSTONE
from infra.db import Sessions, transaction
from infra.errors import InvalidRequestError
from infra.ids import first_id
from infra.report import Phase

Format = Literal["jsonl", "parquet", "trl-preference", "trl-unpaired"]
PAGE_ROWS = 500

Other = aliased(Episode)
_standing = sa.Table(
    "export_standing",
    sa.MetaData(),
    sa.Column("id", sa.String, primary_key=True),
    prefixes=["TEMPORARY"],
    postgresql_on_commit="DROP",
)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which answers and signals are wanted.

    Parameters
    ----------
    all_signals
        Those superseded or withdrawn, too.
    since
        Answers given from then on.
    user
        Answers given to this user.
    """

    all_signals: bool = False
    since: datetime | None = None
    user: str | None = None

    def answers(self, episode: type[Episode]) -> sa.ColumnElement[bool]:
        """Return the condition that an answer is wanted and may be learned from."""
        wanted = [
            episode.learn,
            episode.status == "complete",
            episode.finish_reason.is_distinct_from("tool_calls"),  # it waits for a tool; it is no answer yet
            sa.func.btrim(episode.answer, " \t\r\n") != "",
            ~episode.user_id.startswith(TOMBSTONE, autoescape=True),
        ]
        if self.since is not None:
            wanted.append(episode.id >= first_id("ep", self.since))
        if self.user is not None:
            wanted.append(episode.user_id == self.user)
        return sa.and_(*wanted)

    def signals(self) -> sa.Select[Any]:
        """Return signals on wanted answers, joined with the answer and the one that it was compared with."""
        query = (
            sa.select(Feedback)
            .join(Episode, Episode.id == Feedback.episode_id)
            .outerjoin(Other, Other.id == Feedback.over)
            .where(
                self.answers(Episode),
                sa.or_(Feedback.over.is_(None), self.answers(Other)),
                ~Feedback.user_id.startswith(TOMBSTONE, autoescape=True),
            )
        )
        return query if self.all_signals else query.where(Feedback.id.in_(sa.select(_standing.c.id)))


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written. ``rows`` are lines of a text file, or rows of a table."""

    file: str
    format: str
    rows: int
    num_bytes: int
    elapsed_s: float


def export_file(
    sessions: Sessions, path: Path, format_: Format, selection: Selection, *, force: bool = False
) -> Exported:
    """Write what may be learned from into a file, readable by its owner only.

    Parameters
    ----------
    format_
        ``jsonl`` can be imported again (compressed, if `path` ends in .gz); ``parquet`` has the same columns;
        ``trl-preference`` and ``trl-unpaired`` are TRL's conversational dataset formats.
    force
        Whether a file that is there is replaced.

    Raises
    ------
    InvalidRequestError
        Codes ``file_exists``, ``file_not_writable``, ``only_standing``.
    """
    started_s = time.monotonic()
    if selection.all_signals and format_.startswith("trl-"):
        raise InvalidRequestError(
            "What was superseded or withdrawn must not be trained on; leave out --all-signals, or use jsonl or "
            "parquet.",
            code="only_standing",
        )
    with appearing(path, force) as temporary, transaction(sessions) as session:
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        if not selection.all_signals:
            _note_standing(session)
        rows = _progress(session, format_, selection)
        if format_ == "parquet":
            num_rows = write_parquet(temporary, rows)
        else:
            num_rows = write_lines(temporary, rows, compress=path.suffix == ".gz")
    return Exported(str(path), format_, num_rows, path.stat().st_size, time.monotonic() - started_s)


def _note_standing(session: Session) -> None:
    """Fold once, into a table of this transaction: as part of a join it may be folded anew for each signal."""
    _standing.create(session.connection())
    session.execute(sa.insert(_standing).from_select(["id"], standing_ids()))
    session.execute(sa.text("ANALYZE export_standing"))


def _progress(session: Session, format_: Format, selection: Selection) -> Iterator[dict[str, Any]]:
    makers: dict[str, tuple[Callable[..., Iterator[dict[str, Any]]], sa.Select[Any]]] = {
        "jsonl": (_lines, sa.select(Episode).where(selection.answers(Episode))),
        "parquet": (_table, sa.select(Episode).where(selection.answers(Episode))),
        "trl-preference": (_preferences, _pairs(selection)),
        "trl-unpaired": (_votes, selection.signals().where(Feedback.kind == "thumb")),
    }
    make, query = makers[format_]
    total = session.scalar(sa.select(sa.func.count()).select_from(query.subquery())) or 0
    with Phase("export", total) as phase:
        yield from make(session, selection, query, phase)


def _stream(session: Session, query: sa.Select[Any], phase: Phase | None = None) -> Iterator[Any]:
    """Yield rows from a cursor of the server."""
    result = session.execute(query.execution_options(yield_per=PAGE_ROWS))
    for done, row in enumerate(result, 1):
        yield row
        if phase is not None and (done % PAGE_ROWS == 0 or done >= phase.total):
            phase.update(done)


def _with_signals(
    session: Session, selection: Selection, query: sa.Select[Any], phase: Phase, at: sa.ColumnElement[str]
) -> Iterator[tuple[Episode, list[Feedback]]]:
    """Yield each answer with the signals whose place, `at`, it is, in their order."""
    signals = selection.signals().add_columns(at).order_by(at, Feedback.seq)
    groups = itertools.groupby(_stream(session, signals), key=lambda row: row[1])
    place, group = next(groups, (None, iter(())))
    for (episode,) in _stream(session, query.order_by(Episode.id), phase):
        if place == episode.id:
            yield episode, [signal for signal, _ in group]
            place, group = next(groups, (None, iter(())))
        else:
            yield episode, []


def _lines(session: Session, selection: Selection, query: sa.Select[Any], phase: Phase) -> Iterator[dict[str, Any]]:
    """Yield lines that can be imported: a preference stands where both of its answers are known."""
    place = sa.func.greatest(Feedback.episode_id, Feedback.over)
    for episode, signals in _with_signals(session, selection, query, phase, place):
        own, apart = _divided(episode, signals)
        yield {**_answer(episode), "signals": [_said(signal) for signal in own]}
        for signal in apart:
            named = {"episode_id": signal.episode_id, "user": signal.user_id}
            yield {**named, "idempotency_key": signal.idempotency_key, **_said(signal)}


def _divided(episode: Episode, signals: Iterable[Feedback]) -> tuple[list[Feedback], list[Feedback]]:
    """Return the signals that go into the answer's line, and those that need lines of their own."""
    own: list[Feedback] = []
    apart: list[Feedback] = []
    for signal in signals:
        # Of a preference and its reverse the later stands, so none may overtake one that has its own line.
        waits = signal.episode_id != episode.id or (apart and signal.kind == "preference")
        (apart if waits or len(own) == MAX_SIGNALS else own).append(signal)
    return own, apart


def _table(session: Session, selection: Selection, query: sa.Select[Any], phase: Phase) -> Iterator[dict[str, Any]]:
    place = Feedback.episode_id.expression
    for episode, signals in _with_signals(session, selection, query, phase, place):
        said = [
            {**_said(signal), "user": signal.user_id, "given_at": signal.given_at or signal.created_at}
            for signal in signals
        ]
        yield {**_answer(episode), "created_at": episode.created_at, "signals": said}


def _answer(episode: Episode) -> dict[str, Any]:
    return {
        "id": episode.id,
        "created_at": episode.created_at.astimezone(UTC).isoformat(),
        "user": episode.user_id,
        "release": episode.release,
        "messages": [
            {"role": message["role"], "content": message["content"]} for message in plain(episode.messages)
        ],
        **({"steps": episode.steps} if episode.steps else {}),
        "answer": episode.answer,
    }


def _said(signal: Feedback) -> dict[str, Any]:
    said: dict[str, Any] = {"kind": signal.kind}
    if signal.kind in MACHINE_KINDS:
        said["user"] = signal.user_id
    said |= {name: value for name in COLUMNS if (value := getattr(signal, name)) is not None}
    if signal.given_at is not None:
        said["given_at"] = signal.given_at.astimezone(UTC).isoformat()
    return said


def _pairs(selection: Selection) -> sa.Select[Any]:
    better = sa.case((Feedback.kind == "correction", Feedback.text), else_=Episode.answer)
    worse = sa.case((Feedback.kind == "correction", Episode.answer), else_=Other.answer)
    return (
        selection.signals()
        .with_only_columns(
            Feedback.seq, Episode.messages, Episode.steps, better.label("better"), worse.label("worse")
        )
        .where(Feedback.kind.in_(("correction", "preference")), sa.func.btrim(better) != sa.func.btrim(worse))
    )


def _preferences(session: Session, _: Selection, query: sa.Select[Any], phase: Phase) -> Iterator[dict[str, Any]]:
    for _seq, messages, steps, better, worse in _stream(session, query.order_by(Feedback.seq), phase):
        yield {"prompt": seen(messages, steps), "chosen": _turn(better), "rejected": _turn(worse)}


def _votes(session: Session, _: Selection, query: sa.Select[Any], phase: Phase) -> Iterator[dict[str, Any]]:
    columns = query.with_only_columns(Episode.messages, Episode.steps, Episode.answer, Feedback.value)
    for messages, steps, answer, value in _stream(session, columns.order_by(Feedback.seq), phase):
        yield {"prompt": seen(messages, steps), "completion": _turn(answer), "label": value > 0}


def _turn(answer: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer}]
