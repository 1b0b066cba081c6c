"""Import and export on a real database: each line once, nothing lost on the way out and back in."""

import gzip
import itertools
import json
import os
import signal
import subprocess
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
import sqlalchemy as sa

from feedback import episodes, erasure, exporting, fold, importing, users
from feedback.acceptance import accept
from feedback.episodes import Recording
from feedback.exporting import Selection, export_file
from feedback.import_files import Source
from feedback.importing import import_file
from feedback.signals import read_signal
from feedback.tables import Episode, Feedback, Import, User
from infra.db import advisory_lock, connect
from infra.errors import ConflictError, InvalidRequestError
from infra.ids import new_id
from infra.stack import embedded
from infra.tables import OutboxRow
from reward.tables import RewardScore, RewardUpdate
from tests.conftest import EVERLOOP, wait_until

ASKED = {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "answer": "Because of the air."}
numbers = itertools.count()


class Database:
    """A migrated database of its own, empty at first."""

    def __init__(self, settings):
        self.settings = settings
        self.sessions = connect(settings.database_url, pool_size=2)

    def count(self, table):
        with self.sessions() as session:
            return session.scalar(sa.select(sa.func.count()).select_from(table))

    def rows(self, query):
        with self.sessions() as session:
            return session.execute(query).all()

    def load(self, path):
        return import_file(self.sessions, path, self.settings)

    def dump(self, path, format_="jsonl", force=False, **wanted):
        return export_file(self.sessions, path, format_, Selection(**wanted), force=force)

    def answer(self, user="ada", text="Because of the air.", asked=None, **fields):
        """Record an answer as a turn does; return its id."""
        with self.sessions.begin() as session:
            key, learn = episodes.begin(session, user, True)
            values = {
                "episode_id": episodes.new_episode_id(),
                "user_id": user,
                "release": "r1",
                "adapter_digest": None,
                "canary_id": None,
                "arm": "champion",
                "propensity": 0.8,
                "messages": asked or ASKED["messages"],
                "sampling": {"temperature": 0.8},
                "learn": learn,
                "answer": text,
                "status": "complete",
                **fields,
            }
            episodes.record(session, Recording(**values), key)
        return values["episode_id"]

    def say(self, episode_id, kind, user="ada", **fields):
        body = {"episode_id": episode_id, "user": user, "kind": kind, **fields}
        with self.sessions.begin() as session:
            accept(session, read_signal.validate_python({"idempotency_key": f"k{next(numbers)}", **body}))

    def standing(self):
        """Return what was answered, and what stands of what was said, by the one rule for it."""
        with self.sessions() as session:
            signals = fold.standing_of(session.scalars(sa.select(Feedback)))
            said = sorted(
                repr((s.episode_id, s.user_id, s.kind, s.value, s.score, s.name, s.reasons, s.over, s.text))
                for s in signals
            )
            answers = [
                (e.id, e.created_at, e.user_id, e.release, e.messages, e.answer)
                for e in session.scalars(sa.select(Episode).order_by(Episode.id))
            ]
        return answers, said


@pytest.fixture(scope="module")
def make_database(stack):
    """Make databases; the first is migrated, the others are copies of it."""
    server = stack.settings.database_url.rpartition("/")[0]
    made = ["transfer_template"]
    with psycopg.connect(server.replace("+psycopg", "") + "/postgres", autocommit=True) as admin:
        admin.execute("DROP DATABASE IF EXISTS transfer_template WITH (FORCE)")
        admin.execute("CREATE DATABASE transfer_template")
        embedded.migrate(stack.settings.model_copy(update={"database_url": f"{server}/transfer_template"}))

        def make():
            name = f"transfer_{next(numbers)}_{os.getpid()}"
            admin.execute(f"CREATE DATABASE {name} TEMPLATE transfer_template")
            made.append(name)
            return Database(stack.settings.model_copy(update={"database_url": f"{server}/{name}"}))

        yield make
        for name in made:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database(make_database):
    return make_database()


def write(path, *lines):
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def rejected(path):
    notes = path.with_name(path.name + ".rejected.jsonl")
    return [(note["line"], note["code"]) for note in read(notes)] if notes.exists() else []


def command(*words, database, **options):
    return [*EVERLOOP, "feedback", *map(str, words)], {
        "env": {**os.environ, "EVERLOOP_DATABASE_URL": database.settings.database_url},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        **options,
    }


def run(*words, database):
    words, options = command(*words, database=database)
    return subprocess.run(words, **options, check=False)


def test_an_imported_answer_and_its_thumb_teach_the_reward_model(stack, tmp_path):
    text = f"Because of {new_id('x')}."
    line = {
        **ASKED,
        "answer": text,
        "user": new_id("u"),
        "created_at": "2024-05-01T12:00:00Z",
        "id": f"outside-{new_id('x')}",
        "signals": [{"kind": "thumb", "value": 1}],
    }
    summary = import_file(stack.sessions, write(tmp_path / "a.jsonl", line), stack.settings)
    assert (summary.accepted, summary.rejected) == (1, 0)
    with stack.sessions() as session:
        episode = session.scalars(sa.select(Episode).where(Episode.answer == text)).one()
    assert (episode.arm, episode.propensity) == ("imported", 1.0)
    assert (episode.status, episode.release) == ("complete", "imported")
    assert episode.created_at == datetime(2024, 5, 1, 12, tzinfo=UTC)

    # What it believes of the answer then depends on all that other tests have said: only the step is asked of.
    def learned():
        with stack.sessions() as session:
            of_it = sa.select(RewardUpdate).join(Feedback, Feedback.id == RewardUpdate.feedback_id)
            return session.scalar(of_it.where(Feedback.episode_id == episode.id))

    step = wait_until(learned, what="the imported thumb taught nothing")
    assert (step.action, step.verdict) == ("add", 1.0) and step.precision > 0

    def shown():
        with stack.sessions() as session:
            score = session.get(RewardScore, episode.id)
            return score and score.update_seq >= step.seq

    wait_until(shown, what="the answer was not scored anew")


def test_good_lines_are_imported_and_each_bad_one_is_named(database, tmp_path):
    own = database.answer("bob")
    database.say(own, "thumb", user="bob", value=1, idempotency_key="used")
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    long = "x" * database.settings.max_request_bytes
    thumb, other = {"kind": "thumb", "value": 1}, {**ASKED, "messages": [{"role": "user", "content": "Else?"}]}
    mine, bobs = {**ASKED, "user": "ada"}, {**thumb, "episode_id": own, "user": "bob", "value": -1}

    def over(name):
        return {"kind": "preference", "over": name}

    lines = [
        ({**mine, "id": "a", "signals": [thumb, {"kind": "rating", "value": 4}]}, None),
        (b"{not json", "not_json"),
        ({**ASKED, "colour": "blue"}, "invalid_line"),
        ({**ASKED, "answer": "a\x00b"}, "invalid_line"),
        ({**ASKED, "answer": "a\ud800b"}, "invalid_line"),
        ({**ASKED, "answer": long}, "line_too_long"),
        ({**ASKED, "created_at": soon}, "in_the_future"),
        ({**ASKED, "user": "forgotten_me"}, "user_reserved"),
        ({**ASKED, "user": "nobody", "signals": [thumb, {"kind": "thumb", "value": 7}]}, "invalid_line"),
        ({**ASKED, "user": "nobody", "signals": [thumb, over("ep_0")]}, "episode_not_found"),
        ({**thumb, "episode_id": "ep_0", "user": "ada"}, "episode_not_found"),
        ({**thumb, "episode_id": own, "user": "ada"}, "episode_not_found"),
        ({**bobs, "idempotency_key": "used"}, "idempotency_key_reused"),
        (b'{"kind": "thumb", "value": 1, "value": -1}', "duplicate_key"),
        ({**other, "user": "ada", "id": "c", "signals": [over("a")]}, "not_the_same_message"),
        ({**thumb, "episode_id": "c", "user": "ada"}, "episode_not_found"),
        ({**mine, "answer": "Another.", "id": "a"}, "id_taken"),
        ({**mine, "answer": "Light.", "id": "b", "signals": [over("a")]}, None),
        ({**over("b"), "episode_id": "a", "user": "ada"}, None),
        ({"kind": "verifier", "value": 1, "episode_id": own, "user": "tests"}, None),
        ({**bobs, "idempotency_key": "new"}, None),
    ]  # fmt: skip
    path = write(tmp_path / "mixed.jsonl", *(line for line, _ in lines))
    before = path.read_bytes()
    summary = database.load(path)
    bad = [(number, code) for number, (_, code) in enumerate(lines, 1) if code]
    assert rejected(path) == bad and path.read_bytes() == before
    assert (summary.accepted, summary.rejected, summary.already_imported) == (5, len(bad), 0)
    assert database.count(Episode) == 3 and database.count(Feedback) == 1 + 6
    assert {user for (user,) in database.rows(sa.select(User.user_id))} == {"ada", "bob"}
    stands = database.rows(sa.select(Feedback.kind, Feedback.user_id).where(Feedback.id.in_(fold.standing_ids())))
    assert sorted(stands) == [
        ("preference", "ada"),
        ("rating", "ada"),
        ("thumb", "ada"),
        ("thumb", "bob"),
        ("verifier", "tests"),
    ]


def test_a_users_no_goes_before_the_files_yes(database, tmp_path):
    with database.sessions.begin() as session:
        users.set_consent(session, "ada", False)
        users.set_consent(session, "bob", True)
    lines = [
        {**ASKED, "user": user, "learn": learn}
        for user, learn in (("ada", True), ("bob", True), ("bob", False), ("new", True))
    ]
    database.load(write(tmp_path / "a.jsonl", *lines))
    learn = database.rows(sa.select(Episode.user_id, Episode.learn))
    assert sorted(learn) == [("ada", False), ("bob", False), ("bob", True), ("new", True)]


def test_a_second_run_imports_nothing_packed_or_not(database, tmp_path):
    lines = [{**ASKED, "signals": [{"kind": "thumb", "value": 1}]} for _ in range(3)]
    path = write(tmp_path / "a.jsonl", *lines, b"?")
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert (database.load(path).accepted, database.count(Feedback)) == (3, 3)
    for again in (path, packed):
        summary = database.load(again)
        assert (summary.accepted, summary.already_imported, summary.rejected) == (0, 3, 1)
    assert rejected(path) == [(4, "not_json")]
    with database.sessions.begin() as session:
        session.execute(sa.delete(Import))
    # Even if the note of it is lost, the ids are the same.
    assert (database.load(path).accepted, database.count(Episode), database.count(Feedback)) == (0, 3, 3)


def test_a_file_that_was_added_to_imports_what_was_added(database, tmp_path):
    lines = [
        {**ASKED, "answer": f"{n}.", "id": f"n{n}", "created_at": "2024-05-01T12:00:00Z", "signals": said}
        for n, said in enumerate(([{"kind": "thumb", "value": 1}], [], [{"kind": "thumb", "value": -1}]))
    ]
    database.load(write(tmp_path / "a.jsonl", *lines[:2]))
    summary = database.load(write(tmp_path / "a.jsonl", *lines))
    assert (summary.accepted, summary.already_imported) == (1, 2)
    assert (database.count(Episode), database.count(Feedback)) == (3, 2)


def test_old_answers_lie_in_the_partition_of_their_month_and_very_old_ones_in_the_default(database, tmp_path):
    lines = [{**ASKED, "created_at": at} for at in ("2024-05-01T00:00:00+02:00", "1999-12-31T23:59:59Z")]
    database.load(write(tmp_path / "a.jsonl", *lines))
    partitions = database.rows(sa.text("SELECT tableoid::regclass::text FROM episodes"))
    assert sorted(partitions) == [("episodes_2024_04",), ("episodes_default",)]


def many_lines(num_lines):
    """Return lines of which some are bad; nothing is learned from them, so that no worker has much to do."""

    def line(n):
        signals = [{"kind": "thumb", "value": 1}, {"kind": "comment", "text": f"{n}"}]
        return {**ASKED, "user": f"u{n % 50}", "answer": f"{n}", "id": f"n{n}", "learn": False, "signals": signals}

    return [b"bad" if n % 100 == 7 else line(n) for n in range(num_lines)]


def assert_each_once(database, path, num_lines):
    bad = [n for n in range(num_lines) if n % 100 == 7]
    answers = sorted(int(answer) for (answer,) in database.rows(sa.select(Episode.answer)))
    assert answers == sorted(set(range(num_lines)).difference(bad))
    comments = sa.select(Feedback.text).where(Feedback.kind == "comment")
    texts = sorted(int(text) for (text,) in database.rows(comments))
    assert texts == answers and database.count(Feedback) == 2 * len(answers)
    events = dict(database.rows(sa.select(OutboxRow.topic, sa.func.count()).group_by(OutboxRow.topic)))
    assert events == {"everloop.episodes": len(answers), "everloop.feedback": 2 * len(answers)}
    assert rejected(path) == [(n + 1, "not_json") for n in bad]


def test_kills_in_the_middle_lose_nothing_and_double_nothing(database, tmp_path):
    num_lines = 6000
    path = write(tmp_path / "large.jsonl", *many_lines(num_lines))
    num_killed = 0
    for at_line in (1, 2200, 3200):
        words, options = command("import", path, database=database, stdout=None, stderr=None)
        process = subprocess.Popen(words, **options)

        def there(at_line=at_line, process=process):
            found = database.rows(sa.select(Import.next_line))
            return (found and found[0][0] > at_line) or process.poll() is not None

        wait_until(there)
        num_killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert num_killed >= 1 and 0 < database.count(Episode) < num_lines - 60
    done = run("import", path, "--json", "-", database=database)
    summary = json.loads(done.stdout)
    assert done.returncode == 0 and summary["rejected"] == 60
    assert 0 < summary["accepted"] < 5940 and summary["accepted"] + summary["already_imported"] == 5940
    assert_each_once(database, path, num_lines)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_an_end_between_the_writing_and_the_commit_is_harmless(database, tmp_path, monkeypatch, fails_at):
    monkeypatch.setattr(importing, "CHUNK_LINES", 100)
    path = write(tmp_path / "a.jsonl", *many_lines(250))
    calls = itertools.count(1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def end(self):
            if next(calls) == fails_at:
                raise KeyboardInterrupt

        patch.setattr(Source, "check_unchanged", end)
        database.load(path)
    assert database.count(Episode) == 99 * (fails_at - 1) and len(rejected(path)) == fails_at
    summary = database.load(path)
    assert summary.already_imported == 99 * (fails_at - 1)
    assert_each_once(database, path, 250)


def test_signals_name_answers_that_an_earlier_run_imported(database, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "CHUNK_LINES", 1)
    lines = [{**ASKED, "user": "ada", "id": "a"}, {"kind": "thumb", "value": 1, "episode_id": "a", "user": "ada"}]
    path = write(tmp_path / "a.jsonl", *lines)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        calls = itertools.count()
        patch.setattr(Source, "check_unchanged", lambda _: next(calls) and signal.raise_signal(signal.SIGINT))
        database.load(path)
    assert (database.count(Episode), database.count(Feedback)) == (1, 0)
    assert database.load(path).rejected == 0 and database.count(Feedback) == 1


def test_two_imports_at_once_are_refused(database, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "LOCK_WAIT_S", 0.3)
    path = write(tmp_path / "a.jsonl", ASKED)
    with advisory_lock(database.sessions, "import") as held, pytest.raises(ConflictError) as caught:
        assert held
        database.load(path)
    assert caught.value.code == "import_running" and database.count(Episode) == 0


def test_strict_makes_a_rejection_an_error_and_only_then(database, tmp_path):
    path = write(tmp_path / "a.jsonl", ASKED, b"?")
    lax = run("import", path, "--json", "-", database=database)
    assert lax.returncode == 0 and "warning" in lax.stderr and "a.jsonl.rejected.jsonl" in lax.stderr
    assert json.loads(lax.stdout)["accepted"] == 1
    strict = run("import", path, "--strict", database=database)
    assert strict.returncode == 1 and "[lines_rejected]" in strict.stderr
    good = run("import", write(tmp_path / "b.jsonl", ASKED), "--strict", database=database)
    assert good.returncode == 0 and "warning" not in good.stderr


@pytest.fixture
def lived_in(database):
    """A database with signals of every kind: standing, superseded, withdrawn, and of people who want no part."""
    first = database.answer(text="Because of the air.")
    second = database.answer(text="Rayleigh: blue light is scattered more. é 🌊\u2028")
    third = database.answer("bob", text="No idea.")
    fourth = database.answer(text="Physics.")
    database.say(first, "preference", over=second)  # the earlier over the later: a line of its own
    database.say(second, "preference", over=first)
    database.say(first, "preference", over=second, given_at="2026-01-01T00:00:00+02:00")
    database.say(first, "preference", over=fourth)
    database.say(fourth, "preference", over=first)  # stands only if it still comes after the one above
    database.say(first, "thumb", value=1)
    database.say(first, "thumb", value=-1)
    database.say(first, "rating", value=4)
    database.say(first, "rating", value=0)
    database.say(first, "reasons", reasons=["too_short", "incorrect"])
    database.say(first, "comment", text="Too short.")
    database.say(first, "correction", text="Air scatters blue light.")
    database.say(second, "thumb", value=1)
    database.say(second, "implicit", name="copied")
    database.say(second, "correction", text="Rayleigh: blue light is scattered more. é 🌊\u2028 ")
    database.say(third, "verifier", user="tests", value=-1, score=0.25, text="Fails.")
    database.say(third, "judge", user="judge-1", score=0.1)
    database.say(third, "judge", user="judge-2", score=0.3)
    for user, fields in (
        ("quiet", {"learn": False}),
        ("bob", {"status": "interrupted"}),
        ("bob", {"answer": " \n"}),
        ("gone", {}),
    ):
        database.say(database.answer(user, **fields), "thumb", user=user, value=1)
    with database.sessions.begin() as session:
        erasure.forget(session, "gone", "quarantine")
    database.learnable = [first, second, third, fourth]
    return database


@pytest.mark.parametrize("all_signals", [False, True])
def test_what_is_exported_and_imported_is_the_same(lived_in, make_database, tmp_path, all_signals):
    out, back = tmp_path / "out.jsonl.gz", tmp_path / "back.jsonl.gz"
    lived_in.dump(out, all_signals=all_signals)
    other = make_database()
    summary = other.load(out)
    assert summary.rejected == 0
    other.dump(back, all_signals=all_signals)
    lines = [json.loads(line) for line in gzip.decompress(out.read_bytes()).splitlines()]
    again = [json.loads(line) for line in gzip.decompress(back.read_bytes()).splitlines()]
    assert lines == again and len(lines) > 3
    answers, said = lived_in.standing()
    kept = [answer for answer in answers if answer[0] in lived_in.learnable]
    assert other.standing() == (kept, [text for text in said if text[2:37] in lived_in.learnable])
    assert other.count(Feedback) == (18 if all_signals else 12)
    # And into where it came from, nothing comes twice.
    before = lived_in.count(Feedback)
    assert lived_in.load(out).accepted == 0 and lived_in.count(Feedback) == before


def test_only_what_is_wanted_is_exported(lived_in, tmp_path):
    def ids(**wanted):
        lived_in.dump(tmp_path / "a.jsonl", force=True, **wanted)
        return {line.get("id", line.get("episode_id")) for line in read(tmp_path / "a.jsonl")}

    assert ids() == set(lived_in.learnable)
    assert ids(user="bob") == {lived_in.learnable[2]}
    assert ids(since=datetime.now(UTC) + timedelta(days=1)) == set()
    assert ids(since=datetime.now(UTC) - timedelta(days=1)) == set(lived_in.learnable)
    assert "gone" not in (tmp_path / "a.jsonl").read_text()


def test_a_file_appears_whole_or_not_at_all(lived_in, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("precious")
    with pytest.raises(InvalidRequestError) as caught:
        lived_in.dump(path)
    assert caught.value.code == "file_exists" and path.read_text() == "precious"

    def fail(row):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(exporting, "_said", fail)
        lived_in.dump(path, force=True)
    assert path.read_text() == "precious" and list(tmp_path.iterdir()) == [path]
    done = run("export", path, "--force", "--since", "2020-01-01", "--json", "-", database=lived_in)
    assert done.returncode == 0 and json.loads(done.stdout)["rows"] == len(read(path)) == 5
    assert run("export", path, "--since", "soon", database=lived_in).returncode == 1


def test_parquet_has_the_same_answers_and_signals(lived_in, tmp_path):
    import pyarrow.parquet as pq

    lived_in.dump(tmp_path / "a.parquet", "parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert "struct<role: string, content: string>" in str(table.schema.field("messages").type)
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == lived_in.learnable and rows[0]["messages"] == ASKED["messages"]
    assert {said["kind"] for said in rows[0]["signals"]} == {
        "preference", "thumb", "reasons", "comment", "correction"
    }  # fmt: skip
    assert [said["user"] for said in rows[2]["signals"]] == ["tests", "judge-1", "judge-2"]


def test_trl_reads_what_is_exported_for_it(lived_in, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoTokenizer
    from trl import data_utils

    lived_in.dump(tmp_path / "pairs.jsonl", "trl-preference")
    lived_in.dump(tmp_path / "votes.jsonl", "trl-unpaired")

    def load(name):
        files = str(tmp_path / name)
        return datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))

    pairs, votes = load("pairs.jsonl"), load("votes.jsonl")
    assert all(data_utils.is_conversational(row) for row in [*pairs, *votes])
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"][:8]) for row in pairs] == [
        ("Because of the air.", "Rayleigh"),
        ("Physics.", "Because "),
        ("Air scatters blue light.", "Because "),
    ]
    assert [(row["completion"][0]["content"][:8], row["label"]) for row in votes] == [
        ("Because ", False),
        ("Rayleigh", True),
    ]
    # TRL's own way from preferences to votes, and from both to text.
    unpaired = data_utils.unpair_preference_dataset(pairs)
    assert set(unpaired.column_names) == set(votes.column_names) and len(unpaired) == 2 * len(pairs)
    tokenizer = AutoTokenizer.from_pretrained(lived_in.settings.base_model_dir)
    text = data_utils.apply_chat_template(pairs[2], tokenizer)
    assert "Why is the sky blue?" in text["prompt"] and text["chosen"].startswith("Air scatters blue light.")
    assert data_utils.apply_chat_template(votes[0], tokenizer)["label"] is False
    with pytest.raises(InvalidRequestError) as caught:
        lived_in.dump(tmp_path / "x.jsonl", "trl-unpaired", all_signals=True)
    assert caught.value.code == "only_standing"
