"""Which checkpoint is registered, and the second opinion that says so."""

import math

import numpy as np
import pytest

from tests.unit.test_training_data import example
from trainer import gold, peak
from trainer.peak import Point
from trainer.recipe import Rows
from trainer.rollout import Sample
from trainer.scoring import CUT_LOSS, LENGTH_LOSS, PinnedReward
from trainer.snapshot import Snapshot


def point(step, kl, golds, proxy=0.0):
    mean = sum(golds) / len(golds) if golds else None
    return Point(step, kl, proxy, mean, 20.0, len(golds), tuple(golds))


def test_the_last_checkpoint_is_taken_where_none_is_better():
    rising = [point(2, 1.0, [0.0, 0.2, 0.1]), point(4, 2.0, [1.0, 1.1, 1.2]), point(6, 3.0, [2.0, 2.2, 2.1])]
    assert peak.choose(rising, 60.0).step == 6


def test_the_gold_peak_is_taken_though_the_proxy_rises_on():
    overshot = [
        point(2, 1.0, [0.0, 0.1, 0.2, 0.1], proxy=0.1),
        point(4, 4.0, [1.0, 1.2, 0.9, 1.1], proxy=1.0),
        point(6, 9.0, [-1.0, -0.8, -1.2, -0.9], proxy=2.0),
    ]
    assert peak.choose(overshot, 60.0).step == 4


def test_noise_alone_does_not_send_a_run_back():
    noisy = [point(2, 1.0, [2.0, -2.0, 2.0, -1.9]), point(4, 2.0, [-2.0, 2.0, -1.9, 1.9])]
    assert peak.choose(noisy, 60.0).step == 4


def test_what_is_too_far_from_the_base_is_not_taken_and_where_all_are_the_nearest_is():
    points = [point(2, 5.0, [0.0, 0.0]), point(4, 20.0, [1.0, 1.0]), point(6, 90.0, [5.0, 5.0])]
    assert peak.choose(points, 60.0).step == 4
    assert peak.choose(points, 1.0).step == 2


def test_without_a_gold_scorer_the_last_within_the_bound_is_taken():
    points = [point(2, 5.0, []), point(4, 20.0, []), point(6, 90.0, [])]
    assert peak.choose(points, 60.0).step == 4


def test_checkpoints_answer_prompts_that_no_row_trains_on():
    data = Snapshot(train=[example(f"Answer {n}.", [1.0], prompt=f"Why {n}?") for n in range(10)])
    rows = Rows()
    for trained in data.train[:6]:
        rows.add("samples", {"prompt": trained.messages})
    prompts, references = peak.unseen(data, rows, 3, 0)
    left = {f"Why {n}?": f"Answer {n}." for n in range(6, 10)}
    assert [left[prompt[0]["content"]] for prompt in prompts] == references and len(references) == 3
    assert peak.unseen(data, rows, 3, 0) == (prompts, references)


def test_the_plot_shows_both_curves_and_what_was_taken(tmp_path):
    points = [point(0, 0.0, [0.0]), point(2, 4.0, [1.0], proxy=1.0)]
    peak.plot(points, points[1], tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert text.count("<!-- proxy") == 1 and text.count("<!-- gold") == 1 and "<!-- taken: step 2" in text
    peak.plot([point(0, 0.0, []), point(2, 4.0, [])], points[1], tmp_path / "blind.svg")
    assert "<!-- gold" not in (tmp_path / "blind.svg").read_text()


class Encoder:
    """One feature: how many words, from -1 to 1; texts with an exclamation mark are refused."""

    dim = 1

    def encode_usable(self, answers, on_done=lambda done: None):
        features = [[min(len(text.split()), 20) / 10 - 1] for _, text in answers]
        return np.array(features, np.float32), np.array(["!" not in text for _, text in answers])


def test_gold_learns_from_verdicts_corrections_and_preferences_of_held_out_answers():
    short, long = "a b", "a " * 20
    likes_short = gold.fit(Encoder(), [example(short, [1.0]), example(long, [0.0])] * 4)
    corrected = gold.fit(Encoder(), [example(long, fixed=[short])] * 8)
    preferred = gold.fit(Encoder(), [example(short, over=[long])] * 8)
    for found in (likes_short, corrected, preferred):
        assert found.num_judgements == 8 and not found.is_informed
        assert found.head.predict_one(np.array([-0.8])).mean > found.head.predict_one(np.array([1.0])).mean
    assert gold.fit(Encoder(), [example(short, [1.0])] * gold.MIN_JUDGEMENTS).is_informed


def test_gold_leaves_out_what_cannot_be_encoded():
    found = gold.fit(Encoder(), [example("no!", [1.0], fixed=["yes"]), example("yes", [1.0], fixed=["no!"])])
    assert found.num_judgements == 1


@pytest.mark.parametrize("held_out", [[], [example("a", [])]])
def test_gold_of_nothing_knows_nothing(held_out):
    found = gold.fit(Encoder(), held_out)
    assert found.num_judgements == 0 and math.isclose(found.head.predict_one(np.array([1.0])).mean, 0.0)


class Engine:
    """Finds each token of an answer twice as probable under a trained model as under the base."""

    def __init__(self, url):
        pass

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def token_logprobs(self, model, prompt_ids, token_ids):
        return [-1.0 if model == "base" else -1.0 + math.log(2.0)] * len(token_ids)


def test_a_checkpoint_is_measured_by_proxy_gold_and_distance(monkeypatch):
    monkeypatch.setattr(peak, "EngineClient", Engine)
    likes_short = gold.fit(Encoder(), [example("a b", [1.0]), example("a " * 20, [0.0])] * 40)
    answers = {"0": ("a " * 4, "stop"), "1": ("a", "stop"), "2": ("a " * 8, "length"), "3": None}

    def ask(model, prompts):
        found = [answers[prompt[0]["content"]] for prompt in prompts]
        return [[Sample(one[0], one[1], (1,), (5, 6, 7))] if one else [] for one in found]

    scales = peak.Scales(
        engine_url="",
        prompts=[[{"role": "user", "content": name}] for name in answers],
        references=["a " * 10] * 4,
        reward=PinnedReward(Encoder(), likes_short.head, 0.5),
        gold=likes_short,
        words_range=(2, 9),
        ask=ask,
    )
    found = scales.measure("run/r@1", 6)
    assert (found.step, found.n) == (6, 3) and found.kl == pytest.approx(3 * math.log(2.0))
    assert found.mean_words == pytest.approx(13 / 3)
    # To the gold head the shortest is best; nobody rated anything so short, and the third was cut off.
    raw = scales.reward.score_under(
        [(likes_short.head, 0.0)], scales.prompts[:3], [["a " * 4], ["a"], ["a " * 8]], scales.references[:3]
    )[0]
    assert raw[1][0] > raw[0][0] > raw[2][0]
    assert found.golds == pytest.approx([raw[0][0], -LENGTH_LOSS, raw[2][0] - CUT_LOSS])
    assert found.proxy < sum(score for (score,) in raw) / 3  # pessimistic
    assert "texts" not in found.as_dict() and "golds" not in found.as_dict()
