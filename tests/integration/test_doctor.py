"""`everloop doctor` with nothing, with what is broken, with a running stack; `status`, as quick as it should be."""

import contextlib
import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import time

import httpx
import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from infra import pgvector
from infra.doctor import findings, services
from infra.doctor.findings import Finding
from infra.settings import Settings
from tests.conftest import EVERLOOP, wait_until

LIMIT_S = 5.0


def doctor(home, **settings):
    """Return (exit status, findings by name, seconds)."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EVERLOOP_")}
    environment = kept | {"EVERLOOP_HOME": str(home)} | {f"EVERLOOP_{n.upper()}": v for n, v in settings.items()}
    started_s = time.monotonic()
    done = subprocess.run([*EVERLOOP, "doctor", "--json", "-"], capture_output=True, text=True, env=environment)
    seconds = time.monotonic() - started_s
    assert "Traceback" not in done.stderr, done.stderr
    told = json.loads(done.stdout)
    found = {}
    for finding in told["findings"]:
        found.setdefault(finding["name"], []).append(finding)
    assert told["ok"] == (done.returncode == 0) == all(f["verdict"] != "fail" for f in told["findings"])
    return done.returncode, found, seconds


def failed(found):
    return {name for name, rows in found.items() if any(row["verdict"] == "fail" for row in rows)}


@contextlib.contextmanager
def deaf():
    """A port at which somebody listens and says nothing."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(16)
        yield sock.getsockname()[1]


def test_a_home_that_is_a_file_is_told_of_before_anything_is_started(tmp_path):
    (tmp_path / "home").touch()
    status, found, _ = doctor(tmp_path / "home")
    assert status == 1 and failed(found) == {"home"} and "no directory" in found["home"][0]["told"]
    up = subprocess.run(
        [*EVERLOOP, "up"],
        capture_output=True,
        text=True,
        env=os.environ | {"EVERLOOP_HOME": str(tmp_path / "home")},
    )
    assert up.returncode == 1 and "[home_not_writable]" in up.stderr and "Traceback" not in up.stderr


def test_before_anything_was_started_nothing_fails(tmp_path):
    runs = [doctor(tmp_path / "home") for _ in range(3)]
    status, found, _ = runs[-1]
    assert status == 0 and failed(found) == set()
    assert min(seconds for *_, seconds in runs) < LIMIT_S
    assert {"cores", "memory", "gpu", "python", "platform environment", "disk", "settings", "stack"} <= found.keys()
    assert "pins hold" in found["platform environment"][0]["told"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("canary_alpha", "7"), ("adapters_options", '{"secret": "hunter2", '), ("night_cornn", "hunter2")],
)
def test_settings_that_are_not_valid_are_named_without_their_values(tmp_path, setting, value):
    if setting == "night_cornn":  # of variables, only those that are settings are read
        (tmp_path / "everloop.toml").write_text(f'{setting} = "{value}"')
    status, found, _ = doctor(tmp_path, **{setting: value})
    (finding,) = found["settings"]
    assert status == 1 and failed(found) == {"settings"} and setting in finding["told"]
    assert "hunter2" not in str(found) and "everloop.toml" in finding["advice"]


def test_a_settings_file_that_is_not_toml_is_a_sentence_everywhere(tmp_path):
    (tmp_path / "everloop.toml").write_text("night_cron = never [")
    status, found, _ = doctor(tmp_path)
    assert status == 1 and "is not TOML" in found["settings"][0]["told"]
    done = subprocess.run(
        [*EVERLOOP, "status"], capture_output=True, text=True, env=os.environ | {"EVERLOOP_HOME": str(tmp_path)}
    )
    assert done.returncode == 1 and "[settings_invalid]" in done.stderr and "Traceback" not in done.stderr


def test_a_recipe_that_cannot_be_read_is_told_before_the_night(tmp_path):
    (tmp_path / "training.toml").write_text('recipe = "alchemy"')
    status, found, _ = doctor(tmp_path)
    assert status == 1 and "alchemy" in found["recipe"][0]["told"]


def test_a_port_that_is_taken_is_named_with_its_setting(tmp_path):
    with deaf() as port:
        status, found, _ = doctor(tmp_path, api_port=str(port))
    assert status == 1 and failed(found) == {"ports"} and "EVERLOOP_API_PORT" in found["ports"][0]["advice"]


def test_services_that_are_away_or_deaf_fail_in_time_and_say_which_setting(tmp_path):
    with deaf() as port:
        away = {
            "database_url": f"postgresql+psycopg://u:hunter2@127.0.0.1:{port}/everloop",
            "kafka_bootstrap": f"127.0.0.1:{port}",
            "engine_url": f"http://127.0.0.1:{port}",
            "prefect_url": "http://127.0.0.1:9/api",
        }
        times = []
        for _ in range(3):
            status, found, seconds = doctor(tmp_path, **away)
            times.append(seconds)
    assert status == 1 and min(times) < LIMIT_S, times  # a busy machine takes a second to start Python
    assert failed(found) == {"database", "broker", "engine"} and found["prefect"][0]["verdict"] == "warn"
    assert "hunter2" not in str(found)
    for name in failed(found):
        assert found[name][0]["advice"], name


def test_an_adapter_that_was_tampered_with_fails(settings, registered, tmp_path):
    registered()
    status, found, _ = doctor(settings.home)
    assert status == 0 and found["adapters"][0]["told"].startswith("1 of 1")
    (adapter,) = settings.adapters_dir.glob("*/adapter_model.safetensors")
    adapter.chmod(0o600)
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"\x01")
    status, found, _ = doctor(settings.home)
    assert status == 1 and failed(found) == {"adapters"} and "changed" in found["adapters"][0]["told"]


def test_tables_of_an_earlier_version_fail_and_the_newest_do_not(database, tmp_path):
    settings = Settings(home=tmp_path, database_url=database.kw["bind"].url.render_as_string(hide_password=False))
    database_finding, clock = services.check_database(settings)
    assert (database_finding.verdict, clock.verdict) == ("ok", "ok") and "migrated" in database_finding.told
    with database.begin() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '0001'"))
    assert next(iter(services.check_database(settings))).verdict == "fail"
    with database.begin() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    assert next(iter(services.check_database(settings))).verdict == "warn"


def test_an_encoder_without_its_index_is_told(database, tmp_path):
    url = database.kw["bind"].url.render_as_string(hide_password=False)
    settings = Settings(home=tmp_path, database_url=url, memory_encoder="sentence", reward_url="http://reward")

    def found(settings=settings):
        return next(each for each in services.check_database(settings) if each.name == "pgvector")

    assert found().verdict == "warn" and "everloop migrate" in found().advice
    pgvector.prepare(settings)
    assert found().verdict == "ok"
    assert "reward worker" in found(settings.model_copy(update={"reward_url": None})).told


def test_a_clock_that_is_off_is_told(database, tmp_path, monkeypatch):
    settings = Settings(home=tmp_path, database_url=database.kw["bind"].url.render_as_string(hide_password=False))
    now = time.time
    for ahead_s, verdict in ((-5.0, "warn"), (5.0, "warn"), (-100.0, "fail"), (0.5, "ok")):
        monkeypatch.setattr(services.time, "time", lambda ahead_s=ahead_s: now() + ahead_s)
        _, clock = services.check_database(settings)
        assert clock.verdict == verdict, clock
        assert ("behind" in clock.told) == (ahead_s > 0), "the database's, as seen from here"


def test_a_check_that_hangs_or_breaks_is_a_finding():
    def breaks():
        raise ZeroDivisionError
        yield

    checks = {"slow": lambda: time.sleep(60), "broken": breaks, "well": lambda: [Finding("well", "ok", "")]}
    started_s = time.monotonic()
    found = {finding.name: finding for finding in findings.run(checks, deadline_s=0.3)}
    assert time.monotonic() - started_s < 2
    assert [found[name].verdict for name in checks] == ["fail", "fail", "ok"]
    assert "ZeroDivisionError" in found["broken"].told


def test_a_running_stack_is_well(stack):
    settings = {"canary_settle_s": "1", "gate_overrides": "any"}
    runs = [doctor(stack.settings.home, **settings) for _ in range(3)]
    assert min(seconds for *_, seconds in runs) < LIMIT_S
    # All checks of one run have 2.5 s in all: a part may be busy for as long, but is not each time.
    status, found, _ = min(runs, key=lambda run: len(failed(run[1])))
    assert status == 0 and failed(found) == set(), found
    assert {"database", "broker", "engine", "api", "prefect", "clock", "adapters"} <= found.keys()
    assert "migrated" in found["database"][0]["told"] and "topics" in found["broker"][0]["told"]


def test_status_takes_less_than_a_second_and_shows_the_loop(stack):
    """Of the processor's time: the rest is what other processes on this machine have of it."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*EVERLOOP, "status", "--json", "-"], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
    assert min(times) < 1.0, times
    loop = json.loads(done.stdout)["loop"]
    assert [part["name"] for part in loop["parts"]] == [
        "People", "Log", "Reward", "Training", "Gate", "Canary", "Champion",
    ]  # fmt: skip
    assert isinstance(loop["decisions"], list)


def test_watch_is_live_until_it_is_interrupted(stack):
    process, screen = pty.fork()
    if process == 0:
        os.execv(EVERLOOP[0], [*EVERLOOP, "status", "--watch"])
    seen, until_s = b"", time.monotonic() + 20
    while seen.count(b"postgres") < 3 and time.monotonic() < until_s:
        if select.select([screen], [], [], 0.5)[0]:
            seen += os.read(screen, 65536)
    os.kill(process, signal.SIGINT)
    with contextlib.suppress(OSError):
        while os.read(screen, 65536):
            pass
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 130
    assert seen.count(b"postgres") >= 3 and b"champion" in seen, "it was drawn again and again"


def test_every_part_of_the_stack_serves_metrics(stack):
    targets = json.loads(stack.settings.metrics_targets_file.read_text())
    places = {target["labels"]["part"]: target["targets"][0] for target in targets}
    assert places.keys() == {"api", "engine", "relay", "ledger", "reconciler", "reward", "flows"}
    wanted = {
        "api": ("everloop_engine_up", "everloop_chat_answers_total", "everloop_log_up"),
        "relay": ("everloop_relay_published_events_total",),
        "ledger": ("everloop_canary_open", "everloop_home_free_bytes", "everloop_consumer_events_total"),
        "reconciler": ("everloop_attestation_proved", "everloop_replica_up"),
        "reward": ("everloop_reward_database_up",),
        "flows": ("everloop_run_last_outcome", "everloop_run_in_progress"),
        "engine": ("vllm:num_requests_running",),
    }
    assert stack.feedback(stack.ask(user="watched").id, user="watched", kind="thumb", value=1).status_code == 202

    def told(part):
        text = httpx.get(f"http://{places[part]}/metrics", trust_env=False).text
        return text, {s.name: s for family in text_string_to_metric_families(text) for s in family.samples}

    for part, names in wanted.items():
        wait_until(lambda part=part, names=names: set(names) <= told(part)[1].keys(), what=f"{part} lacks one")
        text, samples = told(part)
        ups = [s for name, s in samples.items() if re.search(r"everloop_\w+_up$", name)]
        assert all(s.value == 1 for s in ups), part
        if part != "engine" and (promtool := shutil.which("promtool")):
            done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
            ours = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("everloop")]
            assert not ours, ours


def test_without_a_database_metrics_say_so_and_nothing_else_breaks(tmp_path):
    from deploy.metrics import CanaryCollector, ReplicaCollector, RunCollector
    from infra.db import connect
    from infra.log.metrics import LogCollector
    from reward.metrics import RewardCollector

    nowhere = connect("postgresql+psycopg://u:p@127.0.0.1:9/none")
    for collector in (CanaryCollector, ReplicaCollector, RunCollector, LogCollector, RewardCollector):
        samples = [s for family in collector(nowhere).collect() for s in family.samples]
        assert [(s.name, s.value) for s in samples] == [(collector.up, 0.0)]


@pytest.mark.parametrize("collector", ["CanaryCollector", "ReplicaCollector", "RunCollector"])
def test_on_new_tables_every_query_of_the_metrics_runs(database, collector):
    import deploy.metrics

    found = getattr(deploy.metrics, collector)(database)
    samples = {s.name: s.value for family in found.collect() for s in family.samples}
    assert samples[found.up] == 1.0 and len(samples) > 1
