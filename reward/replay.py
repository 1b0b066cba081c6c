"""Learning everything anew from the log: under the same encoder or another, within one transaction."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.orm import Session

from feedback.acceptance import EVENT_FIELDS
from feedback.tables import Feedback
from infra.events import FeedbackGiven, ProbeJudged
from reward import history, rulings, state, store
from reward.history import Posterior
from reward.learner import Guards, Learner
from reward.online import BayesianHead
from reward.raters import Rater
from reward.signals import Signals
from reward.tables import GoldProbe, RewardUpdate

if TYPE_CHECKING:
    from reward.worker import RewardWorker

log = logging.getLogger("everloop.reward")

CHUNK_SIGNALS = 1_000


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuild did."""

    num_events: int
    num_signals: int
    seconds: float


def rebuild(worker: RewardWorker, session: Session) -> Rebuilt:
    """Forget all that was learned under the worker's encoder, and learn it anew, in the caller's transaction.

    What operators ruled, and what is known of who rates by choice, stays. Signals are taken in the order in which
    they were accepted; a worker that shares several partitions may first have met them in a slightly other one.
    """
    started_s = time.perf_counter()
    _start_over(worker, session)
    num_events = 0
    probes = _probes(session)
    for rows in _chunks(session):
        due = [probe for probe in probes if probe.created_at <= rows[-1].created_at]
        probes = probes[len(due) :]
        events = [_event(row) for row in rows]
        Signals(worker, session, events, known_dead=True).learn()
        _judge(worker, session, due)
        worker.flush(session)
        session.flush()
        session.expunge_all()
        num_events += len(events) + len(due)
    _judge(worker, session, probes)
    worker.commit(session)
    seconds = time.perf_counter() - started_s
    log.info("learned %d events anew under %s in %.1f s", num_events, worker.encoder.name, seconds)
    return Rebuilt(num_events, worker.posterior.num_signals, seconds)


def _start_over(worker: RewardWorker, session: Session) -> None:
    """Put the prior in place of what was learned; numbers of updates go on from where they were."""
    worker.recover(session)
    encoder = worker.encoder  # only now: recovery takes up the one that is active
    old, seq = worker.learner, history.last_seq(session) + 1
    head = BayesianHead.prior(encoder.dim)
    guards = Guards(propensity=old.guards.propensity, anchor=old.guards.anchor)
    raters = [
        Rater(r.name, ruling=r.ruling, block=r.block, num_seen=r.num_seen, num_rated=r.num_rated)
        for r in old.raters.by_name.values()
    ]
    session.execute(sa.delete(RewardUpdate).where(RewardUpdate.encoder == encoder.name))
    session.execute(sa.update(GoldProbe).values(judged=False))
    posterior = Posterior(head, seq, 0)
    store.save_snapshot(session, posterior, encoder.name)
    worker.take(Learner(head, guards, raters), posterior)
    for rater in raters:
        worker.learner.raters.get(rater.name)  # its row is written again
    state.save(session, worker.learner, posterior, encoder.name)


def _chunks(session: Session) -> Iterator[Sequence[Feedback]]:
    after = 0
    query = sa.select(Feedback).order_by(Feedback.seq).limit(CHUNK_SIGNALS)
    while rows := session.scalars(query.where(Feedback.seq > after)).all():
        yield rows
        after = rows[-1].seq


def _event(row: Feedback) -> FeedbackGiven:
    return FeedbackGiven(feedback_id=row.id, **{name: getattr(row, name) for name in EVENT_FIELDS})


def _probes(session: Session) -> list[GoldProbe]:
    found = list(session.scalars(sa.select(GoldProbe).order_by(GoldProbe.created_at, GoldProbe.id)))
    session.expunge_all()
    return found


def _judge(worker: RewardWorker, session: Session, probes: Sequence[GoldProbe]) -> None:
    for probe in probes:
        event = ProbeJudged(probe_id=probe.id, episode_id=probe.episode_id, over=probe.over, good=probe.good)
        rulings.judge(worker, session, event)
