"""What was said in other words is found: the real sentence model over HTTP, and pgvector in a real PostgreSQL."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import psycopg
import pytest
import sqlalchemy as sa
import uvicorn

from agent.book import Begun
from agent.memory import sentences, store
from agent.memory.encoding import MOST_LATE, Encoding, reading
from agent.memory.prompts import ENCODER_AWAY, Remembering
from agent.schema import ChatRequest
from agent.tables import TurnPlace, TurnVector
from agent.turn import Turn
from deploy.head import Assignment
from feedback import conversations, erasure
from feedback.conversations import Place
from flows.backup.restoring import put_database
from flows.backup.taking import _snapshot, dump
from infra import pgvector
from infra.errors import EverloopError, SetupError, UnavailableError
from infra.settings import Settings
from reward import client, server
from reward.embedding import Embedder, Turnstile
from tests.conftest import wait_until
from tests.integration.test_memory import USER, asked, remembering, talking
from tests.integration.test_memory_feedback import consume, said_of

NUM_TURNS = 80
SAID = "My old man runs a bakery in Porto."
QUESTION = "What does my father do for a living?"


@pytest.fixture(scope="module")
def worker():
    """The address of the sentence model, as the reward worker offers it."""
    config = uvicorn.Config(
        server.build(None, Embedder(Settings(home=Path("unused")), num_threads=1)), port=0, log_config=None
    )
    served = uvicorn.Server(config)
    served.install_signal_handlers = lambda: None
    thread = threading.Thread(target=served.run, daemon=True)
    thread.start()
    wait_until(lambda: served.started)
    port = served.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    served.should_exit = True
    thread.join()


def settings_of(database, base_model_dir, **fields):
    url = database.kw["bind"].url.render_as_string(hide_password=False)
    named = {"home": base_model_dir.parent.parent, "base_model": str(base_model_dir), "database_url": url}
    return Settings(**{**named, "memory_encoder": "sentence", "memory_tokens": 300, **fields})


@pytest.fixture
def encoding(database, base_model_dir, worker):
    settings = settings_of(database, base_model_dir, reward_url=worker)
    pgvector.prepare(settings)
    with Encoding(database, worker, patience_s=10.0).running() as encoding:
        encoding.settings = settings
        yield encoding


@pytest.fixture
def talk(database, encoding):
    """A long conversation in which a birth was told long ago; and its last turn."""

    async def work(talk):
        turns = [None]
        for number in range(NUM_TURNS):
            said = (SAID, "How lovely!") if number == 10 else (f"Tell me of station {number}.", "It is fine.")
            turns.append(await talk.say(*said, parent=turns[-1]))
        return talk, turns[11], turns[-1]

    found = talking(database, work)
    while encoding.read(found[0].conversation, most_rounds=100):
        pass
    return found


def rows(database):
    with database() as session:
        return session.execute(sa.select(TurnVector.episode_id, TurnVector.embedding)).all()


def test_what_was_said_in_other_words_is_in_the_context(database, base_model_dir, encoding, talk):
    conversation, _, last = talk
    wanted = asked(QUESTION, conversation, last)
    without = remembering(database, base_model_dir, memory_tokens=300).prompt(wanted)
    assert "bakery" not in str(without.messages), "words alone would do, so nothing is shown here"
    made = Remembering(database, encoding.settings, encoding).prompt(wanted)
    assert "bakery" in str(made.messages)
    assert made.record["used"] <= made.record["budget"] and "notes" not in made.record
    best = max(made.record["chunks"], key=lambda chunk: chunk["importance"])
    assert best["features"]["sentence"] > 0.2
    assert len(made.context.builder.chunks) <= 2 * store.MOST_TURNS


def test_a_question_is_read_while_its_turn_is_begun(database, encoding, talk, monkeypatch):
    conversation, _, last = talk
    order, ask = [], encoding.ask
    monkeypatch.setattr(encoding, "ask", lambda question: order.append(question) or ask(question))

    async def begin(asked):
        order.append(asked.place)
        return Begun(Assignment("base", None, "champion", 1.0, None), None, may_learn=False)

    book = SimpleNamespace(begin=begin, remembering=Remembering(database, encoding.settings, encoding))
    given = {"conversation": conversation.conversation, "parent": last, "user": USER, "max_tokens": 64}
    body = ChatRequest(model="everloop", messages=[{"role": "user", "content": QUESTION}], **given)
    turn = Turn(book, None, encoding.settings, body)
    prompted = asyncio.run(turn.prompt(asyncio.run(turn.assign())))
    assert order == [QUESTION, Place(conversation.conversation, last)]
    assert "bakery" in str(prompted.messages)


def test_turns_are_read_once_they_are_written(database, encoding):
    async def work(talk):
        talk.book.remembering = Remembering(database, encoding.settings, encoding)
        return await talk.say("I keep bees.", "What fun!")

    turn = talking(database, work)
    found = wait_until(lambda: rows(database))
    assert [row.episode_id for row in found] == [turn, turn]
    assert all(np.linalg.norm(row.embedding) == pytest.approx(1.0, abs=1e-4) for row in found)


@pytest.mark.parametrize("how", ["turn deleted", "conversation deleted", "forgotten"])
def test_no_vector_outlives_its_words(database, encoding, talk, how):
    conversation, told, _ = talk
    with database() as session:
        read = sentences.missing(session, conversation.conversation, "another encoder", 200)
        vectors = dict(session.execute(sa.select(TurnVector.episode_id, TurnVector.embedding)).all())
    with database.begin() as session:
        if how == "turn deleted":
            store.delete_turn(session, told, USER)
        elif how == "conversation deleted":
            conversations.delete(session, conversation.conversation, USER)
        else:
            erasure.forget(session, USER, "retrain-required")
    # Whoever was reading them then writes no more than what still stands.
    with database.begin() as session:
        late = [(turn, (vectors[turn.turn],) * 2) for turn in read]
        assert sentences.keep(session, "sentence", late) == (NUM_TURNS - 1 if how == "turn deleted" else 0)
    left = {row.episode_id for row in rows(database)}
    assert told not in left and len(left) == (NUM_TURNS - 1 if how == "turn deleted" else 0)
    if how == "turn deleted":
        with database() as session:
            missing = sentences.missing(session, conversation.conversation, "a third encoder", 200)
        assert told not in {words.turn for words in missing}, "it is looked for again and again"


def test_a_deleted_turn_hides_none_that_is_to_be_read(database, encoding, talk):
    conversation, _, last = talk
    with database.begin() as session:
        store.delete_turn(session, last, USER)
    with database() as session:
        (newest,) = sentences.missing(session, conversation.conversation, "another encoder", 1)
    assert newest.question == f"Tell me of station {NUM_TURNS - 2}."


def test_a_corrected_answer_is_found_by_what_it_should_have_said(database, encoding, talk):
    conversation, told, last = talk
    consume(database, said_of(database, told, "correction", text="The ferry to Marstrand leaves at noon."))
    assert told not in {row.episode_id for row in rows(database)}, "the old answer is still found"
    encoding.read(conversation.conversation, most_rounds=1)
    wanted = asked("When does the boat sail?", conversation, last)
    assert "Marstrand" in str(Remembering(database, encoding.settings, encoding).prompt(wanted).messages)


def test_without_an_encoder_words_do_what_they_can_in_time(database, base_model_dir, encoding, talk):
    conversation, _, last = talk
    away = Encoding(database, "http://127.0.0.1:9")
    memory = Remembering(database, encoding.settings, away)
    memory.prompt(asked("Warm up?", conversation, last))
    started_s = time.monotonic()
    made = memory.prompt(asked("Tell me of station 7 again.", conversation, last))
    assert time.monotonic() - started_s < 2.0
    assert "station 7 " in str(made.messages) and made.record["notes"] == [ENCODER_AWAY]


def test_an_encoder_that_takes_too_long_is_not_waited_for(database, base_model_dir, encoding, talk, monkeypatch):
    conversation, _, last = talk
    monkeypatch.setattr("reward.client.embed", lambda *given, **options: time.sleep(3.0))
    slow = Encoding(database, "http://127.0.0.1:9", patience_s=0.05)
    started_s = time.monotonic()
    assert slow.ask("Hello?").result() is None
    assert time.monotonic() - started_s < 1.0
    made = Remembering(database, encoding.settings, slow).prompt(asked(QUESTION, conversation, last))
    assert made.record["notes"] == [ENCODER_AWAY]


def test_turns_that_nobody_read_are_read_when_the_conversation_goes_on(database, base_model_dir, encoding):
    async def work(talk):
        away = Encoding(database, "http://127.0.0.1:9")
        with away.running():
            talk.book.remembering = Remembering(database, encoding.settings, away)
            first = await talk.say("I keep bees.", "What fun!")
        talk.book.remembering = Remembering(database, encoding.settings, encoding)
        return {first, await talk.say("And goats.", "Both?", parent=first)}

    both = talking(database, work)
    wait_until(lambda: {row.episode_id for row in rows(database)} == both)


def test_a_database_without_the_extension_is_refused_by_name(database, base_model_dir, monkeypatch):
    monkeypatch.setattr(pgvector, "EXTENSION", "no_such_extension")
    settings = settings_of(database, base_model_dir)
    with pytest.raises(SetupError, match="postgresql-NN-pgvector") as refused:
        pgvector.prepare(settings)
    assert refused.value.code == "pgvector_missing"
    with psycopg.connect(settings.database_url.replace("+psycopg", "")) as connection:
        assert not pgvector.is_ready(connection)


def test_an_api_without_a_reward_worker_goes_by_words(database, base_model_dir):
    async def opened(**fields):
        async with reading(database, settings_of(database, base_model_dir, **fields)) as encoding:
            return encoding

    assert asyncio.run(opened(reward_url="http://127.0.0.1:9")) is not None
    assert asyncio.run(opened()) is None, "there is no reward worker"
    assert asyncio.run(opened(reward_url="http://127.0.0.1:9", memory_encoder="off")) is None


def test_an_extension_that_goes_leaves_words_until_it_is_there_again(database, encoding, talk, monkeypatch):
    conversation, _, last = talk
    monkeypatch.setattr("agent.memory.encoding.REST_S", 0.0)
    maker = Remembering(database, encoding.settings, encoding)
    with database.begin() as session:
        session.execute(sa.text("DROP EXTENSION vector CASCADE"))
    made = maker.prompt(asked("Station 7 again?", conversation, last))
    assert "station 7." in str(made.messages) and made.record["notes"] == [ENCODER_AWAY]
    pgvector.prepare(encoding.settings)
    assert "bakery" in str(maker.prompt(asked(QUESTION, conversation, last)).messages)


def test_a_library_that_is_gone_from_the_server_is_told_by_name(database, encoding, talk):
    """As where another image of PostgreSQL was put before the same data: the catalog still has the extension."""
    conversation, told, last = talk
    library = sa.text("UPDATE pg_proc SET probin = :new WHERE probin = :old")
    there, gone = "$libdir/vector", "$libdir/no_vector"
    with database.begin() as session:
        assert session.execute(library, {"new": gone, "old": there}).rowcount > 10
    database.kw["bind"].dispose()  # who has loaded it has it
    made = Remembering(database, encoding.settings, encoding).prompt(asked("Station 7 again?", conversation, last))
    assert "station 7." in str(made.messages) and made.record["notes"] == [ENCODER_AWAY]
    with psycopg.connect(encoding.settings.database_url.replace("+psycopg", "")) as connection:
        assert not pgvector.is_ready(connection)
    for settings in (encoding.settings, encoding.settings.model_copy(update={"memory_encoder": "off"})):
        with pytest.raises(SetupError, match="pgvector") as refused:
            pgvector.prepare(settings)
        assert refused.value.code == "pgvector_missing"
    with database.begin() as session:
        session.execute(library, {"new": there, "old": gone})
    database.kw["bind"].dispose()
    with database.begin() as session:
        store.delete_turn(session, told, USER)
    assert told not in {row.episode_id for row in rows(database)}


def test_a_pgvector_that_is_too_old_is_refused(database, base_model_dir, encoding, monkeypatch):
    monkeypatch.setattr(pgvector, "LEAST_VERSION", (99, 0))
    with pytest.raises(SetupError, match=r"needs 99\.0 or later") as refused:
        pgvector.prepare(encoding.settings)
    assert refused.value.code == "pgvector_missing"
    with psycopg.connect(encoding.settings.database_url.replace("+psycopg", "")) as connection:
        assert not pgvector.is_ready(connection)


def test_after_several_late_answers_nobody_is_asked_for_a_while(database, monkeypatch):
    asked = []

    def late(client, texts, timeout_s, is_awaited):
        asked.append(texts)
        time.sleep(0.3)

    monkeypatch.setattr("reward.client.embed", late)
    slow = Encoding(database, "http://127.0.0.1:9", patience_s=0.02)
    assert [slow.ask(f"{number}?").result() for number in range(MOST_LATE)] == [None] * MOST_LATE
    more = slow.ask("Once more?")
    assert more.is_in_vain and more.result() is None
    assert ["Once more?"] not in asked


def test_an_answer_of_another_shape_ends_no_reader(database, encoding, talk, monkeypatch):
    conversation, _, _ = talk
    with database.begin() as session:
        session.execute(sa.delete(TurnVector))
    tried = []
    monkeypatch.setattr("reward.client.embed", lambda client, texts, timeout_s: tried.append(texts) or {}["none"])
    encoding.written(conversation.conversation)
    wait_until(lambda: tried)
    monkeypatch.undo()
    encoding.written(conversation.conversation)
    wait_until(lambda: len(rows(database)) == 2 * NUM_TURNS)


def test_a_worker_that_answers_with_an_error_is_left_alone(database, encoding, talk, monkeypatch, caplog):
    conversation, _, _ = talk
    with database.begin() as session:
        session.execute(sa.delete(TurnVector))
    tried = []

    def fails(client, texts, timeout_s, is_awaited=False):
        tried.append(texts)
        raise EverloopError("The wheel is not installed.", code="sentence_model_missing")

    monkeypatch.setattr("reward.client.embed", fails)
    for _ in range(3):
        encoding.written(conversation.conversation)
    wait_until(lambda: "turns are read when their conversation goes on" in caplog.text)
    assert encoding.ask(QUESTION).is_in_vain and len(tried) == 1 and "Traceback" not in caplog.text


def test_a_database_that_is_away_keeps_no_question_from_being_read(database, encoding, monkeypatch, caplog):
    def away(sessions):
        raise UnavailableError("The database does not answer.", code="database_unavailable")

    monkeypatch.setattr("agent.memory.encoding.transaction", away)
    encoding.written("c")
    wait_until(lambda: "turns are read when their conversation goes on" in caplog.text)
    assert encoding.ask(QUESTION).result() is not None


def test_vectors_are_kept_under_the_name_of_the_encoder_that_made_them(database, encoding, talk, monkeypatch):
    """As while a worker with another model takes the place of the one before."""
    conversation, _, _ = talk
    with database.begin() as session:
        session.execute(sa.delete(TurnVector))
    names, embed = itertools.cycle(["one", "two"]), client.embed

    def embed_by_turns(*args, **options):
        return embed(*args, **options).model_copy(update={"encoder": next(names)})

    monkeypatch.setattr("reward.client.embed", embed_by_turns)
    encoding.read(conversation.conversation, most_rounds=1)
    with database() as session:
        kept = session.execute(sa.select(TurnVector.episode_id, TurnVector.encoder).distinct()).all()
    made_by = [row.encoder for row in sorted(kept, reverse=True)[:4]]
    assert made_by in (["one", "two"] * 2, ["two", "one"] * 2)


def test_where_few_turns_were_read_words_serve(database, encoding, talk):
    conversation, _, last = talk
    with database.begin() as session:
        newest = sa.select(TurnPlace.episode_id).order_by(TurnPlace.episode_id.desc()).limit(4)
        session.execute(sa.delete(TurnVector).where(TurnVector.episode_id.not_in(newest)))
    made = Remembering(database, encoding.settings, encoding).prompt(asked("Station 7 again?", conversation, last))
    assert "station 7." in str(made.messages)
    assert not any("sentence" in chunk["features"] for chunk in made.record["chunks"])


@pytest.mark.parametrize("is_there", [True, False])
def test_a_backup_goes_back_to_where_nobody_may_make_the_extension(database, encoding, talk, tmp_path, is_there):
    """To a database of somebody who is no superuser, with the extension that its owner has made, or without it."""
    with _snapshot(database) as (_, snapshot):
        dump(encoding.settings, tmp_path / "dump", snapshot)
    role, name = f"plain_{uuid.uuid4().hex[:8]}", f"restored_{uuid.uuid4().hex[:8]}"
    url = database.kw["bind"].url
    server = sa.create_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE ROLE {role} LOGIN PASSWORD 'x'"))
        connection.execute(sa.text(f"CREATE DATABASE {name} OWNER {role}"))
    if is_there:
        owner = sa.create_engine(url.set(database=name), isolation_level="AUTOCOMMIT")
        with owner.connect() as connection:
            connection.execute(sa.text("CREATE EXTENSION vector"))
        owner.dispose()
    target = url.set(username=role, password="x", database=name).render_as_string(hide_password=False)
    settings = encoding.settings.model_copy(update={"database_url": target})
    try:
        put_database(settings, tmp_path / "dump")
        with psycopg.connect(target.replace("+psycopg", "")) as connection:
            assert connection.execute("SELECT count(*) FROM turn_vectors").fetchone() == (2 * NUM_TURNS,)
            assert not pgvector.is_ready(connection)
        if is_there:
            pgvector.prepare(settings)
            with psycopg.connect(target.replace("+psycopg", "")) as connection:
                assert pgvector.is_ready(connection)
    finally:
        with server.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
            connection.execute(sa.text(f"DROP ROLE {role}"))
        server.dispose()


def test_who_is_awaited_goes_before_those_who_are_not():
    turnstile, passed, threads = Turnstile(), [], []

    def go(name, is_awaited):
        with turnstile.passing(is_awaited=is_awaited):
            passed.append(name)

    with turnstile.passing(is_awaited=False):
        for number, name in enumerate(("a turn", "another turn", "a question")):
            threads.append(threading.Thread(target=go, args=(name, name == "a question")))
            threads[-1].start()
            wait_until(lambda n=number: len(turnstile._changed._waiters) == n + 1)
    for thread in threads:
        thread.join()
    assert passed[0] == "a question" and len(passed) == 3


def test_a_long_text_is_read_window_by_window_as_it_is_at_once():
    embedder = Embedder(Settings(home=Path("unused")), num_threads=1)
    text = " ".join(f"Number {number} keeps bees in town {number % 7}." for number in range(90))
    assert len(embedder.load().windows(text)) > 2
    made = embedder.embed([text, "Short."])
    assert np.allclose(made.vectors, embedder.load().embedded([text, "Short."]), atol=1e-5)


def test_somebody_is_forgotten_while_their_turns_are_read(database, encoding):
    """Whoever reads and whoever forgets lock conversations before turns: neither ends the other."""

    async def work(talk):
        turns = [None]
        for number in range(40):
            turns.append(await talk.say(f"I keep {number} bees.", "What fun!", parent=turns[-1]))
        return talk

    conversation = talking(database, work).conversation
    with database() as session:
        read = sentences.missing(session, conversation, "one", 40)
    failed = []

    def write():
        for _ in range(60):
            try:
                with database.begin() as session:
                    sentences.keep(session, "one", [(words, ([0.1] * 384,) * 2) for words in read])
            except sa.exc.DBAPIError as error:
                failed.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.1)
    with database.begin() as session:
        erasure.forget(session, USER, "retrain-required")
    writer.join()
    assert failed == [] and rows(database) == []


def test_no_vector_is_kept_that_nobody_uses(database, encoding, talk):
    assert len(rows(database)) == 2 * NUM_TURNS
    pgvector.prepare(encoding.settings.model_copy(update={"memory_encoder": "off"}))
    assert rows(database) == []


def test_vectors_of_another_size_give_way_and_off_leaves_no_index(
    database, base_model_dir, encoding, talk, monkeypatch
):
    settings = encoding.settings
    dsn = settings.database_url.replace("+psycopg", "")
    pgvector.prepare(settings)
    assert len(rows(database)) == 2 * NUM_TURNS
    monkeypatch.setattr("infra.sentence_model.dim", lambda settings: 8)
    pgvector.prepare(settings)
    assert rows(database) == []
    with psycopg.connect(dsn) as connection:
        assert pgvector.is_ready(connection)
    pgvector.prepare(settings.model_copy(update={"memory_encoder": "off"}))
    with psycopg.connect(dsn) as connection:
        assert not pgvector.is_ready(connection)


def test_the_reward_worker_reads_texts(stack):
    with httpx.Client(base_url=stack.settings.reward_url, timeout=60.0) as client:
        found = client.post("/v1/embeddings", json={"texts": [SAID, QUESTION, "Trains are late."]}).json()
        one, other, third = np.array(found["vectors"])
        assert np.linalg.norm(one) == pytest.approx(1.0, abs=1e-4) and one @ other > one @ third + 0.1
        assert client.post("/v1/embeddings", json={"texts": []}).status_code == 422
        assert client.post("/v1/embeddings", json={"texts": ["a"] * 9}).status_code == 422
