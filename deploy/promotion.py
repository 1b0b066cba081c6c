"""What an operator decides: promote, roll back, let a release meet people.

Each has a reason, and is done once every replica that is up has proved that it serves the release: load,
attest, move the head. Whoever is served by the old champion then ends on it; the reconciler unloads it when
nobody can be any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from deploy import audit, canary, head, registry, serving
from deploy.tables import Canary
from infra.db import Sessions, transaction
from infra.errors import ConflictError
from infra.settings import BASE_MODEL_NAME, Settings

NEVER_JUDGED = {"gate": "never_judged", "verdict": "inconclusive"}


@dataclass(frozen=True, slots=True)
class Operator:
    """Somebody who decides.

    Attributes
    ----------
    name, address
        Who, and from where, for the audit log.
    """

    sessions: Sessions
    settings: Settings
    name: str
    address: str | None = None

    @contextmanager
    def acting(self) -> Iterator[Session]:
        """Open a transaction whose acts are this operator's."""
        with transaction(self.sessions) as session:
            audit.from_address(session, self.address)
            yield session

    def promote(self, release: str, reason: str) -> tuple[str, str]:
        """Make a release the champion; return the champions before and after.

        Raises
        ------
        ConflictError
            Code ``gates_not_passed`` (:func:`override_gates`).
        UnavailableError
            Code ``release_not_ready`` where not every replica that is up serves it: nothing has changed.
        """
        head.check_reason(reason)
        target, seen = self._find(release)
        serving.make_ready(self.sessions, target)
        with self._moving(target, seen) as session:
            override_gates(session, self.settings, target, actor=self.name, reason=reason)
            head.move_champion(session, target, action="promoted_by_hand", actor=self.name, reason=reason)
        return seen, target

    def roll_back(self, to: str | None, reason: str) -> tuple[str, str]:
        """Go back to a former champion, the one before if none is named; return the champions before and after.

        Raises
        ------
        ConflictError
            Code ``never_champion``.
        """
        head.check_reason(reason)
        target, seen = self._find(to)
        with transaction(self.sessions) as session:
            head.check_was_champion(session, target)  # before a replica is asked to load it
        serving.make_one_ready(self.sessions, target)
        with self._moving(target, seen) as session:
            head.move_champion(session, target, action="rolled_back_by_hand", actor=self.name, reason=reason)
        return seen, target

    def try_out(self, release: str, reason: str, share: float | None = None) -> Canary:
        """Open a canary of a release (:func:`try_out`) once every replica that is up serves it."""
        head.check_reason(reason)
        target, _ = self._find(release)
        serving.make_ready(self.sessions, target)
        with self.acting() as session:
            registry.lock_head(session)  # its files stay while they are looked at
            opened = try_out(session, self.settings, target, share=share, actor=self.name, reason=reason)
            session.refresh(opened)
            return opened

    @contextmanager
    def _moving(self, target: str, seen: str) -> Iterator[Session]:
        """Open a transaction that may move the head, which must be as it was seen."""
        with self.acting() as session:
            registry.lock_head(session)
            if head.read(session).champion != seen:
                raise head.moved_by_another()
            registry.check_servable(session, self.settings, target)
            yield session

    def _find(self, release: str | None) -> tuple[str, str]:
        """Return a release whose files are whole, the one to go back to if none is named; and the champion."""
        with transaction(self.sessions) as session:
            target = registry.get_release(session, release or head.previous_champion(session)).name
            registry.verified_path(session, self.settings, target)
            return target, head.read(session).champion


def try_out(
    session: Session, settings: Settings, release: str, *, share: float | None = None, actor: str, reason: str
) -> Canary:
    """Open a canary of a release.

    Parameters
    ----------
    share
        The only share of users who meet it, instead of the setting's steps.

    Raises
    ------
    ConflictError
        Code ``gates_not_passed`` where the setting lets nobody override what they said.
    """
    registry.check_servable(session, settings, release)
    gates = override_gates(session, settings, release, actor=actor, reason=reason)
    plan = canary.plan(session, settings, gates, share)
    return head.open_canary(session, challenger=release, plan=plan, gates=gates, actor=actor, reason=reason)


def override_gates(
    session: Session, settings: Settings, release: str, *, actor: str, reason: str
) -> list[dict[str, Any]]:
    """Return the gates that a release was judged by; who goes past one that did not pass is written down.

    Raises
    ------
    ConflictError
        Code ``gates_not_passed`` where the setting lets nobody go past it.
    """
    gates = canary.gates_before(session, release)
    if release == BASE_MODEL_NAME:  # what every release is judged against
        return gates
    if overridden := _overridden(gates or [NEVER_JUDGED], settings.gate_overrides):
        audit.write(
            session, actor=actor, action="gates_overridden", subject=release, reason=reason, gates=overridden
        )
    return gates


def _overridden(gates: Sequence[Mapping[str, Any]], allowed: str) -> list[str]:
    """Return the gates that did not pass, where an operator may override them."""
    verdicts = {gate["gate"]: gate["verdict"] for gate in gates if gate["verdict"] != "pass"}
    final = [name for name, verdict in verdicts.items() if allowed == "none" or verdict == "fail"]
    if allowed != "any" and final:
        raise ConflictError(
            f"Its gates hold it ({', '.join(final)}), and gate_overrides is {allowed!r}: set it to 'any' where an "
            "operator may override them.",
            code="gates_not_passed",
        )
    return sorted(verdicts)
