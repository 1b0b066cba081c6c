"""After a promotion or a rollback nights wait; what an erasure asks for does not."""

from datetime import UTC, datetime, timedelta

import pytest

from deploy import audit
from deploy.runs import TrainingRun
from infra.settings import Settings
from trainer.admission import cooling_until
from trainer.night import Night


def moved(session, before, after, action="promoted"):
    places = {"before": {"champion": before}, "after": {"champion": after}}
    audit.write(session, actor="test", action=action, subject=after, reason="a test", **places)


@pytest.mark.parametrize(
    ("before", "after", "action", "cools"),
    [
        ("base", "r1", "promoted", True),
        ("r1", "base", "rolled_back_by_hand", True),
        ("base", "base", "canary_rolled_back", True),
        ("base", "base", "canary_opened", False),
    ],
)
def test_what_was_decided_lately_is_waited_for(database, before, after, action, cools):
    with database.begin() as session:
        moved(session, before, after, action)
    with database() as session:
        until = cooling_until(session, 3600.0)
        assert (until is not None) == cools
        assert cooling_until(session, 0.0) is None
    if cools:
        assert timedelta(minutes=59) < until - datetime.now(UTC) <= timedelta(hours=1)


def test_a_night_within_the_cool_down_is_skipped_and_says_until_when(database, base_model_dir, home):
    settings = Settings(home=home)
    with database.begin() as session:
        moved(session, "base", "r1")
    skipped = Night(database, settings, {}, flow_run_id="f1", cool_down_s=3600.0, min_new_signals=0).run()
    assert (skipped["status"], skipped["code"]) == ("skipped", "cool_down") and "nights go on from" in skipped[
        "reason"
    ]
    with database() as session:
        run = session.get_one(TrainingRun, skipped["run_id"])
        assert (run.status, run.flow_run_id) == ("skipped", "f1")
    by_hand = Night(database, settings, {}, min_new_signals=1).run()
    assert by_hand["code"] == "few_new_signals", "whoever starts one by hand is not asked to wait"
