"""What recipes are given to work with: the assistant as it is served, the pinned reward, verifiers."""

from __future__ import annotations

from typing import Any

from infra.settings import Settings
from trainer.config import RunConfig
from trainer.policy import ServedPolicy
from trainer.prepared import Prepared
from trainer.recipe import Material
from trainer.record import RunRecord
from trainer.rollout import Sample, sample_served
from trainer.snapshot import ANY_LENGTH, Snapshot
from trainer.verify import Task, Verification

ROLLOUT_SEED = 1


def material_of(
    settings: Settings,
    config: RunConfig,
    record: RunRecord,
    ready: Prepared,
    verification: Verification,
    policy: ServedPolicy | None = None,
) -> Material:
    """Return what rows are made from, and what those recipes need that sample and score as they train."""

    def fresh(prompts: Any, num_samples: int) -> list[list[Sample]]:
        record.phase("sample", len(prompts))
        return sample_served(
            settings, config, ready.champion, list(prompts), num_samples, ROLLOUT_SEED, on_done=record.progress
        )

    def score(prompts: Any, answers: Any, references: Any) -> list[list[float]]:
        if policy is not None:  # in mid-training: the phase is the training's
            return ready.reward.score(prompts, answers, references)
        record.phase("score", sum(map(len, answers)) + len(prompts))
        return ready.reward.score(prompts, answers, references, record.progress)

    def tasks(num_tasks: int) -> list[Task]:
        # Other ones each night: a few that came again and again would be learned by heart.
        return verification.training_tasks(num_tasks, config.seed + ready.data.last_signal_seq)

    lengths = words_range(config, ready.data)
    return Material(ready.data, fresh, score, tasks, verification.judge, lengths, policy)


def words_range(config: RunConfig, data: Snapshot) -> tuple[int, int]:
    """Return the lengths that the policy is led to."""
    return data.well_rated_words() if config.length_guard else ANY_LENGTH
