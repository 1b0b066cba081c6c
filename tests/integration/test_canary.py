"""A canary on a real database: what counts, once and in which order; what the platform does, and may do."""

import uuid
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError

from deploy import audit, autonomy, canary, explanation, head, journal, promotion
from deploy.canary import Watch
from deploy.rollout import Plan
from deploy.runs import TrainingRun
from deploy.tables import AuditEntry, Canary, CanaryUser, Release
from feedback import episodes, erasure
from feedback.acceptance import accept
from feedback.episodes import Recording
from feedback.signals import read_signal
from infra.errors import ConflictError, InvalidRequestError, NotFoundError
from infra.settings import Settings
from reward.tables import RewardRater
from tests.adapters import serve

SETTLE_S = 30.0


@pytest.fixture
def settings(database, tmp_path):
    url = database.kw["bind"].url.render_as_string(hide_password=False)
    return Settings(home=tmp_path, database_url=url, canary_settle_s=SETTLE_S, canary_step_users=3, canary_step_s=0)


@pytest.fixture
def people(database):
    return People(database)


class People:
    """Users who chat and vote, as the tables have them."""

    def __init__(self, sessions):
        self.sessions = sessions
        self.number = 0

    def answer(self, arm, user=None, *, began_s_ago=45.0, latency_s=1.0, text="A fine answer.", **fields):
        """Write an answer that began so long ago; return its id and user."""
        self.number += 1
        user = user or f"user-{self.number}"
        with self.sessions.begin() as session:
            canary_id = head.read(session).canary_id
            key, learn = episodes.begin(session, user, True)
            row = {
                "episode_id": episodes.new_episode_id(),
                "user_id": user,
                "release": "r1" if arm == "challenger" else "base",
                "adapter_digest": None,
                "canary_id": canary_id,
                "arm": arm,
                "propensity": 0.5,
                "messages": [{"role": "user", "content": "Why?"}],
                "sampling": {},
                "learn": learn,
                "answer": text,
                "status": "complete",
                "latency_ms": 1000.0 * latency_s,
            }
            recording = Recording(**(row | fields))
            ended = datetime.now(UTC) - timedelta(seconds=began_s_ago - latency_s)
            episodes.record(session, recording, key, ended)
        return recording.episode_id, user

    def thumb(self, episode_id, user, value=1):
        """Vote on an answer now."""
        signal = {"episode_id": episode_id, "user": user, "kind": "thumb", "value": value}
        with self.sessions.begin() as session:
            accept(session, read_signal.validate_python({**signal, "idempotency_key": uuid.uuid4().hex}))

    def vote(self, arm, good=True, **options):
        """Chat, then vote."""
        episode_id, user = self.answer(arm, **options)
        self.thumb(episode_id, user, 1 if good else -1)
        return user

    def pairs(self, count, champion, challenger):
        """Let `count` users of each arm vote."""
        for _ in range(count):
            self.vote("champion", champion)
            self.vote("challenger", challenger)


@pytest.fixture
def opened(database, settings):
    return open_canary(database, settings)


def open_canary(database, settings, name="r1", **options):
    """Open a canary of a release as if an hour ago."""
    with database.begin() as session:
        if session.scalar(sa.select(Release.id).where(Release.name == name)) is None:
            session.add(Release(name=name))
            session.flush()
            serve(session, name)
        options = {"share": 0.5, "actor": "test", "reason": "a test"} | options
        found = promotion.try_out(session, settings, name, **options)
        found.opened_at = datetime.now(UTC) - timedelta(hours=1)
        found.looked_at = found.opened_at
        return found.id


def log_of(database, canary_id, kind=None):
    with database() as session:
        return [event for event in journal.read(session, canary_id) if kind in (None, event.kind)]


def read(database, canary_id):
    with database() as session:
        return session.get_one(Canary, canary_id)


def test_users_count_once_by_the_arm_that_answered(database, settings, people, opened):
    watch = Watch(database, settings)
    one = people.vote("challenger", good=False)
    people.vote("challenger", good=True, user=one)  # a second answer, a second vote
    episode, other = people.answer("champion")
    people.thumb(episode, other, 1)
    people.thumb(episode, other, -1)  # changes their mind
    assert watch.look() is None
    people.vote("champion", good=False, user=one)  # after a step users may meet the other arm
    assert watch.look() is None
    votes = log_of(database, opened, "vote")
    assert {(vote.arm, vote.good) for vote in votes} == {("challenger", False), ("champion", True)}
    assert [event.arm for event in log_of(database, opened, "trial")].count("challenger") == 1
    assert len(votes) == 2 and len(log_of(database, opened, "trial")) == 2


def test_a_vote_counts_for_its_answers_arm_though_the_user_first_met_the_other(database, settings, people, opened):
    _, user = people.answer("champion")
    people.vote("challenger", user=user)
    Watch(database, settings).look()
    assert [event.arm for event in log_of(database, opened, "trial")] == ["champion"]
    assert [event.arm for event in log_of(database, opened, "vote")] == ["challenger"]


def test_the_order_is_that_of_beginnings_and_never_changes(database, settings, people, opened):
    watch = Watch(database, settings)
    slow = people.answer("champion", began_s_ago=90.0, latency_s=20.0)
    people.vote("challenger", began_s_ago=80.0)
    people.thumb(*slow, 1)
    people.vote("challenger", began_s_ago=SETTLE_S - 5)  # not settled
    late = people.answer("champion", began_s_ago=200.0)
    watch.look()
    assert [(vote.arm) for vote in log_of(database, opened, "vote")] == ["champion", "challenger"]
    before = log_of(database, opened)
    people.thumb(*late, -1)  # its answer began first of all
    watch.look()
    after = log_of(database, opened)
    assert after[: len(before)] == before
    assert [(event.kind, event.arm, event.good) for event in after[len(before) :]] == [("vote", "champion", False)]


def test_what_settles_after_a_pause_of_the_watch_is_not_lost(database, settings, people, opened):
    watch = Watch(database, settings)
    episode, user = people.answer("challenger", began_s_ago=SETTLE_S - 10)
    people.thumb(episode, user)
    watch.look()
    assert log_of(database, opened) == []
    with database.begin() as session:  # time passes
        session.execute(sa.text("UPDATE episodes SET created_at = created_at - interval '1 hour'"))
        session.execute(sa.text("UPDATE feedback SET created_at = created_at - interval '1 hour'"))
        for column in ("opened_at", "looked_at"):
            session.execute(sa.text(f"UPDATE canaries SET {column} = {column} - interval '1 hour'"))
    watch.look()
    assert [event.kind for event in log_of(database, opened)] == ["trial", "vote"]


def test_who_may_not_be_learned_from_is_banned_or_forgotten_has_no_vote(database, settings, people, opened):
    people.vote("challenger", learn=False)
    banned = people.vote("challenger")
    forgotten = people.vote("challenger")
    with database.begin() as session:
        key = session.scalar(sa.text("SELECT key_id FROM users WHERE user_id = :user"), {"user": banned})
        state = {"num_votes": 1, "num_right": 0, "num_wrong": 0, "first_at_s": 0.0}
        session.add(RewardRater(name=key, set_aside=True, ruling="banned", **state))
    watch = Watch(database, settings)
    with database.begin() as session:
        erasure.forget(session, forgotten, "retrain-required")
    watch.look()
    assert log_of(database, opened, "vote") == []
    counted = people.vote("challenger")
    watch.look()
    with database.begin() as session:
        assert session.scalar(sa.select(sa.func.count()).where(CanaryUser.user_id == counted)) == 1
        erasure.forget(session, counted, "retrain-required")
    with database() as session:  # the log keeps the vote, and nothing says whose it was
        assert session.scalar(sa.select(sa.func.count()).where(CanaryUser.user_id == counted)) == 0
    watch.look()
    assert len(log_of(database, opened, "vote")) == 1


def test_a_trial_says_what_happened_to_the_first_answer(database, settings, people):
    for _ in range(20):
        people.answer("champion", latency_s=2.0)  # before the canary: what is slow
    opened = open_canary(database, settings)
    with database.begin() as session:
        found = session.get_one(Canary, opened)
        assert found.plan["slow_ms"] == 2000.0
        found.plan = {**found.plan, "words": [2, 10]}
    episode, user = people.answer("challenger")
    people.thumb(episode, user)
    people.answer("challenger", latency_s=2.5)
    people.answer("challenger", status="failed", text="")
    people.answer("challenger", text="I'm sorry, but I can't help.")
    people.answer("challenger", text="word " * 11)
    Watch(database, settings).look()
    flags = [event.flags for event in log_of(database, opened, "trial")]
    assert flags.count(frozenset()) == 1
    assert frozenset({"slow", "unrated"}) in flags and frozenset({"refused", "unrated"}) in flags
    assert frozenset({"failed", "unusual_length", "unrated"}) in flags
    assert frozenset({"unusual_length", "unrated"}) in flags


def test_a_better_challenger_is_promoted_and_the_decision_can_be_recomputed(database, settings, people, opened):
    people.pairs(14, champion=False, challenger=True)
    ended = Watch(database, settings).look()
    assert ended and "promote" in ended
    with database() as session:
        found = canary.get(session, opened)
        told = explanation.explain(session, found)
        assert head.read(session).champion == "r1" and found.decision == "promote"
        assert told["agrees"] is True and told["evidence"] == found.evidence
        assert told["difference"]["low"] > 0 and told["difference"]["value"] == 1.0
        assert [row["note"] for row in told["rows"] if row["note"]] == ["promote: better"]
        assert session.scalar(sa.select(sa.func.count()).select_from(CanaryUser)) == 0
        changed = Canary(**{name: getattr(found, name) for name in ("champion", "challenger", "reason")})
        changed.id, changed.plan, changed.decision = found.id, found.plan, "rollback"
        changed.opened_at, changed.evidence = found.opened_at, found.evidence
        assert explanation.explain(session, changed)["agrees"] is False
    for statement in ("UPDATE canary_events SET good = true", "DELETE FROM canary_events"):
        with database() as session, pytest.raises(DatabaseError, match="append-only"):
            session.execute(sa.text(statement))


def test_a_worse_one_is_rolled_back_without_a_person(database, settings, people, opened):
    people.pairs(14, champion=True, challenger=False)
    assert "rollback" in Watch(database, settings).look()
    with database() as session:
        assert head.read(session).champion == "base" and head.read(session).canary_id is None
        entry = audit.newest(session, 1, automatic=True)[0]
    assert entry.action == "canary_rolled_back" and "worse" in entry.reason


def test_nobody_is_promoted_whom_a_replica_does_not_serve(database, settings, people, opened):
    people.pairs(14, champion=False, challenger=True)
    with database.begin() as session:
        serve(session, "r1", problem="it answers as the base model does")
    watch = Watch(database, settings)
    assert watch.look() is None
    with database.begin() as session:
        assert head.read(session).champion == "base"
        serve(session, "r1")
    assert "promote" in watch.look()


def test_errors_alone_roll_it_back(database, settings, people, opened):
    for _ in range(12):
        people.answer("champion")
        people.answer("challenger", status="failed", text="")
    assert "guardrail failed" in Watch(database, settings).look()


def test_more_users_meet_it_in_steps(database, settings, people):
    opened = open_canary(database, settings, share=None)
    watch = Watch(database, settings)
    shares = []
    for _ in range(4):
        people.answer("challenger")
        people.answer("challenger")
        assert watch.look() is None
        with database() as session:
            shares.append(head.read(session).share)
    assert shares == [0.05, 0.25, 0.25, 0.5]
    with database() as session:
        steps = [entry.details["after"]["share"] for entry in audit.newest(session, 9, automatic=True)]
        assert steps == [0.5, 0.25]
        assert canary.recompute(session, canary.get(session, opened)).share == 0.5


def test_out_of_time_it_ends_without_promotion(database, settings, people, opened):
    with database.begin() as session:
        found = session.get_one(Canary, opened)
        found.plan = {**found.plan, "max_s": 3000.0}
    assert "expired" in Watch(database, settings).look()
    assert read(database, opened).decision == "expired"
    with database() as session:
        assert head.read(session).champion == "base"
        assert explanation.explain(session, canary.get(session, opened))["agrees"] is True


def test_a_watch_that_dies_before_it_commits_leaves_nothing_and_another_goes_on(
    database, settings, people, opened, monkeypatch
):
    people.pairs(14, champion=False, challenger=True)
    watch = Watch(database, settings)

    def killed(*_, **__):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("deploy.canary.act", killed)
        with pytest.raises(RuntimeError):
            watch.look()
    assert log_of(database, opened) == []
    assert "promote" in watch.look()
    assert len(log_of(database, opened, "vote")) == 28


def test_candidates_share_alpha_until_one_is_promoted(database, settings, people):
    limits = []
    for number in range(3):
        opened = open_canary(database, settings, f"r{number}")
        limits.append(Plan.model_validate(read(database, opened).plan).candidate)
        if number != 1:  # one in which nobody voted spends nothing
            people.pairs(1, champion=True, challenger=True)
        Watch(database, settings).look()
        with database.begin() as session:
            canary.abort(session, opened, actor="test", reason="next")
    assert limits == [1, 2, 2]
    opened = open_canary(database, settings, "r3")
    assert Plan.model_validate(read(database, opened).plan).candidate == 3
    with database.begin() as session:
        head.move_champion(session, "r3", action="promoted_by_hand", actor="test", reason="by hand")
    opened = open_canary(database, settings, "r4")
    assert Plan.model_validate(read(database, opened).plan).candidate == 1


@pytest.mark.parametrize(
    ("verdicts", "allowed", "opens"),
    [
        (["pass", "inconclusive"], "inconclusive", True),
        (["pass", "inconclusive"], "none", False),
        (["fail", "inconclusive"], "inconclusive", False),
        (["fail", "inconclusive"], "any", True),
        (["pass", "pass"], "none", True),
    ],
)
def test_gates_are_overridden_where_the_setting_allows_and_it_is_audited(
    database, settings, verdicts, allowed, opens
):
    settings = settings.model_copy(update={"gate_overrides": allowed})
    gates = [{"gate": f"g{n}", "verdict": verdict, "low": 3, "high": 9} for n, verdict in enumerate(verdicts)]
    with database.begin() as session:
        session.add(Release(name="r1"))
        run = {"id": "run_1", "recipe": "dpo", "status": "held", "phase": "gates", "config": {}, "release": "r1"}
        session.add(TrainingRun(**run, result={"gates": gates}))
    if opens:
        opened = open_canary(database, settings)
        assert [gate["gate"] for gate in read(database, opened).gates] == ["g0", "g1"]
    else:
        with pytest.raises(ConflictError) as refused:
            open_canary(database, settings)
        assert refused.value.code == "gates_not_passed"
    with database() as session:
        said = session.scalars(sa.select(AuditEntry.details).where(AuditEntry.action == "gates_overridden")).all()
    held = [gate["gate"] for gate in gates if gate["verdict"] != "pass"]
    assert [entry["gates"] for entry in said] == ([held] if opens and held else [])


def set_level(database, settings, level):
    with database.begin() as session:
        autonomy.set_level(session, settings, level, actor="test", reason="a test")


def proposals(database):
    with database() as session:
        return [(p.action, p.release) for p in autonomy.open_proposals(session)]


def test_at_the_level_canary_a_promotion_is_proposed_once_and_harm_still_rolls_back(
    database, settings, people, opened
):
    set_level(database, settings, "canary")
    people.pairs(14, champion=False, challenger=True)
    watch = Watch(database, settings)
    assert watch.look() is None and watch.look() is None
    assert proposals(database) == [("promote", "r1")]
    with database() as session:
        assert head.read(session).champion == "base"
        actions = [entry.action for entry in audit.newest(session, 20, automatic=True)]
    assert actions.count("promote_proposed") == 1
    people.pairs(40, champion=True, challenger=False)
    assert "rollback" in watch.look()
    assert proposals(database) == []


def test_an_operator_does_what_was_proposed_or_declines_it(database, settings, people, opened):
    set_level(database, settings, "propose")
    people.pairs(14, champion=False, challenger=True)
    Watch(database, settings).look()
    with database.begin() as session:
        head.move_champion(session, "r1", action="promoted_by_hand", actor="ann", reason="looks good")
    assert proposals(database) == []
    with database.begin() as session:
        assert autonomy.propose(session, settings, "canary", "r1", actor="test", reason="passed")
        assert not autonomy.propose(session, settings, "canary", "r1", actor="test", reason="passed")
        (waiting,) = autonomy.open_proposals(session)
        autonomy.decline(session, waiting.id, actor="ann", reason="not now")
        with pytest.raises(InvalidRequestError) as refused:
            autonomy.decline(session, waiting.id, actor="ann", reason="again")
    assert refused.value.code == "proposal_not_open" and proposals(database) == []


def test_what_only_observes_neither_steps_nor_proposes_nor_rolls_back(database, settings, people):
    open_canary(database, settings, share=None)
    set_level(database, settings, "observe")
    watch = Watch(database, settings)
    for _ in range(9):
        people.answer("challenger")
    assert watch.look() is None
    with database() as session:
        assert head.read(session).share == 0.05
    people.pairs(30, champion=True, challenger=False)
    for _ in range(30 * 18):
        people.vote("champion", good=True)
    assert watch.look() is None and proposals(database) == []
    with database() as session:
        assert audit.newest(session, 9, automatic=True) == []
        current = canary.recompute(session, canary.get(session, head.read(session).canary_id))
        assert current.decision == "rollback"


def test_levels_are_four_and_need_a_reason(database, settings):
    with database.begin() as session:
        assert autonomy.level(session, settings) == "auto"
        for level, reason, code in (("full", "why", "autonomy_unknown"), ("auto", " ", "reason_missing")):
            with pytest.raises(InvalidRequestError) as refused:
                autonomy.set_level(session, settings, level, actor="test", reason=reason)
            assert refused.value.code == code


def test_held_nothing_happens_by_itself_and_an_operator_ends_it(database, settings, people, opened):
    with database.begin() as session:
        canary.hold(session, opened, "hold", actor="ann", reason="let me look")
    people.pairs(14, champion=False, challenger=True)
    watch = Watch(database, settings)
    assert watch.look() is None and len(log_of(database, opened, "vote")) == 28
    with database.begin() as session:
        canary.hold(session, opened, "resume", actor="ann", reason="it is fine")
    assert "promote" in watch.look()
    with database() as session:
        assert explanation.explain(session, canary.get(session, opened))["agrees"] is True
    with database.begin() as session:
        for act in (
            lambda: canary.hold(session, opened, "hold", actor="ann", reason="too late"),
            lambda: canary.abort(session, opened, actor="ann", reason="too late"),
        ):
            with pytest.raises(ConflictError) as refused:
                act()
            assert refused.value.code == "canary_closed"
        with pytest.raises(NotFoundError):
            canary.get(session, 999)


def test_a_decision_that_waits_is_not_acted_on_while_an_operator_holds(database, settings, people, opened):
    people.pairs(14, champion=False, challenger=True)
    with database.begin() as session:
        serve(session, "r1", problem="it is being mended")
    watch = Watch(database, settings)
    assert watch.look() is None
    with database.begin() as session:
        canary.hold(session, opened, "hold", actor="ann", reason="let me look")
        serve(session, "r1")
    assert watch.look() is None
    with database() as session:
        assert head.read(session).champion == "base"


def test_what_was_declined_is_not_proposed_again(database, settings, people, opened):
    set_level(database, settings, "canary")
    people.pairs(14, champion=False, challenger=True)
    watch = Watch(database, settings)
    watch.look()
    with database.begin() as session:
        (waiting,) = autonomy.open_proposals(session)
        autonomy.decline(session, waiting.id, actor="ann", reason="not this one")
    assert watch.look() is None and proposals(database) == []


def test_where_the_platform_may_not_step_the_log_does_not_either(database, settings, people):
    set_level(database, settings, "propose")
    opened = open_canary(database, settings, share=None)
    watch = Watch(database, settings)
    for _ in range(9):
        people.answer("challenger")
    assert watch.look() is None and log_of(database, opened, "tick") == []
    with database() as session:
        assert head.read(session).share == canary.recompute(session, canary.get(session, opened)).share == 0.05


def test_what_an_operators_rollback_cut_short_has_spent_its_alpha(database, settings, people, opened):
    people.pairs(2, champion=True, challenger=True)
    Watch(database, settings).look()
    with database.begin() as session:
        session.add(Release(name="r2"))
        session.flush()
        head.move_champion(session, "r2", action="promoted_by_hand", actor="ann", reason="something else")
    opened = open_canary(database, settings, "r3")
    assert Plan.model_validate(read(database, opened).plan).candidate == 2


def test_the_audit_log_is_a_chain_that_tells_of_changes(database):
    with database.begin() as session:
        audit.from_address(session, "203.0.113.9")
        for number in range(3):
            audit.write(
                session, actor="ann", action="noted", subject="x", reason=f"é “{number}”\n", of={"b": 1, "aa": None}
            )
    with database() as session:
        whole = audit.verify(session)
        assert whole.entries == 3 and audit.verify(session, whole.last_hash) == whole
        assert session.scalars(sa.select(AuditEntry.address).distinct()).all() == ["203.0.113.9"]
        assert session.scalars(sa.select(AuditEntry.id)).all() == [1, 2, 3]
        middle = session.scalars(sa.select(AuditEntry.hash).where(AuditEntry.id == 2)).one()

    def tampered(statement, expected=None):
        """What verification says after somebody got around the database's refusal."""
        with database() as session:
            session.execute(sa.text("ALTER TABLE audit_log DISABLE TRIGGER ALL"))
            session.execute(sa.text(statement))
            try:
                audit.verify(session, expected)
            except Exception as error:
                return error.code
            finally:
                session.rollback()

    for column in ("actor", "action", "subject", "reason", "address"):
        assert tampered(f"UPDATE audit_log SET {column} = 'bob' WHERE id = 2") == "audit_changed", column
    assert tampered("UPDATE audit_log SET details = '{}' WHERE id = 2") == "audit_changed"
    assert (
        tampered("UPDATE audit_log SET created_at = created_at + interval '1 us' WHERE id = 2") == "audit_changed"
    )
    assert tampered("DELETE FROM audit_log WHERE id = 2") == "audit_broken"
    assert tampered("UPDATE audit_log SET address = NULL WHERE id = 2") == "audit_changed"
    assert tampered("DELETE FROM audit_log WHERE id = 3") is None  # which only a hash kept elsewhere tells
    assert tampered("DELETE FROM audit_log WHERE id = 3", whole.last_hash) == "audit_cut"
    assert tampered("DELETE FROM audit_log WHERE id = 3", middle) is None


def test_entries_written_at_once_are_one_chain(database):
    import threading

    def write(number):
        for _ in range(10):
            with database.begin() as session:
                audit.write(session, actor=f"a{number}", action="noted", subject="x", reason="at once")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database() as session:
        assert audit.verify(session).entries == 40
