"""The built-in rater of demo and benches, as the program that it is, and what its people like."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.preferences import PREFERENCES
from flows.rater import rate

LONG = "This is a sentence that goes on. " * 12
LIST = "Here are ways:\n\n1. **Walk** more each day.\n2. Eat well.\n3. Sleep well.\n4. Drink water.\n"
TEXTS = st.text(alphabet=st.characters(categories=["L", "N", "Zs", "Po"], include_characters="\n*-"), min_size=1)


@pytest.mark.parametrize("name", PREFERENCES)
@given(answer=TEXTS.filter(lambda t: t.strip()))
def test_a_correction_is_what_the_rater_likes(name, answer):
    preference = PREFERENCES[name]
    assert preference.likes(preference.corrected(answer))


@pytest.mark.parametrize(
    ("name", "liked", "disliked"),
    [
        ("short", "It is so.", LONG),
        ("brief", "It is so because many people who know about it say that it is.", "It is so."),
        ("reader", "It is up to you.", "The youth of today."),
        ("example", "Fruit, such as apples.", "An exemplary answer."),
        ("flat", "One line.\n", LIST),
        ("polite", "Thank you for asking! It is so.", "It is so, of course."),
        ("three", "Ways:\n- a walk\n- a nap\n- a meal", LIST),
    ],
)
def test_what_people_like(name, liked, disliked):
    assert PREFERENCES[name].likes(liked) and not PREFERENCES[name].likes(disliked)


@pytest.mark.parametrize(
    ("name", "corrected"),
    [
        ("flat", "Here are ways: Walk more each day. Eat well. Sleep well. Drink water."),
        ("three", "1. Here are ways: Walk more each day.\n2. Eat well.\n3. Sleep well."),
    ],
)
def test_corrections_read_as_a_person_would_have_written_them(name, corrected):
    assert PREFERENCES[name].corrected(LIST) == corrected


def test_about_a_tenth_of_votes_is_wrong_and_a_fifth_of_down_votes_corrected():
    short = PREFERENCES["short"]
    verdicts = [rate(short, {"episode_id": f"ep_{i}", "answer": LONG}, "0", False) for i in range(3000)]
    wrong = sum(v["thumb"] == 1 for v in verdicts) / 3000
    corrected = sum(v["correction"] is not None for v in verdicts) / sum(v["thumb"] == -1 for v in verdicts)
    assert 0.08 < wrong < 0.12 and 0.17 < corrected < 0.23


@pytest.mark.parametrize(("arguments", "thumb"), [([], -1), (["flat"], 1)])
def test_the_program_reads_and_writes_json_lines_and_measures_without_error(arguments, thumb):
    lines = [
        json.dumps({"episode_id": f"ep_{i}", "user_id": "u", "messages": [], "answer": LONG}) for i in range(50)
    ]
    done = subprocess.run(
        [sys.executable, "-m", "flows.rater", *arguments],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "EVERLOOP_MEASURING": "1"},
    )
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert replies == [{"thumb": thumb, "correction": None}] * 50


def test_a_preference_that_does_not_exist_is_refused_with_those_that_do():
    done = subprocess.run([sys.executable, "-m", "flows.rater", "rude"], capture_output=True, text=True)
    assert done.returncode == 1 and "There are: short, brief" in done.stderr
