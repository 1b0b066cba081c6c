"""Events: their envelope, their schemas, and what is refused."""

import json
from pathlib import Path

import jsonschema
import pytest

from infra.errors import InvalidRequestError
from infra.events import EVENTS, FeedbackGiven

SCHEMAS = Path(__file__).parents[2] / "infra" / "schemas"
GIVEN = FeedbackGiven(feedback_id="fb_1", episode_id="ep_1", user_id="ada", kind="thumb", value=1)


def test_an_event_survives_its_envelope():
    envelope = json.loads(json.dumps(GIVEN.to_cloudevent()))
    assert envelope["specversion"] == "1.0" and envelope["id"].startswith("ev_")
    assert FeedbackGiven.from_cloudevent(envelope) == GIVEN


def test_unknown_fields_pass_and_unknown_versions_do_not():
    envelope = GIVEN.to_cloudevent()
    envelope["data"]["later"] = "addition"
    assert FeedbackGiven.from_cloudevent(envelope) == GIVEN
    envelope["dataschema"] = envelope["dataschema"].replace("v1", "v2")
    with pytest.raises(InvalidRequestError) as refused:
        FeedbackGiven.from_cloudevent(envelope)
    assert refused.value.code == "unknown_schema"


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.type)
def test_the_schema_in_the_repository_is_that_of_the_event(event):
    path = SCHEMAS / f"{event.schema_name()}.json"
    assert json.loads(path.read_text()) == event.model_json_schema(), (
        "run `python -m infra.events` after changing an event"
    )


def test_an_event_fits_its_schema():
    schema = json.loads((SCHEMAS / f"{FeedbackGiven.schema_name()}.json").read_text())
    jsonschema.validate(GIVEN.to_cloudevent()["data"], schema)
