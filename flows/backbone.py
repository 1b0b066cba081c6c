"""The reward backbone's run as a Prefect flow."""

from __future__ import annotations

from typing import Any

from prefect import flow

from infra.db import connect
from infra.errors import ConflictError
from infra.settings import load


@flow(name="reward-backbone", log_prints=True)  # type: ignore[untyped-decorator]
def reward_backbone(config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train a reward backbone on what was said so far; activate it where it wins.

    Parameters
    ----------
    config
        Overrides of the training's settings.
    """
    from reward import backbone
    from reward.backbone_config import BackboneConfig

    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=3)
    try:
        result = backbone.run(sessions, settings, BackboneConfig.model_validate(config or {}), on_phase=print)
    except ConflictError as error:  # somebody trains one by hand
        result = {"status": "skipped", "reason": error.message}
    print(f"{result['status']}: {result['reason']}")
    return result
