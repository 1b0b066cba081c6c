"""Which gates a candidate passes: the built-in ones, and those that other packages bring.

A gate is a function of :class:`Evidence` that returns results; a package offers one as an entry point of the group
``everloop.gates``. One that fails itself is inconclusive, which holds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points

from deploy import gates
from deploy.gates import GateResult
from deploy.tables import Attestation
from reward.style import num_words

log = logging.getLogger("everloop.gates")

GROUP = "everloop.gates"
Arms = tuple[Sequence[float], Sequence[float]]
"""Something measured of the candidate and of the champion, prompt by prompt."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What gates may look at. Of prompts that gave feedback used in training, nothing is.

    Attributes
    ----------
    attested
        What each replica serves as the candidate.
    champion_probe
        The champion's log-probabilities of the same texts; None where it is the base model.
    rewards
        Pessimistic, of answers to held-out prompts.
    answers
        Those answers, the candidate's and the champion's.
    words
        Lengths that people rated well.
    skills
        For each skill, how right the candidate's answers to its tasks were, and the champion's.
    behaviour
        For each probe of :mod:`deploy.behaviour`, 1 where an answer went wrong; without a probe, no gate.
    seconds_per_token
        Of answers that nobody else kept waiting; likewise.
    kl, num_measured, max_kl
        Distance to the base model (nats), over how many answers, and how far it may be.
    golds_gained
        What a reward that training never saw gave the candidate's answers more than the champion's.
    """

    attested: Sequence[Attestation]
    champion_probe: Sequence[float] | None
    rewards: Arms
    answers: tuple[Sequence[str], Sequence[str]]
    words: tuple[float, float]
    skills: tuple[Mapping[str, Sequence[float]], Mapping[str, Sequence[float]]]
    behaviour: Mapping[str, Arms] = field(default_factory=dict)
    seconds_per_token: Arms = ((), ())
    kl: float = 0.0
    num_measured: int = 0
    max_kl: float = math.inf
    golds_gained: Sequence[float] = ()


Gate = Callable[[Evidence], Sequence[GateResult]]


def _length(evidence: Evidence) -> list[GateResult]:
    new, old = ([num_words(answer) for answer in arm] for arm in evidence.answers)
    low, high = evidence.words
    return [gates.length_gate(new, low, max(high, gates.median(old)))]


def _gold(evidence: Evidence) -> list[GateResult]:
    return [gates.gold_gate(evidence.golds_gained)] if len(evidence.golds_gained) > 1 else []


def _latency(evidence: Evidence) -> list[GateResult]:
    return [gates.latency_gate(*evidence.seconds_per_token)] if evidence.seconds_per_token[0] else []


BUILT_IN: Mapping[str, Gate] = {
    "attestation": lambda e: gates.attestation_gates(e.attested, e.champion_probe),
    "win_rate": lambda e: [gates.win_rate_gate(*e.rewards)],
    "length": _length,
    "skills": lambda e: gates.skill_gates(e.skills[1], e.skills[0]),
    "behaviour": lambda e: [gates.behaviour_gate(name, *arms) for name, arms in e.behaviour.items()],
    "latency": _latency,
    "kl": lambda e: [gates.kl_gate(e.kl, e.num_measured, e.max_kl)],
    "gold": _gold,
}


def plugged_in() -> dict[str, Gate]:
    """Return all gates by name: the built-in ones, and those of other packages, which may replace them."""
    return {**BUILT_IN, **{found.name: _loading(found) for found in entry_points(group=GROUP)}}


def _loading(found: EntryPoint) -> Gate:
    """Return a gate whose package is imported when it judges: one that cannot be is inconclusive like any other."""

    def gate(evidence: Evidence) -> Sequence[GateResult]:
        loaded: Gate = found.load()
        return loaded(evidence)

    return gate


def judge(evidence: Evidence, using: Mapping[str, Gate] | None = None) -> list[GateResult]:
    """Return what every gate says."""
    results: list[GateResult] = []
    for name, gate in (plugged_in() if using is None else using).items():
        try:
            results += gate(evidence)
        except Exception:
            log.exception("gate %s", name)
            results.append(GateResult(name, 0.0, 0.0, 0, 0.0, 0.0, "inconclusive"))
    return results
