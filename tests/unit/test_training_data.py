"""Snapshots and pairs: what a run may learn from."""

import asyncio
import json
import math
from contextlib import closing

import pytest

from deploy import gating
from deploy.tables import Release
from infra.errors import IntegrityError, InvalidRequestError
from trainer import judge, snapshot
from trainer.collect import conversation_of, is_held_out, is_held_out_user
from trainer.config import RunConfig
from trainer.pairs import best_against_worst, compared
from trainer.prepared import Prepared
from trainer.rollout import Sample, Sampling, sample
from trainer.snapshot import CARD_FILE, CARD_PAGE, DATASET_FILE, Example, Snapshot
from trainer.verify import Verification

ASK = [{"role": "user", "content": "Why?"}]


def example(answer, verdicts=(), fixed=(), prompt="Why?", over=()):
    messages = [{"role": "user", "content": prompt}]
    return Example(
        "ep", conversation_of(messages), messages, answer, list(verdicts), list(fixed), list(over), ["fb"]
    )


def words(n):
    return " ".join(["word"] * n)


def test_a_conversation_is_known_by_how_it_began():
    asked = [{"role": "system", "content": "Be kind."}, *ASK]
    later = [*asked, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
    assert conversation_of(asked) == conversation_of(later)
    assert len({conversation_of(m) for m in (asked, ASK, [{"role": "user", "content": "How?"}])}) == 3
    assert conversation_of([{"role": "user", "content": [{"type": "text", "text": "\u2028"}]}])


def test_about_a_fifth_of_conversations_and_a_tenth_of_users_are_held_out():
    conversations = [conversation_of([{"role": "user", "content": f"question {n}"}]) for n in range(2_000)]
    # Five standard errors: .045 and .034.
    assert abs(sum(map(is_held_out, conversations)) / 2_000 - 1 / 5) < 0.045
    assert abs(sum(is_held_out_user(f"key_{n}") for n in range(2_000)) / 2_000 - 26 / 256) < 0.034


def test_the_same_snapshot_has_the_same_digest_and_any_change_another():
    one, two = Snapshot(train=[example("a")]), Snapshot(train=[example("a")])
    assert one.digest == two.digest != Snapshot(train=[example("b")]).digest
    assert one.digest != Snapshot(gate=[example("a")]).digest


def test_a_snapshot_is_kept_under_its_digest_and_comes_back(tmp_path):
    data = Snapshot(
        train=[example("One.\u2028Two.", [1.0], ["Three."], over=["Four."])],
        gate=[example("Five.", [0.0])],
        set_aside={"no_consent": 3, "redacted_email": 1},
        last_signal_seq=12,
        num_users=1,
    )
    path = data.save(tmp_path)
    assert path.name == data.digest and data.save(tmp_path) == path
    assert snapshot.read(path) == data
    card = json.loads((path / CARD_FILE).read_text())
    assert card["train"] == {
        "answers": 1,
        "conversations": 1,
        "signals": 1,
        "liked": 1,
        "disliked": 0,
        "corrections": 1,
        "preferences": 1,
        "median_words": 2,
    }
    page = (path / CARD_PAGE).read_text()
    assert "3 signals on answers whose users do not consent" in page and "1 times email" in page
    assert not any(word in page + json.dumps(card) for word in ("One.", "Three.", "Four.", "Five.", "Why?"))
    assert not list(tmp_path.glob(".*")), "nothing half-done is left"


def test_a_longer_range_of_the_log_that_comes_to_the_same_lines_is_on_their_card(tmp_path):
    path = Snapshot(train=[example("a")], last_signal_seq=12).save(tmp_path)
    later = Snapshot(train=[example("a")], last_signal_seq=32, set_aside={"kind_not_trained": 20})
    lines = (path / DATASET_FILE).stat()
    assert later.save(tmp_path) == path and (path / DATASET_FILE).stat() == lines
    assert snapshot.read(path) == later and "20 signals of kinds" in (path / CARD_PAGE).read_text()


def test_a_dataset_that_was_altered_is_refused(tmp_path):
    path = Snapshot(train=[example("a")]).save(tmp_path)
    lines = path / DATASET_FILE
    lines.write_text(lines.read_text()[:-5])
    with pytest.raises(IntegrityError) as refused:
        snapshot.read(path)
    assert refused.value.code == "dataset_corrupt"


def test_the_range_of_lengths_comes_from_good_answers_preferred_ones_and_corrections():
    data = Snapshot(
        train=[
            example(words(40), [1.0]),
            example(words(200), [0.0], [words(12)]),
            example(words(3)),
            example(words(90), [0.5]),
            example(words(20), over=[words(99)]),
        ]
    )
    assert data.well_rated_words() == (12, 40)


def texts(rows):
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]


def test_best_against_worst_keeps_to_the_range_the_margin_and_whole_answers():
    good, short, cut, bad = (
        Sample(words(10), "stop"),
        Sample("No.", "stop"),
        Sample(words(20), "length"),
        Sample(words(90), "stop"),
    )
    found = best_against_worst(
        [ASK], [[good, short, cut, bad]], [[1.0, 9.0, 5.0, -1.0]], min_margin=0.5, words_range=(5, 50)
    )
    assert texts(found.rows) == [(good.text, bad.text)]
    near = best_against_worst([ASK], [[good, bad]], [[0.1, 0.0]], min_margin=0.5, words_range=(5, 50))
    assert not near.rows and near.set_aside["margin_too_small"] == 1
    none = best_against_worst([ASK], [[short, cut]], [[1.0, 0.0]], min_margin=0.5, words_range=(5, 50))
    assert not none.rows and none.set_aside["no_sample_of_allowed_length"] == 1


def test_a_reward_that_is_no_number_and_a_prompt_without_samples_make_no_pair():
    one, other = Sample(words(10), "stop"), Sample(words(20), "stop")
    for bad in (math.nan, math.inf):
        found = best_against_worst(
            [ASK, ASK], [[one, other], []], [[1.0, bad], []], min_margin=0.0, words_range=(5, 50)
        )
        assert not found.rows and found.set_aside == {"reward_not_finite": 1, "prompt_refused": 1}


def test_a_prompt_that_the_engine_refuses_has_no_samples_and_the_others_have():
    class Engine:
        async def num_requests(self):
            return 0

        async def chat(self, payload):
            if "long" in payload["messages"][0]["content"]:
                raise InvalidRequestError("Too long.", code="context_length_exceeded")
            choice = {"message": {"content": "So."}, "finish_reason": "stop"}
            return {"choices": [choice]}

    done = []
    prompts = [[{"role": "user", "content": text}] for text in ("Why?", "long", "How?")]
    found = asyncio.run(
        sample(Engine(), "base", prompts, num_samples=2, sampling=Sampling(8), seed=0, on_done=done.append)
    )
    assert [len(group) for group in found] == [2, 0, 2] and done == [1, 2, 3]


def test_gates_judge_on_prompts_that_both_arms_answered(monkeypatch):
    class Reward:
        def score(self, prompts, answers, references):
            assert references == ["Answer 0.", "Answer 2."]
            return [[float(len(text)) for text in group] for group in answers]

    def sample_of(model, prompts, num_samples, seed, max_tokens=None):
        text = "Longer." if model == "r1" else "Short."
        return [[] if n == 1 else [Sample(text, "stop")] for n in range(len(prompts))]

    async def timed(*_):
        return [0.1], [0.1]

    monkeypatch.setattr(judge, "_attested", lambda *_: ([], None))
    monkeypatch.setattr(judge, "_seconds_per_token", timed)
    data = Snapshot(gate=[example(f"Answer {n}.", prompt=f"Why {n}?") for n in range(3)])
    ready = Prepared(data, Reward(), "base", "base", 1)
    with closing(Verification([], 1.0)) as verification:
        questions = judge.Questions.of(data, verification, RunConfig())
        assert questions.number == 3 + 3 * 12
        evidence = judge.gather(None, None, Release(name="r1"), ready, sample_of, questions, verification)
        few = RunConfig(gate_behaviour_questions=0, gate_timed_answers=0)
        assert judge.Questions.of(data, verification, few).number == 3
    gates = {result.gate: result for result in gating.judge(evidence)}
    assert (gates["win_rate"].n, gates["win_rate"].value) == (2, 1.0)
    assert evidence.answers == (["Longer."] * 2, ["Short."] * 2)
    assert gates["refusal"].n == 11 and gates["sycophancy"].verdict == "pass"  # one of the questions was refused


def test_people_compare_by_correcting_by_preferring_and_by_liking_one_and_not_the_other():
    examples = [
        example("Good.", [1.0]),
        example("Bad.", [0.0]),
        example("Worse.", [0.0]),
        example("Other.", [0.0], prompt="How?"),
        example("Fixed.", fixed=["Right.", "Fixed."]),
        example("Preferred.", over=["Not so.", "Preferred."]),
    ]
    found = compared(examples)
    assert list(zip(found.sources, texts(found.rows), strict=True)) == [
        ("contrasts", ("Good.", "Bad.")),
        ("preferences", ("Preferred.", "Not so.")),
        ("corrections", ("Right.", "Fixed.")),
    ]
    assert found.set_aside == {"correction_changes_nothing": 1}
    fewer = found.newest(2)
    assert fewer.sources == ["preferences", "corrections"] and fewer.set_aside["rows_over_budget"] == 1
