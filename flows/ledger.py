"""The ledger: keeps receipts, has every room erase what a forgotten user left, and does the log's housekeeping."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence

from sqlalchemy.orm import Session

import deploy.erasure
import feedback.erasure
import trainer.erasure
from agent.memory import votes
from deploy.canary import LOOK_EVERY_S, WATCH_LOCK, Watch
from deploy.metrics import CanaryCollector
from feedback import projection
from feedback.tables import Erasure
from flows.housekeeping import keep_house
from infra.db import DATABASE_AWAY, Sessions, advisory_lock, connect
from infra.errors import EverloopError
from infra.events import UserForgotten
from infra.log.consumer import Consumer, Delivery
from infra.process import run_until_stopped
from infra.settings import Settings, load
from infra.telemetry.disk import DiskCollector

log = logging.getLogger("everloop.ledger")

HOUSEKEEPING_EVERY_S = 60.0
RECEIPTS_LINGER_S = 0.1  # nobody reads a receipt within the second, and a shared transaction is a cheap one


class Ledger:
    """The consumers of the ledger, and what is done once a minute."""

    def __init__(self, sessions: Sessions, settings: Settings) -> None:
        self.sessions = sessions
        self.settings = settings
        self.consumers = [
            Consumer(
                projection.CONSUMER,
                sessions,
                settings,
                projection.HANDLERS,
                public=True,
                linger_s=RECEIPTS_LINGER_S,
            ),
            Consumer(votes.CONSUMER, sessions, settings, votes.HANDLERS, public=True),
            Consumer("erasure", sessions, settings, {UserForgotten: self.on_forgotten}),
        ]

    def run(self, stop: threading.Event) -> None:
        """Run everything until told to stop."""
        threads = [
            threading.Thread(target=self._whole_process, args=(run, stop), daemon=True)
            for run in (*(consumer.run for consumer in self.consumers), self.keep_house, self.watch_canary)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    @staticmethod
    def _whole_process(run: object, stop: threading.Event) -> None:
        """A part that dies takes the process with it, which is then started again."""
        try:
            run(stop)  # type: ignore[operator]
        except BaseException:
            log.exception("a part of the ledger failed")
            stop.set()

    def on_forgotten(self, session: Session, deliveries: Sequence[Delivery]) -> None:
        """Have trainer and deploy erase their part."""
        for event in (delivery.event for delivery in deliveries):
            episode_ids, _ = feedback.erasure.concerned(session, event.tombstone)
            datasets, runs = self.settings.datasets_dir, self.settings.runs_dir
            in_training = trainer.erasure.erase(session, datasets, runs, episode_ids)
            feedback.erasure.report(session, event.erasure_id, "trainer", in_training)
            policy = session.get_one(Erasure, event.erasure_id).policy
            in_service = deploy.erasure.mark(session, in_training["runs_marked"], policy)
            feedback.erasure.report(session, event.erasure_id, "deploy", in_service)

    def watch_canary(self, stop: threading.Event) -> None:
        """Look at the open canary once a second, while no flow does: whoever opened it, it is watched at once."""
        watch = Watch(self.sessions, self.settings)
        while not stop.is_set():
            try:
                with advisory_lock(self.sessions, WATCH_LOCK) as held:
                    if held:
                        watch.look()
            except (EverloopError, *DATABASE_AWAY) as error:
                log.warning("canary: %s; trying again", type(error).__name__)
            stop.wait(LOOK_EVERY_S)

    def keep_house(self, stop: threading.Event) -> None:
        """Make partitions ahead of time, prune the log and the adapters' files, once a minute."""
        while not stop.is_set():
            try:
                keep_house(self.sessions, self.settings)
            except (EverloopError, *DATABASE_AWAY) as error:
                log.warning("housekeeping: %s; trying again", type(error).__name__)
            stop.wait(HOUSEKEEPING_EVERY_S)


def main() -> None:
    """Run the ledger as a process."""
    os.nice(2)  # an answer that somebody is reading goes first
    settings = load()
    sessions = connect(settings.need("database_url"))
    collectors = CanaryCollector(sessions), DiskCollector(settings.home)
    run_until_stopped("ledger", Ledger(sessions, settings).run, settings, *collectors)


if __name__ == "__main__":
    main()
