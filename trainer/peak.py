"""Where to stop: checkpoints are measured as they are served, and the one at the gold scorer's peak is taken.

Following a learned reward for long enough makes it rise and what people want fall (Goodhart). So each kept
checkpoint answers prompts that it did not train on; the proxy, a gold scorer that training never sees, and the KL
to the base model are written to the metrics and drawn over sqrt(KL).

References
----------
Gao, Schulman and Hilton (2023), Scaling Laws for Reward Model Overoptimization, arXiv 2210.10760.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from infra.settings import BASE_MODEL_NAME
from reward.style import num_words
from trainer.gold import Gold
from trainer.policy import ServedPolicy
from trainer.recipe import Messages, Rows, one_per_prompt
from trainer.rollout import Sample, patiently
from trainer.scoring import PinnedReward, guarded
from trainer.snapshot import Example, Snapshot

PLOT_FILE = "overoptimisation.svg"

Ask = Callable[[str, list[Messages]], list[list[Sample]]]


@dataclass(frozen=True, slots=True)
class Point:
    """A checkpoint, measured on the same prompts as the others.

    Attributes
    ----------
    kl
        Mean over answers of ``log p(answer) - log p_base(answer)``: an estimate of the KL to the base, in nats.
    proxy, gold
        Mean rewards against the logged answers; gold's is None where too little was held out to fit one.
    golds
        That of each answer, by the number of its prompt.
    """

    step: int
    kl: float
    proxy: float
    gold: float | None
    mean_words: float
    n: int
    golds: Mapping[int, float] = field(default_factory=dict, repr=False)
    texts: tuple[str, ...] = field(default=(), repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, without what each answer got."""
        return {name: value for name, value in asdict(self).items() if name not in ("golds", "texts")}


@dataclass(slots=True)
class Scales:
    """What checkpoints are measured with.

    Attributes
    ----------
    words_range
        Lengths that people rated well: gold is fitted to few answers, and knows no more than the proxy of lengths
        that nobody has seen.
    ask
        Returns one answer of a served model to each prompt.
    """

    policy: ServedPolicy
    prompts: list[Messages]
    references: list[str]
    reward: PinnedReward
    gold: Gold
    words_range: tuple[int, int]
    ask: Ask

    def measure(self, model: str, step: int) -> Point:
        """Measure a model as it is served."""
        asked = self.ask(model, self.prompts)
        answered = [number for number, group in enumerate(asked) if group and group[0].token_ids]
        samples = [asked[number][0] for number in answered]
        texts = [sample.text for sample in samples]
        judges = [(self.reward.head, self.reward.kappa), (self.gold.head, 0.0)]
        proxies, golds = (
            [group[0] for group in scores]
            for scores in self.reward.score_under(
                judges,
                [self.prompts[number] for number in answered],
                [[text] for text in texts],
                [self.references[number] for number in answered],
            )
        )
        ended = [sample.finish_reason == "stop" for sample in samples]
        golds = guarded(golds, texts, ended, self.words_range)
        return Point(
            step=step,
            kl=_mean(asyncio.run(self._log_ratios(model, samples))),
            proxy=_mean(proxies),
            gold=_mean(golds) if self.gold.is_informed else None,
            mean_words=_mean([num_words(text) for text in texts]),
            n=len(samples),
            golds=dict(zip(answered, golds, strict=True)) if self.gold.is_informed else {},
            texts=tuple(texts),
        )

    async def _log_ratios(self, model: str, samples: Sequence[Sample]) -> list[float]:
        async with self.policy.client() as engine:
            mend = partial(self.policy.restore, engine)

            # Both in the same way: what the engine sampled a token with is rounded otherwise than what it reads.
            async def ratio(sample: Sample) -> float:
                asked = sample.prompt_ids, sample.token_ids
                own, base = [
                    sum(await patiently(partial(engine.token_logprobs, name, *asked), mend))
                    for name in (model, BASE_MODEL_NAME)
                ]
                return own - base

            return [await ratio(sample) for sample in samples]


def measure_all(
    scales: Scales,
    champion: str,
    kept: Sequence[tuple[int, Path]],
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Point]:
    """Measure the champion (as step 0) and each kept checkpoint, oldest first."""
    points = [scales.measure(champion, 0)]
    for step, directory in kept:
        on_done(len(points))
        scales.policy.publish(partial(shutil.copytree, directory))
        points.append(scales.measure(scales.policy.name, step))
    return points


def choose(points: Sequence[Point], max_kl: float) -> Point:
    """Return the checkpoint to register: gold's peak, as far as it can be told.

    Of those within `max_kl` (or the nearest to it, which a gate then holds) it is the last that none beats by more
    than one standard error in gold on the same prompts: noise alone does not send a run back.
    """
    allowed = [point for point in points if point.kl <= max_kl] or [min(points, key=lambda point: point.kl)]
    unbeaten = [point for point in allowed if not any(_beats(other, point) for other in allowed)]
    return (unbeaten or allowed)[-1]


def _beats(one: Point, other: Point) -> bool:
    differences = gains(one, other)
    if len(differences) < 2:
        return False
    return statistics.mean(differences) > statistics.stdev(differences) / math.sqrt(len(differences))


def gains(chosen: Point, champion: Point) -> list[float]:
    """Return what each prompt's answer gained in gold, of the prompts that both answered."""
    both = sorted(chosen.golds.keys() & champion.golds.keys())
    return [chosen.golds[number] - champion.golds[number] for number in both]


def plot(points: Sequence[Point], chosen: Point, path: Path) -> None:
    """Draw proxy and gold over sqrt(KL), with the checkpoint that was taken."""
    from matplotlib.figure import Figure

    ordered = sorted(points, key=lambda point: point.kl)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    distance = [math.sqrt(max(point.kl, 0.0)) for point in ordered]
    axes.plot(distance, [point.proxy for point in ordered], "o--", label="proxy (what training follows)")
    golds = [point.gold for point in ordered if point.gold is not None]
    if len(golds) == len(ordered):
        axes.plot(distance, golds, "o-", label="gold (held out of training)")
    axes.axvline(math.sqrt(max(chosen.kl, 0.0)), color="grey", linewidth=1, label=f"taken: step {chosen.step}")
    axes.set_xlabel("sqrt(KL to the base), square root of nats per answer")
    axes.set_ylabel("reward against logged answers")
    axes.legend()
    figure.savefig(path)


def unseen(data: Snapshot, rows: Rows, number: int, seed: int) -> list[Example]:
    """Return answers of people, a prompt each, that no row trains on."""
    trained = [row["prompt"] for row in rows.rows]
    left = [example for example in data.train if example.messages not in trained]
    return one_per_prompt(left, number, seed)


def write_answers(points: Sequence[Point], path: Path) -> None:
    """Write what checkpoints answered, a line each."""
    lines = [json.dumps({"step": point.step, "answers": point.texts}, ensure_ascii=False) for point in points]
    path.write_text("".join(f"{line}\n" for line in lines))


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
