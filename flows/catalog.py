"""Every flow: its name, where it is, when it runs, in which pool, and how many of it may run at once."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from infra.settings import Settings

DEPLOYMENT = "everloop"
POOL = "everloop"  # this machine's
WATCH_CRON = "*/30 * * * *"  # the night starts the watch itself; this takes over where that was lost


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A flow as it is deployed.

    Attributes
    ----------
    entrypoint
        Module and function: what runs is the installed package, and no copy of it.
    limit
        How many runs of it Prefect lets run at once, a further one being cancelled; None where the flow itself sees
        to it: of nights a lock in the database lets one train, whatever started it, and wherever.
    """

    name: str
    entrypoint: str
    pool: str
    cron: str
    limit: int | None = 1

    @property
    def address(self) -> str:
        """What Prefect calls its deployment."""
        return f"{self.name}/{DEPLOYMENT}"

    def load(self) -> Any:
        """Return the flow."""
        module, _, function = self.entrypoint.rpartition(".")
        return getattr(importlib.import_module(module), function)


def catalog(settings: Settings) -> list[Scheduled]:
    """Return all flows."""
    return [
        Scheduled("nightly", "flows.nightly.nightly", settings.night_pool, settings.night_cron, limit=None),
        Scheduled("watch-canary", "flows.nightly.watch_canary", POOL, WATCH_CRON, limit=None),
        Scheduled("reward-backbone", "flows.backbone.reward_backbone", POOL, settings.backbone_cron),
        Scheduled("retention", "flows.upkeep.retention", POOL, settings.retention_cron),
        Scheduled("erasure", "flows.upkeep.finish_erasures", POOL, settings.erasure_cron),
        Scheduled("attest", "flows.upkeep.attest", POOL, settings.attest_cron),
    ]
