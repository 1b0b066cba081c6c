"""Two other sources of human judgement, so that nothing is tuned on one file: arena votes, rated conversations."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

from flows.bench.pairs import encode, one_pass, scores
from infra.settings import Settings
from reward import propensity
from reward.encoder import Answer, Encoder
from reward.online import BayesianHead
from reward.style import style_features

MAX_VOTES = 50_000
MAX_CHARS = 1_200
NEUTRAL = 5.0  # where the sliders stood when nobody moved them
MISSING = "the wheel {} is not installed (make setup installs it)"


def wheel_file(package: str, *parts: str) -> Path | None:
    """Return a data file of a wheel without importing the package around it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]).joinpath(*parts)


def arena() -> dict[str, Any]:
    """Learn who wins in the arena, vote by vote in random order, beside the same fit in hindsight.

    Features are which model answered, so the head is an online Bradley-Terry model. Ties are left out.
    """
    path = wheel_file("leaderbot", "data", "chatbotarena_20240814.json")
    if path is None:
        return {"skipped": MISSING.format("leaderbot")}
    data = json.loads(path.read_text())
    pairs, counts = np.array(data["X"]), np.array(data["Y"])[:, :2]
    rng = np.random.default_rng(0)
    flat = np.repeat(np.arange(counts.size), counts.ravel().astype(int))
    chosen = rng.permutation(flat)[:MAX_VOTES]
    rows, lost = chosen // 2, chosen % 2
    z = np.zeros((len(chosen), len(data["models"])))
    at = np.arange(len(chosen))
    z[at, pairs[rows, 0]], z[at, pairs[rows, 1]] = 1.0, -1.0
    found: dict[str, Any] = one_pass(z, list(1.0 - lost), pairs=False)
    # In hindsight it has seen every vote, also those that it is judged on.
    head = BayesianHead.prior(z.shape[1])
    for row, target in zip(z, 1.0 - lost, strict=True):
        head.learn_one(row, float(target))
    first = len(z) // 4
    batch = scores([s.p_good for s in head.predict_many(z[first:])], list(1.0 - lost[first:]), pairs=False)
    return {**found, "votes_in_all": int(counts.sum()), "hindsight_log_loss": batch["log_loss"]}


def conversations(settings: Settings, encoder: Encoder) -> dict[str, Any]:
    """Learn which conversations people rated well, and which at all, in the order in which they began."""
    path = wheel_file("chitchat_dataset", "dataset.json")
    if path is None:
        return {"skipped": MISSING.format("chitchat-dataset")}
    rows = sorted(json.loads(path.read_text()).values(), key=lambda row: str(row["start"]))
    return {**_ratings(settings, encoder, rows), "who_rates": _who_rates(rows)}


def _ratings(settings: Settings, encoder: Encoder, rows: list[dict[str, Any]]) -> dict[str, float]:
    rated = [row for row in rows if row.get("ratings") and abs(_mean(row) - NEUTRAL) > 0.5 and _text(row)]
    rated = [row for row in rated if len({m["sender"] for turn in row["messages"] for m in turn}) == 2]
    kept = settings.home / "bench" / f"chitchat-{encoder.name}.npy"
    if not kept.exists():
        answers: list[Answer] = [
            ([{"role": "user", "content": row.get("prompt") or "Let's chat."}], _text(row)) for row in rated
        ]
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, encode(encoder, answers, "features of conversations"))
    targets = [float(_mean(row) > NEUTRAL) for row in rated]
    found = one_pass(np.load(kept).astype(np.float64), targets, pairs=False)
    return {**found, "share_good": float(np.mean(targets))}


def _who_rates(rows: list[dict[str, Any]]) -> dict[str, object]:
    model, seen, given = propensity.Propensity(), dict[str, int](), dict[str, int]()
    for row in rows:
        who = row["messages"][0][0]["sender"] if row["messages"] and row["messages"][0] else ""
        x = propensity.inputs(
            0.5, 0.0, float(style_features(_text(row))[0]), seen.get(who, 0), given.get(who, 0), asked=False
        )
        rated = bool(row.get("ratings"))
        model.learn(x, rated=rated)
        seen[who] = seen.get(who, 0) + 1
        given[who] = given.get(who, 0) + rated
    return model.report()


def _text(row: dict[str, Any]) -> str:
    return "\n".join(m["text"] for turn in row["messages"] for m in turn).strip()[:MAX_CHARS]


def _mean(row: dict[str, Any]) -> float:
    return float(np.mean(list(row["ratings"].values())))
