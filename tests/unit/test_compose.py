"""The Compose files fit their schema, refer to what there is, and start the parts that `everloop up` starts."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from infra.settings import Settings
from infra.stack import parts

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "infra" / "compose"
FILES = ("compose.yaml", "compose.gpu.yaml")
ONCE = {"migrate", "model"}
# Read beside the settings; the last one comes with the log formats.
OF_ONE_MACHINE = {"door"}  # which keeps the port while its one API starts anew
NOT_SETTINGS = {"EVERLOOP_SECRETS_DIR", "EVERLOOP_PROMETHEUS_URL", "EVERLOOP_DASHBOARDS"}


def read(name):
    return yaml.safe_load((COMPOSE / name).read_text())


@pytest.fixture
def services():
    return read("compose.yaml")["services"]


@pytest.mark.parametrize("name", FILES)
def test_it_fits_the_schema_of_compose(name, tmp_path):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, COMPOSE / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    slip = tmp_path / name
    slip.write_text((COMPOSE / name).read_text().replace("    command:", "    comand:", 1))
    assert subprocess.run([*command, slip], capture_output=True).returncode == 1


def test_it_refers_to_what_there_is(services):
    whole = read("compose.yaml")
    used = {"volumes": set(), "secrets": set(), "networks": set()}
    for name, service in services.items():
        missing = set(service.get("depends_on", ())) - set(services)
        assert not missing, f"{name} waits for {missing}"
        used["secrets"].update(service.get("secrets", ()))
        used["networks"].update(service.get("networks", ()))
        sources = [volume.split(":")[0] for volume in service.get("volumes", ())]
        used["volumes"].update(source for source in sources if not source.startswith("."))
        for source in (COMPOSE / source for source in sources if source.startswith(".")):
            if (ROOT / "infra" / "monitoring").exists():
                assert source.exists(), f"{name} mounts {source}, which is not there"
    for kind, names in used.items():
        assert names == set(whole[kind]), f"{kind} declared and used differ"
    overlaid = read("compose.gpu.yaml")["services"]
    assert set(overlaid) <= set(services)


def test_each_part_of_the_stack_is_there_and_started_alike(services, tmp_path):
    settings = Settings(home=tmp_path, base_model="/models/base", prefect_url="http://prefect")
    embedded = parts.embedded_parts(settings.model_copy(update={"engine_url": "x"}), set())
    for part in (part for part in embedded if part.name not in OF_ONE_MACHINE):
        command = services[part.name]["command"]
        if command[0] == "sh":  # which reads a secret for it first
            command = shlex.split(command[-1].rpartition(" exec ")[2])
        assert command[1:] == list(part.command[1:]), part.name


@pytest.mark.parametrize(("name", "gpu"), [("compose.yaml", False), ("compose.gpu.yaml", True)])
def test_the_engine_is_told_what_up_tells_it(name, gpu, tmp_path):
    told = dict(flag.removeprefix("--").partition("=")[::2] for flag in read(name)["services"]["engine"]["command"])
    base = tmp_path / "base"
    base.mkdir()
    assert flags(told) == flags(as_flags(Settings(home=tmp_path, base_model=str(base)), gpu=gpu))


def flags(told):
    return {name: value for name, value in told.items() if name not in ("host", "port", "model")}


def as_flags(settings, *, gpu):
    arguments, told = parts.engine_arguments(settings, gpu=gpu), {}
    for argument in arguments:
        if argument.startswith("--"):
            told[name := argument.removeprefix("--")] = ""
        else:
            told[name] = argument
    return told


def test_the_engines_image_has_the_environment_of_up():
    image = (COMPOSE / "Dockerfile").read_text()
    stage = image.partition("AS engine\n")[2].partition("\nFROM")[0]
    for name, value in parts.engine_environment(gpu=False).items():
        if name not in ("LD_PRELOAD", "OMP_NUM_THREADS"):  # paths and cores are the container's
            assert f"{name}={value}" in stage, name
    gpu_stage = image.partition("AS engine-gpu\n")[2]
    assert all(f"{name}={value}" in gpu_stage for name, value in parts.engine_environment(gpu=True).items())


def test_whatever_stays_up_is_bounded_watched_and_no_root(services):
    for name, service in services.items():
        assert re.search(r":.*\d+\.\d+", service["image"]) and "latest" not in service["image"], (
            f"{name}: {service['image']}"
        )
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] or name == "kafka", name
        limits = service["deploy"]["resources"]["limits"]
        assert limits["cpus"] and limits["memory"], name
        if name not in ONCE:
            assert service["healthcheck"]["test"], name
        own = service["image"].startswith("everloop-")  # whose user the Dockerfile names
        assert own or not service["user"].startswith("0"), name
    stages = (COMPOSE / "Dockerfile").read_text().split("\nFROM ")
    assert [s for s in stages if re.match(r"base AS", s) and "USER 10001:10001" not in s] == []


def test_no_secret_stands_in_the_file_and_only_loopback_is_published(services):
    for name, service in services.items():
        for variable, value in (service.get("environment") or {}).items():
            assert not re.search("PASSWORD|SECRET|TOKEN", variable) or str(value).startswith("/run/secrets"), (
                name,
                variable,
            )
        assert all("127.0.0.1" in port for port in service.get("ports", ())), name


def test_every_setting_that_is_given_exists(services):
    known = {f"EVERLOOP_{name.upper()}" for name in Settings.model_fields} | NOT_SETTINGS
    given = {v for s in services.values() for v in s.get("environment") or {} if v.startswith("EVERLOOP_")}
    assert given <= known, given - known


def test_the_image_of_the_api_has_no_torch_and_pins_what_set_up_pins():
    text = (COMPOSE / "Dockerfile").read_text()
    api = text.partition("AS api\n")[2].partition("\nFROM")[0]
    assert "api.txt" in api and "torch" not in api
    setup = (ROOT / "infra" / "setup.sh").read_text()
    wanted = re.search(r"^TORCH=(\S+)", setup, re.M)[1]
    assert set(re.findall(r"^ARG TORCH=(\S+)", text, re.M)) == {wanted}


def test_prefect_asks_for_what_its_worker_sends(services, tmp_path):
    (tmp_path / "everloop_prefect_auth").write_text("everloop:only ours")
    (tmp_path / "python").write_text('#!/bin/sh\necho "$PREFECT_SERVER_API_AUTH_STRING$PREFECT_API_AUTH_STRING"\n')
    (tmp_path / "python").chmod(0o755)
    for name in ("prefect", "flows"):
        assert "everloop_prefect_auth" in services[name]["secrets"]
        command = [w.replace("/run/secrets", str(tmp_path)).replace("$$", "$") for w in services[name]["command"]]
        said = subprocess.run(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True)
        assert said.stdout.strip() == "everloop:only ours", said


def test_passwords_are_made_once(tmp_path):
    script = tmp_path / "secrets.sh"
    script.write_text((COMPOSE / "secrets.sh").read_text())
    made = []
    for _ in range(2):
        subprocess.run(["sh", script], check=True, capture_output=True)
        made.append({path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()})
    assert made[0] == made[1] and set(made[0]) == set(read("compose.yaml")["secrets"])
    assert (
        made[0]["postgres_password"] in made[0]["everloop_database_url"] and len(made[0]["postgres_password"]) >= 32
    )
    assert (tmp_path / "secrets").stat().st_mode & 0o077 == 0
