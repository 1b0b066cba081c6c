"""The ``online-dpo`` recipe's training half: DPO on pairs, with TRL and PEFT.

References
----------
Rafailov et al. (2023), Direct Preference Optimization, arXiv 2305.18290.
Guo et al. (2024), Direct Language Model Alignment from Online AI Feedback, arXiv 2402.04792.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from trainer.config import OnlineDPOConfig
from trainer.pairs import Pair


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Reports steps and writes each log entry to ``metrics.jsonl``."""

    def __init__(self, metrics_path: Path, on_step: Callable[[int, int], None]) -> None:
        self.metrics_path = metrics_path
        self.on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_step(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        with self.metrics_path.open("a") as file:
            file.write(json.dumps({"phase": "train", "step": state.global_step, **(logs or {})}) + "\n")


def train(
    model_dir: Path,
    start_from: Path | None,
    pairs: Sequence[Pair],
    config: OnlineDPOConfig,
    run_dir: Path,
    on_step: Callable[[int, int], None],
) -> Path:
    """Train an adapter on `pairs` and return the directory that holds it.

    Parameters
    ----------
    start_from
        The champion's adapter, which the run goes on from and stays close to; None for the base model.
    on_step
        Called with (step, number of steps).
    """
    torch.manual_seed(config.seed)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if start_from is None:
        lora = LoraConfig(
            r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, lora)
    else:
        model = PeftModel.from_pretrained(model, str(start_from), is_trainable=True)
    trainer = DPOTrainer(
        model=model,
        args=_arguments(config, run_dir),
        train_dataset=Dataset.from_list([_row(pair) for pair in pairs]),
        processing_class=tokenizer,
        callbacks=[_Progress(run_dir / "metrics.jsonl", on_step)],
    )
    trainer.train()
    adapter_dir = run_dir / "adapter"
    trainer.model.save_pretrained(str(adapter_dir), selected_adapters=["default"], safe_serialization=True)
    return adapter_dir


def _arguments(config: OnlineDPOConfig, run_dir: Path) -> DPOConfig:
    losses: dict[str, Any] = {}
    if config.sft_weight:
        losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, config.sft_weight]}
    return DPOConfig(
        output_dir=str(run_dir / "checkpoints"),
        beta=config.beta,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.micro_batch_pairs,
        gradient_accumulation_steps=max(1, config.batch_pairs // config.micro_batch_pairs),
        max_length=config.max_pair_tokens,
        bf16=False,  # the weights are bf16 already; autocast only adds copies on the CPU
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=config.seed,
        **losses,
    )


def _row(pair: Pair) -> dict[str, Any]:
    return {
        "prompt": pair.messages,
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }
