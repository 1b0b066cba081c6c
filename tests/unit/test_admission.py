"""Quiet hours, by the clock of a zone, across midnight and across the changes of the clock."""

from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.settings import Settings
from trainer.admission import quiet_until

BERLIN = ZoneInfo("Europe/Berlin")


def at(text, zone=BERLIN):
    return datetime.fromisoformat(text).replace(tzinfo=zone)


@pytest.mark.parametrize(
    ("quiet", "now", "until"),
    [
        (["08:00-20:00"], "2026-06-01T07:59", None),
        (["08:00-20:00"], "2026-06-01T08:00", "2026-06-01T20:00"),
        (["08:00-20:00"], "2026-06-01T20:00", None),
        (["22:00-06:00"], "2026-06-01T23:30", "2026-06-02T06:00"),
        (["22:00-06:00"], "2026-06-01T03:00", "2026-06-01T06:00"),
        (["20:00-23:00", "23:00-02:00"], "2026-06-01T21:00", "2026-06-02T02:00"),
        ([], "2026-06-01T12:00", None),
    ],
)
def test_quiet_hours_end_when_the_clock_of_the_zone_says_so(quiet, now, until):
    expected = at(until).astimezone(UTC) if until else None
    assert quiet_until(quiet, BERLIN, at(now).astimezone(UTC)) == expected


def test_an_end_that_the_clock_leaves_out_lies_behind_the_gap():
    """On 2026-03-29 Berlin's clock goes from 02:00 to 03:00."""
    until = quiet_until(["22:00-02:30"], BERLIN, at("2026-03-29T01:00"))
    assert until.astimezone(BERLIN).time() == time(3, 30)
    assert quiet_until(["22:00-02:30"], BERLIN, until) is None


def test_an_end_that_the_clock_shows_twice_is_the_later_one():
    until = quiet_until(["22:00-02:30"], BERLIN, at("2026-10-25T01:00"))
    assert until == datetime(2026, 10, 25, 1, 30, tzinfo=UTC)


minutes = st.integers(0, 1439)
windows = st.lists(st.tuples(minutes, minutes).filter(lambda pair: pair[0] != pair[1]), min_size=1, max_size=3)


@given(windows, st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1)))
def test_when_quiet_hours_have_ended_a_night_may_start(pairs, moment):
    quiet = tuple("-".join(f"{m // 60:02}:{m % 60:02}" for m in pair) for pair in pairs)
    try:
        settings = Settings(home="/nowhere", quiet_hours=quiet, time_zone="Europe/Berlin")
    except ValidationError as error:
        assert "leave no time" in str(error)
        return
    now = moment.replace(tzinfo=UTC)
    until = quiet_until(settings.quiet_hours, BERLIN, now)
    if until is not None:
        assert now < until <= now + timedelta(days=1, hours=2)
        assert quiet_until(settings.quiet_hours, BERLIN, until) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"quiet_hours": ["8-20"]}, "write them as 22:00-06:00"),
        ({"quiet_hours": ["24:00-06:00"]}, "write them as"),
        ({"quiet_hours": ["06:00-18:00", "18:00-06:00"]}, "leave no time"),
        ({"quiet_hours": ["06:00-06:00"]}, "leave no time"),
        ({"time_zone": "Berlin"}, "no time zone 'Berlin'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_words(given, said):
    with pytest.raises(ValidationError, match=said):
        Settings(home="/nowhere", **given)
