"""The real encoder under a head that has learned from ordinary prose: of what is unusual it is less sure."""

from __future__ import annotations

import random
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from reward.base_model_encoder import BaseModelEncoder
from reward.learner import abstains
from reward.online import BayesianHead

QUESTION = [{"role": "user", "content": "Tell me about it."}]
ROOT = Path(__file__).resolve().parents[2]
NUM_LEARNED, NUM_HELD_OUT = 90, 24
LANGUAGES = [
    "Je ne sais pas exactement, mais je pense que la réponse dépend de la situation et de votre âge.",
    "Ich bin mir nicht sicher, aber man sollte zuerst mit einem Arzt sprechen und dann weitersehen.",
    "这个问题很难回答，不过我建议你先和家人谈谈，然后再做决定。",
    "Это зависит от того, где вы живёте, но обычно достаточно обратиться к специалисту.",
    "すみません、よくわかりませんが、まず専門家に相談してください。",
    "لا أعرف الجواب بالضبط ولكن يمكنك أن تسأل صديقا.",
]


def prose():
    """Return pairs of sentences of this project's own documents."""
    found = []
    for path in sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]):
        for paragraph in path.read_text().split("\n\n"):
            if re.search(r"```|\||^#", paragraph):
                continue
            sentences = re.split(r"(?<=[.!?]) +", " ".join(paragraph.split()))
            pairs = [" ".join(sentences[i : i + 2]) for i in range(0, len(sentences), 2)]
            found += [pair for pair in pairs if 100 < len(pair) < 500]
    random.Random(0).shuffle(found)
    return found


@pytest.fixture(scope="module")
def believed(base_model_dir):
    """Return a function that gives the standard deviations of answers, and the usual one."""
    encoder = BaseModelEncoder(base_model_dir, 22)
    texts = prose()[: NUM_LEARNED + NUM_HELD_OUT]
    assert len(texts) == NUM_LEARNED + NUM_HELD_OUT
    phi = encoder.encode([(QUESTION, text) for text in texts]).astype(np.float64)
    head = BayesianHead.prior(encoder.dim)
    for number, row in enumerate(phi[:NUM_LEARNED]):
        head.learn_one(row, float(number % 2))
    usual = [score.sd for score in head.predict_many(phi[NUM_LEARNED:])]

    def sds(answers):
        features = encoder.encode([(QUESTION, answer) for answer in answers]).astype(np.float64)
        return [score.sd for score in head.predict_many(features)]

    return sds, statistics.median(usual), texts


def gibberish(rng):
    return " ".join("".join(rng.choices("bcdfghjklmnpqrstvwxzaeiou", k=rng.randint(2, 9))) for _ in range(40))


@pytest.mark.parametrize("kind", ["gibberish", "repetition", "another language", "very short", "very long"])
def test_it_is_less_sure_of_what_is_unusual(believed, kind):
    sds, usual, texts = believed
    rng = random.Random(1)
    answers = {
        "gibberish": [gibberish(rng) for _ in range(6)],
        "repetition": ["the cat " * 60, "No no no " * 50, "I think that " * 40],
        "another language": LANGUAGES,
        "very short": ["ok", "No.", "42"],
        "very long": [" ".join(rng.sample(texts, 30)) for _ in range(2)],
    }[kind]
    found = statistics.median(sds(answers))
    assert found > 1.25 * usual, f"{found:.2f} against {usual:.2f}"
    if kind in ("gibberish", "repetition"):
        assert abstains(found, usual)
