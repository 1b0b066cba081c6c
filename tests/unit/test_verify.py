"""Verifiers: tasks and verdicts are reproducible, and one that misbehaves costs its task and nothing else."""

import json
import subprocess
import sys
from contextlib import closing

import pytest

from infra.errors import EverloopError, InvalidRequestError
from trainer import skills, verify
from trainer.pairs import right_against_wrong, right_ones
from trainer.recipe import resolve
from trainer.rollout import Sample
from trainer.verifiers.instructions import INSTRUCTIONS
from trainer.verifiers.instructions import VERIFIER as INSTRUCTIONS_VERIFIER
from trainer.verifiers.reasoning import LEVELS, _Absent, found_in
from trainer.verifiers.reasoning import VERIFIER as REASONING_VERIFIER
from trainer.verify import Task, Verification

NAMES = ["instructions", "reasoning"]


PLUG_IN = """
import math, time
from trainer.verify import Verifier

class Unruly(Verifier):
    skills = ("fine", "hangs", "raises", "nonsense", "too_much", "no_task", "single")

    def task(self, skill, seed):
        if skill == "no_task":
            raise RuntimeError("none today")
        if skill == "single":
            return "The only one.", {"right": "yes"}
        return f"Do it {seed}.", {"right": "yes"}

    def judge(self, skill, key, answer):
        if skill == "hangs":
            time.sleep(3600)
        if skill == "raises":
            raise ValueError(answer)
        return {"nonsense": math.nan, "too_much": 2.0}.get(skill, float(answer == key["right"]))
"""


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Install a package with a verifier that does what its skill says."""
    (tmp_path / "unruly.py").write_text(PLUG_IN)
    metadata = tmp_path / "unruly-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: unruly\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{verify.ENTRY_POINTS}]\nunruly = unruly:Unruly\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture(scope="module")
def verification():
    with closing(Verification(NAMES, 20.0)) as found:
        yield found


def test_tasks_are_the_same_for_the_same_seed_and_others_for_another(verification):
    one, again, other = (verification.judging_tasks(2, seed) for seed in (1, 1, 2))
    assert one == again and one != other
    assert sorted({task.skill for task in one}) == sorted(
        [f"instructions/{skill}" for skill in INSTRUCTIONS] + [f"reasoning/{skill}" for skill in LEVELS]
    )
    assert len(one) == 2 * (len(INSTRUCTIONS) + len(LEVELS))
    assert not verification.pop_faults()


def test_the_skills_take_turns(verification):
    found = [task.skill for task in verification.training_tasks(20, 3)]
    assert len(found) == 20 and max(map(found.count, found)) == 2
    assert verification.training_tasks(0, 3) == []


def test_no_task_that_judges_ever_trains_whatever_the_seeds(verification):
    judging = [json.dumps(task.messages) for seed in range(3) for task in verification.judging_tasks(8, seed)]
    training = [json.dumps(task.messages) for seed in range(3) for task in verification.training_tasks(128, seed)]
    assert len(judging) == len(training) == 3 * 128
    assert len(set(judging)) > 150 and len(set(training)) > 200  # they do repeat: there are not many small sums
    assert not set(judging) & set(training)


def test_a_verifier_with_a_single_task_has_it_judge_or_train(plug_in):
    with closing(Verification(["unruly"], 5.0)) as found:
        both = [
            [task.skill for task in tasks if task.skill == "unruly/single"]
            for tasks in (found.judging_tasks(1, 1), found.training_tasks(7, 1))
        ]
        assert sorted(both) == [[], ["unruly/single"]]
        assert found.pop_faults() == {"verifier_failed": 2, "no_task_of_this_part": 1}


def test_all_that_takes_long_is_there_before_the_first_tasks_time_runs():
    script = """
import sys
from trainer import verify
verify._warm_up(verify.names())
before = set(sys.modules)
for name in verify.names():
    for skill in verify.open_verifier(name).skills:
        verify._judge((verify._make((f"{name}/{skill}", 1)), "an answer, and 3 more words."))
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == [], done.stdout + done.stderr[-500:]


def test_what_stands_for_an_absent_package_has_no_file():
    """Hypothesis, for one, asks all modules for theirs."""
    stand_in = _Absent("not_installed")
    assert stand_in.Anything is object and not hasattr(stand_in, "__file__")


@pytest.mark.parametrize("skill", LEVELS)
def test_the_right_answer_to_a_puzzle_is_right(skill):
    question, key = REASONING_VERIFIER.task(skill, 11)
    assert question and REASONING_VERIFIER.judge(skill, key, f"Let me think of 99. It is {key['answer']}.") == 1.0
    assert REASONING_VERIFIER.judge(skill, key, "I do not know it.") == 0.0


@pytest.mark.parametrize(
    ("answer", "right", "is_found"),
    [
        ("7 + 3 = 10.", "10", True),
        ("10 is what 7 + 3 makes", "10", False),
        ("It is 100", "10", False),
        ("Yes, it follows.", "Yes", False),
        ("The answer is yes.", "Yes", True),
        ("waiting, country, callers", "country, callers", True),
        ("callers, country", "country, callers", False),
        ("-3", "3", False),
        ("", "3", False),
    ],
)
def test_what_an_answer_ends_with_counts(answer, right, is_found):
    assert found_in(answer, right) is is_found


@pytest.mark.parametrize(
    ("skill", "followed", "broken"),
    [
        ("no_comma", "One two.", "One, two."),
        ("lowercase", "it is cold today, so we stay at home.", "It is cold today."),
        ("few_words", "It is so.", "word " * 60),
        ("quotation", '"It is so."', "It is so."),
        ("bullets", "* one\n* two\n* three", "* one\n* two"),
        ("title", "<<cats>>\nThey purr.", "Cats. They purr."),
        ("numbers", "It has 4 legs.", "It has legs."),
        ("word_range", "word " * 30, "word " * 80),
    ],
)
def test_an_instruction_is_followed_or_not(skill, followed, broken):
    _, key = INSTRUCTIONS_VERIFIER.task(skill, 5)
    assert INSTRUCTIONS_VERIFIER.judge(skill, key, followed) == 1.0
    assert INSTRUCTIONS_VERIFIER.judge(skill, key, broken) == 0.0
    assert INSTRUCTIONS_VERIFIER.judge(skill, key, "  ") == 0.0


@pytest.mark.parametrize("skill", ["keywords", "end_phrase"])
def test_what_an_instruction_asks_for_is_in_its_key(skill):
    _, key = INSTRUCTIONS_VERIFIER.task(skill, 5)
    wanted = " ".join([*key["asked"].get("keywords", []), key["asked"].get("end_phrase", "")])
    assert INSTRUCTIONS_VERIFIER.judge(skill, key, wanted.strip()) == 1.0
    assert INSTRUCTIONS_VERIFIER.judge(skill, key, "It is so.") == 0.0


def test_a_plug_in_that_hangs_raises_or_talks_nonsense_is_counted_and_the_others_go_on(plug_in):
    assert verify.names() == [*NAMES, "unruly"]
    with closing(Verification(["unruly"], 2.0)) as found:
        tasks = [task for task in found.judging_tasks(1, 1) if task.skill != "unruly/single"]
        assert [task.skill.removeprefix("unruly/") for task in tasks] == [
            "fine", "hangs", "raises", "nonsense", "too_much"
        ]  # fmt: skip
        assert found.pop_faults() == {"verifier_failed": 1}
        assert found.judge(tasks, [["yes", "no"]] * 5) == [[1.0, 0.0], *[[None, None]] * 4]
        assert found.pop_faults() == {"verifier_timed_out": 2, "verifier_failed": 2, "verifier_not_a_score": 4}
        assert not found.pop_faults()


def test_a_process_that_takes_the_place_of_a_killed_one_has_time_to_open_its_verifiers(plug_in, tmp_path):
    slow = (tmp_path / "unruly.py").read_text().replace("import math, time", "import math, time; time.sleep(1.5)")
    (tmp_path / "unruly.py").write_text(slow)
    with closing(Verification(["unruly"], 2.0)) as found:
        tasks = [Task(f"unruly/{skill}", [], {"right": "yes"}) for skill in ("fine", "hangs", "fine")]
        assert found.judge(tasks, [["yes"]] * 3) == [[1.0], [None], [1.0]]


def test_a_verifier_that_hangs_when_it_is_opened_ends_the_run_with_that_reason(plug_in, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "OPENING_TIMEOUT_S", 2.0)
    (tmp_path / "unruly.py").write_text("import time; time.sleep(3600)")
    with closing(Verification(["unruly"], 2.0)) as found, pytest.raises(EverloopError, match="unruly") as hung:
        found.judging_tasks(1, 1)
    assert hung.value.code == "verifier_hangs"


def test_a_verifier_that_does_not_exist_is_named_with_the_nearest():
    with pytest.raises(InvalidRequestError, match="'reasoning'") as refused:
        resolve({"verifiers": ["reasonning"]})
    assert refused.value.code == "verifier_unknown"


def test_the_best_answer_to_a_task_is_paired_with_its_worst():
    tasks = [Task(f"v/{n}", [{"role": "user", "content": f"{n}?"}]) for n in range(5)]
    texts = [[Sample(text, "stop") for text in ("a", "b", "c")]] * 4 + [[]]
    found = right_against_wrong(
        tasks, texts, [[0.0, 1.0, None], [1.0, 1.0, 1.0], [0.0, None, 0.0], [None, None, None], []]
    )
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in found.rows] == [("b", "a")]
    assert found.set_aside == {
        "task_all_right": 1,
        "task_all_wrong": 1,
        "task_not_judged": 1,
        "prompt_refused": 1,
    }


def test_of_each_task_the_best_answer_that_ended_by_itself_is_imitated_if_it_is_right():
    tasks = [Task(f"v/{n}", [{"role": "user", "content": f"{n}?"}]) for n in range(5)]
    ended = [Sample("a", "length"), Sample("b", "stop"), Sample("c", "stop")]
    verdicts = [[1.0, 0.5, 0.9], [1.0, 1.0, 1.0], [1.0, 0.4, 0.0], [1.0, None, None], []]
    found = right_ones(tasks, [ended] * 4 + [[]], verdicts)
    assert [(row["prompt"][0]["content"], row["answer"]) for row in found.rows] == [("0?", "c"), ("1?", "b")]
    assert found.sources == ["tasks"] * 2
    assert found.set_aside == {"task_not_solved": 2, "prompt_refused": 1}


def test_skills_are_measured_by_what_could_be_judged():
    class Judge:
        def judge(self, tasks, answers):
            assert answers == [["a"], [], ["b"]]
            return [[1.0], [], [None]]

    tasks = [Task("v/one", []), Task("v/two", []), Task("v/one", [])]
    found = skills.measure(Judge(), tasks, lambda prompts: [[Sample("a", "stop")], [], [Sample("b", "stop")]])
    assert found == {"v/one": [1.0], "v/two": []}
    assert skills.table(found) == {"v/one": {"rate": 1.0, "n": 1}}
