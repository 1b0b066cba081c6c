"""What a check finds, and running many at once within a time that people wait for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from infra.errors import EverloopError

Verdict = Literal["ok", "warn", "fail"]
DEADLINE_S = 2.5


@dataclass(frozen=True, slots=True)
class Finding:
    """One line.

    Attributes
    ----------
    verdict
        ``fail`` where Everloop cannot work so, ``warn`` where it works less well.
    told
        What was found.
    advice
        What to do about it; empty where it is well.
    """

    name: str
    verdict: Verdict
    told: str
    advice: str = ""


Check = Callable[[], Iterable[Finding]]


def run(checks: Mapping[str, Check], deadline_s: float = DEADLINE_S) -> Iterator[Finding]:
    """Run checks at once; yield what they find in their order. One that takes too long, or breaks, is a finding."""
    until_s = time.monotonic() + deadline_s
    found: dict[str, list[Finding]] = {}

    def run_one(name: str, check: Check) -> None:
        try:
            found[name] = list(check())
        except EverloopError as error:
            found[name] = [Finding(name, "fail", error.message, f"[{error.code}]")]
        except Exception as error:
            found[name] = [Finding(name, "fail", f"the check itself failed ({type(error).__name__})", "Report it.")]

    threads = [(item[0], threading.Thread(target=run_one, args=item, daemon=True)) for item in checks.items()]
    for _, thread in threads:
        thread.start()
    for name, thread in threads:
        thread.join(max(until_s - time.monotonic(), 0.0))
        late = Finding(name, "fail", f"no answer within {deadline_s:.0f} s", "Look at its log and at the network.")
        yield from found.get(name, [late])
