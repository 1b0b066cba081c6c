"""``everloop feedback import``: outside answers and signals into the log, each line once.

A chunk of lines and the note of how far the file is are one transaction, so the import goes on where a kill left
it. What cannot be taken is written beside the file before the transaction ends, and cut to what counts on resuming.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from feedback import episodes, partitions, users
from feedback.acceptance import Accepted, accept_many
from feedback.episodes import Recording
from feedback.import_files import Rejects, Source
from feedback.interchange import Line, LineReader
from feedback.tables import Episode, Import, User
from infra.db import Sessions, advisory_lock, transaction
from infra.errors import ConflictError, EverloopError
from infra.ids import time_of
from infra.report import Phase
from infra.settings import Settings

ARM = "imported"
CHUNK_LINES = 500
CHUNK_BYTES = 4 * 1024**2
CHUNK_SIGNALS = 2000
# A killed import's connection is closed by the server only when its statement has ended.
LOCK_WAIT_S = 10.0
# Each partition costs every query that looks into all of them; what is older lies in the default one.
MONTHLY_FOR = timedelta(days=10 * 366)


@dataclass(slots=True)
class Summary:
    """What became of the lines of a file; blank ones are not counted."""

    file: str
    file_digest: str
    accepted: int = 0
    already_imported: int = 0
    rejected: int = 0
    rejected_file: str | None = None
    elapsed_s: float = 0.0


@dataclass(slots=True)
class Chunk:
    """Lines that are written together, and the refusals among them by line number."""

    next_line: int
    lines: list[Line] = field(default_factory=list)
    refused: dict[int, EverloopError] = field(default_factory=dict)
    num_bytes: int = 0
    num_signals: int = 0

    @property
    def full(self) -> bool:
        """Whether it is large enough to be written."""
        return (
            len(self.lines) + len(self.refused) >= CHUNK_LINES
            or self.num_bytes >= CHUNK_BYTES
            or self.num_signals >= CHUNK_SIGNALS
        )


def import_file(sessions: Sessions, path: Path, settings: Settings) -> Summary:
    """Import what a file holds and was not imported before.

    Returns
    -------
    Summary
        Of all its lines: taken now, there before, and rejected now or before.

    Raises
    ------
    InvalidRequestError
        Codes ``file_not_readable``, ``rejected_file_in_the_way``.
    ConflictError
        Codes ``import_running``, ``file_changed``.
    """
    started_s = time.monotonic()
    with Source(path, settings.max_request_bytes) as source, _alone(sessions):
        summary = _Importer(sessions, source, settings).run()
    summary.elapsed_s = time.monotonic() - started_s
    return summary


@contextmanager
def _alone(sessions: Sessions) -> Iterator[None]:
    deadline_s = time.monotonic() + LOCK_WAIT_S
    while True:
        with advisory_lock(sessions, "import") as held:
            if held:
                yield
                return
        if time.monotonic() > deadline_s:
            raise ConflictError("Another import is under way; wait until it has ended.", code="import_running")
        time.sleep(0.1)


class _Importer:
    def __init__(self, sessions: Sessions, source: Source, settings: Settings) -> None:
        self.sessions = sessions
        self.source = source
        self.learn_by_default = settings.learn_by_default
        self.reader = LineReader(source.digest, source.date, settings.max_request_bytes)
        self.summary = Summary(str(source.path), source.digest)
        self._months: set[tuple[int, int]] = set()

    def run(self) -> Summary:
        with transaction(self.sessions) as session:
            values = {"file_digest": self.source.digest, "next_line": 1, "num_accepted": 0, "num_rejected": 0}
            session.execute(insert(Import).values(values).on_conflict_do_nothing())
            begun = session.get_one(Import, self.source.digest)
        self.summary.already_imported, self.summary.rejected = begun.num_accepted, begun.num_rejected
        rejects = Rejects(self.source, begun.next_line)
        if begun.next_line <= self.source.num_lines:
            with Phase("import", self.source.num_lines) as phase:
                for chunk in self._chunks(begun.next_line):
                    self._write(chunk, rejects)
                    phase.update(chunk.next_line - 1)
        if self.summary.rejected:
            self.summary.rejected_file = str(rejects.path)
        return self.summary

    def _chunks(self, next_line: int) -> Iterator[Chunk]:
        chunk = Chunk(next_line)
        for number, raw in self.source.lines():
            try:
                line = self.reader.read(number, raw)
            except EverloopError as error:
                if number >= next_line:
                    chunk.refused[number] = error
            else:
                # Lines of an earlier run are read again all the same: later ones may name their answers.
                if number >= next_line:
                    chunk.lines.append(line)
                    chunk.num_signals += len(line.signals)
            if number >= next_line:
                chunk.next_line = number + 1
                chunk.num_bytes += len(raw)
            if chunk.full:
                yield chunk
                chunk = Chunk(chunk.next_line)
        chunk.next_line = self.source.num_lines + 1
        yield chunk

    def _write(self, chunk: Chunk, rejects: Rejects) -> None:
        first = rejects.next_line
        self._make_months(chunk.lines)
        with transaction(self.sessions) as session:
            refused, num_already = write(session, chunk.lines, self.learn_by_default)
            refused |= chunk.refused
            num_rejected = len(refused)
            num_taken = len(chunk.lines) - len(refused.keys() - chunk.refused.keys())
            # On the disk before the transaction ends: afterwards nobody would write them.
            rejects.add(refused, chunk.next_line)
            self.source.check_unchanged()
            moved = session.execute(
                sa.update(Import)
                .where(Import.file_digest == self.source.digest, Import.next_line == first)
                .values(
                    next_line=chunk.next_line,
                    num_accepted=Import.num_accepted + num_taken,
                    num_rejected=Import.num_rejected + num_rejected,
                )
            )
            if moved.rowcount != 1:  # type: ignore[attr-defined]
                raise ConflictError("Another import of this file is under way.", code="import_running")
        self.summary.accepted += num_taken - num_already
        self.summary.already_imported += num_already
        self.summary.rejected += num_rejected

    def _make_months(self, lines: Sequence[Line]) -> None:
        """Make the partitions of old answers, in transactions of their own: others wait for their locks."""
        oldest = datetime.now(UTC) - MONTHLY_FOR
        for at in (time_of(line.episode_id) for line in lines if line.episode is not None):
            if at > oldest and (at.year, at.month) not in self._months:
                with transaction(self.sessions) as session:
                    partitions.ensure_month(session, at)
                self._months.add((at.year, at.month))


def write(session: Session, lines: Sequence[Line], learn_by_default: bool) -> tuple[dict[int, EverloopError], int]:
    """Write lines within the caller's transaction, each wholly or not at all.

    Returns
    -------
    tuple
        The refusals by line number, and how many of the other lines were there already.
    """
    refused: dict[int, EverloopError] = {}
    while True:
        taken = [line for line in lines if line.number not in refused]
        with session.begin_nested() as attempt:
            found, num_already = _attempt(session, taken, learn_by_default)
            if not found:
                return refused, num_already
            # Good lines wrote together with bad ones; once more without the bad.
            attempt.rollback()
        refused |= found


def _attempt(
    session: Session, lines: Sequence[Line], learn_by_default: bool
) -> tuple[dict[int, EverloopError], int]:
    fresh, refused = _sort_out(session, lines)
    answers = [line for line in fresh if line.episode is not None]
    asking = {line.episode.user for line in answers if line.episode is not None}
    users.ensure(session, asking)
    keys = users.keys_of(session, asking)
    consents = session.execute(sa.select(User.user_id, User.learn).where(User.user_id.in_(asking)))
    said = {row.user_id: row.learn for row in consents}
    recordings = []
    for line in answers:
        recording = _recording(line, said, learn_by_default)
        if recording.user_id in keys:
            recordings.append((recording, line.created_at))
        else:
            refused[line.number] = ConflictError("The user was forgotten just now.", code="user_forgotten")
    episodes.record_many(session, recordings, keys)
    signals = [(line, signal) for line in fresh for signal in line.signals]
    outcomes = accept_many(session, [signal for _, signal in signals]) if signals else []
    num_repeated = 0
    for (line, _), outcome in zip(signals, outcomes, strict=True):
        if not isinstance(outcome, Accepted):
            refused.setdefault(line.number, outcome)
        elif line.episode is None and outcome.repeated:
            num_repeated += 1
    return refused, len(lines) - len(fresh) + num_repeated


def _sort_out(session: Session, lines: Sequence[Line]) -> tuple[list[Line], dict[int, EverloopError]]:
    """Return the lines that are not there yet, and refuse those whose id belongs to something else."""
    ids = [line.episode_id for line in lines if line.episode is not None]
    rows = session.execute(
        sa.select(Episode.id, Episode.user_id, Episode.messages, Episode.answer).where(Episode.id.in_(ids))
    )
    there = {episode_id: (user, messages, answer) for episode_id, user, messages, answer in rows}
    fresh: list[Line] = []
    refused: dict[int, EverloopError] = {}
    for line in lines:
        if line.episode is None:
            fresh.append(line)
            continue
        messages = [message.model_dump() for message in line.episode.messages]
        content = (line.episode.user, messages, line.episode.answer)
        if line.episode_id not in there:
            there[line.episode_id] = content
            fresh.append(line)
        elif there[line.episode_id] != content:
            refused[line.number] = ConflictError(
                "Another answer is there under this id; give this one an id of its own.", code="id_taken"
            )
    return fresh, refused


def _recording(line: Line, said: dict[str, bool | None], learn_by_default: bool) -> Recording:
    assert line.episode is not None
    consent = said.get(line.episode.user)
    return Recording(
        episode_id=line.episode_id,
        user_id=line.episode.user,
        release=line.episode.release,
        adapter_digest=None,
        canary_id=None,
        arm=ARM,
        propensity=1.0,
        messages=[message.model_dump() for message in line.episode.messages],
        steps=[step for step in line.episode.steps if "continues" not in step],  # ids are made anew
        sampling={},
        learn=line.episode.learn and (learn_by_default if consent is None else consent),
        answer=line.episode.answer,
        status="complete",
    )
