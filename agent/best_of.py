"""Best of several answers, where the first is believed to be weak: by the pessimistic reward, within a budget.

Only for answers that are not streamed: nobody can be shown the first word of an answer that is chosen at its end.
What it took stands in the episode's steps, and with the response's usage.

Stiennon et al., "Learning to summarize from human feedback", 2020, call it best-of-N; Gao et al., "Scaling Laws for
Reward Model Overoptimization", 2023, show why N is small and the reward pessimistic.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
import httpx

from agent import metrics
from infra.errors import EverloopError
from infra.fleet import Fleet
from infra.settings import Settings
from reward import client
from reward.online import sigmoid
from reward.scored import MAX_SCORED_MESSAGES, ScoredItem, ScoreItem, ScoreRequest

if TYPE_CHECKING:
    from agent.turn import Turn

KIND = "best_of"
SCORED_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer that may be given."""

    answer: str
    token_ids: list[int]
    told: list[dict[str, Any]]
    finish_reason: str | None


class BestOf:
    """Looks at an answer before it is given, and has others made where that is worth it."""

    def __init__(self, reward: httpx.AsyncClient, fleet: Fleet, settings: Settings) -> None:
        self.reward = reward
        self.fleet = fleet
        self.settings = settings

    async def improve(self, turn: Turn, best_of: int) -> None:
        """Replace a whole answer by the best of up to `best_of`, itself among them, and note what that took.

        Whatever goes wrong, or takes too long, the first answer stays.
        """
        step: dict[str, Any] = {"kind": KIND, "n": best_of, "num_candidates": 1, "chosen": 0, "extra_tokens": 0}
        started_s = time.perf_counter()
        step["outcome"] = "out_of_time"
        with anyio.move_on_after(self.settings.best_of_max_ms / 1000.0):
            try:
                step["outcome"] = await self._improve(turn, best_of, step)
            except (EverloopError, ValueError) as error:  # also what was said is not what it should be
                step["outcome"] = "reward_unavailable" if step["num_candidates"] == 1 else "failed"
                step["code"] = getattr(error, "code", type(error).__name__)
        step["ms"] = round((time.perf_counter() - started_s) * 1000.0, 1)
        turn.recording.steps.append(step)
        metrics.note_best_of(step)

    async def _improve(self, turn: Turn, best_of: int, step: dict[str, Any]) -> str:
        (first,) = await self._score(turn, [turn.recording.answer])
        step["rewards"] = [round(first.reward, 4)]
        if first.p_good >= self.settings.best_of_below:
            return "good_enough"
        if not self._is_sure(first):
            return "unsure"
        max_tokens = turn.recording.sampling["max_tokens"]
        num_more = min(best_of - 1, self.settings.best_of_max_tokens // max_tokens)
        if num_more < 1:
            return "out_of_tokens"
        others = await self._more(turn, num_more)
        step["num_candidates"] += len(others)
        step["extra_tokens"] = sum(len(other.token_ids) for other in others)
        scores = [first, *await self._score(turn, [other.answer for other in others])]
        step["rewards"] = [round(score.reward, 4) for score in scores]
        # The first of equals, so that nothing is changed for nothing.
        step["chosen"] = chosen = max(range(len(scores)), key=lambda number: (scores[number].reward, -number))
        if chosen == 0:
            return "first_kept"
        turn.take_over(others[chosen - 1])
        return "better"

    def _is_sure(self, weak: ScoredItem) -> bool:
        """Tell whether the belief in an answer is that low, and not only its mean."""
        highest = weak.mean + self.settings.best_of_margin_sd * weak.sd
        return not weak.abstain and sigmoid(highest) < self.settings.best_of_below

    async def _more(self, turn: Turn, num: int) -> list[Candidate]:
        """Have the release that answered answer again, all at once; what is empty is left out."""
        async with turn.open_again(num) as chunks:
            choices = [choice async for chunk in chunks for choice in chunk["choices"]]
        found = []
        for choice in choices:
            told = (choice.get("logprobs") or {}).get("content") or []
            # Half a surrogate pair or a NUL can be neither stored nor scored.
            text = str(choice["delta"].get("content") or "").replace("\x00", "")
            text = text.encode("utf-8", "replace").decode()
            found.append(Candidate(text, choice.get("token_ids") or [], told, choice.get("finish_reason")))
        return [candidate for candidate in found if candidate.answer.strip()]

    async def _score(self, turn: Turn, answers: Sequence[str]) -> list[ScoredItem]:
        if not answers:
            return []
        messages = [
            {"role": message["role"], "content": message["content"]}
            for message in turn.recording.messages[-MAX_SCORED_MESSAGES:]
            if message["role"] in SCORED_ROLES and isinstance(message.get("content"), str)
        ]
        items = [ScoreItem.model_validate({"messages": messages, "answer": answer}) for answer in answers]
        timeout_s = self.settings.best_of_max_ms / 1000.0
        return (await client.score(self.reward, ScoreRequest(items=items), timeout_s)).data


def step_of(steps: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return what choosing among several answers took, if it was tried."""
    return next((step for step in steps if step.get("kind") == KIND), None)
