"""Parts are killed, and nothing is lost and nothing counts twice."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import sqlalchemy as sa

from feedback.tables import Episode, Feedback
from flows.accounting import backlog
from infra.tables import ConsumedEvent, OutboxRow
from reward import store
from reward.history import Posterior
from reward.online import BayesianHead
from reward.tables import RewardSnapshot, RewardUpdate
from tests.conftest import wait_until


def drained(stack):
    with stack.sessions() as session:
        return backlog(session) == 0


def adds_per_feedback(stack):
    """Return how often each signal is in the posterior: added, less what was held or taken out of it since."""
    step = sa.case((RewardUpdate.action == "add", 1), (RewardUpdate.precision > 0, -1), else_=0)
    is_signal = RewardUpdate.action != "inflate"
    with stack.sessions() as session:
        counted = sa.select(RewardUpdate.feedback_id, sa.func.sum(step)).where(is_signal)
        return dict(session.execute(counted.group_by(RewardUpdate.feedback_id)).tuples().all())


def test_killing_the_reward_worker_loses_nothing_and_counts_nothing_twice(stack):
    with ThreadPoolExecutor(8) as pool:
        episodes = list(pool.map(lambda i: stack.ask(f"Name fruit number {i}.").id, range(60)))
    given = []

    def rate():
        for i, episode_id in enumerate(episodes):
            reply = stack.feedback(episode_id, kind="thumb", value=1 if i % 3 else -1)
            given.append(reply.json()["id"])
            time.sleep(0.02)

    raters = threading.Thread(target=rate)
    raters.start()
    for _ in range(2):
        time.sleep(0.3)
        pid = stack.part_pid("reward")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: restarted(stack, "reward", pid))
    raters.join()
    wait_until(lambda: drained(stack), timeout_s=90, what="the worker did not catch up")
    counts = adds_per_feedback(stack)
    assert len(given) == 60 and {counts.get(feedback_id) for feedback_id in given} == {1}
    # A second application would break a unique constraint and end as a dead letter.
    assert dead_letters(stack) == 0


def test_the_recovered_posterior_is_that_of_the_recorded_sites(stack):
    """What a restarted worker would recover equals a fresh replay of the history, to the bit.

    Of the whole history, or of what came after the last that was erased: a snapshot stands for all before.
    """
    wait_until(lambda: drained(stack), timeout_s=60)
    with stack.sessions() as session:
        updates = session.scalars(sa.select(RewardUpdate).order_by(RewardUpdate.seq)).all()
        assert updates, "the tests before this one give feedback"
        dim = next(len(np.frombuffer(update.z, np.float64)) for update in updates if update.z)
        recovered = store.load_posterior(session, updates[0].encoder, dim)
        fresh = Posterior(BayesianHead.prior(dim), 0, 0)
        if erased := [update.seq for update in updates if not update.z]:
            after = sa.select(RewardSnapshot).where(RewardSnapshot.update_seq >= erased[-1])
            snapshot = session.scalars(after.order_by(RewardSnapshot.update_seq).limit(1)).one()
            fresh = store.read_snapshot(snapshot)
    replayed = [update for update in updates if update.seq > fresh.update_seq]
    assert replayed
    for update in replayed:
        fresh.replay(update)
    assert recovered.head.digest() == fresh.head.digest()
    assert recovered.num_signals == fresh.num_signals


def test_with_the_broker_down_chat_and_feedback_go_on_and_the_relay_catches_up(stack):
    stack.supervisor.stop("broker")
    try:
        episode_id = stack.ask("Name a river.").id
        receipt = stack.feedback(episode_id, kind="thumb", value=1)
        assert receipt.status_code == 202
        with stack.sessions() as session:
            waiting = session.query(OutboxRow).filter(OutboxRow.published_at.is_(None)).count()
        assert waiting >= 2
    finally:
        stack.supervisor.start("broker")
    # The embedded broker forgot everything: what it had and what waited both reach the worker.
    wait_until(lambda: drained(stack), timeout_s=90, what="the log did not catch up")
    assert adds_per_feedback(stack)[receipt.json()["id"]] == 1


def test_killing_the_relay_publishes_everything_and_consumers_skip_repeats(stack):
    episodes = [stack.ask(f"Name lake number {i}.").id for i in range(20)]
    given = [stack.feedback(episode_id, kind="thumb", value=1).json()["id"] for episode_id in episodes]
    os.kill(stack.part_pid("relay"), signal.SIGKILL)
    # As if it had died between publishing and marking:
    with stack.sessions.begin() as session:
        session.execute(sa.update(OutboxRow).where(OutboxRow.event_id.in_(given)).values(published_at=None))
    wait_until(lambda: drained(stack), timeout_s=60)
    wait_until(lambda: nothing_waits(stack), timeout_s=60)
    counts = adds_per_feedback(stack)
    assert {counts[feedback_id] for feedback_id in given} == {1}


def test_a_poison_event_goes_to_the_dead_letters_and_those_behind_it_go_on(stack):
    from infra import kafka

    producer = kafka.producer(stack.settings.need("kafka_bootstrap"))
    for value in (b"not json", b'{"id": "ev_x", "dataschema": "urn:everloop:schema:feedback.given.v9"}'):
        for partition in range(stack.settings.kafka_partitions):
            producer.send("everloop.feedback", value=value, partition=partition)
    producer.flush()
    producer.close()
    episode_id = stack.ask("Name a hill.").id
    feedback_id = stack.feedback(episode_id, kind="thumb", value=1).json()["id"]
    wait_until(lambda: adds_per_feedback(stack).get(feedback_id) == 1, timeout_s=60)
    consumer = kafka.consumer(stack.settings.need("kafka_bootstrap"))
    consumer.assign(kafka.partitions(consumer, ["everloop.feedback.dlq"]))
    consumer.seek_to_beginning()
    letters = []
    wait_until(lambda: letters.extend(r for rs in consumer.poll(200).values() for r in rs) or len(letters) >= 6)
    consumer.close()
    assert all(dict(letter.headers)["reason"] for letter in letters)


def test_with_the_engine_down_chat_says_503_and_thumbs_still_work(stack):
    episode_id = stack.ask("Name a tree.").id
    stack.supervisor.stop("engine")
    try:
        before = count_episodes(stack)
        for stream in (False, True):
            response = stack.http.post(
                "/v1/chat/completions",
                json={"model": "everloop", "messages": [{"role": "user", "content": "Hi"}], "stream": stream},
            )
            assert response.status_code == 503 and int(response.headers["Retry-After"]) > 0
            assert response.json()["error"]["code"] == "engine_unavailable"
        with pytest.raises(openai.InternalServerError):
            stack.ask()
        assert count_episodes(stack) == before
        assert stack.feedback(episode_id, kind="thumb", value=1).status_code == 202
    finally:
        stack.supervisor.start("engine")
        wait_until(lambda: engine_answers(stack), timeout_s=180, what="the engine did not come back")


def test_killing_the_engine_in_mid_answer_leaves_a_failed_episode(stack):
    stream = stack.ask("Tell me a very long story.", stream=True, max_tokens=1500)
    chunks = iter(stream)
    episode_id = next(chunks).id
    os.killpg(os.getpgid(stack.part_pid("engine")), signal.SIGKILL)
    with pytest.raises(openai.APIError):
        list(chunks)
    with stack.sessions() as session:
        assert session.get(Episode, episode_id).status == "failed"
    wait_until(lambda: engine_answers(stack), timeout_s=180, what="the engine did not come back")


def test_killing_the_database_is_survived(stack):
    episode_id = stack.ask("Name a star.").id
    os.kill(stack.part_pid("postgres"), signal.SIGKILL)
    key = "while-the-database-was-away"

    def accepted():
        reply = stack.feedback(episode_id, kind="thumb", value=1, idempotency_key=key)
        assert reply.status_code in (202, 503), reply.text
        return reply.status_code == 202 and reply.json()["id"]

    feedback_id = wait_until(accepted, timeout_s=60)
    wait_until(lambda: adds_per_feedback(stack).get(feedback_id) == 1, timeout_s=60)
    with stack.sessions() as session:
        assert session.query(Feedback).filter_by(idempotency_key=key).count() == 1


def test_nothing_was_applied_twice_in_all_of_this(stack):
    wait_until(lambda: drained(stack), timeout_s=60)
    assert set(adds_per_feedback(stack).values()) <= {0, 1}
    assert dead_letters(stack) == 1, "only the poison event with an id was given up"
    with stack.sessions() as session:
        is_signal = OutboxRow.event_id.startswith("fb_")
        fed = session.query(OutboxRow).filter(is_signal).count()
        applied = (
            session.query(ConsumedEvent)
            .join(OutboxRow, OutboxRow.event_id == ConsumedEvent.event_id)
            .filter(is_signal, ConsumedEvent.consumer == "reward")
            .count()
        )
        assert applied == fed == session.query(Feedback).count()


def restarted(stack, name, old_pid):
    part = next(part for part in stack.supervisor.status() if part.name == name)
    return part.state == "running" and part.pid != old_pid


def dead_letters(stack):
    with stack.sessions() as session:
        return session.query(ConsumedEvent).filter_by(dead_letter=True, consumer="reward").count()


def nothing_waits(stack):
    with stack.sessions() as session:
        return session.query(OutboxRow).filter(OutboxRow.published_at.is_(None)).count() == 0


def count_episodes(stack):
    with stack.sessions() as session:
        return session.query(Episode).count()


def engine_answers(stack):
    try:
        return bool(stack.ask())
    except openai.APIError:
        return False
