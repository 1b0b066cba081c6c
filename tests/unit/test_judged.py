"""Which comparisons signals make between answers."""

import pytest

from feedback.fold import Standing
from feedback.tables import Episode
from reward.judged import pair_up, pairs_digest, usable

WHY = [{"role": "user", "content": "Why?"}]
HOW = [{"role": "user", "content": "How?"}]


def episode(name, messages=WHY, answer=None, user="ada", learn=True):
    return Episode(
        id=name,
        messages=messages,
        answer=f"Answer {name}." if answer is None else answer,
        user_id=user,
        learn=learn,
    )


def said(seq, episode_id, kind, value=None, text=None, over=None, user="ada"):
    return Standing(f"fb_{seq}", seq, episode_id, user, kind, episode_id, value, over=over, text=text)


def pairs_of(signals, *episodes):
    return [(p.kind, p.chosen, p.rejected, p.feedback_ids) for p in pair_up(signals, {e.id: e for e in episodes})]


def test_preferences_and_corrections_are_comparisons_in_the_order_in_which_they_were_given():
    signals = [said(1, "a", "correction", text="Better."), said(2, "b", "preference", over="a")]
    assert pairs_of(signals, episode("a"), episode("b")) == [
        ("correction", "Better.", "Answer a.", ("fb_1",)),
        ("preference", "Answer b.", "Answer a.", ("fb_2",)),
    ]


def test_a_liked_answer_stands_against_a_disliked_one_to_the_same_prompt_only():
    signals = [
        said(1, "a", "thumb", 1),
        said(2, "b", "rating", 1),
        said(3, "c", "thumb", -1),
        said(4, "d", "rating", 3),
    ]
    episodes = [episode("a"), episode("b"), episode("c", HOW), episode("d")]
    assert pairs_of(signals, *episodes) == [("contrast", "Answer a.", "Answer b.", ("fb_1", "fb_2"))]


def test_four_stars_like_an_answer_and_two_dislike_it():
    found = pairs_of([said(1, "a", "rating", 4), said(2, "b", "rating", 2)], episode("a"), episode("b"))
    assert found == [("contrast", "Answer a.", "Answer b.", ("fb_1", "fb_2"))]


def test_each_answer_is_contrasted_once_and_later_votes_leave_earlier_pairs_as_they_are():
    names = "abcdef"
    episodes = [episode(name) for name in names]
    signals = [said(n, name, "thumb", 1 if n % 2 else -1) for n, name in enumerate(names, 1)]
    whole = pairs_of(signals, *episodes)
    assert len(whole) == 3
    assert pairs_of(signals[:4], *episodes) == whole[:2]


def test_raters_who_disagree_as_often_as_not_say_nothing():
    signals = [said(1, "a", "thumb", 1), said(2, "a", "thumb", -1, user="bob"), said(3, "b", "thumb", -1)]
    assert pairs_of(signals, episode("a"), episode("b")) == []


def test_answers_that_may_not_be_learned_from_make_no_pair():
    signals = [said(1, "a", "correction", text="Better."), said(2, "b", "preference", over="a")]
    assert pairs_of(signals, episode("b")) == []


@pytest.mark.parametrize("text", ["Answer a.", " Answer a. \n", "  ", None])
def test_a_correction_that_changes_nothing_or_says_nothing_makes_no_pair(text):
    assert pairs_of([said(1, "a", "correction", text=text)], episode("a")) == []


def test_only_consenting_users_who_were_not_forgotten_are_learned_from():
    assert usable(episode("a"))
    assert not usable(None)
    assert not usable(episode("a", learn=False))
    assert not usable(episode("a", user="forgotten_01"))
    assert not usable(episode("a", answer=" "))


def test_the_digest_is_of_what_the_pairs_say_in_their_order():
    one, two = pair_up(
        [said(1, "a", "correction", text="Better."), said(2, "a", "correction", text="Best.")], {"a": episode("a")}
    )
    assert pairs_digest([one, two]) == pairs_digest([one, two]) != pairs_digest([two, one]) != pairs_digest([one])
