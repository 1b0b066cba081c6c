"""Snapshots and pairs: what a run may learn from."""

from hypothesis import given
from hypothesis import strategies as st

from trainer.pairs import best_against_worst, corrections
from trainer.rollout import Sample
from trainer.snapshot import Example, Snapshot, is_gate_prompt

ASK = [{"role": "user", "content": "Why?"}]


def example(answer, thumbs=(), fixed=(), prompt="Why?"):
    return Example("ep", [{"role": "user", "content": prompt}], answer, list(thumbs), list(fixed), ["fb"])


def words(n):
    return " ".join(["word"] * n)


@given(st.text(min_size=1, max_size=50))
def test_the_split_depends_on_the_prompt_alone(prompt):
    messages = [{"role": "user", "content": prompt}]
    assert is_gate_prompt(messages) == is_gate_prompt([dict(messages[0])])


def test_about_a_fifth_of_prompts_is_kept_for_gates():
    kept = sum(is_gate_prompt([{"role": "user", "content": f"question {i}"}]) for i in range(2000))
    assert 0.16 < kept / 2000 < 0.24


def test_the_same_snapshot_has_the_same_digest_and_any_change_another():
    one, two = Snapshot(train=[example("a")]), Snapshot(train=[example("a")])
    assert one.digest == two.digest != Snapshot(train=[example("b")]).digest


def test_the_range_of_lengths_comes_from_good_answers_and_corrections():
    data = Snapshot(
        train=[
            example(words(40), thumbs=[1]),
            example(words(200), thumbs=[-1], fixed=[words(12)]),
            example(words(3)),
        ]
    )
    assert data.well_rated_words() == (12, 40)


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
    assert [(p.chosen, p.rejected) for p in found.pairs] == [(good.text, bad.text)]
    near = best_against_worst([ASK], [[good, bad]], [[0.1, 0.0]], min_margin=0.5, words_range=(5, 50))
    assert not near.pairs and near.set_aside["margin_too_small"] == 1
    none = best_against_worst([ASK], [[short, cut]], [[1.0, 0.0]], min_margin=0.5, words_range=(5, 50))
    assert not none.pairs and none.set_aside["no_sample_of_allowed_length"] == 1


def test_corrections_become_pairs_newest_first_kept():
    found = corrections(
        [example("long", fixed=["one"]), example("same", fixed=["same"]), example("x", fixed=["two"])], 1
    )
    assert [(p.chosen, p.rejected) for p in found.pairs] == [("two", "x")]
    assert found.set_aside["older_corrections"] == 1
