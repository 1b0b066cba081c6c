"""What all encoders share: the order of the parts, the refusals, the fixed projection, the check of weights."""

import json

import numpy as np
import pytest

from infra.errors import IntegrityError, InvalidRequestError, SetupError
from infra.settings import Settings
from infra.weights import weights_digest
from reward import encoder as encoder_module
from reward.base_model_encoder import BaseModelEncoder, adapter_digest
from reward.encoder import (
    MAX_ANSWER_CHARS,
    MAX_ANSWER_TOKENS,
    PROMPT_DIM,
    Encoder,
    Layout,
    UnusableAnswerError,
    check_digest,
    open_encoder,
    projection,
)
from reward.online import BayesianHead, pessimistic
from reward.sentence_encoder import SentenceEncoder, last_user_text
from reward.store import answer_digest
from reward.style import STYLE_NAMES, is_refusal, style_features
from trainer.scoring import LOWEST_REWARD, PinnedReward

ASK = [{"role": "user", "content": "Why is the sky blue?"}]


class WordLengths(Encoder):
    """Three features: the lengths of the first words. Counts what reaches its model."""

    def __init__(self):
        super().__init__("word-lengths.v3", content_dim=3)
        self.num_loads = self.num_seen = self.num_counted = 0

    def _load(self):
        self.num_loads += 1

    def _num_tokens(self, text):
        self.num_counted += 1
        return len(text.split())

    def _embed(self, answers):
        self.num_seen += len(answers)
        content = np.zeros((len(answers), 3), np.float32)
        for row, (_, text) in enumerate(answers):
            lengths = [np.inf if word == "infinite" else len(word) for word in text.split()[:3]]
            content[row, : len(lengths)] = lengths
        prompt = np.full((len(answers), PROMPT_DIM), 0.5, np.float32)
        return content, prompt


def refusal_of(encoder, answer):
    with pytest.raises(InvalidRequestError) as caught:
        encoder.encode([(ASK, "Fine."), (ASK, answer)])
    return caught.value


def test_the_parts_stand_side_by_side_in_their_order_and_nothing_is_left_over():
    layout = Layout(content=3)
    assert list(layout.slices) == ["content", "prompt", "style", "constant"]
    places = [place for part in layout.slices.values() for place in range(part.start, part.stop)]
    assert places == list(range(layout.dim)) and layout.dim == 3 + PROMPT_DIM + len(STYLE_NAMES) + 1


def test_every_part_is_where_the_layout_says():
    encoder = WordLengths()
    features = encoder.encode([(ASK, "Light is scattered."), (ASK, "Why?")])
    parts = {name: features[:, part] for name, part in encoder.layout.slices.items()}
    assert features.shape == (2, encoder.dim) and features.dtype == np.float32
    np.testing.assert_array_equal(parts["content"], [[5, 2, 10], [4, 0, 0]])
    np.testing.assert_array_equal(parts["prompt"], np.full((2, PROMPT_DIM), 0.5))
    assert np.corrcoef(parts["style"][1], style_features("Why?"))[0, 1] == pytest.approx(1.0)
    np.testing.assert_array_equal(parts["constant"], [[1], [1]])


def test_no_answers_have_no_features_and_need_no_model():
    encoder = WordLengths()
    assert encoder.encode([]).shape == (0, encoder.dim) and encoder.num_loads == 0


@pytest.mark.parametrize("answer", ["", " \n\t "])
def test_an_answer_without_a_word_is_refused(answer):
    encoder = WordLengths()
    assert refusal_of(encoder, answer).code == "answer_empty"
    assert encoder.num_seen == 0, "nothing of a batch is computed if one of it is refused"


def test_a_very_long_answer_is_refused_and_is_never_tokenised():
    encoder = WordLengths()
    assert refusal_of(encoder, "word " * 100_000).code == "answer_too_long"
    assert encoder.num_seen == encoder.num_counted == encoder.num_loads == 0


def test_the_limit_is_in_tokens_and_counted_only_where_it_may_be_passed():
    encoder = WordLengths()
    assert encoder.refusal("a" * MAX_ANSWER_TOKENS) is None and encoder.num_counted == 0
    assert encoder.refusal("wörd " * MAX_ANSWER_TOKENS) is None and encoder.num_counted == 1
    assert encoder.refusal("wörd " * (MAX_ANSWER_TOKENS + 1)).code == "answer_too_long"
    assert encoder.refusal("a" * (MAX_ANSWER_CHARS + 1)).code == "answer_too_long" and encoder.num_counted == 2


def test_features_that_are_not_finite_are_refused_and_the_answer_is_named():
    with pytest.raises(UnusableAnswerError, match="number 1") as caught:
        WordLengths().encode([(ASK, "Fine."), (ASK, "An infinite word.")])
    assert caught.value.code == "features_not_finite"


def test_the_model_is_loaded_once_and_only_when_it_is_needed():
    encoder = WordLengths()
    assert encoder.num_loads == 0
    encoder.encode([(ASK, "One.")])
    encoder.load()
    assert encoder.num_loads == 1


@pytest.mark.parametrize("dim", [384, 576])
def test_the_projection_is_orthonormal(dim):
    np.testing.assert_allclose(projection(dim).T @ projection(dim), np.eye(PROMPT_DIM), atol=1e-12)


def test_the_projection_is_the_same_each_time_and_everywhere():
    # Written down when the recipe was made: cached features depend on them. Another sign, seed or generator fails.
    expected = [-0.0178895961, 0.007097763, -0.0365521618, -0.0152983712, -0.0173387797, 0.0262786925]
    np.testing.assert_allclose(projection(576)[:3, :2].ravel(), expected, atol=1e-9)
    np.testing.assert_array_equal(projection(576), projection(576))


@pytest.mark.parametrize(
    "text",
    [
        "I can't help with that.",
        "I’m sorry, but I can’t do this.",
        "I'm sorry, I can't assist with that request.",
        "As an AI language model, I have no feelings.",
        "Unfortunately, I am unable to provide medical advice.",
        "I'm just a language model, so I don't know.",
        "I cannot safely recommend that.",
        "I must respectfully decline.",
        "That goes against my guidelines.",
        "Sorry, but no.",
        "I won't write that.",
        "I do not feel comfortable saying this.",
    ],
)
def test_refusals_are_recognised(text):
    assert is_refusal(text)
    assert style_features(text)[STYLE_NAMES.index("refusal")] == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry to hear that. Have you tried tea?",
        "I can't believe how blue the sky is!",
        "You can't help it: light scatters.",
        "As an aid to memory, write it down.",
        "An AI is a program. Language models predict words.",
        "I can help with that.",
        "They won't give up.",
        "I'm afraid of heights, too.",
    ],
)
def test_answers_that_sound_alike_are_not_refusals(text):
    assert not is_refusal(text)
    assert style_features(text)[STYLE_NAMES.index("refusal")] == -1.0


def test_every_style_feature_has_a_name_and_a_bound():
    for text in ("", "Yes.", "1. One\n2. Two\n" * 50, "word " * 5000):
        features = style_features(text)
        assert features.shape == (len(STYLE_NAMES),) and np.abs(features[:-1]).max() <= 1.0
        assert 0.0 <= features[-1] <= 2.0


@pytest.fixture
def model_dir(tmp_path):
    """A directory that looks like a model until it is loaded."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 32}))
    (tmp_path / "modules.json").write_text("[]")
    return tmp_path


def test_the_name_holds_all_that_features_depend_on(model_dir, tmp_path_factory):
    adapter = tmp_path_factory.mktemp("adapter")
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"one")
    names = [
        BaseModelEncoder(model_dir, 2).name,
        BaseModelEncoder(model_dir, 3).name,
        BaseModelEncoder(model_dir, 2, adapter_dir=adapter).name,
        SentenceEncoder(model_dir).name,
    ]
    (adapter / "adapter_model.safetensors").write_bytes(b"two")
    names.append(BaseModelEncoder(model_dir, 2, adapter_dir=adapter).name)
    (model_dir / "model.safetensors").write_bytes(b"others")
    names += [BaseModelEncoder(model_dir, 2).name, SentenceEncoder(model_dir).name]
    assert len(set(names)) == len(names), names
    assert all(name.endswith(encoder_module.RECIPE) for name in names)


def test_the_settings_choose_the_encoder(model_dir, tmp_path):
    settings = Settings(home=tmp_path, base_model=str(model_dir), encoder_layer=2)
    assert open_encoder(settings).name == BaseModelEncoder(model_dir, 2).name
    chosen = settings.model_copy(update={"reward_encoder": "sentence", "sentence_model": str(model_dir)})
    assert open_encoder(chosen).name == SentenceEncoder(model_dir).name
    wheel = open_encoder(settings.model_copy(update={"reward_encoder": "sentence"}))
    assert isinstance(wheel, SentenceEncoder) and wheel.layout.content == 384


@pytest.mark.parametrize("make", [lambda path: BaseModelEncoder(path, 2), SentenceEncoder])
def test_weights_that_are_not_the_noted_ones_are_refused_when_they_are_loaded(model_dir, make):
    (model_dir / "everloop.json").write_text(json.dumps({"sha256": weights_digest(model_dir)}))
    check_digest(model_dir, weights_digest(model_dir))
    (model_dir / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(IntegrityError) as caught:
        make(model_dir).load()
    assert caught.value.code == "encoder_digest_mismatch"


def test_directories_that_hold_no_model_are_refused(tmp_path):
    for call, code in [
        (weights_digest, "model_weights_missing"),
        (SentenceEncoder, "sentence_model_unusable"),
        (adapter_digest, "reward_adapter_incomplete"),
    ]:
        with pytest.raises(SetupError) as caught:
            call(tmp_path)
        assert caught.value.code == code


@pytest.mark.parametrize("config", ["{", "{}", "[]", '{"hidden_size": "many"}'])
def test_a_sentence_model_whose_size_cannot_be_told_is_refused(tmp_path, config):
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(SetupError) as caught:
        SentenceEncoder(tmp_path)
    assert caught.value.code == "sentence_model_unusable"


def test_what_the_user_said_last_is_found():
    talk = [*ASK, {"role": "assistant", "content": "Light."}, {"role": "user", "content": "How?"}]
    assert last_user_text(talk) == "How?"
    assert last_user_text([{"role": "system", "content": "Be brief."}]) == ""


def test_a_refused_answer_gets_the_lowest_reward_and_a_refused_reference_says_nothing():
    encoder = WordLengths()
    head = BayesianHead.prior(encoder.dim)
    head.theta = np.ones(encoder.dim)
    answers = [["Light is scattered.", "", "word " * 100_000], ["Light.", ""]]
    reward = PinnedReward(encoder, head, 0.5)
    rewards = reward.score([ASK, ASK], answers, ["Why not?", " "])
    assert reward.score([ASK, ASK, ASK], [answers[0], [], answers[1]], ["Why not?", "So.", " "]) == [
        rewards[0],
        [],
        rewards[1],
    ]
    alone = encoder.encode([(ASK, "Light is scattered."), (ASK, "Why not?")]).astype(float)
    expected = head.predict_many((alone[0] - alone[1])[None])[0]
    assert rewards[0] == [pessimistic(expected.mean, expected.sd, 0.5), LOWEST_REWARD, LOWEST_REWARD]
    assert rewards[1] == [0.0, 0.0] and LOWEST_REWARD == -8.0


def test_a_run_encodes_an_answer_once(monkeypatch):
    encoder = WordLengths()
    head = BayesianHead.prior(encoder.dim)
    head.theta = np.ones(encoder.dim)
    encoded = []
    monkeypatch.setattr(encoder, "encode", lambda some: encoded.extend(some) or WordLengths().encode(some))
    reward = PinnedReward(encoder, head, 0.5)
    first = reward.score([ASK, ASK], [["Light.", "Light."], ["Air."]], ["Why not?", "Why not?"])
    assert [text for _, text in encoded] == ["Light.", "Air.", "Why not?"]
    other = [*ASK, {"role": "assistant", "content": "So."}]
    again = reward.score([ASK, other], [["Light.", "Light."], ["Air."]], ["Why not?", "Why not?"])
    assert again[0] == first[0] and [text for _, text in encoded[3:]] == ["Air.", "Why not?"]
    assert reward.score([], [], []) == []


def test_features_that_were_computed_before_are_taken_up(monkeypatch):
    encoder = WordLengths()
    reward = PinnedReward(encoder, BayesianHead.prior(encoder.dim), 0.0)
    known = encoder.encode([(ASK, "Light.")]).astype(float)
    reward.remember({answer_digest(ASK, "Light."): known[0]})
    monkeypatch.setattr(encoder, "encode", lambda some: [][len(some)] if some else WordLengths().encode(some))
    features, usable = reward.features([(ASK, "Light.")])
    assert usable.all() and np.array_equal(features, known)


@pytest.mark.parametrize(("theta", "variance"), [(np.nan, 1.0), (0.0, np.nan), (np.inf, 1.0)])
def test_a_reward_that_would_be_no_number_is_refused(theta, variance):
    head = BayesianHead(np.full(3, theta), np.diag([1.0, variance, 1.0]))
    with pytest.raises(IntegrityError) as refused:
        PinnedReward(WordLengths(), head, 0.5)
    assert refused.value.code == "reward_not_finite"
