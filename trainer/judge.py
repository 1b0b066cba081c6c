"""The gates of a candidate: is it served, is it better on held-out prompts, does it keep to people's lengths."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self

from deploy import behaviour, gates, registry, serving, variants
from deploy.gates import GateResult
from deploy.gating import Arms, Evidence
from deploy.tables import Attestation, Release
from infra.db import Sessions
from infra.engine import EngineClient
from infra.errors import UnavailableError
from infra.settings import Settings
from trainer import skills
from trainer.config import RunConfig
from trainer.prepared import Prepared
from trainer.recipe import Messages
from trainer.rollout import PATIENCE_S, Sample, patiently
from trainer.snapshot import Snapshot
from trainer.verify import Task, Verification

GATE_TASKS_SEED = 7
BEHAVIOUR_TOKENS = 24  # how an answer begins tells
TIMED_TOKENS = 16
LOOK_EVERY_S = 0.2


class Sampler(Protocol):
    """Samples answers of a model, as it is served."""

    def __call__(
        self, model: str, prompts: list[Messages], num_samples: int, seed: int, max_tokens: int | None = None
    ) -> list[list[Sample]]: ...


@dataclass(frozen=True, slots=True)
class Questions:
    """What candidate and champion are asked.

    Attributes
    ----------
    prompts, references
        Held-out prompts of people, and the answers that were given to them.
    tasks
        Those that judge: the same for all candidates.
    behaviour
        Of each probe of :mod:`deploy.behaviour`, its first.
    num_timed
        How many answers of each are timed, one at a time.
    """

    prompts: list[Messages]
    references: list[str]
    tasks: list[Task]
    behaviour: Mapping[str, Sequence[str]]
    num_timed: int

    @classmethod
    def of(cls, data: Snapshot, verification: Verification, config: RunConfig) -> Self:
        """Return the newest held-out prompts, each once, and what else is asked, as much of it as `config` says."""
        examples = list({json.dumps(example.messages): example for example in data.gate}.values())
        asked = examples[-config.num_gate_prompts :]
        return cls(
            [example.messages for example in asked],
            [example.answer for example in asked],
            verification.judging_tasks(config.gate_tasks_per_skill, GATE_TASKS_SEED),
            {n: p.questions[: config.gate_behaviour_questions] for n, p in behaviour.PROBES.items()},
            config.gate_timed_answers,
        )

    @property
    def number(self) -> int:
        """How many there are, without those that are timed."""
        return len(self.prompts) + len(self.tasks) + sum(map(len, self.behaviour.values()))


def gather(
    sessions: Sessions,
    settings: Settings,
    release: Release,
    ready: Prepared,
    sample: Sampler,
    questions: Questions,
    verification: Verification,
) -> Evidence:
    """Ask candidate and champion, as both are really served; return what gates look at."""
    prompts, references = questions.prompts, questions.references
    attested, champion_probe = _attested(sessions, release.name, ready.champion)
    arms = [sample(name, prompts, 1, seed) for name, seed in ((release.name, 2), (ready.champion, 3))]
    # A prompt that the engine refused (one that leaves no room to answer) judges neither.
    answered = [i for i in range(len(prompts)) if all(arm[i] for arm in arms)]
    prompts, references = [prompts[i] for i in answered], [references[i] for i in answered]
    new, old = ([arm[i][0].text for i in answered] for arm in arms)
    rewards = ready.reward.score(prompts, [list(pair) for pair in zip(new, old, strict=True)], references)
    able = [
        skills.measure(verification, questions.tasks, partial(sample, name, num_samples=1, seed=seed))
        for name, seed in ((release.name, 5), (ready.champion, 4))
    ]
    return Evidence(
        attested=attested,
        champion_probe=champion_probe,
        rewards=([pair[0] for pair in rewards], [pair[1] for pair in rewards]),
        answers=(new, old),
        words=ready.data.well_rated_words(tail=0.0),
        skills=(able[0], able[1]),
        behaviour=_behaviour(sample, release.name, ready.champion, questions.behaviour),
        seconds_per_token=asyncio.run(
            _seconds_per_token(sessions, settings, release.name, ready.champion, questions.num_timed)
        ),
    )


def _behaviour(
    sample: Sampler, release: str, champion: str, questions: Mapping[str, Sequence[str]]
) -> dict[str, Arms]:
    """Return for each probe of behaviour where the two went wrong; what the engine refused judges neither."""
    asked = [question for some in questions.values() for question in some]
    prompts = [[{"role": "user", "content": question}] for question in asked]
    answers = [
        [group[0].text if group else None for group in sample(name, prompts, 1, 6, BEHAVIOUR_TOKENS)]
        for name in (release, champion)
    ]
    told = {question: pair for question, *pair in zip(asked, *answers, strict=True) if None not in pair}
    return {
        name: (
            [float(behaviour.PROBES[name].went_wrong(told[q][0])) for q in some if q in told],
            [float(behaviour.PROBES[name].went_wrong(told[q][1])) for q in some if q in told],
        )
        for name, some in questions.items()
        if some
    }


async def _seconds_per_token(
    sessions: Sessions, settings: Settings, release: str, champion: str, num_timed: int
) -> Arms:
    """Time both, in turn, on the replica that runs sample from."""
    url = settings.need("engine_url")
    with sessions() as session:
        names = [serving.served_as(session, name, url) for name in (release, champion)]
    seconds: tuple[list[float], list[float]] = ([], [])
    async with EngineClient(url, settings.engine_key, timeout_s=settings.engine_timeout_s) as engine:
        for number in range(num_timed):
            for name, found in zip(names, seconds, strict=True):
                payload: dict[str, Any] = {
                    "model": name,
                    "messages": [{"role": "user", "content": f"Count to {number + 90}."}],
                    "max_tokens": TIMED_TOKENS,
                    "ignore_eos": True,
                    "temperature": 0,
                }
                began_s = time.perf_counter()
                await patiently(partial(engine.chat, payload))
                found.append((time.perf_counter() - began_s) / TIMED_TOKENS)
    return seconds


def _attested(sessions: Sessions, release: str, champion: str) -> tuple[list[Attestation], list[float] | None]:
    """Wait until every replica has shown what it serves as the candidate; return it, and the champion's probe.

    Raises
    ------
    UnavailableError
        Code ``release_not_ready``: no replica, or not every one, has shown anything for long.
    """
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        with sessions() as session:
            shown = serving.verdicts(session, release)
            if shown is not None:
                other = registry.get_release(session, variants.weights_of(session, champion))
                return shown, other.probe if other.adapter_digest else None
        if time.monotonic() > deadline_s:
            raise UnavailableError(
                f"Not every replica has shown what it serves as {release}; is the reconciler running?",
                code="release_not_ready",
            )
        time.sleep(LOOK_EVERY_S)


def failing(results: list[GateResult]) -> str | None:
    """Return which gates hold a candidate, in words, or None."""
    verdict = gates.overall(results)
    names: list[Any] = [result.gate for result in results if result.verdict != "pass"]
    return None if verdict == "pass" else f"gates {verdict}: {', '.join(names)}"
