"""Gates: what a candidate must show before it meets anybody. Inconclusive holds."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Literal

from deploy.attest import MAX_DISAGREEMENT, MIN_DIFFERENCE
from deploy.tables import Attestation
from infra.engine import mean_abs_difference

Verdict = Literal["pass", "fail", "inconclusive"]
Z_95 = 1.959963984540054

MIN_WIN_RATE = 0.5
MAX_SLOWDOWN = 1.5


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate with all that its verdict rests on."""

    gate: str
    value: float
    threshold: float
    n: int
    low: float
    high: float
    verdict: Verdict

    def as_dict(self) -> dict[str, object]:
        """Return the result as plain data."""
        return asdict(self)


def wilson_interval(successes: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # The interval holds the rate itself; rounding at 0 and 1 must not say otherwise.
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def difference_interval(good_a: float, n_a: int, good_b: float, n_b: int, z: float = Z_95) -> tuple[float, float]:
    """Return the interval of rate b minus rate a, 95 % by default (Newcombe 1998, method 10)."""
    if not n_a or not n_b:
        return -1.0, 1.0
    p_a, p_b = good_a / n_a, good_b / n_b
    low_a, high_a = wilson_interval(good_a, n_a, z)
    low_b, high_b = wilson_interval(good_b, n_b, z)
    difference = p_b - p_a
    low = difference - ((p_b - low_b) ** 2 + (high_a - p_a) ** 2) ** 0.5
    high = difference + ((high_b - p_b) ** 2 + (p_a - low_a) ** 2) ** 0.5
    return low, high


def win_rate_gate(challenger: Sequence[float], champion: Sequence[float]) -> GateResult:
    """Compare pessimistic rewards on held-out prompts, pair by pair; ties count half."""
    wins = sum(
        1.0 if new > old else 0.5 if new == old else 0.0 for new, old in zip(challenger, champion, strict=True)
    )
    n = len(champion)
    low, high = wilson_interval(wins, n)
    verdict: Verdict = "pass" if low > MIN_WIN_RATE else "fail" if high < MIN_WIN_RATE else "inconclusive"
    return GateResult("win_rate", wins / n if n else 0.5, MIN_WIN_RATE, n, low, high, verdict)


def attestation_gates(shown: Sequence[Attestation], champion: Sequence[float] | None) -> list[GateResult]:
    """Require that every replica serves the candidate, and that it is another model than base and champion.

    Parameters
    ----------
    shown
        What each replica has shown; distances are means over a probe's tokens (nats).
    champion
        The champion's probe.
    """
    proved = [row for row in shown if row.problem is None]
    if not proved:
        return [GateResult("served_by_replicas", 0.0, len(shown), len(shown), 0.0, 0.0, "fail")]
    from_base = min(row.differs_from_base or 0.0 for row in proved)
    from_champion = min(mean_abs_difference(row.probe, champion) for row in proved) if champion else from_base
    apart = max(row.disagrees or 0.0 for row in proved)
    agree: Verdict = "pass" if apart <= MAX_DISAGREEMENT else "fail"
    served: Verdict = "pass" if len(proved) == len(shown) else "fail"
    return [
        GateResult("served_by_replicas", len(proved), len(shown), len(shown), len(proved), len(proved), served),
        _differs("base", from_base, len(proved[0].probe)),
        _differs("champion", from_champion, len(proved[0].probe)),
        GateResult("replicas_agree", apart, MAX_DISAGREEMENT, len(proved), apart, apart, agree),
    ]


def _differs(against: str, difference: float, num_tokens: int) -> GateResult:
    verdict: Verdict = "pass" if difference > MIN_DIFFERENCE else "fail"
    return GateResult(
        f"differs_from_{against}", difference, MIN_DIFFERENCE, num_tokens, difference, difference, verdict
    )


def length_gate(words: Sequence[int], low_words: float, high_words: float) -> GateResult:
    """Require that the median length stays in the range of the answers that people rated well."""
    middle = median(words)
    verdict: Verdict = "pass" if low_words <= middle <= high_words else "fail"
    return GateResult("median_words", middle, low_words, len(words), low_words, high_words, verdict)


def median(values: Sequence[float]) -> float:
    """Return the (upper) median; 0 of nothing."""
    return float(sorted(values)[len(values) // 2]) if values else 0.0


def behaviour_gate(name: str, challenger: Sequence[float], champion: Sequence[float]) -> GateResult:
    """Require that answers to a probe of behaviour go wrong no more often than the champion's, beyond chance."""
    old, new = ([1.0 - wrong for wrong in arm] for arm in (champion, challenger))
    if not new:
        return GateResult(name, 0.0, 0.0, 0, 0.0, 0.0, "inconclusive")
    return _not_worse(name, old, new, Z_95)


def latency_gate(challenger: Sequence[float], champion: Sequence[float]) -> GateResult:
    """Require that a token takes no longer than `MAX_SLOWDOWN` times the champion's (geometric mean, by prompt).

    Parameters
    ----------
    challenger, champion
        Seconds per token of answers to the same prompts, asked in turn.
    """
    logs = [math.log(new / old) for new, old in zip(challenger, champion, strict=True)]
    n = len(logs)
    if n < 2:
        return GateResult("latency", 1.0, MAX_SLOWDOWN, n, 1.0, 1.0, "inconclusive")
    mean, half = statistics.fmean(logs), Z_95 * statistics.stdev(logs) / math.sqrt(n)
    low, high = math.exp(mean - half), math.exp(mean + half)
    verdict: Verdict = (
        "fail" if low > MAX_SLOWDOWN else "pass" if math.exp(mean) <= MAX_SLOWDOWN else "inconclusive"
    )
    return GateResult("latency", math.exp(mean), MAX_SLOWDOWN, n, low, high, verdict)


def kl_gate(kl: float, n: int, max_kl: float) -> GateResult:
    """Require that a candidate stays near the base model (mean KL over answers, nats)."""
    verdict: Verdict = "inconclusive" if not n else "pass" if kl <= max_kl else "fail"
    return GateResult("kl_to_base", kl, max_kl, n, kl, kl, verdict)


def gold_gate(gains: Sequence[float]) -> GateResult:
    """Require that a reward which training never saw does not find the candidate worse than the champion.

    Parameters
    ----------
    gains
        What that reward gave the candidate's answers more than the champion's, prompt by prompt.
    """
    n = len(gains)
    value = statistics.fmean(gains) if n else 0.0
    half = Z_95 * statistics.stdev(gains) / math.sqrt(n) if n > 1 else math.inf
    return GateResult("gold", value, 0.0, n, value - half, value + half, "fail" if value + half < 0.0 else "pass")


def skill_gates(
    champion: Mapping[str, Sequence[float]], challenger: Mapping[str, Sequence[float]]
) -> list[GateResult]:
    """Require of each skill, and of all together, that it is not worse beyond chance.

    Parameters
    ----------
    champion, challenger
        For each skill, how right answers to its tasks were, from 0 to 1.

    Returns
    -------
    list of GateResult
        ``skills`` first, then those of each verifier (``reasoning``), then each alone; values are differences of
        means. The level of the intervals of verifiers, and of skills, is divided by their number (Bonferroni), so
        that a look at many does not hold a good candidate.
    """
    skills = sorted(champion.keys() & challenger.keys())
    by_verifier: dict[str, list[str]] = defaultdict(list)
    for skill in skills:
        by_verifier[skill.partition("/")[0]].append(skill)

    def gate(name: str, some: Sequence[str], num_looks: int) -> GateResult:
        old, new = ([score for skill in some for score in arm[skill]] for arm in (champion, challenger))
        return _not_worse(name, old, new, NormalDist().inv_cdf(1.0 - 0.025 / num_looks))

    return [
        gate("skills", skills, 1),
        *(gate(f"skills {verifier}", some, len(by_verifier)) for verifier, some in by_verifier.items()),
        *(gate(f"skill {skill}", [skill], len(skills)) for skill in skills),
    ]


def _not_worse(name: str, old: Sequence[float], new: Sequence[float], z: float) -> GateResult:
    low, high = difference_interval(sum(old), len(old), sum(new), len(new), z)
    value = sum(new) / len(new) - sum(old) / len(old) if old and new else 0.0
    return GateResult(name, value, 0.0, len(new), low, high, "fail" if high < 0.0 else "pass")


def overall(results: Sequence[GateResult]) -> Verdict:
    """Return pass only if every gate passes; a failure outweighs an open question."""
    verdicts = {result.verdict for result in results}
    if "fail" in verdicts:
        return "fail"
    return "inconclusive" if "inconclusive" in verdicts else "pass"
