"""What the assistant tells of its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter, Histogram

from feedback.episodes import Recording

ANSWERS = Counter("everloop_chat_answers", "Answers, by arm and how they ended.", ["arm", "outcome"])
TOKENS = Counter("everloop_chat_tokens", "Tokens of prompts that were read and of answers.", ["arm", "kind"])
FIRST_TOKEN = Histogram(
    "everloop_chat_first_token_seconds",
    "From a streamed request's arrival to the first words of its answer.",
    ["arm"],
    buckets=(0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32),
)
ANSWER = Histogram(
    "everloop_chat_answer_seconds",
    "From a request's arrival to the end of its answer.",
    ["arm", "outcome"],
    buckets=(0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128),
)

BEST_OF = Counter(
    "everloop_best_of",
    "Answers looked at before they were given, by what came of it.",
    ["outcome"],
)
BEST_OF_TOKENS = Counter("everloop_best_of_extra_tokens", "Tokens of answers made to choose among.")
BEST_OF_SECONDS = Histogram(
    "everloop_best_of_seconds",
    "What looking, and making others, added to an answer.",
    buckets=(0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16),
)

CONTEXT = Histogram(
    "everloop_memory_context_seconds",
    "Choosing what the model is to see, the reading of what was said before included; `whole` is all of it.",
    ["kind"],
    buckets=(0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1),
)
CONTEXT_USED = Histogram(
    "everloop_memory_budget_used_ratio",
    "Tokens of a context as a share of its budget; above 1 never.",
    ["kind"],
    buckets=(0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 1.0),
)


def note(recording: Recording) -> None:
    """Count an answer that has ended."""
    arm, outcome = recording.arm, recording.status
    ANSWERS.labels(arm, outcome).inc()
    TOKENS.labels(arm, "prompt").inc(recording.num_prompt_tokens)
    TOKENS.labels(arm, "answer").inc(len(recording.token_ids))
    ANSWER.labels(arm, outcome).observe(recording.latency_ms / 1000.0)
    if recording.ttft_ms is not None:
        FIRST_TOKEN.labels(arm).observe(recording.ttft_ms / 1000.0)


def note_best_of(step: dict[str, Any]) -> None:
    """Count an answer that was looked at before it was given (:mod:`agent.best_of`)."""
    BEST_OF.labels(step["outcome"]).inc()
    BEST_OF_TOKENS.inc(step["extra_tokens"])
    BEST_OF_SECONDS.observe(step["ms"] / 1000.0)


def note_context(record: Mapping[str, Any] | None, elapsed_s: float, *, is_whole: bool) -> None:
    """Note a context that was made, with its record where it has one (:mod:`agent.memory.prompts`)."""
    made = "whole" if is_whole else "chosen"
    CONTEXT.labels(made).observe(elapsed_s)
    if record is not None:
        CONTEXT_USED.labels(made).observe(record["used"] / max(record["budget"], 1))
