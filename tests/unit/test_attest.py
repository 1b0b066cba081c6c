"""What a probe proves."""

import pytest

from deploy.attest import DOUBTFUL, MAX_DISAGREEMENT, MIN_DIFFERENCE, prove

BASE = [-1.0, -2.0, -3.0]
OWN = [-1.5, -2.5, -2.0]
OTHER = [-2.0, -1.0, -4.0]


def moved(probe, by):
    return [value + by for value in probe]


def test_the_first_proof_differs_from_base_and_others():
    proof = prove(OWN, BASE, {"r1": OTHER}, None)
    assert proof.problem is None and proof.disagrees is None
    assert proof.differs_from_base == pytest.approx(2 / 3) and proof.differs_from_others == pytest.approx(4 / 3)


def test_an_adapter_that_is_ignored_is_no_proof():
    assert "base model" in prove(moved(BASE, MIN_DIFFERENCE / 2), BASE, {}, None).problem
    assert "base model" in prove(BASE, BASE, {"r1": OTHER}, OWN).problem
    assert prove(moved(BASE, 2 * MIN_DIFFERENCE), BASE, {}, None).problem is None


def test_anothers_weights_are_told_by_name_the_first_time_and_later():
    assert "r1" in prove(OTHER, BASE, {"r1": OTHER, "r2": moved(OTHER, 1.0)}, None).problem
    assert "r1" in prove(moved(OTHER, 0.01), BASE, {"r1": OTHER}, OWN).problem


def test_unknown_weights_are_told_by_their_distance_to_the_first_proof():
    assert prove(moved(OWN, MAX_DISAGREEMENT / 2), BASE, {"r1": OTHER}, OWN).problem is None
    assert "other weights" in prove(moved(OWN, 2 * MAX_DISAGREEMENT), BASE, {"r1": OTHER}, OWN).problem


def test_one_that_is_near_to_another_is_told_from_it_all_the_same():
    near = moved(OWN, 5 * MIN_DIFFERENCE)
    assert prove(OWN, BASE, {"r1": near}, OWN).problem is None
    assert prove(moved(OWN, MIN_DIFFERENCE), BASE, {"r1": near}, OWN).problem is None
    assert "r1" in prove(moved(OWN, 4 * MIN_DIFFERENCE), BASE, {"r1": near}, OWN).problem


def test_the_base_model_is_held_against_what_it_was():
    assert prove(BASE, None, {"r1": OTHER}, None).problem is None
    assert prove(BASE, None, {"r1": OTHER}, BASE).problem is None
    assert "other weights" in prove(moved(BASE, 1.0), None, {}, BASE).problem


def test_another_tokenizer_is_another_base_model():
    assert "another base model" in prove([*BASE, -1.0], None, {}, BASE).problem
    assert prove(BASE, None, {"r1": [*OTHER, -1.0]}, BASE).problem is None


def test_what_noise_may_have_done_is_doubtful_and_nothing_else():
    assert not prove(OWN, BASE, {"r1": OTHER}, None).is_doubtful
    assert not prove(moved(OWN, 0.01), BASE, {"r1": OTHER}, OWN).is_doubtful
    assert prove(moved(BASE, DOUBTFUL / 2), BASE, {}, None).is_doubtful, "hardly told from the base model"
    assert prove(moved(OTHER, 0.01), BASE, {"r1": OTHER}, OWN).is_doubtful, "taken for another"
    assert prove(moved(OWN, 2 * MAX_DISAGREEMENT), BASE, {}, OWN).is_doubtful, "not what it was"
    assert not prove(BASE, BASE, {"r1": OTHER}, None).is_doubtful, "ignored, beyond doubt"
