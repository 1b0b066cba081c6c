"""Asynchronous GRPO as far as a CPU goes: its configuration, the hand-over of adapters, the bound on their age."""

import asyncio
import pickle
import queue
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl.experimental.async_grpo import async_grpo_trainer
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from infra.engine import EngineClient, mean_abs_difference
from infra.errors import EverloopError
from infra.settings import Settings
from infra.stack.parts import MAX_LORAS
from trainer import loop
from trainer.policy import ServedPolicy
from trainer.recipe import Material, resolve
from trainer.recipes.async_grpo import RunReward
from trainer.snapshot import Snapshot

PROBE = "The capital of France is"


@pytest.fixture
def arguments(tmp_path):
    recipe, config = resolve({"recipe": "async-grpo", "top_k": 40})
    return recipe.arguments(config, loop.arguments(config, tmp_path), "http://engine"), config


@pytest.fixture(scope="module")
def policy_model(base_model_dir):
    torch.manual_seed(0)
    _, config = resolve({"recipe": "async-grpo"})
    model = AutoModelForCausalLM.from_pretrained(base_model_dir, dtype=torch.bfloat16)
    lora = LoraConfig(r=config.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def test_the_configuration_is_trls(arguments):
    found, config = arguments
    assert found.max_staleness == config.max_lag == 4 and found.num_generations == config.samples_per_prompt
    assert (found.top_k, found.vllm_server_base_url, found.learning_rate) == (40, "http://engine", 3e-4)


def test_our_engine_holds_as_many_versions_as_the_bound_allows(arguments, policy_model, tmp_path):
    server = {
        "lora_config": {"max_lora_rank": Settings(home=tmp_path).max_lora_rank, "max_loras": MAX_LORAS},
        "parallel_config": {"data_parallel_size": 1},
    }
    assert async_grpo_trainer.select_adapter_sync(server, policy_model, arguments[0])


def test_an_adapter_is_handed_to_the_engine_as_trl_does_it(stack, policy_model, tmp_path):
    name = "trl-policy-v1"
    directory = tmp_path / name
    async_grpo_trainer.save_lora_adapter(policy_model, Accelerator(cpu=True), "default", str(directory))

    async def serve():
        async with EngineClient(stack.settings.need("engine_url"), stack.settings.engine_key) as engine:
            await engine.load_adapter(name, directory)
            try:
                return [await engine.prompt_logprobs(model, PROBE) for model in (name, "base")]
            finally:
                await engine.unload_adapter(name)

    theirs, base = asyncio.run(serve())
    assert mean_abs_difference(theirs, base) > 0.05


def test_answers_of_versions_too_far_behind_are_dropped_and_counted(arguments):
    waiting, metrics = queue.Queue(), defaultdict(list)
    for version in (0, 3, 4, 8):
        sample = SimpleNamespace(**dict.fromkeys(RolloutSample.__dataclass_fields__))
        sample.model_version, sample.group_id = version, version
        waiting.put(sample)
    data = async_grpo_trainer.RolloutQueueDataset(
        waiting, lambda: 8, lambda stale: None, 60.0, metrics, max_staleness=arguments[0].max_staleness
    )
    rows = iter(data)
    assert [next(rows)["group_id"] for _ in range(2)] == [4, 8]
    assert metrics["sample/dropped_stale_total"] == [1.0, 1.0]


def test_without_a_gpu_it_says_so_and_what_to_do(tmp_path):
    recipe, config = resolve({"recipe": "async-grpo"})
    material = Material(Snapshot(), None, None, None, None, (0, 100), ServedPolicy("http://engine", tmp_path))
    with pytest.raises(EverloopError, match="grpo does the same in turns") as refused:
        recipe.trainer(config, {}, {}, material)
    assert refused.value.code == "gpu_needed"


def test_a_reward_goes_to_another_process_without_what_it_has_open():
    reward = RunReward("run_1", "learned", max_tokens=3)
    reward._reward = lambda finish_reason, completion_ids, **_: [float(r == "stop") for r in finish_reason]
    ids = [[1, 2], [1, 2, 3]]
    assert reward(prompts=[[], []], completions=[[], []], completion_ids=ids) == [1.0, 0.0]
    copy = pickle.loads(pickle.dumps(reward))
    assert copy._reward is None and (copy.run_id, copy.__name__, copy.max_tokens) == ("run_1", "learned", 3)
