"""A canary told step by step: computed again from its log, so that its decision can be checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.orm import Session

from deploy import eprocess, journal
from deploy.rollout import Event, Plan, Rollout
from deploy.tables import Canary

SUMMARY = ("id", "challenger", "champion", "opened_at", "decision", "reason")
LAST_ROWS = 12
CONFIDENCE = 0.95


def summary(found: Canary) -> dict[str, Any]:
    """Return what a list of canaries shows of one."""
    told = {name: getattr(found, name) for name in SUMMARY}
    told["opened_at"] = found.opened_at.isoformat(timespec="seconds")
    return told


def explain(session: Session, found: Canary) -> dict[str, Any]:
    """Return a canary with a row for each of its events.

    Returns
    -------
    dict
        The summary; ``plan``; ``limits`` of the tests; ``rows``; ``evidence`` as it is computed now;
        ``difference``, how much more often the challenger's votes are good, with bounds that hold at every
        look; ``agrees``, whether the decision that was taken by itself is the one computed now (None where an
        operator, or nobody, decided).
    """
    plan = Plan.model_validate(found.plan)
    rollout = Rollout(plan)
    rows = []
    for seq, event in enumerate(journal.read(session, found.id), 1):
        before = rollout.step, rollout.decision
        rollout.apply(event)
        rows.append(_row(seq, event, rollout, before))
    automatic = found.decision in ("promote", "rollback", "expired") and found.evidence is not None
    return {
        **summary(found),
        "plan": found.plan,
        "limits": {name: test.limit for name, test in rollout.tests.items()},
        "rows": rows,
        "evidence": rollout.evidence(),
        "difference": difference(rollout),
        "agrees": rollout.decision == found.decision if automatic else None,
    }


def _row(seq: int, event: Event, rollout: Rollout, before: tuple[int, str | None]) -> dict[str, Any]:
    arms = (rollout.tallies["challenger"], rollout.tallies["champion"])
    said = {True: "good", False: "bad", None: ", ".join(sorted(event.flags))}[event.good]
    note = ""
    if rollout.decision != before[1]:
        note = f"{rollout.decision}: {rollout.because}"
    elif rollout.step != before[0]:
        note = f"step to {rollout.share:.0%}"
    return {
        "seq": seq,
        "at_s": event.at_s,
        "event": " ".join(part for part in (event.kind, event.arm, said) if part),
        "users": " : ".join(str(arm.trials) for arm in arms),
        "votes": " : ".join(f"{arm.good}/{arm.votes}" for arm in arms),
        "pairs": rollout.num_pairs,
        "share": rollout.share,
        "e": {name: test.e for name, test in rollout.tests.items()},
        "note": note,
    }


def difference(rollout: Rollout) -> dict[str, float] | None:
    """Return how much more often the challenger's votes are good, with bounds that hold at every look."""
    champion, challenger = rollout.tallies["champion"], rollout.tallies["challenger"]
    if not rollout.num_pairs:
        return None
    test = rollout.votes.tests["better"]
    low, high = eprocess.interval(test.counts, test.process.ratios, 1.0 - CONFIDENCE)
    value = challenger.good / challenger.votes - champion.good / champion.votes
    return {"value": value, "low": low, "high": high, "confidence": CONFIDENCE}


def telling(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with a note, those at which a test first doubled its evidence, and the last."""
    reached: dict[str, float] = {}
    kept = []
    for index, row in enumerate(rows):
        doubled = [name for name, e in row["e"].items() if e >= 2.0 * reached.get(name, 1.0)]
        reached.update({name: row["e"][name] for name in doubled})
        if row["note"] or doubled or index >= len(rows) - LAST_ROWS or row["event"] in ("hold", "resume", "tick"):
            kept.append(row)
    return kept


def words(told: dict[str, Any]) -> str:
    """Say in a few lines what the table comes to."""
    lines = [f"canary {told['id']}: {told['decision'] or 'open'}{': ' + told['reason'] if told['reason'] else ''}"]
    difference = told["difference"]
    if difference is not None:
        lines.append(
            f"good votes: {100 * difference['value']:+.1f} points "
            f"(95 % at every look: {100 * difference['low']:+.0f} to {100 * difference['high']:+.0f})"
        )
    if told["agrees"] is not None:
        lines.append("computed again from the log: " + ("the same" if told["agrees"] else "ANOTHER decision"))
    return "\n".join(lines)
