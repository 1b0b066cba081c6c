"""What operators decide about what people said, each kept with the decision and in the audit log at once.

The audit log, which nobody can change, names a person by their key only: it outlives their being forgotten.
"""

from __future__ import annotations

from typing import Literal

from deploy import audit
from deploy.promotion import Operator
from reward import decisions

Ruling = Literal["banned", "cleared"] | None
Verdict = Literal["release", "discard"]
_OF_VERDICT = {"release": "burst_released", "discard": "burst_discarded"}
_OF_RULING = {"banned": "rater_banned", "cleared": "rater_cleared", None: "rater_reinstated"}


def rule(who: Operator, rater: str, ruling: Ruling, reason: str) -> str:
    """Take out all that a rater said, count them whatever their record says, or (None) let the record count again.

    Returns
    -------
    str
        The id of the ruling; the reward model follows within a second.
    """
    with who.acting() as session:
        known = decisions.rater_of(session, rater)
        decided = decisions.give_ruling(session, rater=known, ruling=ruling, operator=who.name, reason=reason)
        audit.write(session, actor=who.name, action=_OF_RULING[ruling], subject=known, reason=reason)
        return decided


def decide_quarantine(who: Operator, name: str, verdict: Verdict, reason: str) -> str:
    """Let the votes of a burst count, or take them out for good; return the id of the ruling."""
    with who.acting() as session:
        ruling: Ruling = "banned" if verdict == "discard" else None
        decided = decisions.give_ruling(session, quarantine=name, ruling=ruling, operator=who.name, reason=reason)
        audit.write(session, actor=who.name, action=_OF_VERDICT[verdict], subject=name, reason=reason)
        return decided


def exclude(who: Operator, episode_id: str, reason: str) -> None:
    """Have nothing learned from an answer any more, for good; what was learned is taken out within a second."""
    with who.acting() as session:
        decisions.exclude(session, episode_id)
        audit.write(session, actor=who.name, action="answer_excluded", subject=episode_id, reason=reason)


def judge(who: Operator, episode_id: str, *, good: bool, over: str | None, reason: str) -> str:
    """Judge an answer, or judge it against another: raters are held against it; return the id of the probe."""
    with who.acting() as session:
        probe = decisions.give_probe(session, episode_id, good=good, over=over, operator=who.name, reason=reason)
        action = "judged_good" if good else "judged_bad"
        audit.write(session, actor=who.name, action=action, subject=episode_id, reason=reason)
        return probe
