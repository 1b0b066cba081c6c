"""Which checkpoint is registered, and the second opinion that says so."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from reward.online import BayesianHead
from tests.unit.test_training_data import example
from trainer import gold, peak, policy
from trainer.config import RunConfig
from trainer.loop import Trained
from trainer.peak import Point
from trainer.policy import ServedPolicy
from trainer.recipe import Rows
from trainer.rollout import Sample
from trainer.scoring import CUT_LOSS, LENGTH_LOSS, PinnedReward
from trainer.snapshot import Snapshot
from trainer.training import Registrable, Training


def point(step, kl, golds, proxy=0.0):
    mean = sum(golds) / len(golds) if golds else None
    return Point(step, kl, proxy, mean, 20.0, len(golds), dict(enumerate(golds)))


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


def test_the_last_that_none_beats_is_taken_though_the_first_beats_the_last():
    # Each is .15 below the one before it; the errors of the differences are .2, but that of the first and last.
    first, second, third = [1.0, 1.0, 1.0], [1.25, 0.85, 0.45], [0.7, 0.7, 0.7]
    assert peak.choose([point(2, 1.0, first), point(4, 2.0, second), point(6, 3.0, third)], 60.0).step == 4


def test_gains_are_of_the_prompts_that_both_answered():
    chosen = Point(4, 2.0, 0.0, 1.0, 20.0, 3, {0: 1.0, 2: 3.0, 3: 0.5})
    champion = Point(0, 0.0, 0.0, 0.0, 20.0, 3, {0: 0.5, 1: 9.0, 2: 1.0})
    assert peak.gains(chosen, champion) == [0.5, 2.0]


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
    found = peak.unseen(data, rows, 3, 0)
    assert len(found) == 3 and all(one in data.train[6:] for one in found)
    assert peak.unseen(data, rows, 3, 0) == found


def test_the_plot_shows_both_curves_and_what_was_taken(tmp_path):
    points = [point(0, 0.0, [0.0]), point(2, 4.0, [1.0], proxy=1.0)]
    peak.plot(points, points[1], tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text()
    assert text.count("<!-- proxy") == 1 and text.count("<!-- gold") == 1 and "<!-- taken: step 2" in text
    peak.plot([point(0, 0.0, []), point(2, 4.0, [])], points[1], tmp_path / "blind.svg")
    assert "<!-- gold" not in (tmp_path / "blind.svg").read_text()


class Record:
    """What a run writes."""

    def __init__(self, run_dir):
        self.run_dir = run_dir
        self.phases, self.metrics = [], []

    def phase(self, name, total):
        self.phases.append((name, total))

    def progress(self, done):
        pass

    def metric(self, **values):
        self.metrics.append(values)


def chosen_of(tmp_path, monkeypatch, data, trained=(), kept=True, **settings):
    """Have a training choose among checkpoints at steps 2 and 4, the first of which is gold's peak."""
    monkeypatch.setattr(
        peak,
        "measure_all",
        lambda scales, champion, kept, on_done: [
            point(0, 0.0, [0.0, 0.0]),
            *[point(step, 1.0, [1.0, 2.0] if step == 2 else [0.5, 0.5]) for step, _ in kept],
        ],
    )
    directories = [(step, tmp_path / f"step-{step}") for step in (2, 4)]
    rows = Rows([{"prompt": one.messages} for one in trained])
    ready = SimpleNamespace(
        data=data, rows=rows, champion="base", reward=PinnedReward(Encoder(), BayesianHead.prior(1), 0.0)
    )
    record = Record(tmp_path)
    training = Training(None, None, None, RunConfig(**settings), record, ready, None)
    ended = Trained(tmp_path / "adapter", 4, None, 0, directories if kept else [])
    return training._chosen(ServedPolicy("", tmp_path), ended), record


def test_the_adapter_of_the_gold_peak_is_the_one_to_register(tmp_path, monkeypatch):
    data = Snapshot(train=[example("So.", prompt=f"Why {n}?") for n in range(6)])
    found, record = chosen_of(tmp_path, monkeypatch, data)
    assert found == Registrable(tmp_path / "step-2", 1.0, 2, [1.0, 2.0])
    assert [line["taken"] for line in record.metrics] == [False, True, False] and record.phases == [("peak", 3)]
    assert (tmp_path / peak.PLOT_FILE).exists()
    last, _ = chosen_of(tmp_path, monkeypatch, data, register_at="last")
    assert last.adapter_dir == tmp_path / "step-4"


def test_without_kept_checkpoints_what_the_training_ended_with_is_measured(tmp_path, monkeypatch):
    data = Snapshot(train=[example("So.", prompt=f"Why {n}?") for n in range(6)])
    found, _ = chosen_of(tmp_path, monkeypatch, data, kept=False)
    assert found.adapter_dir == tmp_path / "adapter" and found.num_measured == 2


def test_where_all_prompts_train_those_of_the_gates_tell_the_distance(tmp_path, monkeypatch):
    data = Snapshot(train=[example("So.", prompt="Why?")], gate=[example("So.", [1.0], prompt="Who?")] * 30)
    asked = []
    scales = peak.Scales
    monkeypatch.setattr(peak, "Scales", lambda **given: asked.append(given) or scales(**given))
    found, _ = chosen_of(tmp_path, monkeypatch, data, trained=data.train)
    assert [prompt[0]["content"] for prompt in asked[0]["prompts"]] == ["Who?"] and found.num_measured == 2
    assert not asked[0]["gold"].is_informed  # it was fitted to them
    nothing, _ = chosen_of(tmp_path, monkeypatch, Snapshot(train=data.train), trained=data.train)
    assert nothing.num_measured == 0 and nothing.adapter_dir == tmp_path / "adapter"


def test_a_choice_is_made_once(tmp_path):
    choice = Registrable(tmp_path / "kept", 3.5, 16, [0.5, -0.25])
    path = tmp_path / "chosen.json"
    assert Registrable.load(path) is None
    choice.save(path)
    assert Registrable.load(path) is None  # the adapter is gone
    choice.adapter_dir.mkdir()
    assert Registrable.load(path) == choice


class Encoder:
    """One feature: how many words, from -1 to 1; texts with an exclamation mark are refused."""

    dim = 1

    def encode_usable(self, answers, on_done=lambda done: None):
        features = [[min(len(text.split()), 20) / 10 - 1] for _, text in answers]
        return np.array(features, np.float32), np.array(["!" not in text for _, text in answers])


def fit(held_out):
    return gold.fit(PinnedReward(Encoder(), BayesianHead.prior(1), 0.0), held_out)


def test_gold_learns_from_verdicts_corrections_and_preferences_of_held_out_answers():
    short, long = "a b", "a " * 20
    likes_short = fit([example(short, [1.0]), example(long, [0.0])] * 4)
    corrected = fit([example(long, fixed=[short])] * 8)
    preferred = fit([example(short, over=[long])] * 8)
    for found in (likes_short, corrected, preferred):
        assert found.num_judgements == 8 and not found.is_informed
        assert found.head.predict_one(np.array([-0.8])).mean > found.head.predict_one(np.array([1.0])).mean
    assert fit([example(short, [1.0])] * gold.MIN_JUDGEMENTS).is_informed


def test_gold_leaves_out_what_cannot_be_encoded():
    found = fit([example("no!", [1.0], fixed=["yes"]), example("yes", [1.0], fixed=["no!"])])
    assert found.num_judgements == 1


@pytest.mark.parametrize("held_out", [[], [example("a", [])]])
def test_gold_of_nothing_knows_nothing(held_out):
    found = fit(held_out)
    assert found.num_judgements == 0 and math.isclose(found.head.predict_one(np.array([1.0])).mean, 0.0)


class Engine:
    """Finds each token of an answer twice as probable under a trained model as under the base."""

    def __init__(self, url, key):
        pass

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def token_logprobs(self, model, prompt_ids, token_ids):
        return [-1.0 if model == "base" else -1.0 + math.log(2.0)] * len(token_ids)


def test_a_checkpoint_is_measured_by_proxy_gold_and_distance(monkeypatch, tmp_path):
    monkeypatch.setattr(policy, "EngineClient", Engine)
    likes_short = fit([example("a b", [1.0]), example("a " * 20, [0.0])] * 40)
    answers = {"0": ("a " * 4, "stop"), "1": ("a", "stop"), "2": ("a " * 8, "length"), "3": None}

    def ask(model, prompts):
        found = [answers[prompt[0]["content"]] for prompt in prompts]
        return [[Sample(one[0], one[1], (1,), (5, 6, 7))] if one else [] for one in found]

    scales = peak.Scales(
        policy=ServedPolicy("", tmp_path),
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
    assert found.golds == pytest.approx({0: raw[0][0], 1: -LENGTH_LOSS, 2: raw[2][0] - CUT_LOSS})
    assert found.proxy < sum(score for (score,) in raw) / 3  # pessimistic
    assert "texts" not in found.as_dict() and "golds" not in found.as_dict()
