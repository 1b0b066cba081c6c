"""``/operate/learning``: what the reward model knows, what came in, and the runs; and each run by itself."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deploy import runs, signals
from deploy.pages.rendering import SKILL, Chart, Page, Series
from deploy.runs import TrainingRun
from infra.access.gate import needs
from infra.access.roles import Role
from infra.db import Sessions, transaction
from infra.log import metrics
from infra.settings import Settings
from infra.text import CleanText
from reward import report

router = APIRouter(prefix="/operate", include_in_schema=False, dependencies=[needs(Role.OPERATOR)])

NUM_RUNS = 20
COUNTED_EVERY_S = 10.0
TRAINING_CURVES = ("loss", "reward", "rewards/margins", "kl", "entropy", "mean_token_accuracy", "grad_norm")


@dataclass(slots=True)
class Counts:
    """Figures that are counted over all rows, and so at most once in :data:`COUNTED_EVERY_S`."""

    at_s: float
    counted_at: datetime
    reward: dict[str, Any]
    signals: dict[str, list[tuple[Any, ...]]]


def _counts(request: Request, sessions: Sessions) -> Counts:
    kept: Counts | None = getattr(request.app.state, "operate_counts", None)
    if kept is None or time.monotonic() - kept.at_s > COUNTED_EVERY_S:
        with transaction(sessions) as session:
            kept = Counts(time.monotonic(), datetime.now(UTC), report.summary(session), signals.counts(session))
        request.app.state.operate_counts = kept
    return kept


@router.get("/learning")
def learning_page(request: Request, csv: str | None = None) -> Response:
    """Serve the reward model's figures, what came in, and the runs."""
    sessions, settings = request.app.state.sessions, request.app.state.settings
    counts = _counts(request, sessions)
    with transaction(sessions) as session:
        is_training = runs.is_training(session)
        judged = runs.newest_judged(session)
        context = {
            "counts": counts,
            "reward": counts.reward,
            "runs": [(run, run.status == "running" and not is_training) for run in runs.newest(session, NUM_RUNS)],
            "judged": judged,
            "skills": skills(judged),
            "log": metrics.read(session),
            "settings": settings,
        }
        return Page("learning.html", context, _charts(counts, settings, judged)).respond(request, csv)


def skills(run: TrainingRun | None) -> list[dict[str, Any]]:
    """Return the gates of single skills of a run."""
    gates = (run.result or {}).get("gates", ()) if run else ()
    return [{**gate, "gate": gate["gate"].removeprefix(SKILL)} for gate in gates if gate["gate"].startswith(SKILL)]


def _charts(counts: Counts, settings: Settings, judged: TrainingRun | None) -> list[Chart]:
    calibration = counts.reward.get("calibration") or {}
    table = calibration.get("reliability", [])
    kinds = [(kind, count) for kind, count in counts.signals["kinds"]]
    aside = [(reason or "unknown", count) for reason, count in counts.signals["set_aside"]]
    return [
        Chart(
            id="calibration",
            title="Is it right as often as it says?",
            says="For each tenth of forecasts, how often the answer was liked; on the diagonal it is as it says.",
            x="forecast, %",
            series=[Series("liked, %", "points"), Series("as it says", "limit"), Series("signals", "none")],
            rows=[
                (100 * row["forecast"], 100 * row["outcome"], 100 * row["forecast"], row["count"]) for row in table
            ],
        ),
        Chart(
            id="kinds",
            title="Signals by kind",
            says="How many signals of each kind were given.",
            x="kind",
            series=[Series("signals", "bars")],
            rows=kinds,
        ),
        Chart(
            id="set-aside",
            title="Set aside, and why",
            says="How many signals the reward model did not use, by reason.",
            x="reason",
            series=[Series("signals", "bars")],
            rows=aside,
        ),
        *([overoptimisation(runs.metrics(settings.runs_dir, judged.id))] if judged else []),
    ]


def overoptimisation(lines: Sequence[dict[str, Any]]) -> Chart:
    """Return what training followed, and what it never saw, over the distance from the base model."""
    points = sorted((line for line in lines if line.get("phase") == "peak" and "kl" in line), key=lambda p: p["kl"])
    rows = [
        (math.sqrt(max(p["kl"], 0.0)), p["proxy"], p["gold"], p["gold"] if p.get("taken") else None, p["step"])
        for p in points
    ]
    return Chart(
        id="overoptimisation",
        title="Proxy and gold over sqrt(KL)",
        says="Where gold falls while the proxy rises, training has begun to fool the reward; the run stops at "
        "gold's peak.",
        x="sqrt(KL), nats",
        series=[
            Series("proxy (what training follows)"),
            Series("gold (what it never sees)"),
            Series("taken", "points"),
            Series("step", "none"),
        ],
        rows=rows,
    )


@router.get("/runs/{run_id}")
def run_page(run_id: CleanText, request: Request, csv: str | None = None) -> Response:
    """Serve a run: how far it is, what it was made from, what it measured, and how it ended."""
    settings = request.app.state.settings
    with transaction(request.app.state.sessions) as session:
        run = runs.get(session, run_id)
        measured = runs.metrics(settings.runs_dir, run.id)
        prefect = settings.prefect_url.removesuffix("/api") if settings.prefect_url else None
        context = {
            "run": run,
            "result": run.result or {},
            "is_stopped": run.status == "running" and not runs.is_training(session),
            "log": measured[-40:],
            "in_prefect": f"{prefect}/runs/flow-run/{run.flow_run_id}" if prefect and run.flow_run_id else None,
        }
        charts = [chart for chart in (*_curves(measured), overoptimisation(measured)) if chart.rows]
        return Page("run.html", context, charts).respond(request, csv)


def _curves(measured: Sequence[dict[str, Any]]) -> list[Chart]:
    """Return a chart for each figure that training reports step by step."""
    steps = [line for line in measured if line.get("phase") == "train" and "step" in line]
    charts = []
    for name in TRAINING_CURVES:
        rows = [(line["step"], line[name]) for line in steps if isinstance(line.get(name), int | float)]
        if rows:
            title = name.replace("/", " ").replace("_", " ")
            says = f"{title.capitalize()} by step of training."
            charts.append(Chart(name.replace("/", "-"), title.capitalize(), says, "step", [Series(title)], rows))
    return charts
