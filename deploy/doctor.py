"""Whether the adapters that are served are what their digests say."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from deploy.store import check_files
from infra.doctor.findings import Finding
from infra.errors import IntegrityError
from infra.settings import Settings

BUDGET_S = 1.5
ADVICE = "Promote another release, or register the adapter again from where it came."


def check_adapters(settings: Settings) -> Iterator[Finding]:
    """Check the files of adapters against their digests, the newest first, as many as the time allows."""
    if settings.adapters_url is not None:
        yield Finding(
            "adapters", "ok", f"at {settings.adapters_url.partition('?')[0]}; checked when they are fetched"
        )
        return
    found = [path for path in settings.adapters_dir.glob("*") if len(path.name) == 64 and path.is_dir()]
    found.sort(key=lambda path: -path.stat().st_mtime)
    until_s, num_checked = time.monotonic() + BUDGET_S, 0
    for directory in found:
        if time.monotonic() > until_s:
            break
        num_checked += 1
        problem = _problem(directory)
        if problem is not None:
            yield Finding("adapters", "fail", problem, ADVICE)
    told = f"{num_checked} of {len(found)} checked against their digests" if found else "none yet"
    yield Finding("adapters", "ok", told)


def _problem(directory: Path) -> str | None:
    try:
        check_files(directory, directory.name)
    except IntegrityError as error:
        return error.message
    except OSError as error:
        return f"{directory.name[:12]} cannot be read ({error.strerror})"
    return None
