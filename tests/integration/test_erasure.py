"""A person is forgotten: no word of theirs is left in any table, topic or file, and nothing learned from it."""

import subprocess
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import sqlalchemy as sa

import trainer.erasure
from feedback.tables import Erasure, Feedback, SelfEvaluation, User
from infra import kafka
from infra.db import transaction
from infra.events import TOPICS, dead_letter_topic
from reward import decisions, history, store
from reward.history import Posterior
from reward.online import BayesianHead
from reward.tables import GoldProbe, RewardUpdate
from tests.conftest import EVERLOOP, wait_until
from trainer.snapshot import DATASET_FILE, Example, Snapshot, episode_of


def tables_with(stack, text):
    """Search every column of every table, byte strings included, as a thief of the database would."""
    found = []
    with stack.sessions() as session:
        names = session.scalars(
            sa.text("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
        ).all()
        for name in names:
            row = f'SELECT count(*) FROM "{name}" t WHERE t::text LIKE :text OR t::text LIKE :hex'
            count = session.scalar(sa.text(row), {"text": f"%{text}%", "hex": f"%{text.encode().hex()}%"})
            if count:
                found.append(name)
    return found


def topics_with(stack, text):
    """Read every topic from its beginning and search the raw records."""
    topics = [*TOPICS, *map(dead_letter_topic, TOPICS)]
    client = kafka.consumer(stack.settings.need("kafka_bootstrap"))
    client.assign(kafka.partitions(client, topics))
    client.seek_to_beginning()
    found, num_records, silent = [], 0, 0
    while silent < 5:
        records = [record for batch in client.poll(300).values() for record in batch]
        silent = 0 if records else silent + 1
        num_records += len(records)
        found += [r.topic for r in records if text.encode() in (r.value or b"") or text.encode() in (r.key or b"")]
    client.close()
    assert num_records > 0
    return found


def files_with(stack, text):
    """Search every file of the home but the database's own storage, which the tables' search has read."""
    home = stack.settings.home
    return [
        str(path.relative_to(home))
        for path in home.rglob("*")
        if path.is_file() and not path.is_relative_to(home / "postgres") and text.encode() in path.read_bytes()
    ]


@pytest.fixture
def person(stack):
    """Somebody who said a sentinel in every way there is, and whose signals were learned from."""
    sentinel = f"SENTINEL{uuid.uuid4().hex}"
    user = f"user-{sentinel}"
    ids = [stack.ask(f"Repeat after me: {sentinel}", user=user).id for _ in range(2)]
    said = [
        {"kind": "thumb", "value": 1},
        {"kind": "comment", "text": f"A comment with {sentinel}."},
        {"kind": "correction", "text": f"A correction with {sentinel}."},
        {"kind": "preference", "over": ids[1]},
    ]
    for signal in said:
        assert stack.feedback(ids[0], user=user, **signal).status_code == 202
    stack.feedback(ids[0], user="a-judge", kind="judge", score=0.5, text=f"They said {sentinel}.")
    with stack.sessions() as session:
        expected = session.scalars(sa.select(Feedback.id).where(Feedback.episode_id.in_(ids))).all()
        assert len(expected) == 5

    def learned():
        with stack.sessions() as session:
            rows = session.scalars(sa.select(RewardUpdate).where(RewardUpdate.feedback_id.in_(expected))).all()
            return len({row.feedback_id for row in rows}) == 4

    wait_until(learned, timeout_s=30, what="the signals were not learned from")

    def evaluated():
        with stack.sessions() as session:
            return session.query(SelfEvaluation).filter(SelfEvaluation.episode_id.in_(ids)).count() == 2

    wait_until(evaluated, timeout_s=30, what="the answers were not evaluated")
    assert {"episodes", "feedback"} <= {name.split("_")[0] for name in tables_with(stack, sentinel)}
    assert not topics_with(stack, sentinel), "what travels is sealed"
    return user, sentinel, ids, expected


def was_learned(stack, feedback_id):
    with stack.sessions() as session:
        return session.scalar(sa.select(RewardUpdate.seq).where(RewardUpdate.feedback_id == feedback_id))


def complete(stack, erasure_id, timeout_s=90):
    def reported():
        found = stack.http.get(f"/v1/erasures/{erasure_id}").json()
        return found if found["complete"] else None

    return wait_until(reported, timeout_s, what="not every room reported")


def test_a_forgotten_person_leaves_no_word_anywhere(stack, person):
    user, sentinel, ids, _ = person
    answer = stack.http.delete("/v1/me", headers={"X-Everloop-User": user})
    assert answer.status_code == 202, answer.text
    found = complete(stack, answer.json()["erasure_id"])["found"]
    assert found["feedback"] == {
        "conversations": 0,
        "episodes": 2,
        "signals": 5,
        "self_evaluations": 2,
        "keys_destroyed": 1,
    }
    assert found["reward"]["sites_removed"] == 4 and found["reward"]["features_deleted"] >= 2
    assert tables_with(stack, sentinel) == []
    assert topics_with(stack, sentinel) == []
    assert files_with(stack, sentinel) == []
    # Nor can it be had through the API, under either name.
    for episode_id in ids:
        assert stack.http.get(f"/v1/episodes/{episode_id}", headers={"X-Everloop-User": user}).status_code == 404
    assert stack.feedback(ids[0], user=user, kind="thumb", value=1).status_code == 404
    with stack.sessions() as session:
        assert session.get(User, user) is None


def tombstone_of(stack, erasure_id):
    with stack.sessions() as session:
        return session.get_one(Erasure, erasure_id).tombstone


def test_what_they_taught_is_taken_out_of_the_reward_model(stack, person):
    user, _, _, signals = person
    bystander = stack.feedback(stack.ask("What is dew?").id, kind="thumb", value=1).json()["id"]
    wait_until(lambda: was_learned(stack, bystander), what="the bystander's vote was not learned from")
    done = subprocess.run([*EVERLOOP, "users", "forget", user, "--json", "-"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with stack.sessions() as session:
        updates = session.scalars(sa.select(RewardUpdate).order_by(RewardUpdate.seq)).all()
        assert bystander in {u.feedback_id for u in updates if u.z}
        theirs = [u for u in updates if u.feedback_id in signals]
        assert sorted(u.action for u in theirs) == ["add"] * 4 + ["remove"] * 4
        assert all(u.z == b"" for u in theirs)
        dim = max(len(np.frombuffer(u.z, np.float64)) for u in updates)
        recovered = store.load_posterior(session, updates[-1].encoder, dim)
    # The posterior is that of the sites that stand, whoever else's they are.
    removed = {u.feedback_id for u in updates if u.action == "remove"}
    fresh = Posterior(BayesianHead.prior(dim), 0, 0)
    for update in updates:
        if update.feedback_id not in removed:
            fresh.replay(update)
    np.testing.assert_allclose(recovered.head.theta, fresh.head.theta, atol=1e-6)
    np.testing.assert_allclose(recovered.head.covariance, fresh.head.covariance, atol=1e-6)


def test_what_operators_judged_of_their_answers_goes_too(stack, person):
    user, _, ids, _ = person
    with transaction(stack.sessions) as session:
        probes = [
            decisions.give_probe(session, ids[0], good=True, operator="test", reason="a test"),
            decisions.give_probe(session, ids[1], over=ids[0], good=False, operator="test", reason="a test"),
        ]
    wait_until(lambda: all(was_learned(stack, probe) for probe in probes), what="the probes were not learned")
    answer = stack.http.delete("/v1/me", headers={"X-Everloop-User": user})
    assert complete(stack, answer.json()["erasure_id"])["found"]["reward"]["sites_removed"] == 6
    with stack.sessions() as session:
        rows = session.scalars(sa.select(RewardUpdate).where(RewardUpdate.feedback_id.in_(probes))).all()
        assert sorted(row.action for row in rows) == ["add"] * 2 + ["remove"] * 2
        assert all(row.z == b"" for row in rows)
        assert not session.scalars(sa.select(GoldProbe).where(GoldProbe.id.in_(probes))).all()


def test_what_everybody_said_without_a_name_is_nobodys_to_forget(stack):
    url, key = stack.settings.need("public_url"), stack.settings.credentials
    for answer in (
        httpx.delete(f"{url}/v1/me", trust_env=False, headers=key),
        httpx.put(f"{url}/v1/me/consent", json={"learn": False}, trust_env=False, headers=key),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "user_required")


def test_a_message_while_its_user_is_forgotten_begins_anew(stack, person):
    """Chat, signals and forgetting at once: no 5xx, and nothing of before is left afterwards."""
    user, sentinel, ids, _ = person
    codes = []

    def talk():
        body = {"model": "everloop", "messages": [{"role": "user", "content": "Hi"}], "user": user, "max_tokens": 4}
        codes.append(stack.http.post("/v1/chat/completions", json=body).status_code)

    def rate():
        codes.append(stack.feedback(ids[0], user=user, kind="comment", text=sentinel).status_code)

    def consent():
        answer = stack.http.put("/v1/me/consent", json={"learn": False}, headers={"X-Everloop-User": user})
        codes.append(answer.status_code if not answer.json().get("learn") else 599)

    def forget():
        codes.append(stack.http.delete("/v1/me", headers={"X-Everloop-User": user}).status_code)

    with ThreadPoolExecutor(12) as pool:
        for work in [talk, rate, consent, forget, rate, consent, forget, talk, rate, consent, forget, rate] * 3:
            pool.submit(work)
    stack.http.delete("/v1/me", headers={"X-Everloop-User": user})
    assert codes and max(codes) < 500, codes
    assert tables_with(stack, sentinel) == []


def test_forgetting_twice_and_forgetting_nobody_say_so(stack, person):
    user = person[0]
    assert stack.http.delete("/v1/me", headers={"X-Everloop-User": user}).status_code == 202
    again = stack.http.delete("/v1/me", headers={"X-Everloop-User": user})
    assert (again.status_code, again.json()["error"]["code"]) == (404, "user_not_found")
    done = subprocess.run([*EVERLOOP, "users", "forget", "nobody-at-all"], capture_output=True, text=True)
    assert done.returncode == 1 and "[user_not_found]" in done.stderr


def test_somebody_forgotten_may_come_back_as_somebody_new(stack, person):
    user = person[0]
    stack.http.delete("/v1/me", headers={"X-Everloop-User": user})
    episode_id = stack.ask("Hello again.", user=user).id
    mine = stack.http.get("/v1/episodes", headers={"X-Everloop-User": user}).json()["data"]
    assert [row["id"] for row in mine] == [episode_id]


def test_the_name_of_a_tombstone_is_nobodys(stack, person):
    answer = stack.http.delete("/v1/me", headers={"X-Everloop-User": person[0]}).json()
    tombstone = tombstone_of(stack, answer["erasure_id"])
    reply = stack.http.post(
        "/v1/chat/completions",
        json={"model": "everloop", "messages": [{"role": "user", "content": "Hi"}], "user": tombstone},
    )
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "user_reserved")
    for path in ("/v1/episodes", "/v1/me/receipts", "/v1/me"):
        refused = stack.http.get(path, headers={"X-Everloop-User": tombstone})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "user_reserved")


def test_datasets_are_cleaned_whatever_line_ends_their_texts_hold_and_however_they_were_cut(stack, tmp_path):
    data = Snapshot(
        train=[
            Example(f"ep_{n}", "c", [{"role": "user", "content": "Why?\u2028How?\u0085"}], f"So {n}.", [1.0])
            for n in range(3)
        ]
    )
    path = data.save(tmp_path) / DATASET_FILE
    with path.open("a") as file:
        file.write('{"episode_id": "ep_3", "answ')  # a process of the first version died here
    unfinished = tmp_path / f".{'0' * 64}.123" / "dataset.new"  # and another one here
    for other, text in ((tmp_path / "other" / DATASET_FILE, "\n"), (unfinished, path.read_text())):
        other.parent.mkdir()
        other.write_text(text)
    for _ in range(2):  # the second time finds what the first did
        with stack.sessions() as session:
            found = trainer.erasure.erase(session, tmp_path, tmp_path / "runs", {"ep_1", "ep_9"})
            session.rollback()
        assert found["datasets"] == sorted(["0" * 64, data.digest]) and found["dataset_lines_removed"] == 2
    for file in (path, unfinished):
        assert [episode_of(line) for line in file.read_text().split("\n")[:-1]] == ["ep_0", "ep_2"]
    trainer.erasure.sweep(stack.sessions, tmp_path)
    assert not unfinished.exists() and path.exists()


def test_what_was_learned_under_another_encoder_is_taken_out_there_too(stack, person):
    user, _, _, signals = person
    earlier = next(s for s in signals if not was_learned(stack, s))  # as if of the time of the other encoder
    dim, other = 5, f"another-encoder-{uuid.uuid4().hex}"
    head = BayesianHead.prior(dim)
    theirs, someones = (head.learn_one(np.arange(1.0, dim + 1) * sign, 1.0) for sign in (1.0, -0.5))
    with stack.sessions.begin() as session:
        last = history.last_seq(session)
        for offset, (feedback_id, site) in enumerate(
            [(earlier, theirs), (f"fb_of_somebody_{other}", someones)], 10_000
        ):
            session.add(
                RewardUpdate(
                    seq=last + offset,
                    feedback_id=feedback_id,
                    action="add",
                    encoder=other,
                    key="thumb",
                    verdict=1.0,
                    weight=1.0,
                    z=site.z.tobytes(),
                    precision=site.precision,
                    target=site.target,
                )
            )
    stack.supervisor.stop("reward")  # it must see the numbers that this test has used
    stack.supervisor.start("reward")
    erasure_id = stack.http.delete("/v1/me", headers={"X-Everloop-User": user}).json()["erasure_id"]
    complete(stack, erasure_id, timeout_s=180)  # the worker loads its models first
    head.unlearn_one(theirs)
    with stack.sessions() as session:
        recovered = store.load_posterior(session, other, dim)
    np.testing.assert_allclose(recovered.head.theta, head.theta, atol=1e-9)
    assert recovered.num_signals == 1
