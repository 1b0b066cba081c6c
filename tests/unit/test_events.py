"""Events: their envelope, their schemas, and what is refused."""

import json
from pathlib import Path

import jsonschema
import pytest

from infra.errors import IntegrityError, InvalidRequestError
from infra.event_docs import document
from infra.events import EVENTS, ErasedEventError, FeedbackGiven
from infra.sealing import SubjectKey

SCHEMAS = Path(__file__).parents[2] / "infra" / "schemas"
GIVEN = FeedbackGiven(
    feedback_id="fb_1", episode_id="ep_1", user_id="ada", kind="correction", text="SENTINEL", slot="ep_1"
)
KEY = SubjectKey("sk_1", bytes(range(32)))


def test_an_event_survives_its_envelope():
    envelope = json.loads(json.dumps(GIVEN.to_cloudevent(subject=KEY)))
    assert envelope["specversion"] == "1.0" and envelope["id"].startswith("ev_")
    assert FeedbackGiven.from_cloudevent(envelope, KEY.key) == GIVEN


def test_what_a_person_said_is_sealed_and_gone_with_the_key():
    text = json.dumps(GIVEN.to_cloudevent("fb_1", KEY))
    assert "SENTINEL" not in text and "ada" not in text and "sk_1" in text
    with pytest.raises(ErasedEventError):
        FeedbackGiven.from_cloudevent(json.loads(text))
    with pytest.raises(IntegrityError) as broken:
        FeedbackGiven.from_cloudevent(json.loads(text), bytes(32))
    assert broken.value.code == "seal_broken"
    public = FeedbackGiven.public_model().model_validate(json.loads(text)["data"])
    assert public.feedback_id == "fb_1" and not hasattr(public, "text")


def test_every_altered_byte_of_a_sealed_part_is_noticed():
    envelope = GIVEN.to_cloudevent("fb_1", KEY)
    token = envelope["data"]["sealed"]
    for at in range(0, len(token), 7):
        other = "A" if token[at] != "A" else "B"
        envelope["data"]["sealed"] = token[:at] + other + token[at + 1 :]
        with pytest.raises(IntegrityError):
            FeedbackGiven.from_cloudevent(envelope, KEY.key)


def test_the_page_on_events_is_made_from_the_schemas():
    page = Path(__file__).parents[2] / "docs" / "events.md"
    assert page.read_text() == document(SCHEMAS), "run `python -m infra.event_docs` after changing an event"


def test_unknown_fields_pass_and_unknown_versions_do_not():
    envelope = GIVEN.to_cloudevent(subject=KEY)
    envelope["data"]["later"] = "addition"
    assert FeedbackGiven.from_cloudevent(envelope, KEY.key) == GIVEN
    envelope["dataschema"] = envelope["dataschema"].replace("v1", "v2")
    with pytest.raises(InvalidRequestError) as refused:
        FeedbackGiven.from_cloudevent(envelope)
    assert refused.value.code == "unknown_schema"


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.type)
def test_the_schema_in_the_repository_is_that_of_the_event(event):
    path = SCHEMAS / f"{event.schema_name()}.json"
    assert json.loads(path.read_text()) == event.wire_schema(), (
        "run `python -m infra.event_docs` after changing an event"
    )


def test_an_event_fits_its_schema():
    schema = json.loads((SCHEMAS / f"{FeedbackGiven.schema_name()}.json").read_text())
    jsonschema.validate(GIVEN.to_cloudevent(subject=KEY)["data"], schema)
