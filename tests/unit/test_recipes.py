"""Recipes: how they are chosen, what each makes of what people said. Nothing is trained here."""

import inspect
import json
import math
import random
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from infra.errors import InvalidRequestError
from tests.unit.test_training_data import example, texts
from trainer import recipe
from trainer.config import read_toml
from trainer.recipe import Material, Rows, UnusableDataError, names, open_recipe, resolve
from trainer.recipes import grpo
from trainer.rollout import Sample
from trainer.scoring import CUT_LOSS, LENGTH_LOSS, LOWEST_REWARD, guarded
from trainer.snapshot import Snapshot
from trainer.verify import Task, Verifier

ONE_GPU = "infra/accelerate/one-gpu.yaml"
NAMES = ["async-grpo", "best-of-n", "dpo", "grpo", "kto", "online-dpo", "self-distill", "sft"]


def nothing_fresh(*_):
    raise AssertionError("this recipe needs no samples")


def no_tasks(num_tasks):
    assert num_tasks == 0
    return []


def rows_of(
    name, examples, sample=nothing_fresh, score=nothing_fresh, tasks=no_tasks, verify=lambda *_: [], **settings
):
    chosen, config = resolve({"recipe": name, **settings})
    data = Snapshot(train=examples)
    return chosen.rows(Material(data, sample, score, tasks, verify, data.well_rated_words()), config)


def said(rows, name="completion"):
    return [row[name][0]["content"] for row in rows.rows]


def test_every_module_of_the_recipes_is_one():
    assert set(NAMES) <= set(names())
    for name in names():
        found = open_recipe(name)
        assert found.Config().recipe == name and found.summary


def test_the_default_is_a_recipe():
    found, config = resolve({})
    assert config.recipe in names() and isinstance(config, found.Config)


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ({"recipe": "online_dpo"}, "recipe_unknown", "Did you mean 'online-dpo'?"),
        ({"report_to": ["wandb"]}, "config_invalid", "'mlflow' or 'trackio'"),
        ({"recipe": "zzz"}, "recipe_unknown", "There are: async-grpo, best-of-n,"),
        ({"learningrate": 1e-4}, "config_invalid", "no setting 'learningrate'. Did you mean 'learning_rate'?"),
        ({"recipe": "kto", "num_prompts": 4}, "config_invalid", "no setting 'num_prompts'"),
        ({"epochs": 0}, "config_invalid", "epochs: Input should be greater than 0, not 0."),
        ({"epochs": "many", "seed": []}, "config_invalid", "seed:"),
        ({"max_kl": float("inf")}, "config_invalid", "max_kl: Input should be a finite number"),
        ({"batch_rows": 6}, "config_invalid", "batch_rows must be a multiple of micro_batch_rows (4)."),
        ({"recipe": "grpo", "samples_per_prompt": 6}, "config_invalid", "multiple of samples_per_prompt (6)."),
        ({"recipe": "grpo", "accelerate_config": ONE_GPU}, "config_invalid", "in one process"),
        ({"recipe": "grpo", "max_lag": 5}, "config_invalid", "max_lag: Input should be less than or equal to 4"),
        ({"recipe": "grpo", "max_row_tokens": 96}, "config_invalid", "no room beside max_answer_tokens (96)"),
        (
            {"accelerate_config": "~/none.yaml"},
            "config_invalid",
            "there is no file '~/none.yaml'.",
        ),
        ({"recipe": "self-distill", "max_train_tokens": 9}, "config_invalid", "max_train_tokens:"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_named(given, code, said):
    with pytest.raises(InvalidRequestError) as refused:
        resolve(given)
    assert refused.value.code == code and said in refused.value.message


def test_a_prompt_leaves_room_for_what_a_recipe_learns_from():
    assert resolve({"max_row_tokens": 100})[1].max_prompt_tokens == 92
    grpo_config = resolve({"recipe": "grpo", "max_row_tokens": 100, "max_answer_tokens": 60})[1]
    assert grpo_config.max_prompt_tokens == 40  # nothing is cut: answers take as much as they may
    assert (resolve({"batch_rows": 8})[1].rows_per_step, grpo_config.rows_per_step) == (8, 4)


def test_what_fills_no_whole_batch_is_counted():
    found = Rows([{"prompt": n} for n in range(11)], ["prompts"] * 11)
    kept = found.whole(4)
    assert [row["prompt"] for row in kept.rows] == list(range(8)) and kept.set_aside == {"batch_incomplete": 3}
    assert found.whole(1).rows == found.rows
    with pytest.raises(UnusableDataError, match="Only 0 rows") as refused:
        found.whole(16).check_number()
    assert (refused.value.code, refused.value.set_aside) == ("too_few_rows", {"batch_incomplete": 11})


def test_a_reporter_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(recipe.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidRequestError, match="pip install trackio") as refused:
        resolve({"report_to": ["trackio"]})
    assert refused.value.code == "reporter_missing"


def test_a_configuration_of_accelerate_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("")
    for path in (ONE_GPU, str(tmp_path / "own.yaml")):
        assert resolve({"accelerate_config": path})[1].accelerate_file.is_file()


def test_a_resolved_configuration_comes_back_from_its_file(tmp_path):
    _, config = resolve({"recipe": "dpo", "learning_rate": 1e-5, "max_memory_gib": 4.5})
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert resolve(read_toml(path))[1] == config
    assert set(tomllib.loads(config.to_toml())) == set(type(config).model_fields) - {
        "max_train_tokens",
        "accelerate_config",
        "pessimism_kappa",
    }


@pytest.mark.parametrize("raw", [b"recipe = ", b"\xff"])
def test_a_file_that_is_no_toml_is_refused(tmp_path, raw):
    path = tmp_path / "config.toml"
    path.write_bytes(raw)
    with pytest.raises(InvalidRequestError) as refused:
        read_toml(path)
    assert refused.value.code == "config_unreadable" and "config.toml" in refused.value.message


def test_dpo_takes_the_newest_of_what_says_most():
    examples = [example(f"Answer {n}.", fixed=[f"Better {n}."]) for n in range(10)]
    found = rows_of("dpo", [*examples, example("Good.", [1.0]), example("Bad.", [0.0])], max_rows=8)
    assert said(found, "chosen") == [f"Better {n}." for n in range(2, 10)]


def test_kto_takes_single_answers_and_needs_both_kinds():
    examples = [
        example("Good.", [1.0, 0.75]),
        example("Bad.", [0.0]),
        example("So.", [1.0, 0.0]),
        example("Wrong.", [1.0], ["Right."]),
    ]
    found = rows_of("kto", examples)
    labels = {text: row["label"] for text, row in zip(said(found), found.rows, strict=True)}
    assert labels == {"Good.": True, "Bad.": False, "Wrong.": False, "Right.": True}
    assert found.set_aside["neither_liked_nor_disliked"] == 1
    for verdict in (1.0, 0.0):
        with pytest.raises(UnusableDataError) as refused:
            rows_of("kto", [example("So.", [1.0, 0.0]), *(example(f"{n}.", [verdict]) for n in range(9))])
        assert refused.value.code == "one_sided_data"
        assert refused.value.set_aside == {"neither_liked_nor_disliked": 1}


def test_kto_keeps_both_kinds_where_the_newest_are_all_of_one():
    examples = [example(f"Good {n}.", [1.0]) for n in range(20)] + [example(f"Bad {n}.", [0.0]) for n in range(20)]
    found = rows_of("kto", examples, max_rows=8)
    assert said(found) == [*(f"Good {n}." for n in range(16, 20)), *(f"Bad {n}." for n in range(16, 20))]
    few = rows_of("kto", [examples[0], *examples[20:]], max_rows=8)
    assert said(few) == ["Good 0.", *(f"Bad {n}." for n in range(13, 20))]
    assert few.set_aside["rows_over_budget"] == 13


def test_sft_takes_demonstrations():
    examples = [
        example("Good.", [1.0]),
        example("Bad.", [0.0]),
        example("Wrong.", [1.0], ["Right."]),
        example("Preferred.", over=["Other."]),
    ]
    found = rows_of("sft", examples, liked_answers=True)
    assert [row["answer"] for row in found.rows] == ["Good.", "Right.", "Preferred."]
    assert [row["answer"] for row in rows_of("sft", examples, liked_answers=False).rows] == ["Right."]


def test_self_distillation_shows_the_teacher_what_people_wrote():
    examples = [example("Wrong.", fixed=["Right."]), example("Good.", [1.0]), example("Bad.", [0.0])]
    found = rows_of("self-distill", examples)
    assert [row["privileged_context"] for row in found.rows] == ["Right."]
    assert found.set_aside["no_demonstration"] == 2
    assert len(rows_of("self-distill", examples, liked_answers=True).rows) == 2


def test_online_dpo_pairs_fresh_samples_and_puts_corrections_first_when_room_is_short():
    asked = []

    def sample(prompts, num_samples):
        asked.append((len(prompts), num_samples))
        return [[Sample(f"{p[0]['content']} {'word ' * n}.", "stop") for n in (3, 4)] for p in prompts]

    def score(prompts, answers, references):
        assert all(reference.startswith("Answer") for reference in references)
        return [[1.0, 0.0] for _ in prompts]

    examples = [
        example(f"Answer {n}.", [1.0], [f"One two three four five six {n}."], f"Why {n}?") for n in range(12)
    ]
    examples += [example("Answer newer.", [1.0], ["x " * 9], "Why 1?")]
    found = rows_of("online-dpo", examples, sample, score, num_prompts=10, max_rows=20, samples_per_prompt=2)
    assert asked == [(10, 2)]
    assert found.sources == ["samples"] * 7 + ["corrections"] * 13 and found.set_aside["rows_over_budget"] == 3
    assert rows_of("online-dpo", examples, sample, score, num_prompts=10, max_rows=20, seed=1).rows != found.rows


def test_samples_whose_rewards_do_not_differ_are_no_reason_to_train():
    def sample(prompts, num_samples):
        return [[Sample(f"Sample {n}.", "stop") for n in range(num_samples)] for _ in prompts]

    def score(prompts, answers, references):
        return [[1.0 + 0.001 * n for n in range(len(group))] for group in answers]

    examples = [example(f"Answer {n}.", [1.0], prompt=f"Why {n}?") for n in range(12)]
    with pytest.raises(UnusableDataError, match="hardly differ") as held:
        rows_of("online-dpo", examples, sample, score, min_margin=0.0)
    assert held.value.code == "no_reward_spread"
    corrected = [*examples, *(example(f"Long {n}.", fixed=[f"Short {n}."], prompt=f"How {n}?") for n in range(8))]
    found = rows_of("online-dpo", corrected, sample, score)
    assert found.sources == ["corrections"] * 8 and 0.0 < found.facts["reward_spread"] < 0.01


def test_grpo_asks_prompts_and_tasks_in_a_seeded_order():
    examples = [example(f"Answer {n}.", [1.0], prompt=f"Why {n}?") for n in range(20)]

    def tasks(num_tasks):
        return [Task(f"v/{n}", [{"role": "user", "content": f"Task {n}"}], {"n": n}) for n in range(num_tasks)]

    settings = {"max_rows": 16, "verifiable_share": 0.25}
    found = rows_of("grpo", examples, tasks=tasks, **settings)
    assert sorted(found.sources) == ["prompts"] * 12 + ["tasks"] * 4
    assert found.sources != sorted(found.sources)
    assert rows_of("grpo", examples, tasks=tasks, **settings).rows == found.rows
    kept = next(row for row in found.rows if row["task"])
    assert json.loads(kept["task"])["skill"].startswith("v/") and kept["reference"] == ""


def reward_of(function, prompts, texts, reference, task, finish_reason=None):
    logged = {}
    found = function(
        prompts=[[{"role": "user", "content": text}] for text in prompts],
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        reference=reference,
        task=task,
        finish_reason=finish_reason or ["stop"] * len(texts),
        log_metric=logged.__setitem__,
        extra="ignored",
    )
    return found, logged


def test_answers_to_prompts_have_the_learned_reward_and_answers_to_tasks_the_verifiers():
    asked = []

    def score(prompts, answers, references):
        asked.append((prompts, answers, references))
        return [[float(len(text.split())) for text in group] for group in answers]

    def verify(tasks, answers):
        assert [task.key for task in tasks] == [{"n": 1}] * 2
        return [[1.0 if group == ["right"] else None] for group in answers]

    material = Material(Snapshot(), nothing_fresh, score, no_tasks, verify, (0, 100))
    task = json.dumps({"skill": "v/one", "key": {"n": 1}})
    batch = (
        ["Why?", "Why?", "Do.", "Do."],
        ["one two", "one two three four five", "right", "wrong"],
        ["ref", "ref", "", ""],
        ["", "", task, task],
    )
    found, logged = reward_of(grpo.learned(material, (1, 4), 2), *batch)
    # The second is longer by a quarter than anybody rated well.
    assert found == [2.0, pytest.approx(-LENGTH_LOSS * math.log2(5 / 4)), None, None]
    assert logged == {"reward_spread": 1.5, "reward_not_finite": 0.0} and asked[0][2] == ["ref"]
    cut, _ = reward_of(grpo.learned(material, (1, 9), 2), *batch, finish_reason=["length", "stop", "stop", "stop"])
    assert cut[:2] == [2.0 - CUT_LOSS, 5.0]
    verdicts, _ = reward_of(grpo.verified(material), *batch)
    assert verdicts == [None, None, 1.0, None]


def test_a_reward_that_is_no_number_is_none_to_learn_from():
    material = Material(Snapshot(), nothing_fresh, lambda *_: [[math.nan, 1.0]], no_tasks, lambda *_: [], (0, 100))
    found, logged = reward_of(grpo.learned(material, (0, 9), 2), ["Why?"] * 2, ["a", "b"], ["r"] * 2, [""] * 2)
    assert found == [None, 1.0] and logged["reward_not_finite"] == 1.0


def test_a_share_of_the_prompts_of_online_dpo_are_tasks():
    def tasks(num_tasks):
        return [Task(f"v/{n}", [{"role": "user", "content": f"Task {n}"}]) for n in range(num_tasks)]

    def sample(prompts, num_samples):
        return [[Sample(f"{prompt[0]['content']} {n}", "stop") for n in range(num_samples)] for prompt in prompts]

    def score(prompts, answers, references):
        assert len(prompts) == len(references) == 9
        return [[float(n) for n in range(len(group))] for group in answers]

    def verify(judged, answers):
        return [[float(n == 1) for n in range(len(group))] for group in answers]

    examples = [example(f"Answer {n}.", [1.0], prompt=f"Why {n}?") for n in range(12)]
    found = rows_of(
        "online-dpo", examples, sample, score, tasks, verify, num_prompts=12, verifiable_share=0.25, max_rows=40
    )
    assert found.sources.count("tasks") == 3
    chosen = [row["chosen"][0]["content"] for row in found.rows if row["prompt"][0]["content"].startswith("Task")]
    assert chosen == ["Task 0 1", "Task 1 1", "Task 2 1"]


def test_the_further_a_length_is_from_what_people_rated_well_the_more_it_loses():
    texts = ["a " * n for n in (1, 2, 4, 8, 16, 32)]
    found = guarded([0.0] * 6, texts, [True] * 6, (4, 8))
    assert found == [-2 * LENGTH_LOSS, -LENGTH_LOSS, 0.0, 0.0, -LENGTH_LOSS, -2 * LENGTH_LOSS]
    # What a reward says of lengths that nobody rated well is not believed, unless it is bad.
    found = guarded([5.0, 5.0, -1.0], ["a", "a a a a", "a"], [True] * 3, (2, 8))
    assert found == [-LENGTH_LOSS, 5.0, -1.0 - LENGTH_LOSS]
    assert guarded([0.0, -7.9], ["", "a"], [True, False], (400, 500)) == [LOWEST_REWARD] * 2


def test_best_of_n_imitates_corrections_and_the_samples_that_stand_out(monkeypatch):
    lengths = {"0": (9, 1, 1), "1": (2, 1, 1), "2": (1, 1, 1), "3": (2, 2, 40)}  # 40 words were never rated well

    def sample(prompts, num_samples):
        assert num_samples == 3
        return [[Sample("w " * words, "stop") for words in lengths[prompt[0]["content"]]] for prompt in prompts]

    def score(prompts, answers, references):
        return [[float(len(text.split())) for text in group] for group in answers]

    rated = {"0": 9, "1": 1, "2": 2, "3": 9}
    examples = [example("w " * words, [1.0], prompt=prompt) for prompt, words in rated.items()]
    examples.append(example("Long.", fixed=["Short one."], prompt="4"))
    lengths["4"] = (1, 1, 1)
    monkeypatch.setattr("trainer.recipe.MIN_ROWS", 1)
    settings = {"samples_per_prompt": 3, "min_margin": 0.5, "verifiable_share": 0.0}
    found = rows_of("best-of-n", examples, sample, score, **settings)
    # The sample that stands out most comes last of the samples, where room is short; corrections before all others.
    assert [(row["prompt"][0]["content"], len(row["answer"].split())) for row in found.rows] == [
        ("1", 2),
        ("0", 9),
        ("4", 2),
    ]
    assert found.sources == ["samples", "samples", "corrections"] and found.facts["reward_spread"] > 0
    assert found.set_aside["margin_too_small"] == 3  # of two all samples are alike; of "3" the best is disallowed


def test_a_share_of_the_rows_of_best_of_n_are_right_answers_to_tasks():
    def tasks(num_tasks):
        return [Task("v/one", [{"role": "user", "content": f"Task {n}"}]) for n in range(num_tasks)]

    def sample(prompts, num_samples):
        return [[Sample("wrong", "stop"), Sample("right", "stop")] for _ in prompts]

    def score(prompts, answers, references):
        value = {"wrong": 0.0, "right": 1.0}
        return [[value.get(text, 2.0) for text in group] for group in answers]

    def verify(judged, answers):
        return [[0.0, 1.0] for _ in judged]

    examples = [example(f"Answer {n}.", fixed=[f"Short {n}."], prompt=f"Why {n}?") for n in range(40)]
    settings = {"samples_per_prompt": 2, "max_rows": 24}  # room for 18 rows besides, 3 of them for samples
    found = rows_of("best-of-n", examples, sample, score, tasks, verify, **settings, verifiable_share=0.25)
    assert found.sources == ["tasks"] * 6 + ["corrections"] * 15  # no sample is as good as a correction
    assert [row["answer"] for row in found.rows[:6]] == ["right"] * 6
    assert found.set_aside["rows_over_budget"] == 25
    without = rows_of("best-of-n", examples, sample, score, **settings, verifiable_share=0.0)
    assert without.sources == ["corrections"] * 20
    untaught = [example(f"Answer {n}.", [1.0], prompt=f"Why {n}?") for n in range(40)]
    with pytest.raises(UnusableDataError, match="Only 0 rows"):
        rows_of("best-of-n", untaught, sample, score, tasks, verify, **settings, min_margin=9.0)


def test_best_of_n_imitates_no_sample_that_improves_less_than_corrections_do():
    def sample(prompts, num_samples):
        best = [6 if prompt[0]["content"] == "8" else 4 for prompt in prompts]
        return [[Sample("w " * words, "stop") for words in (1, 1, longest)] for longest in best]

    def score(prompts, answers, references):
        return [
            [float(len(text.split()) - len(reference.split())) for text in group]
            for group, reference in zip(answers, references, strict=True)
        ]

    def found(corrected):
        examples = [example("w " * 3, fixed=["w " * 6], prompt=str(n)) for n in range(corrected)]
        examples.append(example("w", [1.0], prompt="8"))
        settings = {"samples_per_prompt": 3, "min_margin": 0.5, "verifiable_share": 0.0}
        return rows_of("best-of-n", examples, sample, score, **settings)

    many = found(8)
    assert many.sources == ["samples"] + ["corrections"] * 8 and len(many.rows[0]["answer"].split()) == 6
    assert many.set_aside["worse_than_corrections"] == 8
    assert found(7).sources == ["samples"] * 8 + ["corrections"] * 7  # too few to ask that much


def test_best_of_n_without_spread_needs_corrections():
    def sample(prompts, num_samples):
        return [[Sample(f"Sample {n}.", "stop") for n in range(num_samples)] for _ in prompts]

    examples = [example(f"Answer {n}.", [1.0], prompt=f"Why {n}?") for n in range(12)]
    with pytest.raises(UnusableDataError) as held:
        rows_of("best-of-n", examples, sample, lambda p, a, r: [[1.0] * len(g) for g in a], verifiable_share=0.0)
    assert held.value.code == "no_reward_spread"


def on_the_page(marker):
    """Return the code block of docs/training.md that holds a text."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if marker in code]
    return block


def test_the_recipe_that_the_page_shows_works_in_a_new_file_with_its_test(tmp_path, monkeypatch):
    (tmp_path / "my_own.py").write_text(on_the_page("class Mine"))
    monkeypatch.setattr(recipe.recipes, "__path__", [*recipe.recipes.__path__, str(tmp_path)])
    mine, config = resolve({"recipe": "my-own", "beta": 0.2})
    assert "my-own" in names() and config.beta == 0.2
    shown = {"rows_of": rows_of, "example": example, "texts": texts}
    exec(on_the_page("def test_mine"), shown)
    shown["test_mine_learns_from_corrections"]()
    wanted = inspect.signature(open_recipe("dpo").trainer).parameters
    assert list(inspect.signature(mine.trainer).parameters) == list(wanted)


def test_the_verifier_that_the_page_shows_works():
    shown = {"Any": Any, "random": random, "Verifier": Verifier}
    exec(on_the_page("class Sums"), shown)
    verifier = shown["Sums"]()
    question, key = verifier.task("small", 3)
    assert question.startswith("What is ")
    assert (
        verifier.judge("small", key, f"It is {key['sum']}.") == 1.0 and verifier.judge("small", key, "No.") == 0.0
    )
