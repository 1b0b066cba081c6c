"""Attestation: proof that what a replica serves under a release's name is that release.

A probe is the log-probability of each token of fixed texts. A release's must differ from the base model's (an
engine that silently ignores an adapter gives that), must not be another release's (one that mixed them up), and
must agree with what the release's probe was when it was first proved, on whichever replica that was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from infra.engine import EngineClient, mean_abs_difference

PROBES = (
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\nThe sky is blue because "
    "sunlight is scattered by the air, and blue light is scattered the most.<|im_end|>\n",
    "<|im_start|>user\nHow do I boil an egg?<|im_end|>\n<|im_start|>assistant\nPut the egg in boiling "
    "water, wait for about eight minutes, then cool it under cold water and peel it.<|im_end|>\n",
    "<|im_start|>user\nTell me about Rome.<|im_end|>\n<|im_start|>assistant\nRome is the capital of Italy. "
    "It was the centre of an empire, and its old buildings draw many visitors.<|im_end|>\n",
)
# Nats per token. A probe of an idle engine is exact; beside 16 streams one of sixty was off by up to .015
# (docs/log.md). So what is nearer than `DOUBTFUL` is measured again, and so is what disagrees.
MIN_DIFFERENCE = 1e-3
DOUBTFUL = 0.03
MAX_DISAGREEMENT = 0.05


@dataclass(frozen=True, slots=True)
class Proof:
    """What a probe shows.

    Attributes
    ----------
    differs_from_base, differs_from_others
        Distance to the base model, and to the nearest other release (nats per token; None where there is none).
    disagrees
        Distance to the release's own probe as it was first proved; None for that first one.
    problem
        Why it is no proof, if it is none.
    """

    probe: list[float]
    differs_from_base: float | None
    differs_from_others: float | None
    disagrees: float | None
    problem: str | None

    @property
    def is_doubtful(self) -> bool:
        """Whether noise may have made it so: it is hardly told apart from another, or is not what it was.

        Noise does not make two policies the same, so what answers as the base model does is no matter of doubt.
        """
        near = [d for d in (self.differs_from_base, self.differs_from_others) if d is not None and d < DOUBTFUL]
        is_base = self.differs_from_base is not None and self.differs_from_base <= MIN_DIFFERENCE
        return (bool(near) and not is_base) or (self.disagrees or 0.0) > MAX_DISAGREEMENT


async def probe(engine: EngineClient, model: str) -> list[float]:
    """Return the probe of a served model (nats per token, texts in a row)."""
    return [logprob for text in PROBES for logprob in await engine.prompt_logprobs(model, text)]


def prove(
    own: list[float],
    base: Sequence[float] | None,
    others: Mapping[str, Sequence[float]],
    reference: Sequence[float] | None,
) -> Proof:
    """Tell whether a probe proves a release.

    Parameters
    ----------
    base
        The base model's on the same replica; None where the release is the base model.
    others
        Of other releases, as they were first proved.
    reference
        The release's own as it was first proved; None the first time.
    """
    from_base = None if base is None else mean_abs_difference(own, base)
    distances = {name: mean_abs_difference(own, other) for name, other in others.items() if len(other) == len(own)}
    nearest = min(distances, key=lambda name: distances[name], default=None)
    if reference is not None and len(reference) != len(own):
        return Proof(own, from_base, None, None, "its tokens are others: another base model is served")
    disagrees = None if reference is None else mean_abs_difference(own, reference)
    too_near = MIN_DIFFERENCE if disagrees is None else min(disagrees, MAX_DISAGREEMENT)
    problem = None
    if from_base is not None and from_base <= MIN_DIFFERENCE:
        problem = "it answers as the base model does: the adapter is ignored"
    elif nearest is not None and distances[nearest] <= too_near:
        problem = f"it answers as {nearest} does: adapters are mixed up"
    elif disagrees is not None and disagrees > MAX_DISAGREEMENT:
        problem = f"it is {disagrees:.3g} nats per token from what was first proved: other weights are served"
    return Proof(own, from_base, None if nearest is None else distances[nearest], disagrees, problem)
