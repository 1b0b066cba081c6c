"""``everloop access``: accounts, links and keys, from the machine that Everloop runs on."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.table import Table
from sqlalchemy.orm import Session

from deploy import audit
from infra import report
from infra.access import accounts, keys, sessions
from infra.access.roles import Role
from infra.access.tables import Account
from infra.db import connect, transaction
from infra.report import JsonPath
from infra.settings import load

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="An account's name.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it goes into the audit log.")]


@contextmanager
def _acting() -> Iterator[Session]:
    with transaction(connect(load().need("database_url"), pool_size=1)) as session:
        yield session


def _note(session: Session, action: str, subject: str, reason: str, **details: Any) -> None:
    audit.write(session, actor=getpass.getuser(), action=action, subject=subject, reason=reason, **details)


def _link(session: Session, account: Account) -> str:
    return sessions.link(session, account, load().need("public_url"))


@app.command("list")
def list_accounts(json_path: JsonPath = None) -> None:
    """Show who may come in, and what they may do."""
    with _acting() as session:
        found = [
            {
                "name": account.name,
                "user": account.user_id,
                "role": account.role,
                "since": account.created_at.isoformat(timespec="seconds"),
                "enters by": account.issuer or ("password" if account.password_hash else "link"),
                "keys": len(keys.of(session, account)),
                "disabled": account.disabled_at is not None,
            }
            for account in accounts.newest(session)
        ]
    report.write_json(json_path, {"accounts": found})
    if json_path != "-":
        table = Table(*(found[0] if found else ("name", "role")), box=None)
        for row in found:
            table.add_row(*map(str, row.values()))
        report.output.print(table)


@app.command()
def add(name: Name, reason: Reason, role: Annotated[Role, typer.Option("--role")] = Role.USER) -> None:
    """Let somebody in; prints the link by which they sign in for the first time."""
    with _acting() as session:
        account = accounts.create(session, name, role)
        _note(session, "account.added", account.id, reason, role=role)
        typer.echo(_link(session, account))


@app.command()
def link(
    name: Annotated[str, typer.Argument(help="An account's name.")] = accounts.OWNER,
    reset: Annotated[bool, typer.Option("--reset", help="Take their password away; all sessions end.")] = False,
) -> None:
    """Print a link by which somebody signs in once."""
    with _acting() as session:
        # Where no `up` has made the owner, whoever has this terminal is let in like that for the first time.
        account = (
            accounts.ensure(session, name, Role.ADMIN) if name == accounts.OWNER else accounts.get(session, name)
        )
        if reset:
            accounts.forget_password(session, account)
        _note(session, "account.link", account.id, "asked for at the terminal", reset=reset)
        typer.echo(_link(session, account))


@app.command()
def role(name: Name, role: Role, reason: Reason) -> None:
    """Change what somebody may do: user, rater, operator or admin."""
    with _acting() as session:
        account = accounts.get(session, name)
        accounts.set_role(session, account, role)
        _note(session, "account.changed", account.id, reason, role=role)
    report.say(f"{name} is {role} now")


@app.command()
def disable(name: Name, reason: Reason) -> None:
    """Keep somebody out: sessions end, keys are revoked."""
    with _acting() as session:
        account = accounts.get(session, name)
        accounts.disable(session, account)
        _note(session, "account.changed", account.id, reason, disabled=True)
    report.say(f"{name} is kept out")


@app.command()
def enable(name: Name, reason: Reason) -> None:
    """Let somebody in again; they need new keys."""
    with _acting() as session:
        account = accounts.get(session, name)
        accounts.enable(account)
        _note(session, "account.changed", account.id, reason, disabled=False)
    report.say(f"{name} may come in")


@app.command()
def remove(name: Name, reason: Reason) -> None:
    """Delete an account with its keys; what it said stays until `everloop users forget`."""
    with _acting() as session:
        account = accounts.get(session, name)
        report.say(f"its user is {account.user_id}")
        accounts.remove(session, account)
        _note(session, "account.removed", account.id, reason)


@app.command()
def key(
    name: Name,
    reason: Reason,
    role: Annotated[Role, typer.Option("--role")] = Role.USER,
    days: Annotated[float | None, typer.Option("--days", help="Until it ends; for ever, if unset.")] = None,
    acts_for_others: Annotated[
        bool, typer.Option("--acts-for-others", help="Let it name any user: for a server with accounts of its own.")
    ] = False,
    requests_per_minute: Annotated[int | None, typer.Option("--requests-per-minute")] = None,
) -> None:
    """Make a key of an account; prints its secret, which is shown this once."""
    with _acting() as session:
        account = accounts.get(session, name)
        options: dict[str, Any] = {"role": role, "days": days, "acts_for_others": acts_for_others}
        made, secret = keys.issue(session, account, reason, requests_per_minute=requests_per_minute, **options)
        _note(session, "key.issued", made.id, reason, account=account.id)
        report.say(f"{made.id}, of {account.name}")
        typer.echo(secret)


@app.command("keys")
def list_keys(name: Name, json_path: JsonPath = None) -> None:
    """Show the keys of an account, and when each was last used."""
    with _acting() as session:
        found = [
            {
                "id": key.id,
                "name": key.name,
                "role": key.role,
                "for others": key.acts_for_others,
                "ends": key.expires_at and key.expires_at.isoformat(timespec="minutes"),
                "last used": key.last_used_at and key.last_used_at.isoformat(timespec="minutes"),
            }
            for key in keys.of(session, accounts.get(session, name))
        ]
    report.write_json(json_path, {"keys": found})
    if json_path != "-":
        table = Table(*(found[0] if found else ("id", "name")), box=None)
        for row in found:
            table.add_row(*(str(value or "–") for value in row.values()))
        report.output.print(table)


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(help="A key's id.")], reason: Reason) -> None:
    """End a key."""
    with _acting() as session:
        keys.revoke(keys.get(session, key_id))
        _note(session, "key.revoked", key_id, reason)
    report.say(f"{key_id} is revoked")
