"""What a run is told: plain data, from a TOML file, stored with the run. Imports nothing heavy."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from infra.errors import InvalidRequestError

DEFAULT_RECIPE = "best-of-n"
MIN_ANSWER_TOKENS = 8
ROOT = Path(__file__).resolve().parents[1]


class RunConfig(BaseModel):
    """Settings that every recipe has. The defaults are what two cores do in a night (docs/log.md).

    A recipe adds its own in a subclass; the file may set any of them, and nothing else.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    recipe: str = Field(DEFAULT_RECIPE, description="Which recipe; `everloop train --list` names them.")
    lora_rank: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    learning_rate: float = Field(3e-4, gt=0)
    batch_rows: int = Field(8, ge=1, description="Rows (pairs, answers) per optimiser step.")
    micro_batch_rows: int = Field(4, ge=1, description="Rows per forward pass.")
    max_row_tokens: int = Field(144, ge=32, description="Prompt and answer are cut to this in training.")
    max_rows: int = Field(48, ge=8, description="Most rows that are trained on.")
    epochs: float = Field(1.0, gt=0)
    seed: int = 0

    num_gate_prompts: int = Field(24, ge=8, description="Held-out prompts of the win-rate gate.")
    max_answer_tokens: int = Field(96, ge=8, description="Longest sample, in rollouts and at the gates.")
    temperature: float = Field(1.0, gt=0, description="Of the samples.")
    top_p: float = Field(1.0, gt=0, le=1, description="Likewise: the most probable tokens up to this share.")
    top_k: int = Field(0, ge=0, description="Likewise: this many of the most probable tokens; 0 is all.")

    verifiers: list[str] = Field(["reasoning", "instructions"], description="Whose tasks train and judge.")
    verifiable_share: float = Field(0.0, ge=0, lt=1, description="Of the prompts that get samples, share of tasks.")
    gate_tasks_per_skill: int = Field(4, ge=0, description="Tasks of each skill that judge a candidate.")
    gate_behaviour_questions: int = Field(
        12, ge=0, le=12, description="Questions of each probe of behaviour (refusal, sycophancy, safety)."
    )
    gate_timed_answers: int = Field(8, ge=0, description="Answers of each arm that are timed for the latency gate.")
    verifier_timeout_s: float = Field(5.0, gt=0, description="A verifier that takes longer is counted, and killed.")

    length_guard: bool = Field(
        True, description="Keep to lengths that people rated well, whatever the reward says."
    )
    pessimism_kappa: float | None = Field(
        None, ge=0, description="Standard deviations taken off a reward; the setting's if unset."
    )
    checkpoints_judged: int = Field(
        3, ge=0, description="Checkpoints measured after the training, the last included."
    )
    judge_prompts: int = Field(16, ge=4, description="Prompts that they are measured on; none of them trains.")
    register_at: Literal["gold-peak", "last"] = Field("gold-peak", description="Which of them is registered.")
    keep_answers: bool = Field(False, description="Keep what they answered, in the run's directory.")
    max_kl: float = Field(60.0, gt=0, description="Furthest from the base model, nats per answer.")

    max_train_minutes: float = Field(30.0, gt=0, description="The training ends here, with what it has learned.")
    max_train_tokens: int | None = Field(None, ge=1, description="Likewise, after this many tokens.")
    max_memory_gib: float | None = Field(None, gt=0, description="A run that needs more fails, before the machine.")
    accelerate_config: str | None = Field(
        None,
        description="A configuration file of `accelerate`: processes, devices, sharding. One process if unset. "
        "A path that is not absolute begins where Everloop is checked out.",
    )
    report_to: list[Literal["mlflow", "trackio"]] = Field(
        [], description="Where metrics go besides metrics.jsonl; the package has to be installed."
    )
    checkpoint_steps: int = Field(4, ge=1, description="Steps between checkpoints; a killed run goes on from one.")

    @field_validator("accelerate_config")
    @classmethod
    def _check_file(cls, path: str | None) -> str | None:
        if path is not None and not _in_checkout(path).is_file():
            raise ValueError(f"there is no file {path!r}")
        return path

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that leaves room to learn from an answer."""
        return self.max_row_tokens - MIN_ANSWER_TOKENS

    @property
    def rows_per_step(self) -> int:
        """Rows that an optimiser step takes."""
        return self.batch_rows

    @property
    def accelerate_file(self) -> Path | None:
        """The configuration file of `accelerate`."""
        return _in_checkout(self.accelerate_config) if self.accelerate_config else None

    @model_validator(mode="after")
    def _check_batches(self) -> Self:
        if self.batch_rows % min(self.micro_batch_rows, self.batch_rows):
            raise ValueError(f"batch_rows must be a multiple of micro_batch_rows ({self.micro_batch_rows})")
        return self

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Self:
        """Return the configuration that was given, completed with defaults.

        Raises
        ------
        InvalidRequestError
            Code ``config_invalid``: an unknown key is named with the nearest there is, a bad value with what it
            should be.
        """
        try:
            return cls.model_validate(dict(given))
        except ValidationError as error:
            raise InvalidRequestError(_explain(cls, error), code="config_invalid") from error

    def to_toml(self) -> str:
        """Return every setting as TOML, the ones that are unset left out."""
        values = self.model_dump(exclude_none=True)
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def read_toml(path: Path) -> dict[str, Any]:
    """Return the settings of a file.

    Raises
    ------
    InvalidRequestError
        Code ``config_unreadable``.
    """
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidRequestError(
            f"{path.name} cannot be read as TOML: {error}", code="config_unreadable"
        ) from error


def nearest(name: str, known: list[str]) -> str:
    """Return a sentence about the known name that is nearest to an unknown one, or about all of them."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {found[0]!r}?" if found else f"There are: {', '.join(sorted(known))}."


def _in_checkout(path: str) -> Path:
    return ROOT / Path(path).expanduser()


def _explain(config: type[RunConfig], error: ValidationError) -> str:
    sentences = []
    for problem in error.errors():
        name = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            sentences.append(f"There is no setting {name!r}. {nearest(name, list(config.model_fields))}")
        elif problem["type"] == "value_error":  # a sentence of ours, about one setting or how several go together
            said = problem["msg"].removeprefix("Value error, ")
            sentences.append(f"{name}: {said}." if name else f"{said}.")
        else:
            sentences.append(f"{name}: {problem['msg']}, not {problem['input']!r}.")
    return " ".join(sentences)
