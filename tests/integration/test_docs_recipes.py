"""The recipes in docs/recipes/ do what they say: their ``bash`` blocks are run, one after another, in one shell.

What a reader puts in (a line ``NAME=…`` of the page) is given by the test. Blocks of other languages are not run.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.bench.adapters import linear_shapes, write_adapter
from infra.stack.supervisor import stack_processes

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "docs" / "recipes"


def blocks(page):
    return re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.M | re.S)


def follow(name, given, home, cwd, timeout_s=120):
    """Do what a recipe says; return what its shell said."""
    script = "\n".join(blocks(RECIPES / name))
    for variable, value in given.items():
        script, count = re.subn(rf"^{variable}=.*$", f"{variable}={value}", script, count=1, flags=re.M)
        assert count == 1, f"{name} has no line {variable}=…"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "EVERLOOP_HOME": str(home),
        "NO_COLOR": "1",
    }
    environment.pop("EVERLOOP_GATE_OVERRIDES", None)  # of the tests; a reader has the default
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout + done.stderr


def test_every_recipe_has_something_to_run_and_is_run_here():
    pages = {page.name for page in RECIPES.glob("*.md")}
    assert all(blocks(RECIPES / page) for page in pages)
    run = set(re.findall(r'follow\(\s*"([\w-]+\.md)"', Path(__file__).read_text()))
    assert run == pages
    index = (RECIPES.parent / "README.md").read_text()
    assert all(f"recipes/{page}" in index for page in pages)


def test_votes_from_elsewhere_are_brought_once(stack, tmp_path):
    follow("bring-my-votes.md", {}, stack.settings.home, tmp_path)
    exported = (tmp_path / "all.jsonl").read_text()
    assert exported.count("Air scatters blue light more than red.") == 1, "the second import brought nothing"
    assert "Seven." in exported and not (tmp_path / "votes.jsonl.rejected.jsonl").exists()
    assert exported.count('"answer"') >= 3


def test_a_person_has_the_last_word(stack, tmp_path):
    adapter = tmp_path / "candidate"
    write_adapter(adapter, linear_shapes(stack.settings.base_model_dir), rank=4, seed=8)
    said = follow("approve-by-hand.md", {"ADAPTER": adapter}, stack.settings.home, tmp_path)
    assert "propose" in said and "candidate" in said
    assert stack.http.get("/v1/deployment").json()["challenger"] is None


def test_a_gpu_is_looked_for(tmp_path):
    said = follow("run-on-a-gpu.md", {}, tmp_path, ROOT)
    assert re.search(r"^(cpu\ninfra/requirements/engine\.txt|gpu\ninfra/requirements/engine-gpu\.txt)$", said, re.M)


@pytest.mark.slow
def test_a_model_of_ones_own_is_served(base_model_dir, tmp_path):
    model = tmp_path / "my-model"
    shutil.copytree(base_model_dir, model)
    home = tmp_path / "home"
    said = follow("serve-my-own-model.md", {"MODEL": model}, home, tmp_path, timeout_s=400)
    assert '"status":"ready"' in said.replace(" ", "") and '"content"' in said
    assert not stack_processes(home), "stopped at the end"
