"""What compose.yaml says is enough: its parts, started as plain processes with its commands, settings and checks.

Only names that Docker would resolve are put in: addresses, the volumes' directories, the secrets.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from tests.conftest import wait_until
from tests.integration.test_elsewhere import cluster  # noqa: F401 (a fixture)
from tests.integration.test_health import port

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PARTS = ("relay", "reconciler", "ledger", "reward", "api")  # flows and Prefect: test_flows.py


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load((ROOT / "infra" / "compose" / "compose.yaml").read_text())["services"]


@pytest.fixture(scope="module")
def resolved(cluster, base_model_dir, tmp_path_factory):  # noqa: F811
    """What stands for the names in the file."""
    home, secrets = tmp_path_factory.mktemp("state"), tmp_path_factory.mktemp("secrets")
    (secrets / "everloop_database_url").write_text(cluster["EVERLOOP_TEST_DATABASE"])
    (secrets / "everloop_engine_key").write_text("only ours")
    ports = {name: str(port()) for name in ("8080", "8000", "8001")}
    return {
        "kafka:9092": cluster["EVERLOOP_TEST_KAFKA"],
        "http://engine:8000": f"http://127.0.0.1:{ports['8000']}",
        "http://reward:8001": f"http://127.0.0.1:{ports['8001']}",
        "http://127.0.0.1:8001": f"http://127.0.0.1:{ports['8001']}",
        "http://127.0.0.1:8080": f"http://127.0.0.1:{ports['8080']}",
        "/run/secrets": str(secrets),
        "/var/lib/everloop": str(home),
        "/models/base": str(base_model_dir),
        "0.0.0.0": "127.0.0.1",
    } | ports


def put_in(text, resolved):
    text = str(text)
    if text in resolved:
        return resolved[text]
    for name, meant in resolved.items():
        text = text if name.isdigit() else text.replace(name, meant)
    return text


def environment_of(service, resolved):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EVERLOOP_")}
    given = {name: put_in(value, resolved) for name, value in (service.get("environment") or {}).items()}
    # Compose's defaults, as in ${EVERLOOP_TIME_ZONE:-UTC}.
    given = {
        name: value.partition(":-")[2].rstrip("}") if "${" in value else value for name, value in given.items()
    }
    return {**kept, "PYTHONPATH": str(ROOT), **given}


def command_of(service):
    first, *rest = service["command"]
    return [sys.executable, *(["-m", "infra.cli"] if first == "everloop" else []), *rest]


@contextmanager
def running(services, resolved, log_dir):
    """The engine and our parts, as the file says."""
    with ExitStack() as held:

        def start(name, command, environment):
            log = held.enter_context((log_dir / f"{name}.log").open("w"))
            process = subprocess.Popen(command, env=environment, cwd=log_dir, stdout=log, stderr=log)
            held.callback(process.wait, 40)
            held.callback(process.terminate)

        told = [put_in(flag, resolved) for flag in services["engine"]["command"]]
        told = [f"--port={resolved['8000']}" if flag.startswith("--port=") else flag for flag in told]
        engine = [ROOT / ".venv-engine" / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server", *told]
        start("engine", engine, {**os.environ, **image_environment(), "EVERLOOP_ENGINE_KEY": "only ours"})
        migrated = subprocess.run(
            command_of(services["migrate"]), env=environment_of(services["migrate"], resolved), capture_output=True
        )
        assert migrated.returncode == 0, migrated.stderr
        for name in PARTS:
            start(name, command_of(services[name]), environment_of(services[name], resolved))
        yield


def image_environment():
    """The variables of the engine's image, but for what depends on where it lies."""
    stage = (
        (ROOT / "infra" / "compose" / "Dockerfile").read_text().partition("AS engine\n")[2].partition("\nFROM")[0]
    )
    words = stage.partition("\nENV ")[2].partition("\nEXPOSE")[0].replace("\\\n", " ").split()
    pairs = dict(word.split("=", 1) for word in words)
    return {name: value for name, value in pairs.items() if name not in ("HOME", "LD_PRELOAD")}


def key_of(name, services, resolved):
    """Make an account and a key as an operator would, in the container of the API."""
    command, environment = [sys.executable, "-m", "infra.cli", "access"], environment_of(services["api"], resolved)
    options = {"env": environment, "capture_output": True, "text": True, "check": True}
    subprocess.run([*command, "add", name, "--reason", "a test"], **options)
    return subprocess.run([*command, "key", name, "--reason", "a test"], **options).stdout.strip()


def is_well(name, services, resolved):
    """Ask as Docker would whether a part is well."""
    kind, *test = services[name]["healthcheck"]["test"]
    if kind == "CMD-SHELL":
        command = ["sh", "-c", test[0].replace("$$", "$")]
    else:
        command = [
            sys.executable if test[0] == "python" else test[0],
            *(put_in(part, resolved) for part in test[1:]),
        ]
    environment = environment_of(services[name], resolved)
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


def test_the_parts_of_the_file_chat_and_learn_and_are_well(services, resolved, tmp_path):
    url = resolved["http://127.0.0.1:8080"]
    with (
        running(services, resolved, tmp_path),
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):

        def ready():
            try:
                return client.get("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        logs = "\n".join(path.name for path in tmp_path.glob("*.log"))
        wait_until(ready, timeout_s=300, what=f"not ready; logs in {tmp_path}: {logs}")
        client.headers["Authorization"] = f"Bearer {key_of('ada', services, resolved)}"
        question = {"model": "everloop", "max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}]}
        answer = client.post("/v1/chat/completions", json=question).json()
        vote = {"episode_id": answer["id"], "kind": "thumb", "value": 1, "idempotency_key": "one"}
        receipt = client.post("/v1/feedback", json=vote).json()

        def learned():
            told = client.get(f"/v1/feedback/{receipt['id']}/receipt")
            return told.status_code == 200 and "belief" in json.dumps(told.json())

        wait_until(learned, timeout_s=60, what="the vote was not learned from")
        for name in PARTS:
            wait_until(lambda name=name: is_well(name, services, resolved), what=f"{name} is not well")
    # All are stopped: an old sign of life is none.
    os.utime(Path(resolved["/var/lib/everloop"]) / "run" / "relay.alive", (0, 0))
    assert not is_well("relay", services, resolved) and not is_well("api", services, resolved)
