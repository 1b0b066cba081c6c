"""Attestation: proof that the model served under a release's name is that release.

A probe is the log-probability of each token of fixed texts. A release's probe must differ from the base
model's and from the champion's; an engine that silently ignores an adapter gives the base model's.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from deploy.gates import MIN_PROBE_DIFFERENCE
from deploy.tables import Attestation, Release
from infra.engine import EngineClient, mean_abs_difference
from infra.settings import BASE_MODEL_NAME

PROBES = (
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\nThe sky is blue because "
    "sunlight is scattered by the air, and blue light is scattered the most.<|im_end|>\n",
    "<|im_start|>user\nHow do I boil an egg?<|im_end|>\n<|im_start|>assistant\nPut the egg in boiling "
    "water, wait for about eight minutes, then cool it under cold water and peel it.<|im_end|>\n",
    "<|im_start|>user\nTell me about Rome.<|im_end|>\n<|im_start|>assistant\nRome is the capital of Italy. "
    "It was the centre of an empire, and its old buildings draw many visitors.<|im_end|>\n",
)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """A release's probe and how far it is from the two models that it must not be."""

    probe: list[float]
    differs_from_base: float
    differs_from_champion: float

    @property
    def changed(self) -> bool:
        """Whether the engine really serves something else."""
        return min(self.differs_from_base, self.differs_from_champion) > MIN_PROBE_DIFFERENCE


async def probe(engine: EngineClient, model: str) -> list[float]:
    """Return the probe of a served model (nats per token, texts in a row)."""
    return [logprob for text in PROBES for logprob in await engine.prompt_logprobs(model, text)]


async def compare(engine: EngineClient, release: str, champion: str) -> ProbeResult:
    """Probe a release beside the base model and the champion."""
    own = await probe(engine, release)
    base = await probe(engine, BASE_MODEL_NAME)
    other = base if champion == BASE_MODEL_NAME else await probe(engine, champion)
    return ProbeResult(own, mean_abs_difference(own, base), mean_abs_difference(own, other))


def save(session: Session, release: Release, replica: str, result: ProbeResult) -> None:
    """Record the proof for one replica."""
    values = {
        "adapter_digest": release.adapter_digest,
        "probe": result.probe,
        "differs_from_base": result.differs_from_base,
        "differs_from_champion": result.differs_from_champion,
    }
    session.execute(
        insert(Attestation)
        .values(release=release.name, replica=replica, **values)
        .on_conflict_do_update(index_elements=["release", "replica"], set_={**values, "attested_at": sa.func.now()})
    )
