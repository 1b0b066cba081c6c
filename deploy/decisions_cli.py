"""``everloop reward ban`` and others: what is decided about raters and answers, at a terminal."""

from __future__ import annotations

from typing import Annotated, cast

import typer

from deploy import decisions
from deploy.cli import Reason, operator
from deploy.decisions import Ruling, Verdict
from infra import report
from infra.db import transaction
from infra.errors import InvalidRequestError
from infra.report import JsonPath

UserName = Annotated[str, typer.Argument(help="A user, or (as program:NAME) a verifier or judge.")]
Answer = Annotated[str, typer.Argument(help="The answer's id.")]


def gold(
    episode: Answer,
    reason: Reason,
    good: Annotated[bool, typer.Option("--good/--bad", help="Your verdict.")] = True,
    over: Annotated[str | None, typer.Option("--over", help="Judge it against this answer.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Judge an answer yourself: raters are held against it."""
    probe = decisions.judge(operator(), episode, good=good, over=over, reason=reason)
    report.write_json(json_path, {"probe": probe})
    report.say(f"probe {probe}")


def exclude(episode: Answer, reason: Reason) -> None:
    """Have nothing learned from an answer any more, for good."""
    decisions.exclude(operator(), episode, reason)
    report.say(f"nothing is learned from {episode}")


def ban(user: UserName, reason: Reason, json_path: JsonPath = None) -> None:
    """Take out all that a rater said, and set aside what they will say."""
    _rule(user, "banned", reason, json_path)


def clear(user: UserName, reason: Reason, json_path: JsonPath = None) -> None:
    """Count a rater fully, whatever their record says."""
    _rule(user, "cleared", reason, json_path)


def reinstate(user: UserName, reason: Reason, json_path: JsonPath = None) -> None:
    """Take back what was decided about a rater: their record counts again."""
    _rule(user, None, reason, json_path)


def _rule(user: str, ruling: Ruling, reason: str, json_path: str | None) -> None:
    report.write_json(json_path, {"ruling": decisions.rule(operator(), user, ruling, reason)})
    report.say(f"{user}: {ruling or 'as their record says'}")


def quarantine(
    name: Annotated[str | None, typer.Argument(help="A quarantine; without one, they are listed.")] = None,
    verdict: Annotated[str | None, typer.Option("--verdict", help="release, or discard.")] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why; it is kept with the decision.")] = "",
    json_path: JsonPath = None,
) -> None:
    """List bursts of fresh accounts that were held, or decide about one."""
    from reward.report import list_quarantines

    who = operator()
    if name is None:
        with transaction(who.sessions) as session:
            report.print_fields(json_path, {"quarantines": list_quarantines(session)})
        return
    if verdict not in ("release", "discard") or not reason:
        raise InvalidRequestError(
            "Say --verdict release or --verdict discard, and --reason.", code="verdict_required"
        )
    decided = decisions.decide_quarantine(who, name, cast(Verdict, verdict), reason)
    report.print_fields(json_path, {"ruling": decided})


COMMANDS = (gold, exclude, ban, clear, reinstate, quarantine)
