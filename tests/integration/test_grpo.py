"""GRPO on the engine that serves: real ids and log-probabilities, versions, and trying a run as it trains."""

import asyncio
import json
import subprocess
from contextlib import closing

import openai
import pytest
from safetensors.torch import load_file

from deploy.runs import METRICS_FILE
from feedback.tables import Episode
from infra.engine import EngineClient
from tests.conftest import EVERLOOP, wait_until
from tests.unit.test_training_data import example
from trainer import loop
from trainer.grpo import sampler
from trainer.policy import ServedPolicy
from trainer.recipe import Material, resolve
from trainer.rollout import Sampling
from trainer.snapshot import Snapshot
from trainer.verify import Task

ASK = [{"role": "user", "content": "Why?"}]
SETTINGS = {
    "batch_rows": 8,
    "micro_batch_rows": 8,
    "samples_per_prompt": 2,
    "max_rows": 8,
    "max_answer_tokens": 12,
    "max_row_tokens": 64,
    "lora_rank": 4,
    "learning_rate": 1e-3,
    "checkpoint_steps": 2,
}


def material_of(policy):
    """Prompts whose shortest answers are best, and a task that no answer solves."""
    data = Snapshot(train=[example("It is so.", [1.0], prompt=f"What is {n}?") for n in range(6)])

    def score(prompts, answers, references):
        return [[-0.1 * len(text) for text in group] for group in answers]

    def tasks(num_tasks):
        return [Task("v/one", [{"role": "user", "content": f"Say {n}."}], {"n": n}) for n in range(num_tasks)]

    def verify(judged, answers):
        return [[float(len(text) % 2) for text in group] for group in answers]

    return Material(data, None, score, tasks, verify, (0, 100), policy)


@pytest.fixture
def policy(stack, tmp_path):
    directory = tmp_path / "run_of_grpo"
    directory.mkdir()
    with closing(
        ServedPolicy(stack.settings.need("engine_url"), directory, engine_key=stack.settings.engine_key)
    ) as found:
        yield found


def train(stack, policy, on_step=lambda *_: None, **more):
    recipe, config = resolve({"recipe": "grpo", "verifiable_share": 0.25, **SETTINGS, **more})
    material = material_of(policy)
    run_dir = policy.directory.parent
    trained = loop.train(
        recipe,
        config,
        recipe.rows(material, config).rows,
        material=material,
        model_dir=stack.settings.base_model_dir,
        start_from=None,
        run_dir=run_dir,
        on_step=on_step,
    )
    lines = [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
    return trained, [line for line in lines if "loss" in line]


def chat(*arguments):
    return subprocess.run([*EVERLOOP, "chat", *arguments], capture_output=True, text=True)


def lose(stack, name):
    """Have the engine forget an adapter, as one that was started anew has."""

    async def unload():
        async with EngineClient(stack.settings.need("engine_url"), stack.settings.engine_key) as engine:
            await engine.unload_adapter(name)

    asyncio.run(unload())
    assert served(stack) == []


def served(stack):
    return [model.id for model in stack.openai.models.list() if model.id.startswith("run/")]


def test_the_engine_reports_what_it_samples_from_and_what_it_has_to_do(stack):
    async def look():
        async with EngineClient(stack.settings.need("engine_url"), stack.settings.engine_key) as engine:
            return await engine.logprobs_are_processed("base"), await engine.num_requests()

    wait_until(lambda: asyncio.run(look()) == (True, 0), what="it is being proved, or has something to do for good")


def test_a_policy_trains_on_its_own_answers_and_can_be_tried_meanwhile(stack, policy):
    tried = []

    def try_it(step, _):
        if step == 2:
            name = f"run/{policy.run_id}@latest"
            assert served(stack) == [name]
            tried.append(stack.ask(model=name, user="curious"))
            with pytest.raises(openai.NotFoundError) as unknown:
                stack.ask(model="run/run_other@latest", user="curious")
            assert unknown.value.code == "model_not_found"
            told, refused = (chat("--adapter", one, "Why?") for one in (name, "run/run_other@latest"))
            assert told.returncode == 0 and told.stdout.strip(), told.stderr
            assert refused.returncode == 1 and "[model_not_found]" in refused.stderr, refused.stderr
            lose(stack, policy.name)
            (group,) = sampler(policy, Sampling(4), 2, seed=0)(policy.name, [ASK], 1)
            assert [one.model for one in group] == [policy.name] * 2 and served(stack) == [name]

    trained, lines = train(stack, policy, on_step=try_it)
    assert trained.num_steps == 2 == len(lines)
    assert policy.version == 2  # one for each step, made before it
    assert tried[0].model == f"run/{policy.run_id}@2" and tried[0].choices[0].message.content
    with stack.sessions() as session:
        episode = session.get(Episode, tried[0].id)
        assert not episode.learn and episode.release == tried[0].model  # nobody learns from what is no release
    weights = load_file(trained.adapter_dir / "adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    # Trainer and engine hold each token for nearly as probable: ids and log-probabilities are the policy's own.
    for line in lines:
        assert abs(line["sampling/importance_sampling_ratio/mean"] - 1.0) < 0.15
        assert line["sampling/importance_sampling_ratio/max"] <= 2.0
        assert line["rollout/lag"] == 0.0 and line["rollout/dropped"] == 0.0
    assert any(line.get("reward_spread", 0.0) > 0.0 for line in lines)
    assert any(line["rewards/verdict/mean"] is not None for line in lines)
    policy.close()
    assert served(stack) == []


@pytest.mark.slow
def test_answers_sampled_ahead_are_of_an_older_version_and_weighed_by_what_they_were_sampled_from(stack, policy):
    _, lines = train(stack, policy, rollouts_ahead=1, temperature=0.7, top_p=0.9)
    assert [line["rollout/lag"] for line in lines] == [0.0, 1.0]
    # Answers came from fewer tokens than the policy has, so the engine held each for more probable.
    assert all(0.7 < line["sampling/importance_sampling_ratio/mean"] < 1.0 for line in lines)
