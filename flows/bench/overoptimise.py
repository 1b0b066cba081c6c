"""``everloop bench overoptimise``: comparisons followed too far, with the guards off and on.

People like answers of 12 to 30 words; the base model's have about 70. So shorter is better for long, and both the
learned reward (the proxy) and what comparisons teach go on beyond that. One run follows the comparisons for many
steps, and its last checkpoint is taken; the other, on the same rows, has the guards that choose among checkpoints:
gold's peak, in which lengths that nobody rated well count for nothing, within the bound on the KL. What people
really like, without error, is the measure of both, and of where the proxy went on without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flows.bench import life
from flows.bench.life import Plan
from flows.preferences import PREFERENCES
from infra.errors import EverloopError

PREFERENCE = "brief"
FOLLOWED = {
    "recipe": "dpo",
    "epochs": 4.0,
    "learning_rate": 2e-4,
    "max_rows": 48,
    "checkpoint_steps": 3,
    "checkpoints_judged": 8,
    "judge_prompts": 48,
    "gate_tasks_per_skill": 0,
    "keep_answers": True,
}
PLAIN = {"length_guard": False, "pessimism_kappa": 0.0, "register_at": "last", "max_kl": 1e6}


def measure(rated: int, measured: int, seed: int) -> dict[str, Any]:
    """Play both on the same day's signals; return their curves and what held-out prompts show.

    Returns
    -------
    dict
        ``base`` (rate); ``plain`` and ``guarded``, each with ``curve`` (``step``, ``sqrt_kl``, ``proxy``, ``gold``,
        ``liked`` per checkpoint), ``taken`` (its step), ``rate`` on held-out prompts, and ``lost``: points of liked
        answers between the curve's best checkpoint and the one that was taken.
    """
    plan = Plan(
        PREFERENCE,
        {"plain": {**FOLLOWED, **PLAIN}, "guarded": FOLLOWED},
        contest=True,
        rated=rated,
        measured=measured,
        seed=seed,
    )
    found = life.play(plan)
    if failed := [night["reason"] for night in found["nights"] if night["status"] == "failed"]:
        raise EverloopError(f"A night came to nothing: {failed[0]}", code="bench_failed")
    plain, guarded = (_curve(night) for night in found["nights"])
    return {
        "base": found["base"]["rate"],
        "base_words": found["base"]["mean_words"],
        "plain": plain,
        "guarded": guarded,
        "guards_gain": 100.0 * (guarded["rate"] - plain["rate"]),
    }


def _curve(night: dict[str, Any]) -> dict[str, Any]:
    curve = [
        {
            "step": point["step"],
            "sqrt_kl": max(point["kl"], 0.0) ** 0.5,
            "proxy": point["proxy"],
            "gold": point["gold"],
            "liked": _liked(night["answers"][str(point["step"])]),
            "mean_words": point["mean_words"],
        }
        for point in night["peak"]
    ]
    taken = next(point for point in night["peak"] if point["taken"])["step"]
    liked = {point["step"]: point["liked"] for point in curve}
    return {
        "curve": curve,
        "taken": taken,
        "rate": night["rate"],
        "n": night["n"],
        "mean_words": night["mean_words"],
        "status": night["status"],
        "reason": night["reason"],
        "lost": 100.0 * (max(liked.values()) - liked[taken]),
    }


def _liked(answers: Sequence[str]) -> float:
    return sum(map(PREFERENCES[PREFERENCE].likes, answers)) / max(len(answers), 1)
