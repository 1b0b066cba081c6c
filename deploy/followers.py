"""What a process has computed of canaries that people look at, so that a look computes only what is new."""

from __future__ import annotations

import threading

from sqlalchemy.orm import Session

from deploy import canary, head
from deploy.canary import Follower
from deploy.rollout import Rollout
from deploy.tables import Canary

MAX_KEPT = 16


class Followers:
    """The canaries that were looked at last.

    Attributes
    ----------
    lock
        To be held while what it returns is used: requests run in threads.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._kept: dict[int, Follower] = {}

    def open_rollout(self, session: Session) -> Rollout | None:
        """Return the open canary as its log has it by now; None where none is open."""
        canary_id = head.read(session).canary_id
        return self.catch_up(session, canary.get(session, canary_id)).rollout if canary_id else None

    def catch_up(self, session: Session, found: Canary) -> Follower:
        """Return a canary as its log has it by now."""
        follower = self._kept.pop(found.id, None) or Follower()
        follower.catch_up(session, found)
        self._kept[found.id] = follower  # the last in the order is the one that was used last
        for oldest in list(self._kept)[:-MAX_KEPT]:
            del self._kept[oldest]
        return follower
