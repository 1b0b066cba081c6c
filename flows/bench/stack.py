"""A stack of its own for a bench, whole or only the log's parts, in a directory that goes away afterwards."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.orm import Session

from feedback import episodes
from feedback.episodes import Recording
from feedback.tables import Episode
from infra import report
from infra.db import Sessions, connect
from infra.settings import Settings, load
from infra.stack import embedded
from infra.stack.supervisor import Supervisor

PARTS = frozenset({"postgres", "broker", "api", "relay", "ledger", "reward"})
ADDRESSES = ("DATABASE_URL", "KAFKA_BOOTSTRAP", "ENGINE_URL", "PREFECT_URL")
NUM_TEXTS = 16
NUM_USERS = 200


def log_stack() -> AbstractContextManager[tuple[Settings, Sessions, Supervisor]]:
    """Return a stack of the log's parts, without the engine."""
    return own_stack(PARTS)


@contextmanager
def own_stack(
    only: Collection[str] | None = None, engine_url: str | None = None
) -> Iterator[tuple[Settings, Sessions, Supervisor]]:
    """Start a stack (or only some parts of it), hand it over, stop it, and remove all that it wrote.

    Parameters
    ----------
    engine_url
        An engine to be used instead of its own.
    """
    own = load(recorded_addresses=False)
    with tempfile.TemporaryDirectory(prefix="everloop-bench-") as directory:
        home = Path(directory)
        # A bench must never write into somebody's database or cluster.
        for name in ADDRESSES:
            os.environ.pop(f"EVERLOOP_{name}", None)
        os.environ["EVERLOOP_HOME"] = str(home)
        if engine_url is not None:
            os.environ["EVERLOOP_ENGINE_URL"] = engine_url
        if own.base_model is None and own.base_model_dir.exists():
            (home / "models").symlink_to(own.base_model_dir.parent)
        settings = embedded.up(Settings(home=home, engine_url=engine_url), report.say, only=only)
        try:
            yield settings, connect(settings.need("database_url")), Supervisor(settings)
        finally:
            embedded.down(settings)
            os.environ.pop("EVERLOOP_ENGINE_URL", None)


def user_of(number: int) -> str:
    """Return whose the episode of this number is."""
    return f"user-{number % NUM_USERS}"


def write_episode(session: Session, user: str, number: int, answer: str) -> str:
    """Write an answer about a number, as a turn would; return the episode's id."""
    key, _ = episodes.begin(session, user, True)
    recording = Recording(
        episode_id=episodes.new_episode_id(),
        user_id=user,
        release="base",
        adapter_digest=None,
        canary_id=None,
        arm="champion",
        propensity=1.0,
        messages=[{"role": "user", "content": f"Say something about the number {number}."}],
        sampling={},
        learn=True,
        answer=answer,
        status="complete",
    )
    episodes.record(session, recording, key)
    return recording.episode_id


def seed(sessions: Sessions, num_episodes: int) -> list[str]:
    """Write episodes of a few texts, so that features are computed once each; return their ids."""
    with sessions.begin() as session:
        for number in range(NUM_TEXTS):
            user = user_of(number)
            answer = f"The number {number} comes after {number - 1}." + " It is a number." * (number % 5)
            write_episode(session, user, number, answer)
        for number in range(NUM_TEXTS, NUM_USERS):
            episodes.begin(session, user_of(number), True)
    templates = sa.select(Episode).order_by(Episode.id).limit(NUM_TEXTS)
    ids = sorted(episodes.new_episode_id() for _ in range(num_episodes))
    with sessions.begin() as session:
        rows = [
            {c.key: getattr(row, c.key) for c in sa.inspect(Episode).columns} for row in session.scalars(templates)
        ]
        for start in range(0, num_episodes, 1000):
            chunk = [
                {**rows[n % NUM_TEXTS], "id": ids[n], "user_id": user_of(n)}
                for n in range(start, min(start + 1000, num_episodes))
            ]
            session.execute(sa.insert(Episode), chunk)
    return ids
