"""The gates of a candidate: is it served, is it better on held-out prompts, does it keep to people's lengths."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self

from deploy import attest, gates, registry
from deploy.gates import GateResult
from deploy.reconciler import load_release
from deploy.tables import Release
from infra.db import Sessions
from infra.engine import EngineClient
from infra.settings import Settings
from reward.style import num_words
from trainer import skills
from trainer.config import RunConfig
from trainer.prepared import Prepared
from trainer.recipe import Messages
from trainer.rollout import Sample, patiently
from trainer.snapshot import Snapshot
from trainer.verify import Task, Verification

GATE_TASKS_SEED = 7


class Sampler(Protocol):
    """Samples answers of a model, as it is served."""

    def __call__(self, model: str, prompts: list[Messages], num_samples: int, seed: int) -> list[list[Sample]]: ...


@dataclass(frozen=True, slots=True)
class Questions:
    """What candidate and champion are asked.

    Attributes
    ----------
    prompts, references
        Held-out prompts of people, and the answers that were given to them.
    tasks
        Those that judge: the same for all candidates.
    """

    prompts: list[Messages]
    references: list[str]
    tasks: list[Task]

    @classmethod
    def of(cls, data: Snapshot, verification: Verification, config: RunConfig) -> Self:
        """Return the newest held-out prompts, each once, and tasks of each skill, as many as `config` says."""
        examples = list({json.dumps(example.messages): example for example in data.gate}.values())
        asked = examples[-config.num_gate_prompts :]
        return cls(
            [example.messages for example in asked],
            [example.answer for example in asked],
            verification.judging_tasks(config.gate_tasks_per_skill, GATE_TASKS_SEED),
        )

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self.prompts) + len(self.tasks)


def judge(
    sessions: Sessions,
    settings: Settings,
    release: Release,
    ready: Prepared,
    sample: Sampler,
    questions: Questions,
    verification: Verification,
) -> list[GateResult]:
    """Hold a candidate against the champion, as both are really served."""
    prompts, references = questions.prompts, questions.references
    probe = asyncio.run(_attest(sessions, settings, release, ready.champion))
    arms = [sample(name, prompts, 1, seed) for name, seed in ((release.name, 2), (ready.champion, 3))]
    # A prompt that the engine refused (one that leaves no room to answer) judges neither.
    answered = [i for i in range(len(prompts)) if all(arm[i] for arm in arms)]
    prompts, references = [prompts[i] for i in answered], [references[i] for i in answered]
    new, old = ([arm[i] for i in answered] for arm in arms)
    pairs = [[mine[0].text, theirs[0].text] for mine, theirs in zip(new, old, strict=True)]
    rewards = ready.reward.score(prompts, pairs, references)
    scores = [[reward[arm] for reward in rewards] for arm in (0, 1)]
    low, high = ready.data.well_rated_words(tail=0.0)
    able = [
        skills.measure(verification, questions.tasks, partial(sample, name, num_samples=1, seed=seed))
        for name, seed in ((ready.champion, 4), (release.name, 5))
    ]
    return [
        gates.attestation_gate("base", probe.differs_from_base, len(probe.probe)),
        gates.attestation_gate("champion", probe.differs_from_champion, len(probe.probe)),
        gates.win_rate_gate(scores[0], scores[1]),
        gates.length_gate([num_words(g[0].text) for g in new], low, max(high, _median_words(old))),
        *gates.skill_gates(*able),
    ]


async def _attest(sessions: Sessions, settings: Settings, release: Release, champion: str) -> attest.ProbeResult:
    url = settings.need("engine_url")
    async with EngineClient(url, timeout_s=settings.engine_timeout_s) as engine:

        async def compared() -> attest.ProbeResult:
            if release.name not in await engine.models():
                await load_release(sessions, settings, engine, release.name)
            return await attest.compare(engine, release.name, champion)

        result = await patiently(compared)
    with sessions.begin() as session:
        attest.save(session, registry.get_release(session, release.name), url, result)
    return result


def failing(results: list[GateResult]) -> str | None:
    """Return which gates hold a candidate, in words, or None."""
    verdict = gates.overall(results)
    names: list[Any] = [result.gate for result in results if result.verdict != "pass"]
    return None if verdict == "pass" else f"gates {verdict}: {', '.join(names)}"


def _median_words(groups: list[list[Sample]]) -> float:
    ordered = sorted(num_words(group[0].text) for group in groups)
    return float(ordered[len(ordered) // 2]) if ordered else 0.0
