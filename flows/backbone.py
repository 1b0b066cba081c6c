"""The reward backbone's run as a Prefect flow."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows import artifacts
from flows.retries import step
from infra.db import Sessions, connect
from infra.errors import ConflictError
from infra.settings import Settings, load


@flow(name="reward-backbone", log_prints=True)  # type: ignore[untyped-decorator]
def reward_backbone(config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train a reward backbone on what was said so far; activate it where it wins.

    Parameters
    ----------
    config
        Overrides of the training's settings.
    """
    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=3)
    try:
        result: dict[str, Any] = train(sessions, settings, config or {})
    except ConflictError as error:  # somebody trains one by hand
        result = {"status": "skipped", "reason": error.message}
    print(f"{result['status']}: {result['reason']}")
    contest = result.get("contest", {})
    sides = [{"side": side, **contest[side]} for side in ("active", "candidate") if side in contest]
    artifacts.table("contest", sides, f"{result['status']}: {result['reason']}")
    return result


@step
def train(sessions: Sessions, settings: Settings, config: dict[str, Any]) -> dict[str, Any]:
    """Train and judge a backbone; one that was trained before the database went away is only judged."""
    from reward import backbone
    from reward.backbone_config import BackboneConfig

    return backbone.run(sessions, settings, BackboneConfig.model_validate(config), on_phase=print)
