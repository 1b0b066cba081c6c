"""``everloop flows``: what runs by schedule, starting it now, and cancelling it."""

from __future__ import annotations

import json
import os
import time
from typing import Annotated, Any

import typer
from rich.table import Table

from infra import report
from infra.errors import EverloopError, InvalidRequestError, NotFoundError, UnavailableError
from infra.report import JsonPath
from infra.settings import Settings, load
from infra.stack.parts import prefect_environment

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

WAIT_S = 0.5


@app.command("list")
def list_(json_path: JsonPath = None) -> None:
    """Show each flow: when it runs, when it will next, and how it ended last."""
    settings = _prepared()
    from flows import prefect_view

    rows = _reached(prefect_view.overview, settings)
    report.write_json(json_path, {"time_zone": settings.time_zone, "flows": rows})
    if json_path != "-":
        table = Table("flow", "schedule", "next", "last", "ended as", "pool", box=None)
        for row in rows:
            table.add_row(*(str(row[name] or "-") for name in ("name", "cron", "next", "last", "state", "pool")))
        report.output.print(table)
        report.output.print(
            f"schedules in {settings.time_zone}; quiet hours {', '.join(settings.quiet_hours) or '-'}"
        )


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="A flow, as `list` names it.")],
    param: Annotated[
        list[str] | None,
        typer.Option("--param", help="name=value, the value in JSON or plain; may be given again."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow it to its end.")] = True,
    json_path: JsonPath = None,
) -> None:
    """Start a flow now; exit status 1 where it does not complete."""
    settings = _prepared()
    from flows import prefect_view

    parameters = dict(map(_parameter, param or ()))
    run_id = _reached(prefect_view.start, settings, name, parameters)
    state = _reached(prefect_view.state_of, run_id)
    while wait and not state["final"]:
        time.sleep(WAIT_S)
        state = _reached(prefect_view.state_of, run_id)
    report.print_fields(json_path, {"run": run_id, **state})
    if wait and state["state"] != "Completed":
        raise typer.Exit(1)


@app.command()
def cancel(run_id: Annotated[str, typer.Argument(help="Id of a flow run.")]) -> None:
    """Have a flow run stopped; a night that it runs ends as cancelled, and nothing of it stays registered."""
    _prepared()
    from flows import prefect_view

    _reached(prefect_view.cancel, run_id)
    report.say(f"{run_id} is being cancelled")


def _prepared() -> Settings:
    settings = load()
    os.environ.update(prefect_environment(settings))  # Prefect reads its settings at import
    return settings


def _parameter(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found or not name:
        raise InvalidRequestError(f"{text!r} is no parameter; write --param name=value.", code="parameter_invalid")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _reached(ask: Any, *args: Any) -> Any:
    """Ask Prefect something; where it is away, say so."""
    import httpx
    from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

    try:
        return ask(*args)
    except EverloopError:
        raise
    except ObjectNotFound as error:
        raise NotFoundError(
            "Prefect knows no such flow or run; `everloop flows list` names the flows.", code="flow_not_found"
        ) from error
    except PrefectHTTPStatusError as error:
        raise InvalidRequestError(
            f"Prefect refused it: {error.response.text[:300]}", code="flow_parameters_invalid"
        ) from error
    except (httpx.HTTPError, RuntimeError) as error:
        raise UnavailableError(
            "Prefect does not answer; `everloop status` shows whether it runs. Serving and feedback go on without.",
            code="prefect_unavailable",
        ) from error
