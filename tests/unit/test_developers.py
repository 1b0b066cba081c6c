"""What developers meet first: verbs, forms, hooks, and pages whose links lead somewhere."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from typer.core import TyperGroup

from infra import cli
from infra.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += [*ROOT.glob("docs/**/*.md"), ROOT / "infra/compose/README.md", ROOT / "infra/k8s/README.md"]
OF_NOW = [page for page in PAGES if page.name not in ("log.md", "CHANGELOG.md")]  # what those say was so once
VERBS = {"setup", "up", "demo", "test", "test-all", "lint", "type", "docs", "bench", "shots", "clean"}


def test_make_alone_lists_every_verb_with_what_it_does():
    listed = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True).stdout
    told = dict(re.findall(r"^([a-z-]+) {2,}(\S.*)$", listed, re.M))
    targets = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M))
    assert targets >= VERBS and set(told) == targets
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert set(phony) == targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    dead = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert dead == []


@pytest.mark.parametrize("page", OF_NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tests_that_a_page_names_are_there(page):
    code = "\n".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    files = {path.name for path in ROOT.glob("tests/**/test_*.py")}
    text = page.read_text()
    named = [re.escape(name).replace("…", r"\w+") for name in re.findall(r"`(test_[\w…]+)`", text)]
    assert [name for name in named if not re.search(rf"def {name}\(", code)] == []
    assert set(re.findall(r"\b(test_\w+\.py)\b", text)) <= files


@pytest.mark.parametrize("page", OF_NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_that_a_page_names_are_there(page):
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"\beverloop ([a-z][^`|;\n]*)", text):
        first, *words = line.split()
        if first not in COMMANDS:  # "Everloop is": a sentence
            continue
        command = typer.main.get_command(cli.app).get_command(None, first)
        while isinstance(command, TyperGroup) and words and re.fullmatch(r"[a-z-]+", words[0]):
            name = words.pop(0)
            command = command.commands.get(name)
            assert command is not None, f"everloop {line}: {name} is no command"
        options = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", " ".join(words))) <= options, f"everloop {line}"


def test_the_index_names_every_page_and_room():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in ROOT.glob("docs/*.*"):
        if page.name != "README.md":
            assert f"({page.name})" in index, page.name
    rooms = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["root_packages"]
    assert all(f"`{room}`" in index for room in rooms)


@pytest.mark.parametrize(("schema", "name"), [
    ("github-issue-forms", "bug.yml"), ("github-issue-forms", "idea.yml"), ("github-issue-config", "config.yml"),
])  # fmt: skip
def test_the_forms_fit_their_schema(schema, name):
    form = ROOT / ".github" / "ISSUE_TEMPLATE" / name
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(form)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_hooks_are_tools_of_this_checkout():
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"], "nothing is fetched"
    lint = (ROOT / "Makefile").read_text()
    for hook in repositories[0]["hooks"]:
        program, *arguments = shlex.split(hook["entry"])
        assert hook["language"] == "system" and (ROOT / program).exists(), hook["id"]
        assert program in lint, f"{program} is not what make runs"
        assert all((ROOT / argument).exists() for argument in arguments if "/" in argument), hook["id"]
        if "files" in hook:
            assert re.compile(hook["files"])


def test_the_changelog_has_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased" and headings[1].startswith(version)
