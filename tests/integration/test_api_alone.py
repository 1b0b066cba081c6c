"""The API runs from ``infra/requirements/api.txt`` alone: no torch, at most 300 MB."""

import os
import re
import subprocess
import sys
import time
from importlib.metadata import distribution
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import wait_until
from tests.integration.test_health import NO_ENGINE, port

ROOT = Path(__file__).parents[2]
API = ROOT / "infra" / "requirements" / "api.txt"
MAX_BYTES = 300 * 1000**2
# What the image `api` runs, and what people type there.
MODULES = [
    *("agent.app", "infra.log.relay", "deploy.reconciler", "infra.stack.cli", "infra.stack.embedded"),
    *("infra.cli", "deploy.cli", "deploy.canary_cli", "deploy.audit_cli", "deploy.releases_cli", "feedback.cli"),
    *("agent.tools.mcp_servers", "agent.access_cli", "reward.cli", "infra.log.cli", "alembic.command", "psycopg"),
]
# Runs as if only the packages that are named on the first line of standard input were installed.
ALONE = """
import importlib, sys
from importlib.metadata import packages_distributions
allowed = set(sys.stdin.readline().split())
there = packages_distributions()

class Absent:
    def find_spec(self, name, path=None, target=None):
        owners = there.get(name.partition(".")[0])
        if owners and not allowed.intersection(owner.lower().replace("_", "-") for owner in owners):
            raise ModuleNotFoundError(f"{name} is of {owners}, which api.txt does not name", name=name)

sys.meta_path.insert(0, Absent())
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


def pins(file):
    lines = (line.strip() for line in file.read_text().splitlines())
    named = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in named}


def test_it_is_a_subset_of_the_platforms_pins_and_lacks_nothing():
    api, platform = pins(API), pins(API.with_name("platform.txt"))
    assert {name: version for name, version in api.items() if platform.get(name) != version} == {}
    lacking = set()
    for name in api:
        for text in distribution(name).requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                lacking |= {canonicalize_name(needed.name)} - set(api)
    assert lacking == set()


def test_what_the_image_runs_needs_nothing_else():
    names = " ".join([*pins(API), "everloop"])

    def run(*modules):
        command = [sys.executable, "-c", ALONE, *modules]
        return subprocess.run(command, input=names + "\n", capture_output=True, text=True, cwd=ROOT)

    done = run(*MODULES)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "torch" in run("reward.encoder", "torch").stderr, "what is not named is kept out"


def size_bytes(directory):
    files = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_blocks * 512 for path in files)


@pytest.mark.slow
def test_it_installs_within_its_size_and_starts(database, tmp_path):
    venv = tmp_path / "venv"
    began_s = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [venv / "bin" / "python", "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--requirement", API], check=True)
    own = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ROOT]
    subprocess.run([*pip, *own], check=True)
    installed_s = time.monotonic() - began_s
    assert (
        subprocess.run([*pip, "check"], capture_output=True, text=True).stdout.strip()
        == "No broken requirements found."
    )

    number = port()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "EVERLOOP_HOME": str(tmp_path / "home"),
        "EVERLOOP_DATABASE_URL": database.kw["bind"].url.render_as_string(hide_password=False),
        "EVERLOOP_ENGINE_URL": NO_ENGINE,
        "EVERLOOP_API_PORT": str(number),
        "EVERLOOP_ACCESS": "open",  # on loopback: all pages, without signing in
    }
    began_s = time.monotonic()
    process = subprocess.Popen([venv / "bin" / "python", "-m", "agent.app"], env=environment, cwd=tmp_path)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{number}", trust_env=False, timeout=30) as client:
            wait_until(lambda: _answers(client), what="the API did not start")
            started_s = time.monotonic() - began_s
            for page in (
                "/",
                "/operate",
                "/operate/learning",
                "/operate/feedback",
                "/operate/releases",
                "/metrics",
            ):
                assert client.get(page).status_code in (200, 307), page
            assert client.get("/readyz/feedback").status_code == 200
    finally:
        process.terminate()
        process.wait(30)
    help_text = subprocess.run(
        [venv / "bin" / "everloop", "--help"], capture_output=True, text=True, env=environment
    )
    assert re.search("migrate", help_text.stdout), help_text.stderr
    total = size_bytes(venv) + sum(
        size_bytes(ROOT / package) for package in ("agent", "feedback", "reward", "deploy")
    )
    print(f"{total / 1e6:.0f} MB, installed in {installed_s:.0f} s, first answer after {started_s:.1f} s")
    assert total <= MAX_BYTES


def _answers(client):
    try:
        return client.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False
