"""The embedded stack and the command line, as an operator meets them."""

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from infra.db import Base
from infra.errors import SetupError
from infra.settings import Settings, load
from infra.stack import embedded, ports
from infra.stack.supervisor import stack_processes
from tests.conftest import EVERLOOP, in_prefect, wait_until


def test_starting_twice_is_refused_with_the_reason(stack):
    done = subprocess.run([*EVERLOOP, "up"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "already running" in done.stderr and "[already_running]" in done.stderr


def test_status_lists_every_part_and_the_deployment(stack):
    done = subprocess.run([*EVERLOOP, "status", "--json", "-"], capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert {part["name"] for part in report["parts"]} == {
        "postgres", "broker", "engine", "prefect", "door", "api", "relay", "ledger", "reconciler", "reward",
        "flows",
    }  # fmt: skip
    assert all(part["state"] == "running" for part in report["parts"])
    assert report["deployment"]["champion"]


def test_a_part_that_dies_is_restarted_and_shown(stack):
    before = next(p for p in stack.supervisor.status() if p.name == "reconciler")
    os.kill(before.pid, signal.SIGKILL)

    def back():
        now = next(p for p in stack.supervisor.status() if p.name == "reconciler")
        return now.state == "running" and now.pid != before.pid and now.restarts == before.restarts + 1

    wait_until(back)


def test_every_part_listens_on_loopback_only(stack):
    listening = [
        connection.laddr.ip
        for process in stack_processes(stack.settings.home)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and set(listening) == {"127.0.0.1"}


def test_prefect_starts_nothing_for_whoever_has_not_its_name(stack):
    """Its worker starts what a deployment says, as the user of the stack: no page or other account may ask."""
    stranger = httpx.Client(base_url=stack.settings.need("prefect_url"), trust_env=False)
    assert stranger.get("/health").status_code == 200
    for asked in (
        stranger.post("/deployments/filter", json={}),
        stranger.get("/work_pools/everloop"),
        stranger.post("/flows/", json={"name": "mine"}, headers={"Origin": "http://elsewhere.example"}),
        stranger.get("/work_pools/everloop", auth=("everloop", "guessed")),
    ):
        assert asked.status_code == 401, asked.request.url
    assert in_prefect(stack.settings).get("/work_pools/everloop").status_code == 200


def test_secrets_are_readable_by_their_owner_only(stack):
    home = stack.settings.home
    kept = (home / "postgres.password", home / "prefect.auth")
    for path in (*kept, stack.settings.stack_file, home / "run" / "supervisord.conf"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_secrets_are_in_no_log_and_on_no_command_line(stack, home):
    settings = stack.settings
    secrets = {settings.service_key, settings.engine_key, settings.prefect_auth.removeprefix("everloop:")}
    secrets.add((home / "postgres.password").read_text())
    assert all(len(secret) > 20 for secret in secrets)
    processes = stack_processes(home)
    assert len(processes) > 8
    shown = [" ".join(process.cmdline()) for process in processes]
    shown += [path.read_text(errors="replace") for path in settings.log_dir.iterdir()]
    assert not [text[:200] for text in shown for secret in secrets if secret in text]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(
            ("POST", path)
            for path in ("/v1/load_lora_adapter", "/v1/chat/completions", "/adapters", "/invocations")
        ),
        *(("POST", "/tokenize"), ("DELETE", "/adapters/base"), ("GET", "/v1/models")),
    ],
)
def test_the_engine_does_nothing_for_strangers(stack, method, path):
    key = stack.settings.engine_credentials
    with httpx.Client(base_url=stack.settings.engine_url, trust_env=False) as engine:
        assert engine.request(method, path, json={}).status_code == 401
        wrong = {"Authorization": key["Authorization"] + "x"}
        assert engine.request(method, path, json={}, headers=wrong).status_code == 401
        assert engine.request(method, path, json={}, headers=key).status_code != 401
        assert engine.get("/health").status_code == 200


def test_chosen_ports_are_none_that_an_outgoing_connection_may_be_given(stack):
    used = [getattr(stack.settings, name) for name in ("api_port", "reward_port")]
    addresses = (stack.settings.database_url, stack.settings.kafka_bootstrap, stack.settings.engine_url)
    used += [int(re.search(r":(\d+)(?:/|$)", address).group(1)) for address in addresses]
    assert all(port in ports.OWN_PORTS for port in used)


def test_the_models_are_what_the_migrations_make(stack):
    root = Path(__file__).parents[2]
    for room in ("infra", "feedback", "reward", "deploy", "trainer", "agent"):
        for path in (root / room).rglob("*.py"):
            if "__tablename__" in path.read_text():
                importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
    engine = stack.sessions.kw["bind"]
    with engine.connect() as connection:
        options = {"compare_type": True, "include_object": _is_not_of_a_partition}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []


def _is_not_of_a_partition(thing, name, kind, reflected, compare_to):
    """The months' partitions, and the keys that PostgreSQL keeps to each, are made as time goes on."""
    if kind == "foreign_key_constraint":
        name = thing.elements[0].target_fullname
    return not (kind in ("table", "foreign_key_constraint") and name.startswith("episodes_"))


def test_a_taken_port_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(SetupError) as refused:
            embedded.up(Settings(home=tmp_path, api_port=port), print)
    assert refused.value.code == "port_taken" and str(port) in refused.value.message
    assert "EVERLOOP_API_PORT" in refused.value.message


def test_too_little_disk_is_said_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "MIN_FREE_BYTES", 1 << 60)
    with pytest.raises(SetupError) as refused:
        embedded.up(Settings(home=tmp_path / "none"), print)
    assert refused.value.code == "no_disk" and not (tmp_path / "none").exists()


def test_the_api_never_loads_a_model():
    code = "import sys, agent.app; print([m for m in ('torch', 'transformers', 'peft', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_imports_no_subcommand():
    code = (
        "import sys; sys.argv = ['everloop', '--help']; import infra.cli\n"
        "try: infra.cli.main()\nexcept SystemExit: pass\n"
        "print([m for m in ('fastapi', 'sqlalchemy', 'prefect', 'torch', 'kafka') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]") and "rollback" in done.stdout


def test_without_a_stack_commands_say_how_to_get_one(tmp_path):
    environment = {**os.environ, "EVERLOOP_HOME": str(tmp_path)}
    for command in (["train"], ["chat", "hi"], ["rollback", "--reason", "x"]):
        done = subprocess.run([*EVERLOOP, *command], capture_output=True, text=True, env=environment)
        assert done.returncode == 1 and "everloop up" in done.stderr, done.stderr
    done = subprocess.run([*EVERLOOP, "status"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "not running" in done.stderr


def test_what_needs_no_stack_is_told_without_one(tmp_path):
    environment = {**os.environ, "EVERLOOP_HOME": str(tmp_path)}
    told = subprocess.run([*EVERLOOP, "train", "--list"], capture_output=True, text=True, env=environment)
    assert told.returncode == 0 and "best-of-n" in told.stdout
    command = [*EVERLOOP, "train", "--cancel", "run_1"]
    refused = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert refused.returncode == 2 and "--reason" in refused.stderr


def test_addresses_recorded_by_a_stack_that_died_are_not_taken_for_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERLOOP_HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stack.json").write_text('{"database_url": "postgresql+psycopg://gone"}')
    assert load().database_url == "postgresql+psycopg://gone"
    assert load(recorded_addresses=False).database_url is None


def test_a_rater_that_answers_nonsense_ends_the_demo_with_a_sentence(stack):
    done = subprocess.run(
        [*EVERLOOP, "demo", "--rater", "echo nonsense", "--measured", "20"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "[rater_failed]" in done.stderr and "Traceback" not in done.stderr
    assert stack.supervisor.running(), "a demo on a running stack must not stop it"
