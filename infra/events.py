"""The events of the loop, defined in this one place.

Values on Kafka are CloudEvents 1.0 in structured JSON. ``dataschema`` names a versioned JSON Schema in
``infra/schemas/``; unknown fields pass, an unknown major version goes to the dead-letter topic.
"""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict

from infra.errors import InvalidRequestError

SOURCE = "urn:everloop"


class Event(BaseModel):
    """What happened, as data. Subclasses name their topic, type and schema version."""

    model_config = ConfigDict(extra="ignore")

    topic: ClassVar[str]
    type: ClassVar[str]
    major: ClassVar[int] = 1

    @classmethod
    def schema_name(cls) -> str:
        """Return the name of the JSON Schema, e.g. ``episode.recorded.v1``."""
        return f"{cls.type}.v{cls.major}"

    def to_cloudevent(self, event_id: str | None = None) -> dict[str, Any]:
        """Wrap the event in its CloudEvents 1.0 envelope."""
        return {
            "specversion": "1.0",
            "id": event_id or f"ev_{uuid.uuid4().hex}",
            "source": SOURCE,
            "type": f"dev.everloop.{self.type}",
            "time": datetime.now(UTC).isoformat(),
            "datacontenttype": "application/json",
            "dataschema": f"{SOURCE}:schema:{self.schema_name()}",
            "data": self.model_dump(mode="json"),
        }

    @classmethod
    def from_cloudevent(cls, envelope: dict[str, Any]) -> Self:
        """Read the event back, refusing what this version cannot understand.

        Raises
        ------
        InvalidRequestError
            Code ``unknown_schema`` where the type or its major version is not this one.
        """
        schema = f"{SOURCE}:schema:{cls.schema_name()}"
        if envelope.get("dataschema") != schema:
            raise InvalidRequestError(
                f"Expected {schema}, got {envelope.get('dataschema')!r}.", code="unknown_schema"
            )
        return cls.model_validate(envelope.get("data"))


class EpisodeRecorded(Event):
    """One answer was given, cut off or failed, with what was said."""

    topic = "everloop.episodes"
    type = "episode.recorded"

    episode_id: str
    user_id: str
    release: str
    arm: str
    propensity: float
    status: Literal["complete", "interrupted", "failed"]
    learn: bool
    messages: list[dict[str, Any]]
    answer: str


class FeedbackGiven(Event):
    """A person said something about an answer."""

    topic = "everloop.feedback"
    type = "feedback.given"

    feedback_id: str
    episode_id: str
    user_id: str
    kind: Literal["thumb", "correction"]
    value: int | None = None
    text: str | None = None


class RewardUpdated(Event):
    """The reward model learned from a signal; this is the answer's new score."""

    topic = "everloop.rewards"
    type = "reward.updated"

    episode_id: str
    feedback_id: str | None
    mean: float
    sd: float
    p_good: float
    update_seq: int


class DeploymentChanged(Event):
    """The head of the deployment moved, or a canary opened or closed."""

    topic = "everloop.deployments"
    type = "deployment.changed"

    action: str
    head_version: int
    champion: str
    challenger: str | None
    reason: str


EVENTS: tuple[type[Event], ...] = (EpisodeRecorded, FeedbackGiven, RewardUpdated, DeploymentChanged)
TOPICS: tuple[str, ...] = tuple(event.topic for event in EVENTS)


def dead_letter_topic(topic: str) -> str:
    """Return where events of `topic` go that nobody can handle."""
    return f"{topic}.dlq"


def write_schemas(directory: Path) -> None:
    """Write the JSON Schema of every event into `directory`."""
    for event in EVENTS:
        text = json.dumps(event.model_json_schema(), indent=2, sort_keys=True) + "\n"
        (directory / f"{event.schema_name()}.json").write_text(text)


if __name__ == "__main__":
    write_schemas(Path(__file__).parent / "schemas")
