"""The events of the loop, defined in this one place.

Values on Kafka are CloudEvents 1.0 in structured JSON. ``dataschema`` names a versioned JSON Schema in
``infra/schemas/``; unknown fields pass, an unknown major version goes to the dead-letter topic. What a person said,
and who they are, travels in ``data.sealed`` (:mod:`infra.sealing`). `python -m infra.event_docs` writes the schemas
and ``docs/events.md`` anew.
"""

from __future__ import annotations

import builtins
import functools
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, create_model, model_validator

from infra.errors import InvalidRequestError
from infra.ids import new_id
from infra.sealing import SubjectKey, seal, unseal
from infra.telemetry import tracing

SOURCE = "urn:everloop"


class ErasedEventError(Exception):
    """What the event said is gone: the key that sealed it was destroyed."""


class Event(BaseModel):
    """What happened, as data. Subclasses name their topic, type and schema version."""

    model_config = ConfigDict(extra="ignore")

    topic: ClassVar[str]
    type: ClassVar[str]
    major: ClassVar[int] = 1
    personal: ClassVar[frozenset[str]] = frozenset()

    # Of the envelope, not of the data: the trace in which it happened.
    _traceparent: str | None = PrivateAttr(default_factory=tracing.traceparent)

    @property
    def traceparent(self) -> str | None:
        """The trace in which it happened, as W3C writes it; None where nobody traces."""
        return self._traceparent

    def happened_in(self, traceparent: str | None) -> Self:
        """Note the trace in which it happened, where that is not the one that goes on now; return the event."""
        self._traceparent = traceparent
        return self

    @classmethod
    def schema_name(cls) -> str:
        """Return the name of the JSON Schema, e.g. ``episode.recorded.v1``."""
        return f"{cls.type}.v{cls.major}"

    def to_cloudevent(self, event_id: str | None = None, subject: SubjectKey | None = None) -> dict[str, Any]:
        """Wrap the event in its CloudEvents 1.0 envelope.

        Parameters
        ----------
        event_id
            The event's identity, by which a second delivery is known; a new one, if unset.
        subject
            The key of the person whom it is about; events with personal fields need one.
        """
        envelope: dict[str, Any] = {
            "specversion": "1.0",
            "id": event_id or new_id("ev"),
            "source": SOURCE,
            "type": f"dev.everloop.{self.type}",
            "time": datetime.now(UTC).isoformat(),
            "datacontenttype": "application/json",
            "dataschema": f"{SOURCE}:schema:{self.schema_name()}",
        }
        data = self.model_dump(mode="json")
        if self.personal:
            assert subject is not None, f"{self.type} needs the key of its subject"
            envelope["subject"] = subject.key_id
            data["sealed"] = seal(subject, {name: data.pop(name) for name in self.personal})
        if self._traceparent is not None:
            envelope[tracing.HEADER] = self._traceparent
        envelope["data"] = data
        return envelope

    @classmethod
    def from_cloudevent(cls, envelope: dict[str, Any], key: bytes | None = None) -> Self:
        """Read the event back, refusing what this version cannot understand.

        Parameters
        ----------
        key
            What opens the sealed part.

        Raises
        ------
        InvalidRequestError
            Code ``unknown_schema`` where the type or its major version is not this one.
        ErasedEventError
            Where the sealed part has no key any more.
        """
        schema = f"{SOURCE}:schema:{cls.schema_name()}"
        if envelope.get("dataschema") != schema:
            raise InvalidRequestError(
                f"Expected {schema}, got {envelope.get('dataschema')!r}.", code="unknown_schema"
            )
        data = envelope.get("data")
        if cls.personal and isinstance(data, dict) and "sealed" in data:
            if key is None:
                raise ErasedEventError
            data = {**data, **unseal(key, str(data["sealed"]))}
        return cls.model_validate(data).happened_in(tracing.valid(envelope.get(tracing.HEADER)))

    @classmethod
    @functools.cache
    def public_model(cls) -> builtins.type[BaseModel]:
        """Return the model of what everybody may read of the event: its fields without the personal ones."""
        fields: dict[str, Any] = {
            name: (field.annotation, field) for name, field in cls.model_fields.items() if name not in cls.personal
        }
        model: builtins.type[BaseModel] = create_model(
            f"Public{cls.__name__}", __config__=cls.model_config, **fields
        )
        return model

    @classmethod
    def wire_schema(cls) -> dict[str, Any]:
        """Return the JSON Schema of ``data`` as it travels: the personal fields stand within ``sealed``."""
        schema = cls.model_json_schema()
        if not cls.personal:
            return schema
        properties, required = schema["properties"], schema.get("required", [])
        inner = {
            "type": "object",
            "properties": {name: properties.pop(name) for name in sorted(cls.personal)},
            "required": sorted(cls.personal.intersection(required)),
        }
        properties["sealed"] = {
            "type": "string",
            "description": "Compact JWE (dir, A256GCM) under the key that the envelope's `subject` names.",
            "contentMediaType": "application/jose",
            "contentSchema": inner,
        }
        schema["required"] = [name for name in required if name not in cls.personal] + ["sealed"]
        return schema


class EpisodeRecorded(Event):
    """One answer was given, cut off or failed, with what was said. Its id is the episode's."""

    topic = "everloop.episodes"
    type = "episode.recorded"
    personal = frozenset({"user_id", "messages", "answer", "steps"})

    episode_id: str = Field(description="Also the `id` of the API's response.")
    user_id: str = Field(description="Who asked.")
    release: str = Field(description="The release that answered.")
    arm: str = Field(description="champion, challenger or pinned; imported for outside data.")
    propensity: float = Field(description="Probability with which the user was given this arm.")
    status: Literal["complete", "interrupted", "failed"] = Field(description="How the answer ended.")
    learn: bool = Field(description="Whether it may be learned from.")
    messages: list[dict[str, Any]] = Field(description="What the model saw.")
    answer: str = Field(description="What it answered.")
    conversation_id: str | None = Field(None, description="The conversation that it is a turn of, if it is kept.")
    parent_id: str | None = Field(None, description="The episode that it follows there; null for a first turn.")
    steps: list[dict[str, Any]] = Field(
        default_factory=list,
        description="Calls of tools before the answer, with what came of them, and why they ended.",
    )


class SelfEvaluated(Event):
    """The release that gave an answer was asked whether it was good."""

    topic = "everloop.episodes"
    type = "episode.self_evaluated"

    episode_id: str = Field(description="The answer.")
    release: str = Field(description="The release that gave it, and was asked.")
    p_good: float = Field(ge=0, le=1, description="Its probability of Yes, given that it says Yes or No.")


class FeedbackGiven(Event):
    """Somebody said something about an answer. Its id is the signal's."""

    topic = "everloop.feedback"
    type = "feedback.given"
    personal = frozenset({"user_id", "text", "address_block"})

    feedback_id: str = Field(description="The signal's id; its receipt is found under it.")
    seq: int = Field(0, description="Order of acceptance: of two signals in one slot the higher stands.")
    episode_id: str = Field(description="The answer that it is about.")
    user_id: str = Field(description="Who says it: a user, or the name of a verifier or judge.")
    kind: Literal[
        "thumb",
        "rating",
        "reasons",
        "comment",
        "correction",
        "preference",
        "implicit",
        "verifier",
        "judge",
    ] = Field(description="What sort of signal it is.")
    slot: str = Field("", description="Signals of one rater in one slot supersede each other.")
    value: int | None = Field(None, description="Thumb or verifier: -1 or 1; rating: 1 to 5; 0 withdraws any kind.")
    score: float | None = Field(None, description="A judge's or verifier's score, 0 to 1.")
    name: str | None = Field(None, description="Which implicit act it was.")
    reasons: list[str] | None = Field(None, description="Stable keys of the reasons.")
    over: str | None = Field(None, description="The episode that this one is preferred to.")
    text: str | None = Field(None, description="Comment, corrected answer, or a judge's rationale.")
    address_block: str | None = Field(None, description="The network (/24 or /48) that it came from, if public.")

    @model_validator(mode="after")
    def _slot_of_earlier_events(self) -> Self:
        """Events of the first version name no slot; all of theirs were the episode's."""
        if not self.slot:
            self.slot = self.episode_id
        return self


class UserForgotten(Event):
    """A person asked to be forgotten; each room erases its part and reports what it found."""

    topic = "everloop.users"
    type = "user.forgotten"

    erasure_id: str = Field(description="The report under which each room notes its part.")
    tombstone: str = Field(description="The name that stands where the person's stood.")


class ProbeJudged(Event):
    """An operator judged an answer: raters are held against it."""

    topic = "everloop.feedback"
    type = "probe.judged"

    probe_id: str = Field(description="The probe's id.")
    episode_id: str = Field(description="The answer.")
    over: str | None = Field(None, description="The episode that it was compared with.")
    good: bool = Field(description="Whether it is good (or better).")


class AnswerExcluded(Event):
    """Nothing is learned from an answer any more, whatever is said of it."""

    topic = "everloop.feedback"
    type = "answer.excluded"

    episode_id: str = Field(description="The answer.")
    by: Literal["operator", "owner"] = Field("operator", description="Who decided; its owner by deleting it.")


class RaterRuled(Event):
    """An operator decided about a rater, or about all of a quarantine."""

    topic = "everloop.users"
    type = "rater.ruled"

    rater: str | None = Field(None, description="The id of a person's key, or a program's name.")
    quarantine: str | None = Field(None, description="The quarantine.")
    ruling: Literal["banned", "cleared"] | None = Field(
        description="Out, in, or (null) as their record says. Of a quarantine: null ends it."
    )


class RatingSolicited(Event):
    """A rating of an answer is asked for."""

    topic = "everloop.episodes"
    type = "rating.solicited"

    episode_id: str = Field(description="The answer.")
    reason: Literal["random", "informative"] = Field(description="Why this one.")
    propensity: float = Field(description="Probability with which it was asked for.")
    form: Literal["rating", "pair"] = Field("rating", description="What is asked for; of a pair, which is better.")


class RebuildRequested(Event):
    """The reward model is to learn everything anew from the log."""

    topic = "everloop.deployments"
    type = "reward.rebuild_requested"

    encoder: str = Field(description="Under which encoder.")
    reason: str = Field(description="Why.")


class RewardUpdated(Event):
    """The reward model learned from a signal; this is the answer's new score."""

    topic = "everloop.rewards"
    type = "reward.updated"

    episode_id: str = Field(description="The answer that was scored.")
    feedback_id: str | None = Field(description="The signal that moved it.")
    mean: float = Field(description="Mean of the logit.")
    sd: float = Field(description="Standard deviation of the logit.")
    p_good: float = Field(description="Probability that the answer is good, after the signal.")
    p_before: float | None = Field(None, description="The same before the signal.")
    abstain: bool = Field(False, description="Whether too little is known of such answers to say anything.")
    weight: float | None = Field(None, description="What the signal was worth: 1 is a vote of a trusted rater.")
    encoder: str | None = Field(None, description="The version of the features behind the score.")
    update_seq: int = Field(description="The update of the posterior that this was.")


class SignalSetAside(Event):
    """The reward model did not use a signal, and why."""

    topic = "everloop.rewards"
    type = "signal.set_aside"

    feedback_id: str = Field(description="The signal.")
    episode_id: str = Field(description="The answer that it is about.")
    reason: str = Field(description="Stable key of the reason.")


class TrainingUsed(Event):
    """A run's dataset holds these signals (long lists come in several events)."""

    topic = "everloop.deployments"
    type = "training.used"

    run_id: str = Field(description="The run.")
    dataset_digest: str = Field(description="SHA-256 of the dataset snapshot.")
    reward_snapshot_id: int = Field(description="The reward snapshot that the run pinned.")
    role: Literal["train", "gates"] = Field(description="Whether it trained, or was kept to judge.")
    feedback_ids: list[str] = Field(description="The signals.")


class RunProgressed(Event):
    """A training run began a phase, or came further in it; at most one in five seconds."""

    topic = "everloop.deployments"
    type = "run.progressed"

    run_id: str = Field(description="The run.")
    phase: str = Field(description="snapshot, sample, score, train, peak or gates.")
    done: int = Field(description="Steps of the phase that are done.")
    total: int = Field(description="Steps of the phase.")
    seconds_left: float | None = Field(description="Time that the rest of the phase takes at this pace.")


class RunEnded(Event):
    """A training run ended, with or without an adapter."""

    topic = "everloop.deployments"
    type = "run.ended"

    run_id: str = Field(description="The run.")
    status: str = Field(description="canary, held, skipped, failed or cancelled.")
    release: str | None = Field(description="The release that came out.")
    adapter_digest: str | None = Field(description="The adapter behind it.")
    reason: str = Field(description="Why it ended so.")
    code: str = Field("", description="The code of the error or state that ended it, where it has one.")


class DeploymentChanged(Event):
    """The head of the deployment moved, or a canary opened or closed."""

    topic = "everloop.deployments"
    type = "deployment.changed"

    action: str = Field(description="What was done.")
    head_version: int = Field(description="The head's version afterwards.")
    champion: str = Field(description="Who is served to most users now.")
    challenger: str | None = Field(description="Who meets some users now.")
    release: str | None = Field(None, description="The release that the act was about.")
    reason: str = Field(description="Why.")


EVENTS: tuple[type[Event], ...] = (
    EpisodeRecorded,
    SelfEvaluated,
    FeedbackGiven,
    RewardUpdated,
    SignalSetAside,
    TrainingUsed,
    RunProgressed,
    RunEnded,
    DeploymentChanged,
    UserForgotten,
    ProbeJudged,
    AnswerExcluded,
    RaterRuled,
    RatingSolicited,
    RebuildRequested,
)
BY_SCHEMA: dict[str, type[Event]] = {f"{SOURCE}:schema:{event.schema_name()}": event for event in EVENTS}
TOPICS: tuple[str, ...] = tuple(dict.fromkeys(event.topic for event in EVENTS))


def dead_letter_topic(topic: str) -> str:
    """Return where events of `topic` go that nobody can handle."""
    return f"{topic}.dlq"
