"""Lines of an import and its files: what is read, what is refused, and what a second reading gives."""

import gzip
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.import_files import Rejects, Source
from feedback.interchange import LineReader, episode_id_of
from infra.errors import ConflictError, EverloopError, InvalidRequestError
from infra.ids import first_id, new_id, time_of

DATE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ASKED = {"messages": [{"role": "user", "content": "Why?"}], "answer": "Because."}


def reader(digest="d1", max_bytes=10_000):
    return LineReader(digest, DATE, max_bytes)


def read(body, number=1, of=None):
    return (of or reader()).read(number, json.dumps(body).encode())


def refusal(raw, of=None):
    with pytest.raises(EverloopError) as caught:
        (of or reader()).read(1, raw if isinstance(raw, bytes) else json.dumps(raw).encode())
    return caught.value


@given(
    st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),
    st.integers(1),
    st.integers(1),
)
def test_a_made_id_has_the_form_of_all_ids_and_is_the_same_each_time(at, first, second):
    made = episode_id_of(at, "line", "digest", first)
    assert made == episode_id_of(at, "line", "digest", first)
    assert (made == episode_id_of(at, "line", "digest", second)) == (first == second)
    assert made >= first_id("ep", at) and timedelta() <= at - time_of(made) < timedelta(milliseconds=1)
    fresh = new_id("ep", at)
    # Version and variant stand where RFC 9562 has them.
    assert len(made) == len(fresh) and made[15] == fresh[15] == "7" and made[19] in "89ab"


def test_ids_and_keys_come_from_the_file_and_the_line():
    body = {**ASKED, "signals": [{"kind": "thumb", "value": 1}, {"kind": "comment", "text": "So."}]}
    line, again = read(body), read(body)
    assert line == again
    keys = [
        signal.idempotency_key
        for one in (line, read(body, number=2), read(body, of=reader("d2")))
        for signal in one.signals
    ]
    assert len(set(keys)) == 6
    ids = {line.episode_id, read(body, number=2).episode_id, read(body, of=reader("d2")).episode_id}
    assert len(ids) == 3


def test_an_id_from_elsewhere_is_known_in_another_file_too():
    body = {**ASKED, "id": "theirs-7", "created_at": "2024-05-01T12:00:00Z"}
    assert read(body).episode_id == read(body, number=9, of=reader("d2")).episode_id
    assert read(body).episode_id != read({**body, "id": "theirs-8"}).episode_id
    assert read(body).episode_id != read({**body, "user": "ada"}).episode_id


def test_our_own_id_is_kept():
    own = new_id("ep", DATE)
    line = read({**ASKED, "id": own, "created_at": (DATE + timedelta(seconds=30)).isoformat()})
    assert line.episode_id == own and line.created_at == DATE + timedelta(seconds=30)
    assert read({**ASKED, "id": own}).created_at == DATE


def test_what_is_left_out_is_filled_in():
    line = read({**ASKED, "user": "ada", "signals": [{"kind": "thumb", "value": 1}, {"kind": "judge", "score": 1}]})
    thumb, judge = line.signals
    assert (thumb.user, judge.user) == ("ada", "judge") and thumb.episode_id == judge.episode_id == line.episode_id
    assert line.created_at == DATE and line.episode.learn and line.episode.release == "imported"


def test_later_lines_name_earlier_answers_by_their_ids():
    of = reader()
    first = read({**ASKED, "id": "a"}, 1, of)
    second = read({**ASKED, "id": "b", "signals": [{"kind": "preference", "over": "a"}]}, 2, of)
    third = read({"kind": "preference", "episode_id": "a", "over": "b", "user": "ada"}, 3, of).signals[0]
    assert second.signals[0].over == first.episode_id
    assert (third.episode_id, third.over) == (first.episode_id, second.episode_id)


def test_one_id_is_one_answer_whatever_else_the_line_says():
    of = reader()
    first = read({**ASKED, "id": "a"}, 1, of)
    assert read({**ASKED, "id": "a", "created_at": "2024-05-01T12:00:00Z"}, 2, of).episode_id == first.episode_id


def test_a_machine_may_have_a_name_of_its_own_and_a_person_not():
    judge = {"kind": "judge", "score": 0.5, "user": "judge-1"}
    assert read({**ASKED, "signals": [judge]}).signals[0].user == "judge-1"
    assert "signals.0.user" in refusal({**ASKED, "signals": [{"kind": "thumb", "value": 1, "user": "x"}]}).message


SOON = (datetime.now(UTC) + timedelta(days=1)).isoformat()  # told when tests are collected, long before they run


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"{", "not_json"),
        (b"\xff\xfe{}", "not_json"),
        (b'{"messages": \x00}', "not_json"),
        (b'{"kind": "judge", "score": NaN}', "not_json"),
        (b"[" * 100_000, "not_json"),
        (b"9" * 5_000, "not_json"),
        (b"[]", "invalid_line"),
        (b"{}", "invalid_line"),
        (b'{"kind": "thumb", "kind": "thumb"}', "duplicate_key"),
        (b" " * 200_001, "line_too_long"),
        ({**ASKED, "extra": 1}, "invalid_line"),
        ({**ASKED, "answer": "a\x00b"}, "invalid_line"),
        ({**ASKED, "answer": "a\ud800b"}, "invalid_line"),
        ({**ASKED, "answer": "  "}, "invalid_line"),
        ({**ASKED, "messages": []}, "invalid_line"),
        ({**ASKED, "messages": [{"role": "assistant", "content": "Hi"}]}, "invalid_line"),
        ({**ASKED, "messages": [{"role": "tool", "content": "Hi"}]}, "invalid_line"),
        ({**ASKED, "user": "forgotten_1"}, "user_reserved"),
        ({**ASKED, "created_at": SOON}, "in_the_future"),
        ({**ASKED, "created_at": "9999-12-31T23:59:59-14:00"}, "in_the_future"),
        ({**ASKED, "created_at": "0001-01-01T00:00:00+14:00"}, "invalid_line"),
        ({**ASKED, "created_at": "1969-12-31T23:59:59Z"}, "invalid_line"),
        ({**ASKED, "created_at": "2024-05-01T12:00:00"}, "invalid_line"),
        ({**ASKED, "id": "ep_" + "f" * 32}, "in_the_future"),
        ({**ASKED, "id": "ep_" + "0" * 32, "created_at": "2024-05-01T12:00:00Z"}, "invalid_line"),
        ({**ASKED, "signals": [{"kind": "thumb", "value": 2}]}, "invalid_line"),
        ({**ASKED, "signals": [{"kind": "thumb", "value": 1, "idempotency_key": "k"}]}, "invalid_line"),
        ({**ASKED, "signals": [{"kind": ["thumb"]}]}, "invalid_line"),
        ({**ASKED, "signals": [{"kind": "thumb", "value": 1, "given_at": SOON}]}, "invalid_line"),
        ({**ASKED, "id": "a", "signals": [{"kind": "preference", "over": ["a"]}]}, "invalid_line"),
        ({"kind": "thumb", "value": 1, "user": "u"}, "invalid_line"),
        ({"kind": "thumb", "value": 1, "episode_id": "ep_1"}, "invalid_line"),
        ({"kind": "applause", "episode_id": "ep_1", "user": "u"}, "invalid_line"),
    ],
)
def test_what_is_wrong_with_a_line_has_a_code_and_a_reason(raw, code):
    error = refusal(raw, reader(max_bytes=200_000))
    assert error.code == code and error.message
    json.dumps({"reason": error.message}).encode()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(
    ["messages", "answer", "user", "created_at", "learn", "release", "id", "signals", "kind", "value", "episode_id"]
)


@given(st.binary(max_size=60) | st.dictionaries(fields, json_values).map(lambda body: json.dumps(body).encode()))
def test_whatever_a_line_holds_it_is_read_or_refused(raw):
    try:
        reader().read(1, raw)
    except EverloopError as error:
        assert error.code != "internal_error"


@given(st.dictionaries(fields.filter(lambda name: name not in ("messages", "answer")), json_values))
def test_an_answer_with_odd_fields_is_read_or_refused(extra):
    try:
        assert read({**ASKED, **extra}).episode.answer == "Because."
    except EverloopError as error:
        assert error.code != "internal_error"


def lines_of(path, max_line_bytes=20):
    with Source(path, max_line_bytes) as source:
        return source.num_lines, list(source.lines()), source.digest


def test_lines_are_numbered_blank_ones_skipped_and_long_ones_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf{1}\r\n\n  \n" + b"x" * 20 + b"\r\n" + b"y" * 5000 + b"\n" + b" " * 30 + b"\nz")
    num_lines, lines, _ = lines_of(path)
    assert num_lines == 7
    assert [(number, line[:3]) for number, line in lines] == [
        (1, b"{1}"),
        (4, b"xxx"),
        (5, b"yyy"),
        (6, b"   "),
        (7, b"z"),
    ]
    assert [len(line) > 20 for _, line in lines] == [False, False, True, True, False]


def test_compression_does_not_make_another_file(tmp_path):
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b"
    plain.write_bytes(b"one\ntwo\n")
    packed.write_bytes(gzip.compress(b"one\ntwo\n"))
    assert lines_of(plain) == lines_of(packed)


@pytest.mark.parametrize("damage", ["missing", "directory", "cut", "garbled"])
def test_a_file_that_cannot_be_read_whole_is_refused_before_anything_is_imported(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    packed = bytearray(gzip.compress(os.urandom(5000)))
    if damage == "directory":
        path.mkdir()
    elif damage == "cut":
        path.write_bytes(packed[:-40])
    elif damage == "garbled":
        packed[100] ^= 0xFF
        path.write_bytes(packed)
    with pytest.raises(InvalidRequestError) as caught, Source(path, 100):
        pass
    assert caught.value.code == "file_not_readable"


def test_a_file_that_grows_meanwhile_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\n")
    with Source(path, 100) as source:
        source.check_unchanged()
        with path.open("ab") as file:
            file.write(b"two\n")
        with pytest.raises(ConflictError, match="written to"):
            source.check_unchanged()


ERROR = InvalidRequestError("Why.", code="not_json")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\n")
    with Source(path, 100) as source:
        yield source


def noted(source):
    path = source.path.with_name("a.jsonl.rejected.jsonl")
    return [json.loads(line)["line"] for line in path.read_text().splitlines()] if path.exists() else []


def test_resuming_cuts_what_was_noted_and_not_committed(source):
    rejects = Rejects(source, 1)
    rejects.add({3: ERROR, 1: ERROR}, 5)
    rejects.add({7: ERROR}, 9)
    assert noted(source) == [1, 3, 7]
    with rejects.path.open("ab") as file:
        file.write(b'{"line": 8, "co')  # killed while it wrote
    Rejects(source, 5).add({5: ERROR}, 9)
    assert noted(source) == [1, 3, 5]
    Rejects(source, 1)
    assert noted(source) == [] and source.path.read_bytes() == b"one\n"


@pytest.mark.parametrize("content", [b"my notes", b'{"line": 1}\n', b"[]\n", b'{"messages": []}'])
def test_somebody_elses_file_is_not_written_over(source, content):
    path = source.path.with_name("a.jsonl.rejected.jsonl")
    path.write_bytes(content)
    with pytest.raises(InvalidRequestError) as caught:
        Rejects(source, 1)
    assert caught.value.code == "rejected_file_in_the_way" and path.read_bytes() == content


def test_importing_and_exporting_need_no_model_and_no_pyarrow():
    heavy = "{'torch', 'transformers', 'datasets', 'trl', 'pyarrow'}"
    code = f"import sys, feedback.cli, feedback.importing, feedback.exporting; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
