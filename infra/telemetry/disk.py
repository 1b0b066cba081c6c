"""The disk that holds the home."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from infra.telemetry.exposition import FigureCollector, Sample


class DiskCollector(FigureCollector):
    """How much is free where all state lies."""

    figures: ClassVar = {
        "everloop_home_free_bytes": ("Free space of the disk that holds the home.",),
        "everloop_home_size_bytes": ("Size of that disk.",),
    }

    def __init__(self, home: Path) -> None:
        self.home = home

    def samples(self) -> Iterator[Sample]:
        usage = shutil.disk_usage(self.home)
        yield "everloop_home_free_bytes", {}, usage.free
        yield "everloop_home_size_bytes", {}, usage.total
