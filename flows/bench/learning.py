"""``everloop bench learning`` and ``bench recipes``: what people gain, how soon, by which recipe."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flows.bench import life, training
from flows.bench.life import Plan
from flows.preferences import PREFERENCES
from infra.errors import InvalidRequestError
from infra.files import write_whole
from trainer.config import nearest, read_toml
from trainer.recipe import resolve

LEARNED = ("short", "reader", "example", "flat", "polite", "three")
QUARTER = 4
TASKS_PER_SKILL = 8
OVERHEAD_ROWS, OVERHEAD_RUNS = 48, 5


def learning(
    only: Sequence[str],
    nights: int,
    rated: int,
    measured: int,
    config: Mapping[str, Any],
    seed: int,
    lives_dir: Path | None,
    *,
    quarter: bool = True,
) -> dict[str, Any]:
    """Play preferences through `nights` nights each, and one night after a quarter of a day's ratings.

    Parameters
    ----------
    measured
        Held-out answers of each measurement.
    lives_dir
        Where finished lives are kept: a bench that was stopped goes on with the others.
    quarter
        Whether the night after a quarter of the ratings, a life of its own, is played.

    Returns
    -------
    dict
        Per preference ``base``, ``nights``, ``quarter`` and ``skills``; and ``mean_gain_1``, ``mean_gain_3``,
        ``quarter_share``, ``verifier_delta`` (points, mean over preferences), ``overhead_ratio``, ``memory_ratio``.
    """
    names = list(only) or list(LEARNED)
    _check(names)
    resolve(config)
    found: dict[str, Any] = {}
    for name in names:
        first = Plan(name, {"night": config}, rated=rated // QUARTER, measured=measured, seed=seed)
        whole = replace(first, nights=nights, rated=rated, tasks_per_skill=TASKS_PER_SKILL)
        found[name] = {**_played(whole, lives_dir), "quarter": _played(first, lives_dir) if quarter else None}
    gains = [_gains(one) for one in found.values()]
    quarters = [_gains(one["quarter"])[0] for one in found.values() if quarter]
    overhead = training.measure(OVERHEAD_ROWS, OVERHEAD_RUNS)
    mean_gain_1 = statistics.mean(one[0] for one in gains)
    return {
        "preferences": found,
        "mean_gain_1": mean_gain_1,
        "mean_gain_3": statistics.mean(one[2] for one in gains) if nights >= 3 else None,
        "quarter_share": statistics.mean(quarters) / mean_gain_1 if quarters and mean_gain_1 > 0 else None,
        "verifier_delta": statistics.mean(one["skills"]["delta"] for one in found.values()),
        "overhead_ratio": overhead["overhead_ratio"],
        "memory_ratio": overhead["memory_ratio"],
    }


def _played(plan: Plan, lives_dir: Path | None) -> dict[str, Any]:
    """Return what a life found, from where it is kept if it was played before."""
    if lives_dir is None:
        return life.play(plan)
    text = json.dumps(asdict(plan), sort_keys=True)
    kept = lives_dir / f"{plan.preference}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    if not kept.exists():
        found = life.play(plan)
        lives_dir.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps({"plan": asdict(plan), "found": found}, indent=1))
    return dict(json.loads(kept.read_text())["found"])


def recipes(preference: str, candidates: Sequence[str], rated: int, measured: int, seed: int) -> dict[str, Any]:
    """Let recipes train on the same day's signals, each from the base model; return what each gained a minute.

    Parameters
    ----------
    candidates
        Names of recipes, or paths of TOML files.
    """
    _check([preference])
    configs = {given: _config(given) for given in candidates}
    plan = Plan(preference, configs, contest=True, rated=rated, measured=measured, seed=seed)
    found = life.play(plan)
    base = found["base"]["rate"]
    for night in found["nights"]:
        if night.get("rate") is not None:
            night["gain"] = gain(base, night["rate"])
            night["gain_per_minute"] = night["gain"] / (night["seconds"] / 60.0)
    return found


def gain(base: float, rate: float | None) -> float:
    """Return what was gained, in points; from a base over one half, the share of the way to 1 in percent.

    A night that failed gained nothing.
    """
    if rate is None:
        return 0.0
    return 100.0 * (rate - base) / (1.0 - base if base > 0.5 else 1.0)


def _gains(played: Mapping[str, Any]) -> list[float]:
    return [gain(played["base"]["rate"], night.get("rate")) for night in played["nights"]]


def _config(given: str) -> dict[str, Any]:
    config = read_toml(Path(given)) if given.endswith(".toml") else {"recipe": given}
    resolve(config)
    return config


def _check(names: Sequence[str]) -> None:
    for name in names:
        if name not in PREFERENCES:
            raise InvalidRequestError(
                f"There is no preference {name!r}. {nearest(name, list(PREFERENCES))}", code="preference_unknown"
            )
