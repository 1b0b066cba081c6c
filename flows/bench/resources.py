"""What each part holds, sampled while a bench runs: memory, open files, connections; and whether it grows."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from infra.stack.renewal import MAX_BROKER_MIB
from infra.stack.supervisor import Supervisor

SAMPLE_EVERY_S = 2.0
NUM_BLOCKS = 8  # samples near each other are alike: the slope is fitted to means of so many stretches
WARM_SHARE = 0.25  # what a process takes when it does something for the first time is no leak
# Growth that a run of this length cannot tell from what caches and allocators take: a share of the part's memory.
TOLERATED_SHARE = 0.05
TOLERATED_MIB = 8.0
TOLERATED_FILES = 8  # pools of connections open more under load, up to their size
# What a part takes little by little, up to a bound that it was given: the engine touches the blocks of its cache
# when they are first used (VLLM_CPU_KVCACHE_SPACE); a server process of PostgreSQL keeps up to so many files of
# tables open (max_files_per_process), and then closes the oldest; the embedded broker keeps its log in memory until
# it is started anew (infra/stack/renewal.py); the reward worker's model keeps the buffers of its largest batch, and
# each server process of PostgreSQL what it knows of the tables it met. Beyond the bound it is a leak here, too.
BOUND_MIB = {"engine": 1024.0, "broker": MAX_BROKER_MIB, "reward": 512.0, "postgres": 64.0}
BOUND_FILES = {"postgres": 1000}
T_95 = {4: 2.78, 5: 2.57, 6: 2.45}  # Student's t, two-sided, by degrees of freedom
MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Sample:
    """A part at one moment.

    Memory is its proportional share (PSS), so that what is shared counts once, without shared segments such as the
    buffers of PostgreSQL: their size is set, but a page of them is counted from its first use.
    """

    at_s: float
    memory_mib: float
    files: int
    connections: int


@dataclass(frozen=True, slots=True)
class Slope:
    """Growth per minute with its standard error, over `num` blocks."""

    per_min: float
    error: float
    num: int

    @property
    def is_noise(self) -> bool:
        """Whether it cannot be told from none."""
        return abs(self.per_min) <= T_95.get(self.num - 2, 2.4) * self.error


def slope(times_s: Sequence[float], values: Sequence[float], num_blocks: int = NUM_BLOCKS) -> Slope:
    """Fit a line to means of blocks of the samples."""
    size = max(1, len(values) // num_blocks)
    starts = range(0, size * (len(values) // size), size)
    xs = [statistics.fmean(times_s[start : start + size]) / 60.0 for start in starts]
    ys = [statistics.fmean(values[start : start + size]) for start in starts]
    if len(xs) < 3:
        return Slope(0.0, math.inf, len(xs))
    fit = statistics.linear_regression(xs, ys)
    spread = sum((x - statistics.fmean(xs)) ** 2 for x in xs)
    left = sum((y - fit.slope * x - fit.intercept) ** 2 for x, y in zip(xs, ys, strict=True))
    return Slope(fit.slope, math.sqrt(left / (len(xs) - 2) / spread), len(xs))


def judge(samples: Sequence[Sample], part: str = "") -> dict[str, Any]:
    """Return what a part held at start and end, how its memory grew, and what of it is a leak.

    Start and end are medians of the first and the last fifth of what was sampled after the warm-up. Memory leaks
    where its slope is beyond noise and has made, over the run, more than caches and allocators may.
    """
    warm = list(samples[round(WARM_SHARE * len(samples)) :])
    fifth = max(1, len(warm) // 5)
    first, last = warm[:fifth], warm[-fifth:]

    def ends(name: str) -> tuple[float, float]:
        return tuple(statistics.median(getattr(s, name) for s in part) for part in (first, last))

    memory, files, connections = ends("memory_mib"), ends("files"), ends("connections")
    grown = slope([s.at_s for s in warm], [s.memory_mib for s in warm])
    length_min = (warm[-1].at_s - warm[0].at_s) / 60.0
    tolerated = max(TOLERATED_MIB, TOLERATED_SHARE * memory[0]) + BOUND_MIB.get(part, 0.0)
    leaks = ["memory"] if not grown.is_noise and grown.per_min * length_min > tolerated else []
    leaks += [
        name
        for name, (start, end), bound in (
            ("files", files, BOUND_FILES.get(part, 0)),
            ("connections", connections, 0),
        )
        if end - start > max(TOLERATED_FILES, 0.1 * start) + bound
    ]
    return {
        "memory_start_mib": round(memory[0], 1),
        "memory_end_mib": round(memory[1], 1),
        "slope_mib_per_min": round(grown.per_min, 3),
        "slope_error": round(grown.error, 3),
        "verdict": "leaks"
        if "memory" in leaks
        else "flat"
        if grown.is_noise or grown.per_min <= 0
        else "within what caches take",
        "files_start": files[0],
        "files_end": files[1],
        "connections_start": connections[0],
        "connections_end": connections[1],
        "samples": len(warm),
        "leaks": leaks,
    }


class Sampler:
    """Samples every part of a stack, in a thread of its own, for the length of the block."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.samples: dict[str, list[Sample]] = defaultdict(list)
        self.restarts: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            for part in self.supervisor.status():
                if part.pid is not None:
                    with suppress(psutil.Error):
                        self.samples[part.name].append(_sample(part.pid, alone=part.name == "flows"))
                self.restarts[part.name] = part.restarts

    def report(self) -> dict[str, dict[str, Any]]:
        """Return the verdict on each part."""
        return {
            name: judge(samples, name) | {"restarts": self.restarts[name]}
            for name, samples in sorted(self.samples.items())
        }


def _own_bytes(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in rollup)}
    return (kib["Pss"] - kib.get("Pss_Shmem", 0)) * 1024


def _sample(pid: int, *, alone: bool) -> Sample:
    """Look at a process and its children; of the flows' worker the children are runs, which come and go."""
    process = psutil.Process(pid)
    tree = [process] if alone else [process, *process.children(recursive=True)]
    memory, files, connections = 0, 0, 0
    for each in tree:
        with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            memory += _own_bytes(each.pid)
            files += each.num_fds()
            connections += len(each.net_connections("inet"))
    return Sample(time.monotonic(), memory / MIB, files, connections)
