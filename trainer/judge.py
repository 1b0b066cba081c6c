"""The gates of a candidate: is it served, is it better on held-out prompts, does it keep to people's lengths."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from deploy import attest, gates, registry
from deploy.gates import GateResult
from deploy.reconciler import load_release
from deploy.tables import Release
from infra.db import Sessions
from infra.engine import EngineClient
from infra.settings import Settings
from reward.style import num_words
from trainer.recipe import Messages
from trainer.rollout import Sample
from trainer.scoring import PinnedReward
from trainer.snapshot import Snapshot

# (model, prompts, samples of each, seed) to samples
Sampler = Callable[[str, list[Messages], int, int], list[list[Sample]]]


def gate_prompts(data: Snapshot, limit: int) -> tuple[list[Messages], list[str]]:
    """Return the newest held-out prompts, each once, and the answers that were given to them."""
    examples = list({json.dumps(example.messages): example for example in data.gate}.values())[-limit:]
    return [example.messages for example in examples], [example.answer for example in examples]


def judge(
    sessions: Sessions,
    settings: Settings,
    release: Release,
    champion: str,
    data: Snapshot,
    reward: PinnedReward,
    sample: Sampler,
    num_prompts: int,
) -> list[GateResult]:
    """Hold a candidate against the champion on held-out prompts, as both are really served."""
    prompts, references = gate_prompts(data, num_prompts)
    probe = asyncio.run(_attest(sessions, settings, release, champion))
    arms = [sample(name, prompts, 1, seed) for name, seed in ((release.name, 2), (champion, 3))]
    # A prompt that the engine refused (one that leaves no room to answer) judges neither.
    answered = [i for i in range(len(prompts)) if all(arm[i] for arm in arms)]
    prompts, references = [prompts[i] for i in answered], [references[i] for i in answered]
    new, old = ([arm[i] for i in answered] for arm in arms)
    scores = [
        [group[0] for group in reward.score(prompts, [[s.text for s in g] for g in answers], references)]
        if prompts
        else []
        for answers in (new, old)
    ]
    low, high = data.well_rated_words(tail=0.0)
    return [
        gates.attestation_gate("base", probe.differs_from_base, len(probe.probe)),
        gates.attestation_gate("champion", probe.differs_from_champion, len(probe.probe)),
        gates.win_rate_gate(scores[0], scores[1]),
        gates.length_gate([num_words(g[0].text) for g in new], low, max(high, _median_words(old))),
    ]


async def _attest(sessions: Sessions, settings: Settings, release: Release, champion: str) -> attest.ProbeResult:
    url = settings.need("engine_url")
    async with EngineClient(url, timeout_s=settings.engine_timeout_s) as engine:
        if release.name not in await engine.models():
            await load_release(sessions, engine, release.name)
        result = await attest.compare(engine, release.name, champion)
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
