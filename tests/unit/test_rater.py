"""The built-in rater of the demo, as the program that it is."""

import json
import os
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from flows.rater import as_it_should_be, likes, rate

LONG = "This is a sentence that goes on. " * 12


@given(st.text(alphabet=st.characters(categories=["L", "Zs", "Po"]), min_size=1).filter(lambda t: t.strip()))
def test_a_correction_is_what_the_rater_likes(answer):
    assert likes(as_it_should_be(answer))


def test_about_a_tenth_of_votes_is_wrong_and_a_fifth_of_down_votes_corrected():
    verdicts = [rate({"episode_id": f"ep_{i}", "answer": LONG}, "0", False) for i in range(3000)]
    wrong = sum(v["thumb"] == 1 for v in verdicts) / 3000
    corrected = sum(v["correction"] is not None for v in verdicts) / sum(v["thumb"] == -1 for v in verdicts)
    assert 0.08 < wrong < 0.12 and 0.17 < corrected < 0.23


def test_the_program_reads_and_writes_json_lines_and_measures_without_error():
    lines = [
        json.dumps({"episode_id": f"ep_{i}", "user_id": "u", "messages": [], "answer": LONG}) for i in range(50)
    ]
    done = subprocess.run(
        [sys.executable, "-m", "flows.rater"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "EVERLOOP_MEASURING": "1"},
    )
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert replies == [{"thumb": -1, "correction": None}] * 50
