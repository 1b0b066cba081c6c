"""Settings: from the environment (``EVERLOOP_*``), secrets' files, ``everloop.toml``, then what `up` chose.

Nothing is read at import: :func:`load` reads everything, once, where a process starts.
"""

from __future__ import annotations

import base64
import difflib
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

ALL_SETTINGS = "docs/settings.md has all of them."
DEFAULT_HOME = "~/.local/share/everloop"
SECRETS_DIR = "EVERLOOP_SECRETS_DIR"  # files named as the variables, as containers are given secrets
BASE_MODEL_NAME = "base"
ASSISTANT_MODEL = "everloop"  # what the deployed assistant is called as a model
CRON = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))  # what each field of a schedule may hold
Share = Annotated[float, Field(gt=0, lt=1)]
ServerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,24}$")]  # stands before the names of its tools
ToolLevel = Literal["off", "ask", "auto"]  # what a tool may do, rising


class McpServer(BaseModel):
    """An MCP server whose tools the assistant may call: a program that the API starts, or an address."""

    model_config = ConfigDict(extra="forbid")

    command: str | None = Field(None, min_length=1)
    args: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    url: str | None = Field(None, pattern=r"^https?://")
    headers: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_way_to_it(self) -> McpServer:
        if (self.command is None) == (self.url is None):
            raise ValueError("An MCP server has either a `command` or a `url`.")
        return self


class Settings(BaseSettings):
    """Every setting, with its default. An address that is set replaces the embedded part."""

    model_config = SettingsConfigDict(env_prefix="EVERLOOP_", extra="forbid")

    home: Path = Field(description="Directory that holds all state.")

    access: Literal["accounts", "open"] = Field(
        "accounts",
        description="Whether people and programs sign in; `open` lets in whoever reaches the port (loopback only).",
    )
    session_days: float = Field(14.0, gt=0, description="A browser stays signed in for this long.")
    requests_per_minute: int = Field(
        120,
        ge=0,
        description="Requests that change something, for one user in a minute; 0 for any number.",
    )
    tokens_per_hour: int = Field(
        0, ge=0, description="Tokens, questions included, that one user may use in an hour; 0 for any number."
    )
    sign_ins_per_minute: int = Field(
        10, ge=1, description="Tries to sign in from one address in a minute; raise it where many share one."
    )
    oidc_issuer: str | None = Field(
        None, description="Address of an OpenID Connect provider whose people may sign in; see docs/security.md."
    )
    oidc_client_id: str = Field("everloop", description="What Everloop is called there.")
    oidc_client_secret: str | None = Field(None, repr=False, description="Its secret there; shown nowhere.")
    oidc_role_claim: str = Field("roles", description="Claim of the identity token with people's roles there.")
    oidc_roles: dict[str, Literal["user", "rater", "operator", "admin"]] = Field(
        default_factory=dict, description="Which of its values is which role here; whoever has none is a user."
    )
    service_key: str | None = Field(
        None, repr=False, description="Key of our own commands; `everloop up` makes one. Shown nowhere."
    )

    api_host: str = Field("127.0.0.1", description="Address that the API listens on.")
    api_port: int | None = Field(None, description="Port of the API and the chat page; free one if unset.")
    public_url: str | None = Field(None, description="Where the API answers; filled in by `everloop up`.")
    database_url: str | None = Field(None, description="SQLAlchemy URL of PostgreSQL; embedded if unset.")
    kafka_bootstrap: str | None = Field(None, description="host:port of a Kafka cluster; embedded if unset.")
    kafka_partitions: int = Field(3, ge=1, description="Partitions of each topic that Everloop creates.")
    kafka_options: dict[str, Any] = Field(
        default_factory=dict,
        repr=False,
        description="Further options of kafka-python's clients, such as security_protocol, sasl_mechanism, "
        "sasl_plain_username and sasl_plain_password; shown nowhere.",
    )
    kafka_replicas: int = Field(
        1, ge=1, description="Copies that brokers keep of each topic that Everloop creates; 3 on a cluster."
    )
    engine_url: str | None = Field(None, description="Address of a vLLM server; embedded if unset.")
    engine_replicas: tuple[str, ...] = Field(
        (), description="Addresses of further vLLM servers that serve the same base model."
    )
    engine_discovery: str | None = Field(
        None, description="Address of vLLM servers whose host name stands for all of them, as a headless service's."
    )
    engine_key: str | None = Field(
        None, repr=False, description="Key that the engines ask for; `everloop up` makes one. Shown nowhere."
    )
    engine_gpu_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="On a GPU, the share of its memory that the engine takes; training has the rest.",
    )
    reward_url: str | None = Field(None, description="Address of a reward worker; embedded if unset.")
    reward_host: str = Field(
        "127.0.0.1", description="Where the reward worker listens; 0.0.0.0 in a container, behind a network policy."
    )
    prefect_url: str | None = Field(None, description="Prefect API address (…/api); embedded if unset.")
    prefect_auth: str | None = Field(
        None,
        repr=False,
        description="What Prefect's API asks for, as `name:password`; `everloop up` makes one. Shown nowhere.",
    )
    database_port: int | None = Field(None, description="Port of the embedded PostgreSQL; free one if unset.")
    kafka_port: int | None = Field(None, description="Port of the embedded broker; free one if unset.")
    engine_port: int | None = Field(None, description="Port of the embedded vLLM; free one if unset.")
    reward_port: int | None = Field(None, description="Port of the embedded reward worker; free one if unset.")
    prefect_port: int | None = Field(None, description="Port of the embedded Prefect; free one if unset.")

    metrics_port: int | None = Field(
        None,
        description="Port of a process's /metrics; in the embedded stack the first of one for each part.",
    )
    metrics_host: str = Field("127.0.0.1", description="Address at which /metrics of a process listens.")
    log_format: Literal["text", "json"] = Field("text", description="What a process writes into its log.")
    otlp_url: str | None = Field(
        None, description="Collector of traces (OTLP over HTTP), such as http://127.0.0.1:4318; none if unset."
    )
    trace_share: float = Field(1.0, ge=0, le=1, description="Share of the requests that are traced.")

    base_model: str | None = Field(
        None, description="Model directory or hub name; SmolLM2-135M-Instruct from its wheel if unset."
    )
    max_model_tokens: int = Field(2048, description="Longest context the engine holds, answer included.")
    max_answer_tokens: int = Field(256, description="Answer length where the request sets none.")
    trusted_proxies: int = Field(
        0, ge=0, description="Proxies before the API whose X-Forwarded-For is believed, one entry each."
    )
    max_request_bytes: int = Field(262_144, description="Largest request body; more is refused with 413.")
    engine_timeout_s: float = Field(120.0, description="Longest silence of the engine within one answer.")

    memory: bool = Field(
        True,
        description="Whether what people say of themselves is remembered across conversations; each may choose.",
    )
    memory_tokens: int | None = Field(
        None, ge=64, description="Most tokens of a prompt; all that the model holds besides the answer, if unset."
    )
    memory_refill: Literal["extract", "model"] = Field(
        "extract",
        description="Who shortens what was said: its sentences and words are chosen, or the model writes it anew.",
    )

    memory_encoder: Literal["off", "sentence"] = Field(
        "off",
        description="Whose embeddings find what was said in other words; needs the extension `vector` (pgvector).",
    )

    self_evaluation: bool = Field(True, description="Ask the model after each answer whether it was good.")
    best_of: int = Field(
        1, ge=1, le=8, description="Answers to choose from where the first is weak; 1 is off. Not for streams."
    )
    best_of_below: float = Field(
        0.5, ge=0, le=1, description="The first answer is weak where its probability of being good is below this."
    )
    best_of_margin_sd: float = Field(
        1.0, ge=0, description="By how many standard deviations the belief in it must be below that, to be sure."
    )
    best_of_max_ms: float = Field(
        4000.0, gt=0, description="Longest time that choosing may add to an answer; then the first is given."
    )
    best_of_max_tokens: int = Field(
        1024, ge=1, description="Most tokens that are made beside the first answer to choose from."
    )
    offer_tools: bool = Field(
        False, description="Whether answers may call tools of people who have chosen no level and name no tool."
    )
    tool_levels: dict[str, ToolLevel] = Field(
        default_factory=dict,
        description="The most that a tool may do (off, ask, auto), by its name, or `server__*` for all of an MCP "
        "server. Unset: auto for what is built in, ask for all else. People may lower it for themselves.",
    )
    mcp_servers: dict[ServerName, McpServer] = Field(
        default_factory=dict,
        repr=False,
        description="MCP servers by name: command, args and env, or url and headers; shown nowhere.",
    )
    tool_parser: str | None = Field(
        None,
        description="vLLM's parser of this model's calls, such as hermes; unset, tools are told of in the prompt.",
    )
    tool_max_steps: int = Field(6, ge=1, description="Steps with calls within one answer.")
    tool_max_s: float = Field(90.0, gt=0, description="Longest time of an answer that calls tools.")
    tool_max_tokens: int = Field(4096, ge=1, description="Tokens that all steps of an answer may generate.")
    tool_timeout_s: float = Field(20.0, gt=0, description="Longest time of one call.")
    tool_result_max_bytes: int = Field(
        16_384, ge=64, description="Of a longer result the model sees the beginning."
    )
    tool_result_max_tokens: int = Field(512, ge=16, description="The same limit in tokens.")
    approval_minutes: float = Field(
        60.0, gt=0, description="A call that waits for approval is given up after this."
    )
    learn_by_default: bool = Field(True, description="Whether users are learned from who said nothing about it.")
    erasure_policy: Literal["retrain-required", "quarantine"] = Field(
        "retrain-required", description="What becomes of adapters that learned from a user who is forgotten."
    )
    log_retention_days: float = Field(30.0, gt=0, description="Events that all consumers applied stay this long.")
    log_max_bytes: int = Field(2 * 1024**3, ge=0, description="Size of the log beyond which older events go.")
    phone_region: str | None = Field(
        None, description="Country (ISO code) whose national phone numbers are redacted."
    )
    redact_names: bool = Field(False, description="Redact people's names before training (extra `names`).")

    reward_encoder: Literal["base-model", "sentence"] = Field(
        "base-model", description="Whose view of an answer the reward model judges by: hidden states or embeddings."
    )
    encoder_layer: int = Field(22, ge=1, description="Hidden layer whose mean is the reward feature.")
    sentence_model: str | None = Field(
        None, description="Directory of a sentence-transformers model; all-MiniLM-L6-v2 from its wheel if unset."
    )
    reward_snapshot_every: int = Field(64, ge=1, description="Updates between two reward snapshots.")
    pessimism_kappa: float = Field(0.5, ge=0, description="Standard deviations taken off a reward.")

    ask_share: float = Field(0.02, ge=0, le=1, description="Share of answers whose rating is asked for at random.")
    ask_informative_share: float = Field(
        0.5, ge=0, le=1, description="Of the answers that would teach the most, the share that is asked for."
    )
    ask_per_day: int = Field(
        6,
        ge=0,
        description="Who was asked this often in 24 hours is not asked about answers that would teach much.",
    )
    ask_gap_s: float = Field(600.0, ge=0, description="Nor is who was asked less than this long ago.")
    ask_pair_share: float = Field(
        0.5, ge=0, le=1, description="Of those, the share for which another answer is offered to choose from."
    )

    adapters_url: str | None = Field(
        None,
        description="Where adapters are kept (fsspec), such as s3://bucket/prefix; in the home if unset.",
    )
    adapters_options: dict[str, Any] = Field(
        default_factory=dict,
        repr=False,
        description="What fsspec is given for it, such as key, secret and endpoint_url; shown nowhere.",
    )
    releases_kept: int = Field(10, ge=1, description="Promotions that can be rolled back: their adapters stay.")
    adapters_kept_days: float = Field(
        30.0, ge=0, description="Age from which the files of an adapter that nothing needs are deleted."
    )
    max_lora_rank: int = Field(16, ge=1, description="Largest rank of an adapter that the engine takes.")
    night_cron: str = Field("0 3 * * *", description="When the night run starts.")
    night_pool: str = Field(
        "everloop",
        min_length=1,
        description="Prefect work pool whose worker runs the nights, such as a GPU host's.",
    )
    pool_type: str = Field(
        "process", min_length=1, description="Type of `night_pool`, such as kubernetes, where Prefect has none yet."
    )
    pool_template: Path | None = Field(
        None, description="JSON file with the base job template of `night_pool`; the type's own if unset."
    )
    flow_concurrency: int = Field(4, ge=2, description="Flows that this machine runs at the same time.")
    training_config: Path | None = Field(
        None,
        description="TOML file with the recipe of the night and its settings; training.toml in the home if unset.",
    )
    backbone_cron: str = Field("30 2 * * *", description="When a reward backbone is trained and judged.")
    min_backbone_pairs: int = Field(60, ge=2, description="With fewer comparisons no reward backbone is trained.")
    retention_cron: str = Field("15 4 * * *", description="When what is past its time is deleted, with a report.")
    erasure_cron: str = Field("45 4 * * *", description="When erasures that a room did not finish are finished.")
    attest_cron: str = Field("5 */6 * * *", description="When every replica proves again what it serves.")
    time_zone: str = Field("UTC", description="Time zone of the schedules and of quiet hours (IANA name).")
    quiet_hours: tuple[str, ...] = Field(
        (), description="Times of day, such as 08:00-20:00, in which no night starts by schedule."
    )
    quiet_hours_then: Literal["wait", "skip"] = Field(
        "wait", description="Whether a night that falls into quiet hours starts at their end, or not at all."
    )
    night_cool_down_s: float = Field(
        14_400.0, ge=0, description="After a promotion or rollback no night starts by schedule for so long."
    )
    min_new_signals: int = Field(20, ge=1, description="A night with fewer new signals trains nothing.")
    autonomy: Literal["observe", "propose", "canary", "auto"] = Field(
        "auto", description="What the platform does by itself; `everloop autonomy` sets another for the deployment."
    )
    gate_overrides: Literal["none", "inconclusive", "any"] = Field(
        "inconclusive",
        description="Which gates an operator may override to let a candidate meet people, or to promote it.",
    )
    canary_steps: tuple[Share, ...] = Field(
        (0.05, 0.25, 0.5), min_length=1, description="Shares of users who meet a candidate, in turn."
    )
    canary_step_users: int = Field(
        10, ge=1, description="Users who have met a candidate before more do, and before it may be promoted."
    )
    canary_step_s: float = Field(60.0, ge=0, description="Least length of a step.")
    canary_alpha: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="Chance that any candidate since a promotion is promoted that is no better.",
    )
    canary_settle_s: float = Field(30.0, ge=0, description="Time an answer has to end and to be voted on.")
    canary_max_s: float = Field(86_400.0, gt=0, description="A canary undecided for this long ends.")

    @field_validator("engine_url", "engine_replicas", "engine_discovery")
    @classmethod
    def _without_slash(cls, value: Any) -> Any:
        """An address is also a name in the tables: one spelling of it."""
        if isinstance(value, tuple):
            return tuple(url.rstrip("/") for url in value)
        return value.rstrip("/") if isinstance(value, str) else value

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (KeyError, ValueError, OSError) as error:
            raise ValueError(
                f"There is no time zone {value!r}; use an IANA name, such as Europe/Berlin."
            ) from error
        return value

    @field_validator("quiet_hours")
    @classmethod
    def _leave_time(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        quiet: set[int] = set()
        for text in value:
            found = re.fullmatch(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)", text)
            if found is None:
                raise ValueError(f"{text!r} are no quiet hours; write them as 22:00-06:00.")
            begin_h, begin_min, end_h, end_min = map(int, found.groups())
            begin, end = 60 * begin_h + begin_min, 60 * end_h + end_min
            quiet.update((begin + n) % 1440 for n in range((end - begin) % 1440 or 1440))
        if len(quiet) == 1440:
            raise ValueError("Quiet hours leave no time of day in which a night may start.")
        return value

    @field_validator("*")
    @classmethod
    def _a_port(cls, value: Any, info: ValidationInfo) -> Any:
        if str(info.field_name).endswith("_port") and value is not None and not 1 <= value <= 65535:
            raise ValueError("A port is a number from 1 to 65535.")
        return value

    @field_validator("night_cron", "backbone_cron", "retention_cron", "erasure_cron", "attest_cron")
    @classmethod
    def _five_fields(cls, value: str) -> str:
        fields = value.split()
        numbers = [[int(n) for n in re.findall(r"(?<!/)\b\d+", field)] for field in fields]
        if len(fields) != len(CRON) or not all(
            re.fullmatch(r"[\w*/,#-]+", field) and all(low <= number <= high for number in found)
            for field, found, (low, high) in zip(fields, numbers, CRON, strict=True)
        ):
            raise ValueError(
                f"{value!r} is no schedule; write minute, hour, day, month and day of the week, such as "
                "0 3 * * * for three o'clock each night."
            )
        return value

    @field_validator("canary_steps")
    @classmethod
    def _rising(cls, steps: tuple[float, ...]) -> tuple[float, ...]:
        if list(steps) != sorted(set(steps)):
            raise ValueError("Steps must rise: who met the candidate keeps meeting it.")
        return steps

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = TomlConfigSettingsSource(settings_cls, home_dir() / "everloop.toml")
        if directory := os.environ.get(SECRETS_DIR):
            return init_settings, env_settings, SecretsSettingsSource(settings_cls, directory), toml
        return init_settings, env_settings, toml

    @property
    def run_dir(self) -> Path:
        """Sockets, process ids and the addresses that `everloop up` chose."""
        return self.home / "run"

    @property
    def log_dir(self) -> Path:
        """One log file per part."""
        return self.home / "logs"

    @property
    def base_model_dir(self) -> Path:
        """The directory of the base model that engine, encoder and trainer load."""
        if self.base_model is None:
            return self.home / "models" / "SmolLM2-135M-Instruct"
        if Path(self.base_model).expanduser().is_dir():
            return Path(self.base_model).expanduser().absolute()
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(self.base_model, local_files_only=True))  # `up` has fetched it

    @property
    def adapters_dir(self) -> Path:
        """Registered adapters, one directory per digest."""
        return self.home / "adapters"

    @property
    def backbones_dir(self) -> Path:
        """Trained reward backbones, one directory per digest."""
        return self.home / "backbones"

    @property
    def training_config_file(self) -> Path | None:
        """The file with the recipe of the night; None where there is none and the defaults hold."""
        if self.training_config is not None:
            return self.training_config.expanduser()
        found = self.home / "training.toml"
        return found if found.exists() else None

    @property
    def datasets_dir(self) -> Path:
        """What runs learned from, one directory per digest."""
        return self.home / "datasets"

    @property
    def runs_dir(self) -> Path:
        """Training runs: configuration, metrics, adapter."""
        return self.home / "runs"

    @property
    def stack_file(self) -> Path:
        """Addresses (and the database password) of the running stack; readable by its owner only."""
        return self.run_dir / "stack.json"

    @property
    def credentials(self) -> dict[str, str]:
        """Headers by which our own commands are known to the API."""
        return {"Authorization": f"Bearer {self.service_key}"} if self.service_key else {}

    @property
    def engine_credentials(self) -> dict[str, str]:
        """Headers by which we are known to the engines."""
        return {"Authorization": f"Bearer {self.engine_key}"} if self.engine_key else {}

    @property
    def prefect_credentials(self) -> dict[str, str]:
        """Headers by which we are known to Prefect."""
        if self.prefect_auth is None:
            return {}
        return {"Authorization": f"Basic {base64.b64encode(self.prefect_auth.encode()).decode()}"}

    @property
    def metrics_targets_file(self) -> Path:
        """Where each part of the running stack serves its metrics, as Prometheus reads it (``file_sd_configs``)."""
        return self.run_dir / "metrics" / "targets.json"

    def need(self, name: str) -> str:
        """Return an address, or say how to get one."""
        from infra.errors import SetupError

        value = getattr(self, name)
        if value is None:
            raise SetupError(
                f"No {name} is set and no embedded stack is running in {self.home}. "
                "Start one with `everloop up`, or set the address.",
                code="stack_not_running",
            )
        return str(value)


def home_dir() -> Path:
    """Return the state directory named by ``EVERLOOP_HOME``."""
    return Path(os.environ.get("EVERLOOP_HOME", DEFAULT_HOME)).expanduser().absolute()


def _read() -> Settings:
    from infra.errors import SetupError

    try:
        return Settings(home=home_dir())
    except ValidationError as error:
        # Without the values: some are secrets.
        wrong = "; ".join(map(_what_is_wrong, error.errors(include_input=False)))
        raise SetupError(f"The settings are not valid. {wrong} {ALL_SETTINGS}", code="settings_invalid") from None
    except SettingsError as error:
        told = f"{error}: lists and objects are JSON in the environment."
        raise SetupError(f"The settings are not valid. {told} {ALL_SETTINGS}", code="settings_invalid") from None
    except tomllib.TOMLDecodeError as error:
        raise SetupError(f"{home_dir() / 'everloop.toml'} is not TOML: {error}", code="settings_invalid") from None


def _what_is_wrong(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        return f"{name}: {error['msg'].removeprefix('Value error, ').removesuffix('.')}."
    near = difflib.get_close_matches(name, Settings.model_fields, n=1)
    return f"{name}: There is no such setting{f'; did you mean {near[0]}?' if near else '.'}"


def load(*, recorded_addresses: bool = True) -> Settings:
    """Read the settings.

    Parameters
    ----------
    recorded_addresses
        Whether the addresses that a running `everloop up` recorded fill in what neither the environment
        nor ``everloop.toml`` sets. `up` itself must not: a record may have outlived its stack.

    Raises
    ------
    SetupError
        Code ``settings_invalid``, with each setting that is wrong and why.
    """
    settings = _read()
    if recorded_addresses and settings.stack_file.exists():
        recorded = json.loads(settings.stack_file.read_text())
        missing = {k: v for k, v in recorded.items() if getattr(settings, k, None) is None}
        settings = settings.model_copy(update=missing)
    return settings
