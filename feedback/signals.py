"""What may be said of an answer: one schema for people, verifiers and judges."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictInt,
    TypeAdapter,
    field_validator,
    model_validator,
)

from feedback.fold import Standing
from infra.access.roles import ANONYMOUS
from infra.telemetry import tracing
from infra.text import CleanText

MAX_CORRECTION_CHARS = 16_000
MAX_COMMENT_CHARS = 4_000
CLOCK_SKEW = timedelta(minutes=5)
MACHINE_KINDS = frozenset({"verifier", "judge"})

Reason = Literal[
    "incorrect",
    "incomplete",
    "off_topic",
    "too_long",
    "too_short",
    "repetitive",
    "bad_format",
    "bad_tone",
    "unsafe",
    "refused_without_need",
    "outdated",
    "well_explained",
    "exactly_right",
]
ImplicitAct = Literal["copied", "regenerated", "edited_and_resent", "abandoned", "contradicted"]
Id = Annotated[CleanText, Field(min_length=1, max_length=64)]
Name = Annotated[CleanText, Field(min_length=1, max_length=128)]


def _example(kind: str, **fields: Any) -> ConfigDict:
    example = {"episode_id": "ep_1f…", "user": "ada", "kind": kind, **fields, "idempotency_key": "k1"}
    return ConfigDict(extra="forbid", allow_inf_nan=False, json_schema_extra={"examples": [example]})


class BaseSignal(BaseModel):
    """What every signal says: of which answer, who, and a key that makes a retry harmless."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    episode_id: Id = Field(description="The answer: the `id` of a chat completion.")
    user: Name = Field(ANONYMOUS, description="Who says it, for callers that act for others; others leave it out.")
    idempotency_key: Name = Field(description="Makes a retry harmless.")
    given_at: AwareDatetime | None = Field(
        None, description="When it was given, where that is not now (an offline client); not in the future."
    )

    kind: Any
    _address_block: str | None = PrivateAttr(None)
    _traceparent: str | None = PrivateAttr(default_factory=tracing.traceparent)

    @property
    def address_block(self) -> str | None:
        """The network that it came from; the API knows, the body cannot say."""
        return self._address_block

    @property
    def traceparent(self) -> str | None:
        """The trace in which it was given."""
        return self._traceparent

    def came_from(self, block: str | None) -> None:
        """Note the network that it came from."""
        self._address_block = block

    @field_validator("given_at")
    @classmethod
    def _in_the_past(cls, given_at: datetime | None) -> datetime | None:
        if given_at is not None and given_at > datetime.now(UTC) + CLOCK_SKEW:
            raise ValueError("given_at is in the future; check the client's clock.")
        return given_at

    @property
    def slot(self) -> str:
        """Signals of one rater, kind and slot supersede each other."""
        return self.episode_id

    def digest(self) -> str:
        """Return the digest that tells a retry from another signal under the same key."""
        return hashlib.sha256(self.model_dump_json(exclude={"idempotency_key"}).encode()).hexdigest()


class Thumb(BaseSignal):
    """Good or not."""

    model_config = _example("thumb", value=1)
    kind: Literal["thumb"]
    value: StrictInt = Field(ge=-1, le=1, description="1 good, -1 not; 0 withdraws it.")


class Rating(BaseSignal):
    """One to five stars."""

    model_config = _example("rating", value=4)
    kind: Literal["rating"]
    value: StrictInt = Field(ge=0, le=5, description="1 worst to 5 best; 0 withdraws it.")


class Reasons(BaseSignal):
    """Why, as stable keys."""

    model_config = _example("reasons", reasons=["too_long", "incorrect"])
    kind: Literal["reasons"]
    reasons: list[Reason] = Field(max_length=13, description="All that apply; an empty list withdraws them.")

    @field_validator("reasons")
    @classmethod
    def _each_once(cls, reasons: list[Reason]) -> list[Reason]:
        return sorted(set(reasons))


class Comment(BaseSignal):
    """Why, in words."""

    model_config = _example("comment", text="The date is wrong.")
    kind: Literal["comment"]
    value: StrictInt | None = Field(None, ge=0, le=0, description="0 withdraws it.")
    text: CleanText | None = Field(None, min_length=1, max_length=MAX_COMMENT_CHARS)

    @model_validator(mode="after")
    def _text_or_withdrawal(self) -> Comment:
        return _text_unless_withdrawn(self, "comment")


class Correction(BaseSignal):
    """The answer as it should have been."""

    model_config = _example("correction", text="Paris.")
    kind: Literal["correction"]
    value: StrictInt | None = Field(None, ge=0, le=0, description="0 withdraws it.")
    text: CleanText | None = Field(None, min_length=1, max_length=MAX_CORRECTION_CHARS)

    @model_validator(mode="after")
    def _text_or_withdrawal(self) -> Correction:
        return _text_unless_withdrawn(self, "correction")


class Preference(BaseSignal):
    """This answer over that one; both to the same message."""

    model_config = _example("preference", over="ep_2a…")
    kind: Literal["preference"]
    over: Id = Field(description="The episode that this one is better than.")
    value: StrictInt = Field(1, ge=0, le=1, description="0 withdraws it.")

    @model_validator(mode="after")
    def _two_answers(self) -> Preference:
        if self.over == self.episode_id:
            raise ValueError("A preference is between two answers; `over` names this one.")
        return self

    @property
    def slot(self) -> str:
        return "|".join(sorted((self.episode_id, self.over)))


class Implicit(BaseSignal):
    """What somebody did rather than said."""

    model_config = _example("implicit", name="copied")
    kind: Literal["implicit"]
    name: ImplicitAct = Field(description="What was done.")

    @property
    def slot(self) -> str:
        return f"{self.episode_id}|{self.name}"


class Verifier(BaseSignal):
    """A program checked the answer. `user` is the program's name."""

    model_config = _example("verifier", user="unit-tests", value=1)
    kind: Literal["verifier"]
    user: Name = Field(description="The program's name.")
    value: StrictInt = Field(ge=-1, le=1, description="1 passed, -1 failed; 0 withdraws it.")
    score: float | None = Field(None, ge=0, le=1, description="Share of checks passed.")
    text: CleanText | None = Field(None, max_length=MAX_COMMENT_CHARS, description="What it found.")


class Judge(BaseSignal):
    """A model judged the answer. `user` is the judge's name."""

    model_config = _example("judge", user="judge-1", score=0.8)
    kind: Literal["judge"]
    user: Name = Field(description="The judge's name.")
    score: float = Field(ge=0, le=1, description="0 worst to 1 best.")
    text: CleanText | None = Field(None, max_length=MAX_COMMENT_CHARS, description="Its rationale.")


class Withdrawal(BaseSignal):
    """Takes back what stands, of whatever kind. Made here where an answer is deleted; no client sends it."""

    kind: str
    value: Literal[0] = 0
    name: str | None
    over: str | None
    of_slot: str

    @classmethod
    def of(cls, said: Standing) -> Self:
        """Return the withdrawal of a signal."""
        return cls(
            episode_id=said.episode_id,
            user=said.user_id,
            idempotency_key=f"withdraws {said.feedback_id}",
            kind=said.kind,
            name=said.name,
            over=said.over,
            of_slot=said.slot,
        )

    @property
    def slot(self) -> str:
        return self.of_slot


_Worded = TypeVar("_Worded", Comment, Correction)


def _text_unless_withdrawn(signal: _Worded, kind: str) -> _Worded:
    withdrawn = signal.value == 0
    if withdrawn == (signal.text is not None) or (not withdrawn and not (signal.text or "").strip()):
        raise ValueError(f"A {kind} has a `text` (or, to withdraw it, a `value` of 0 and no text).")
    return signal


Signal = Annotated[
    Thumb | Rating | Reasons | Comment | Correction | Preference | Implicit | Verifier | Judge,
    Field(discriminator="kind"),
]
KINDS = frozenset(
    {"thumb", "rating", "reasons", "comment", "correction", "preference", "implicit", "verifier", "judge"}
)
read_signal: TypeAdapter[
    Thumb | Rating | Reasons | Comment | Correction | Preference | Implicit | Verifier | Judge
] = TypeAdapter(Signal)
