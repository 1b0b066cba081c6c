"""The command root. A subcommand's module is imported only when it is called, so ``--help`` is quick."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

# name: (module, attribute, the line in --help)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "up": ("infra.stack.cli", "up", "Start the embedded stack and serve."),
    "down": ("infra.stack.cli", "down", "Stop the stack; no process stays behind."),
    "status": ("infra.stack.cli", "status", "Show each part, the loop, and what needs a decision."),
    "doctor": ("flows.doctor", "doctor", "Check the machine, the settings and every service; say what to do."),
    "backup": ("flows.backup.cli", "backup", "Write all that was learned to a directory, while people chat."),
    "restore": ("flows.backup.cli", "restore", "Restore a backup into an empty home, and check it."),
    "migrate": ("infra.stack.cli", "migrate", "Bring a database of yours to this version's tables."),
    "demo": ("flows.cli", "demo", "Take the loop round with a simulated population."),
    "chat": ("agent.cli", "chat", "Talk to the assistant in the terminal."),
    "train": ("flows.cli", "train", "Start a night run now and follow it."),
    "flows": ("flows.flows_cli", "app", "What runs by schedule; start it now, or cancel it."),
    "promote": ("deploy.cli", "promote", "Make a release the champion, with a reason."),
    "rollback": ("deploy.cli", "rollback", "Go back to an earlier champion, with a reason."),
    "releases": ("deploy.releases_cli", "app", "Releases and their lineage, import, retention."),
    "canary": ("deploy.canary_cli", "app", "A candidate among users: open, explain, hold, abort."),
    "autonomy": ("deploy.cli", "set_autonomy", "What the platform does by itself, and what it proposes."),
    "audit": ("deploy.audit_cli", "app", "Who did what, when, why and from where; verify it."),
    "access": ("agent.access_cli", "app", "Accounts, links to sign in, keys."),
    "feedback": ("feedback.cli", "feedback", "Import, export and follow what people said."),
    "users": ("feedback.cli", "users_app", "Consent and erasure."),
    "reward": ("flows.reward_cli", "app", "State of the reward model, gold probes, raters, learning anew."),
    "memory": ("agent.memory.cli", "app", "What makes the assistant remember one thing and not another."),
    "log": ("infra.log.cli", "app", "State of the log, replay, dead letters."),
    "bench": ("flows.bench.cli", "app", "Measure; each bench prints what it compared with."),
}


class LazyGroup(TyperGroup):
    """A group that knows its commands' names and help without importing them."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        if cmd_name not in COMMANDS:
            return None
        module, attribute, help_line = COMMANDS[cmd_name]
        function = getattr(importlib.import_module(module), attribute)
        if isinstance(function, typer.Typer):
            function.info.help = help_line
            return typer.main.get_group(function)
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name=cmd_name, help=help_line)(function)
        return typer.main.get_command(app)

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry[2]) for name, entry in COMMANDS.items()])


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"everloop {version('everloop')}")
        raise typer.Exit


@app.callback()
def root(
    version_: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Everloop: an assistant that gets better from the people who use it."""


def main() -> None:
    """Run the command line; an error that helps is one sentence and exit status 1."""
    from infra.errors import EverloopError

    try:
        app()
    except KeyboardInterrupt:
        typer.echo("everloop: interrupted", err=True)
        sys.exit(130)
    except EverloopError as error:
        typer.echo(f"everloop: {error.message} [{error.code}]", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
