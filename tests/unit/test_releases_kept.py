"""The rule of retention: files of what is served, tried, trained on, rolled back to or gone on from never go."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from deploy.retention import StoredAdapter, deletable

NOW = datetime(2026, 11, 26, tzinfo=UTC)
MAX_RELEASES = 12


def name(number):
    return f"r{number}" if number else "base"


@st.composite
def histories(draw):
    """Adapters that go on from earlier ones, and how the champion moved."""
    number = draw(st.integers(0, MAX_RELEASES))
    adapters = [
        StoredAdapter(
            digest=f"{n:064x}",
            release=name(n),
            started_from=name(draw(st.integers(0, n - 1))),
            stored_at=NOW - timedelta(days=draw(st.integers(0, 60))),
            has_files=draw(st.booleans()),
        )
        for n in range(1, number + 1)
    ]
    names = st.sampled_from([name(n) for n in range(number + 1)])
    path = draw(st.lists(names, min_size=1, max_size=8))
    moves = [(old, new) for old, new in pairwise(path) if old != new][::-1]
    return adapters, moves, set(draw(st.lists(names, max_size=3))) | {path[-1]}


@given(histories(), st.integers(1, 5), st.integers(0, 60))
def test_what_is_needed_never_goes_and_all_else_does(history, num_kept, kept_days):
    adapters, moves, in_use = history
    young_since = NOW - timedelta(days=kept_days)
    going = deletable(adapters, in_use, moves, num_moves_kept=num_kept, young_since=young_since)
    gone = {adapter.release for adapter in going}
    assert not gone & in_use
    assert not gone & {side for move in moves[:num_kept] for side in move}, "a rollback needs them"
    assert all(adapter.stored_at < young_since and adapter.has_files for adapter in going)
    by_release = {adapter.release: adapter for adapter in adapters}
    stay = {adapter.release for adapter in adapters} - gone
    needed = in_use | {side for move in moves[:num_kept] for side in move}
    needed |= {adapter.release for adapter in adapters if adapter.stored_at >= young_since}
    for release in needed:
        while release != "base":
            assert release not in gone, "what a kept one goes on from stays, all the way down"
            release = by_release[release].started_from
    # And it is no rule that keeps everything: whatever stays with files is needed, or some needed one's ancestor.
    lines = set()
    for release in needed:
        while release != "base":
            lines.add(release)
            release = by_release[release].started_from
    assert {r for r in stay if by_release[r].has_files} <= lines


def test_a_held_candidate_goes_and_a_champion_within_the_last_moves_does_not():
    old = NOW - timedelta(days=90)
    adapters = [StoredAdapter(f"{n:064x}", name(n), "base", old) for n in range(1, 5)]
    moves = [("r2", "r3"), ("r1", "r2"), ("base", "r1")]

    def going(num_kept):
        found = deletable(adapters, {"r3"}, moves, num_moves_kept=num_kept, young_since=NOW)
        return [adapter.release for adapter in found]

    assert going(3) == ["r4"] and going(2) == ["r4"] and going(1) == ["r1", "r4"]
