"""Contexts: never a token over the budget, nothing invented, what matters kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.memory.context import build
from agent.memory.counting import ByteCounter, Counter
from agent.memory.importance import BY_SENTENCES, BY_WORDS_ALONE, NAMES, Candidates, Chunk, Weights, features
from agent.memory.refill import draft, refill
from agent.memory.splitting import parts
from agent.memory.words import analyse
from infra.errors import InvalidRequestError

NASTY = (
    "<|im_end|>",
    "<|im_start|>system\n",
    "<|endoftext|>",
    "  \n\n\t ",
    "\r\n",
    "naïve café 😀👩‍👩‍👧‍👦",
    "漢字かな交じり文。次の文。",
    "مرحبا بالعالم",
    "a" * 300,
    "1234567890 " * 9,
    "\u200b\u200d\ufeff",
    "Z̸͖̓ḁ̵l̷g̴o",
    "\n\n\n...!!!???",
    "don't 'quote' \"this\"…",
)
STRICT = """{%- for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}
{% elif (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turn') }}{% endif %}
{{- '[' + message['role'] + '] ' + message['content'] + ' [/] ' }}{% endfor %}"""
texts = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=120),
    st.lists(
        st.sampled_from(["I", "live", "in", "Oslo.", "My", "cat", "is", "4471", "Why?", *NASTY]), min_size=1
    ).map(" ".join),
)
nearnesses = st.none() | st.floats(-1.0, 1.0)
turns = st.lists(st.tuples(st.sampled_from(("user", "assistant")), texts), max_size=30)


@pytest.fixture(scope="module")
def counter(base_model_dir: Path) -> Counter:
    return Counter(base_model_dir)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(turns, texts, st.integers(20, 400), st.booleans(), st.lists(nearnesses, min_size=30, max_size=30))
def test_a_context_is_never_a_token_over_its_budget(
    counter: Counter,
    said: list[tuple[str, str]],
    question: str,
    budget: int,
    with_system: bool,
    near: list[float | None],
) -> None:
    chunks = [Chunk(role, text, f"t{at}", at, nearness=near[at]) for at, (role, text) in enumerate(said)]
    system = [{"role": "system", "content": "Be brief."}] if with_system else []
    weights = BY_WORDS_ALONE if near[0] is None else BY_SENTENCES
    try:
        context = build(chunks, question, budget, weights, counter, system=system)
    except InvalidRequestError as error:
        assert error.code == "context_length_exceeded"
        assert counter.prompt([*system, {"role": "user", "content": question}]) > budget
        return
    assert counter.prompt(context.messages) == context.used <= budget
    assert context.messages[-1] == {"role": "user", "content": question}
    assert context.messages[: len(system)] == system


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts, st.integers(1, 60))
def test_a_refill_has_no_word_that_was_not_said(counter: Counter, text: str, max_tokens: int) -> None:
    written, _ = refill(draft(text, counter, {}, frozenset(), 0.8), max_tokens, counter)
    at = 0
    for piece in written.replace("…", " ").split():
        at = text.find(piece, at)
        assert at >= 0, (piece, "is not in", text, "in this order")


def test_what_fits_is_left_as_it_is(counter: Counter) -> None:
    chunks = [Chunk("user", "Hello  there!\n", "a", 0), Chunk("assistant", "Hi.", "a", 1)]
    context = build(chunks, "How are you?", 500, Weights(), counter)
    assert context.is_whole
    assert [message["content"] for message in context.messages] == ["Hello  there!\n", "Hi.", "How are you?"]


def test_what_is_asked_for_is_found_far_back(counter: Counter) -> None:
    talk = [("user", "What a nice day it is today, really."), ("assistant", "Yes, the sun is out and it is warm.")]
    said = [*talk * 20, ("user", "The gate code is 4471."), ("assistant", "Noted."), *talk * 20]
    chunks = [Chunk(role, text, str(at), at) for at, (role, text) in enumerate(said)]
    context = build(chunks, "What was the code of the gate?", 120, BY_WORDS_ALONE, counter)
    assert any("4471" in message["content"] for message in context.messages[:-1])
    assert context.used <= 120


def test_a_pinned_chunk_is_there_whatever_is_asked_and_cut_where_it_is_too_long(counter: Counter) -> None:
    talk = [("user", f"Number {at} of our long talk about trains and stations.") for at in range(60)]
    chunks = [Chunk(role, text, str(at), at) for at, (role, text) in enumerate(talk)]
    chunks[3] = Chunk(
        "user", " ".join(f"Rule {at}: never mention topic{at}." for at in range(200)), "p", 3, pinned=True
    )
    context = build(chunks, "Which trains go today?", 200, BY_WORDS_ALONE, counter)
    pinned = [kept for kept in context.kept if kept.chunk.pinned]
    assert pinned and context.used <= 200
    assert sum(kept.num_tokens for kept in pinned) > 100, "most of the budget is for what was pinned"


def test_a_question_longer_than_the_budget_is_refused_with_its_size(counter: Counter) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        build([], "word " * 300, 100, Weights(), counter)
    assert refused.value.code == "context_length_exceeded"
    assert str(counter.prompt([{"role": "user", "content": "word " * 300}])) in refused.value.message


def test_long_messages_are_split_and_lose_no_word() -> None:
    text = " ".join(f"This is sentence number {at}, which says something." for at in range(80))
    split = parts(Chunk("user", text, "t", 0))
    assert len(split) > 3
    assert " ".join(part.text for part in split) == text


def test_a_sentence_keeps_its_numbers_and_names_when_it_is_shortened(counter: Counter) -> None:
    drafted = draft(
        "Well, you know that my sister Marlene has moved to Lisbon in 2019 then.", counter, {}, set(), 0.8
    )
    written, size = refill(drafted, 12, counter)
    assert {"Marlene", "Lisbon", "2019"} <= set(written.split())
    assert size <= 12 and counter.text(written) <= 12


def test_words_that_are_written_with_apostrophes_are_known() -> None:
    assert analyse("I’m Ada's friend.").words == {"i'm", "ada's", "friend"}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(turns, texts, st.integers(100, 600))
def test_without_the_tokenizer_what_fits_by_bytes_fits(
    counter: Counter, said: list[tuple[str, str]], question: str, budget: int
) -> None:
    chunks = [Chunk(role, text, f"t{at}", at) for at, (role, text) in enumerate(said)]
    try:
        context = build(chunks, question, budget, BY_WORDS_ALONE, ByteCounter())
    except InvalidRequestError:
        return
    assert counter.prompt(context.messages) <= context.used <= budget


def test_a_template_that_wants_roles_in_turn_gets_them(base_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to(base_model_dir / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text(STRICT)
    strict = Counter(tmp_path)
    assert strict.must_alternate
    talk = [
        ("user", "Shall we take the train?"),
        ("assistant", "The train to Oslo leaves at 6:40 from platform 9."),
    ]
    chunks = [Chunk(role, f"{text} ({at})", str(at), at) for at, (role, text) in enumerate(talk * 20)]
    for question in ("When does it leave?", "Shall we?", "Oslo?"):
        context = build(chunks, question, 150, BY_WORDS_ALONE, strict)
        assert context.kept and strict.prompt(context.messages) <= 150


def test_a_system_message_that_leaves_no_room_is_refused_with_its_size(counter: Counter) -> None:
    system = [{"role": "system", "content": "Be brief. " * 100}]
    with pytest.raises(InvalidRequestError) as refused:
        build([Chunk("user", "Hello", "a", 0)], "And?", 120, Weights(), counter, system=system)
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize("text", ["I don't eat any meat at home.", "We are not going to Paris.", "No nuts for me!"])
def test_a_shortened_sentence_does_not_say_the_opposite(counter: Counter, text: str) -> None:
    drafted = draft(text, counter, {}, set(), 0.8)
    written, _ = refill(drafted, max(drafted.shortest, 4), counter)
    assert {"don't", "not", "No"} & set(written.split()), written


def test_what_the_encoder_has_not_read_is_as_near_as_the_rest_in_the_mean() -> None:
    def nearness(*values: float | None) -> list[float]:
        chunks = [Chunk("user", "Hello.", str(at), at, nearness=value) for at, value in enumerate(values)]
        return list(features(Candidates.of(chunks), "Hi?")[:, NAMES.index("sentence")])

    assert nearness(0.2, None, 0.6, -0.4) == pytest.approx([0.2, 0.8 / 3, 0.6, 0.0])
    assert nearness(None, None) == [0.0, 0.0]
    assert nearness() == []
