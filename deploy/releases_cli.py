"""``everloop releases``: what there is to serve, its lineage, adapters from outside, and files that may go."""

from __future__ import annotations

import getpass
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deploy import audit, registry, retention, variants
from deploy.cli import Reason
from deploy.lineage import LineageView, lineage, releases
from deploy.names import CHAMPION
from infra import report
from infra.db import connect, transaction
from infra.errors import SetupError
from infra.report import JsonPath
from infra.settings import load

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
Name = Annotated[str, typer.Argument(help="A release; champion and challenger are what is served now.")]


@app.command("list")
def list_releases(
    run: Annotated[str | None, typer.Option("--run", help="Those that this run trained.")] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help="Those of a dataset, by its digest.")] = None,
    reward_snapshot: Annotated[int | None, typer.Option("--reward-snapshot", help="Those of its number.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rows.")] = 50,
    json_path: JsonPath = None,
) -> None:
    """Releases, the newest first, and what each came from."""
    with transaction(connect(load().need("database_url"), pool_size=1)) as session:
        found = releases(session, run=run, dataset=dataset, reward_snapshot=reward_snapshot, limit=limit)
    report.write_json(json_path, {"releases": [view.model_dump() for view in found]})
    if json_path == "-":
        return
    table = Table("release", "now", "goes on from", "run", "dataset", "reward", "created", "files", box=None)
    for view in found:
        files = "" if view.digest is None else view.mark or ("deleted" if view.files_deleted_at else "kept")
        told = (view.alias, view.started_from, view.run, (view.dataset_digest or "")[:12], view.reward_snapshot)
        created = f"{view.created_at:%Y-%m-%d %H:%M}"
        table.add_row(view.name, *("" if value is None else str(value) for value in told), created, files)
    report.output.print(table)


@app.command()
def show(name: Name, json_path: JsonPath = None) -> None:
    """All that is known of a release."""
    report.print_fields(json_path, _view(name).model_dump())


@app.command("lineage")
def show_lineage(name: Name, json_path: JsonPath = None) -> None:
    """What a release came from, and what came of it."""
    view = _view(name)
    names = {"name", "ancestors", "descendants", "run", "recipe", "dataset_digest", "reward_snapshot", "canaries"}
    report.print_fields(json_path, view.model_dump(include=names))


@app.command("import")
def import_adapter(
    directory: Annotated[Path, typer.Argument(help="Holds adapter_config.json and adapter_model.safetensors.")],
    reason: Reason,
    name: Annotated[str | None, typer.Option("--name", help="What to call it; numbered, if unset.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Register an adapter from outside, once it is seen to be safe and of the present base model."""
    settings = load()
    try:
        with transaction(connect(settings.need("database_url"), pool_size=1)) as session:
            manifest = {"recipe": "imported"}
            release = registry.register(session, settings, directory, run_id=None, manifest=manifest, name=name)
            audit.write(
                session,
                actor=getpass.getuser(),
                action="imported",
                subject=release.name,
                reason=reason,
                digest=release.adapter_digest,
            )
    except OSError as error:
        raise SetupError(
            f"The adapter could not be copied: {error.strerror}. Nothing of it is registered.", code="copy_failed"
        ) from error
    report.write_json(json_path, {"release": release.name, "digest": release.adapter_digest})
    report.say(f"registered {release.name}; `everloop promote {release.name} --reason …` has it served")


@app.command()
def propose(
    best_of: Annotated[int, typer.Option("--best-of", help="Answers to choose from where the first is weak.")],
    reason: Reason,
    of: Annotated[str, typer.Option("--of", help="The release whose weights it has.")] = CHAMPION,
    name: Annotated[str | None, typer.Option("--name", help="What to call it; chosen, if unset.")] = None,
    json_path: JsonPath = None,
) -> None:
    """Make a release that answers otherwise than another of the same weights, and propose a canary of it."""
    with transaction(connect(load().need("database_url"), pool_size=1)) as session:
        release = variants.propose(session, of, best_of, name=name, actor=getpass.getuser(), reason=reason)
    told = {"release": release.name, "variant_of": release.variant_of, "decoding": release.decoding}
    report.write_json(json_path, told)
    report.say(f"made {release.name}; `everloop canary open {release.name} --reason …` has it meet users")


@app.command()
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    json_path: JsonPath = None,
) -> None:
    """Delete the files of adapters that nothing serves, rolls back to or goes on from; it is done once a minute."""
    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=1)
    found = retention.prune(sessions, settings, dry_run=dry_run, actor=getpass.getuser())
    report.print_fields(json_path, {"dry_run": dry_run, **asdict(found)})


def _view(name: str) -> LineageView:
    with transaction(connect(load().need("database_url"), pool_size=1)) as session:
        return lineage(session, name)
