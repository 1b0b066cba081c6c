"""What a dataset holds of a log, and what not, rule by rule. Each test writes its log and takes it back."""

import uuid

import pytest
import sqlalchemy as sa

from feedback import episodes
from feedback.acceptance import accept
from feedback.episodes import Recording, new_episode_id
from feedback.signals import read_signal
from feedback.tables import User
from reward.raters import CROWD
from reward.tables import RewardRater
from trainer import collect
from trainer.redactor import Redactor


class Log:
    """A log that is rolled back: all that was said before it is left out of its snapshots."""

    def __init__(self, session):
        self.session = session
        before = self._take()
        self.before = {example.episode_id for example in [*before.train, *before.gate]}
        self.set_aside_before = before.set_aside

    def _take(self, max_user_share=1.0, **options):
        return collect.take(self.session, Redactor(), max_user_share=max_user_share, **options)

    def take(self, **options):
        """Return (train, gate, what this log added to what is set aside); of nobody's answers is a share cut."""
        data = self._take(**options)
        train, gate = ([e for e in part if e.episode_id not in self.before] for part in (data.train, data.gate))
        added = {k: n - self.set_aside_before.get(k, 0) for k, n in data.set_aside.items()}
        return train, gate, {k: n for k, n in added.items() if n}

    def answer(self, user, prompt, answer="So.", consent=True, status="complete"):
        key, learn = episodes.begin(self.session, user, consent)
        messages = [{"role": "user", "content": prompt}]
        recording = Recording(
            new_episode_id(), user, "base", None, None, "champion", 1.0, messages, {}, learn, answer
        )
        recording.status = status
        assert episodes.record(self.session, recording, key)
        return recording.episode_id

    def say(self, user, episode_id, kind="thumb", **said):
        said = {"value": 1} if kind == "thumb" and not said else said
        body = {"episode_id": episode_id, "user": user, "kind": kind, "idempotency_key": uuid.uuid4().hex, **said}
        return accept(self.session, read_signal.validate_python(body))

    def key_of(self, user):
        return self.session.get_one(User, user).key_id


@pytest.fixture
def log(stack):
    with stack.sessions() as session:
        yield Log(session)
        session.rollback()


def user(name="ada"):
    return f"{name}-{uuid.uuid4().hex[:8]}"


def prompt(held_out=False):
    """Return a new prompt whose conversation trains, or is held out."""
    while True:
        text = f"Why {uuid.uuid4().hex[:8]}?"
        if collect.is_held_out(collect.conversation_of([{"role": "user", "content": text}])) == held_out:
            return text


def trained_user(log, *, held_out=False):
    """Return a user who is, or is not, one of those kept for gates, in a house that is large enough."""
    for _ in range(CROWD):
        log.answer(user("first"), prompt())
    while True:
        name = user()
        log.answer(name, prompt())
        if collect.is_held_out_user(log.key_of(name)) == held_out:
            return name


def test_what_people_said_of_an_answer_stands_beside_it(log):
    ada = trained_user(log)
    asked = prompt()
    one, other = (log.answer(ada, asked, text) for text in ("One. Write to ada@example.org.", "Two."))
    log.say(ada, one)
    log.say(ada, one, "rating", value=4)
    log.say(ada, one, "correction", text="Better: ada@example.org.")
    log.say(ada, one, "preference", over=other)
    log.say(ada, one, "comment", text="Fine.")
    train, gate, set_aside = log.take()
    assert not gate and len(train) == 1
    [example] = train
    assert example.verdicts == [1.0, 0.75] and example.preferred_over == ["Two."]
    assert len(example.feedback_ids) == 4 and set_aside["kind_not_trained"] == 1
    assert "ada@example.org" not in example.answer + example.corrections[0] and set_aside["redacted_email"] == 2


def test_what_was_replaced_or_taken_back_and_what_may_not_be_learned_is_counted_and_left_out(log):
    ada = trained_user(log)
    silent, broken, empty = (
        log.answer(ada, prompt(), consent=False),
        log.answer(ada, prompt(), status="interrupted"),
        log.answer(ada, prompt(), " "),
    )
    kept, taken_back = log.answer(ada, prompt()), log.answer(ada, prompt())
    for episode_id in (silent, broken, empty, kept, taken_back):
        log.say(ada, episode_id)
    log.say(ada, kept, value=-1)
    log.say(ada, taken_back, value=0)
    train, gate, set_aside = log.take()
    assert [(e.episode_id, e.verdicts) for e in train] == [(kept, [0.0])] and not gate
    assert set_aside == {"no_consent": 1, "answer_interrupted": 1, "answer_empty": 1, "superseded_or_withdrawn": 3}


def test_whom_the_reward_model_does_not_trust_teaches_nothing_here_either(log):
    ada = trained_user(log)
    expected = {}
    for name, state, reason in (
        ("banned", {"ruling": "banned"}, "rater_banned"),
        ("burst", {"quarantine": "qu_1"}, "rater_quarantined"),
        ("wrong", {"set_aside": True}, "rater_set_aside"),
        ("cleared", {"ruling": "cleared", "set_aside": False}, None),
    ):
        somebody = user(name)
        episode_id = log.answer(somebody, prompt())
        log.say(somebody, episode_id)
        known = {"num_votes": 1, "num_right": 0, "num_wrong": 0, "set_aside": False, "first_at_s": 0.0, **state}
        log.session.add(RewardRater(name=log.key_of(somebody), **known))
        if reason is not None:
            expected[reason] = 1
    log.session.flush()
    episode_id = log.answer(ada, prompt())
    log.say(ada, episode_id)
    train, _, set_aside = log.take()
    assert {k: n for k, n in set_aside.items() if k.startswith("rater_")} == expected
    assert episode_id in {e.episode_id for e in train}


def test_no_conversation_and_no_held_out_user_both_trains_and_judges(log):
    ada, kept_out = trained_user(log), trained_user(log, held_out=True)
    shared, judged = prompt(), prompt(held_out=True)
    trains = log.answer(ada, shared)
    judges = log.answer(ada, judged)
    theirs_shared, theirs = log.answer(kept_out, shared), log.answer(kept_out, prompt())
    for somebody, episode_id in ((ada, trains), (ada, judges), (kept_out, theirs_shared), (kept_out, theirs)):
        log.say(somebody, episode_id)
    train, gate, set_aside = log.take()
    assert [e.episode_id for e in train] == [trains]
    assert [e.episode_id for e in gate] == sorted([judges, theirs])
    assert set_aside == {"conversation_held_out": 1, "user_held_out": 1, "conversation_trains": 1}


def test_the_first_people_of_a_house_are_never_held_out(stack, log):
    first = log.session.scalars(sa.select(User).order_by(User.created_at, User.key_id).limit(CROWD)).all()
    known = [u.user_id for u in first if not u.user_id.startswith("forgotten")][:8]
    said = {}
    for name in known:
        said[name] = log.answer(name, prompt())
        log.say(name, said[name])
    train, _, _ = log.take()
    assert set(said.values()) <= {e.episode_id for e in train}


def test_nobody_is_more_than_their_share_of_a_crowd(log):
    loud = trained_user(log)
    many = 30 + len(log.before) // 4  # more than a share of all that is there, however much other tests have left
    theirs = [log.answer(loud, prompt()) for _ in range(many)]
    for episode_id in theirs:
        log.say(loud, episode_id)
    for _ in range(2 * CROWD):
        somebody = user("quiet")
        log.say(somebody, log.answer(somebody, prompt()))
    train, _, _ = log.take(max_user_share=collect.USER_SHARE)
    kept = [e.episode_id for e in train if e.episode_id in theirs]
    assert 0 < len(kept) < many and kept == theirs[-len(kept) :], "the newest stay"
    assert len(train) - len(kept) >= 2 * CROWD * 0.5, "of the others nothing is cut: they gave one answer each"
    assert log._take(collect.USER_SHARE).set_aside["over_user_cap"] >= many - len(kept)
    whole, _, _ = log.take()
    assert {e.episode_id for e in whole} - {e.episode_id for e in train} == set(theirs) - set(kept)


def test_the_same_range_has_the_same_bytes_whatever_comes_later(log):
    ada = trained_user(log)
    episode_id = log.answer(ada, prompt())
    log.say(ada, episode_id)
    through = collect.settled_seq(log.session)
    before = log._take(through_seq=through)
    log.say(ada, episode_id, value=-1)
    other = log.answer(ada, prompt())
    log.say(ada, other)
    after = log._take(through_seq=through)
    assert after.to_jsonl() == before.to_jsonl() and after.set_aside == before.set_aside
    assert log._take().digest != before.digest
    assert log._take(after_seq=through).num_new_signals == 2


def test_the_range_ends_before_whoever_is_still_writing(stack):
    """A signal that is not committed yet gets a number above the range, or the range waits for it."""
    with stack.sessions() as writing, stack.sessions() as reading:
        log = Log(writing)
        ada = user()
        log.say(ada, log.answer(ada, prompt()))
        reading.execute(sa.text("SET LOCAL lock_timeout = '300ms'"))
        with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
            collect.settled_seq(reading)
        writing.rollback()
        reading.rollback()
        assert collect.settled_seq(reading) >= 0


def test_the_range_ends_before_whoever_has_a_number_and_has_not_written_yet(stack, monkeypatch):
    with stack.sessions() as writing, stack.sessions() as reading:
        log = Log(writing)
        ada = user()
        episode_id = log.answer(ada, prompt())
        writing.commit()
        reading.execute(sa.text("SET LOCAL lock_timeout = '300ms'"))

        def look(**_):  # a writer seals its events here, after it has drawn its numbers
            with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
                collect.settled_seq(reading)
            raise InterruptedError

        monkeypatch.setattr("feedback.acceptance.FeedbackGiven", look)
        with pytest.raises(InterruptedError):
            log.say(ada, episode_id)
        writing.rollback()


def test_who_was_forgotten_is_found_among_more_answers_than_a_statement_has_parameters(stack):
    with stack.sessions() as session:
        assert collect.forgotten(session, [f"ep_{n}" for n in range(70_000)]) == set()
