"""Both encoders with their real models; the first checks hold for either."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from infra.errors import IntegrityError, InvalidRequestError
from infra.sentence_model import directory
from infra.settings import Settings
from infra.weights import base_model_digest
from reward.base_model_encoder import CONTENT_SCALE, BaseModelEncoder
from reward.encoder import MAX_ANSWER_TOKENS
from reward.sentence_encoder import SentenceEncoder

LAYER = 22
SKY = [{"role": "user", "content": "Why is the sky blue?"}]
TEA = [{"role": "user", "content": "How do I make tea?"}]
ANSWERS = [
    (SKY, "Air scatters blue light more than red light."),
    (SKY, "Because of the sea."),
    (TEA, "Boil water, pour it over the leaves and wait for three minutes. " * 9),
    (SKY, "The atmosphere scatters short wavelengths the most, and those look blue to us."),
    (TEA, "I can't help with that."),
]
# Products of other shapes add up in another order; the base model rounds each to the 8 bits of bfloat16, and 22
# layers carry that on (0.0065 was seen, half a percent of the vector's length), MiniLM to the 24 of float32.
ROUNDING = {"base": 0.015, "sentence": 1e-5}


@pytest.fixture(scope="module")
def encoders(base_model_dir):
    return {
        "base": BaseModelEncoder(base_model_dir, LAYER),
        "sentence": SentenceEncoder(directory(Settings(home=Path()))),
    }


@pytest.fixture(scope="module", params=["base", "sentence"])
def encoder(encoders, request):
    return encoders[request.param]


@pytest.fixture
def rounding(request, encoder, encoders):
    return next(ROUNDING[kind] for kind, known in encoders.items() if known is encoder)


def part(encoder, features, name):
    return features[..., encoder.layout.slices[name]]


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_features_do_not_depend_on_what_else_is_in_the_batch(encoder, rounding):
    together = encoder.encode(ANSWERS)
    alone = np.concatenate([encoder.encode([answer]) for answer in ANSWERS])
    np.testing.assert_allclose(together, alone, atol=rounding)
    turned = encoder.encode(ANSWERS[::-1])[::-1]
    np.testing.assert_allclose(together, turned, atol=rounding)
    content = part(encoder, together, "content")
    between = np.abs(content[0] - content[1]).max()
    assert between > 10 * rounding, "the tolerance would hide the difference between two answers"


def test_the_prompt_part_is_the_prompts_alone(encoder, rounding):
    long = (SKY, "Light. " * 900)
    prompt = part(encoder, encoder.encode([ANSWERS[0], ANSWERS[1], long, ANSWERS[2]]), "prompt")
    np.testing.assert_allclose(prompt[1:3], prompt[[0, 0]], atol=rounding)
    assert np.abs(prompt[0] - prompt[3]).max() > 0.1


def test_what_is_too_long_is_counted_in_the_models_own_tokens(encoder):
    word = " sky"  # one token to either model, four bytes
    assert encoder.refusal(word * MAX_ANSWER_TOKENS) is None
    with pytest.raises(InvalidRequestError) as caught:
        encoder.encode([(SKY, word * (MAX_ANSWER_TOKENS + 1))])
    assert caught.value.code == "answer_too_long" and str(MAX_ANSWER_TOKENS + 1) in caught.value.message


def test_near_the_limit_features_are_still_computed(encoder):
    longest = (SKY, " sky" * (MAX_ANSWER_TOKENS - 1))
    assert np.isfinite(encoder.encode([longest])).all()


def test_changed_weights_are_refused(encoder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(encoder.model_dir, copy)
    if not (copy / "everloop.json").exists():
        (copy / "everloop.json").write_text(json.dumps({"sha256": base_model_digest(encoder.model_dir)}))
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    changed = type(encoder)(copy, *([LAYER] if isinstance(encoder, BaseModelEncoder) else []))
    assert changed.name == encoder.name, "the note still says what it was"
    with pytest.raises(IntegrityError) as caught:
        changed.encode(ANSWERS[:1])
    assert caught.value.code == "encoder_digest_mismatch"


def adapter(directory, model, task_type):
    """Write an adapter with effect, as a trainer does; return the model that carries it."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type=task_type)
    carrying = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in carrying.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    carrying.save_pretrained(directory)
    return carrying.eval()


def reference(model, model_dir, messages, answer):
    """Return content features by transformers alone: all hidden states, one answer, no padding."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    reply = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.inference_mode():
        states = model(torch.tensor([before + reply]), output_hidden_states=True).hidden_states[LAYER]
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        normed = base.model.layers[LAYER].input_layernorm(states)[0, len(before) :].float()
    return CONTENT_SCALE / normed.shape[1] ** 0.5 * normed.mean(0).numpy()


def test_the_base_model_sees_answers_without_any_adapter(encoders, base_model_dir, tmp_path):
    encoder = encoders["base"]
    content = part(encoder, encoder.encode(ANSWERS[:1]), "content")[0]
    model = AutoModelForCausalLM.from_pretrained(base_model_dir, dtype=torch.bfloat16)
    served = adapter(tmp_path, model, "CAUSAL_LM")
    with served.disable_adapter():
        off = reference(served, base_model_dir, *ANSWERS[0])
    on = reference(served, base_model_dir, *ANSWERS[0])
    np.testing.assert_allclose(content, off, atol=ROUNDING["base"])
    assert np.abs(content - on).max() > 5 * ROUNDING["base"]


@pytest.mark.parametrize(
    ("auto", "task_type"),
    [(AutoModelForSequenceClassification, "SEQ_CLS"), (AutoModelForCausalLM, "CAUSAL_LM")],
)
def test_an_adapter_of_the_reward_models_own_is_merged_into_it(encoders, base_model_dir, tmp_path, auto, task_type):
    options = {"num_labels": 1} if task_type == "SEQ_CLS" else {}
    model = auto.from_pretrained(base_model_dir, dtype=torch.bfloat16, **options)
    model.config.pad_token_id = model.config.eos_token_id
    carrying = adapter(tmp_path, model, task_type)
    encoder = BaseModelEncoder(base_model_dir, LAYER, adapter_dir=tmp_path)
    content = part(encoder, encoder.encode(ANSWERS[:1]), "content")[0]
    expected = reference(carrying, base_model_dir, *ANSWERS[0])
    plain = part(encoder, encoders["base"].encode(ANSWERS[:1]), "content")[0]
    # Not equal: merged weights are rounded to bfloat16 once more.
    assert np.linalg.norm(content - expected) < 0.2 * np.linalg.norm(plain - expected)
    assert encoder.name != encoders["base"].name


def test_a_prompt_that_is_too_long_is_seen_from_its_end(encoders):
    encoder = encoders["base"]
    ends = ["Why is the sky blue?", "How do I make tea?"]
    long = [([{"role": "user", "content": "Listen. " * 1500 + end * 20}], "Yes.") for end in ends]
    one, other = part(encoder, encoder.encode(long), "prompt")
    assert np.abs(one - other).max() > 5 * ROUNDING["base"]


def test_embeddings_are_those_of_the_library(encoders):
    encoder = encoders["sentence"]
    texts = [answer for _, answer in ANSWERS]
    expected = SentenceTransformer(str(directory(Settings(home=Path()))), device="cpu").encode(
        texts, show_progress_bar=False
    )
    np.testing.assert_allclose(part(encoder, encoder.encode(ANSWERS), "content"), expected, atol=1e-5)


def test_sentences_that_mean_the_same_are_near(encoders):
    encoder = encoders["sentence"]
    said = ["Boil some water first.", "Heat water until it boils.", "Cats sleep for most of the day."]
    one, same, other = part(encoder, encoder.encode([(TEA, text) for text in said]), "content")
    assert cosine(one, same) > cosine(one, other) + 0.3


def test_the_end_of_an_answer_beyond_the_window_counts(encoders):
    encoder = encoders["sentence"]
    start = "Boil some water first. " * 100
    ends = ["Heat water until it boils. " * 100, "Cats sleep for most of the day. " * 100]
    tea, cats = part(encoder, encoder.encode([(TEA, start + end) for end in ends]), "content")
    about_cats = part(encoder, encoder.encode([(TEA, "Cats sleep for most of the day.")]), "content")[0]
    assert cosine(cats, about_cats) > cosine(tea, about_cats) + 0.3
    np.testing.assert_allclose(np.linalg.norm(cats), 1.0, atol=1e-5)
