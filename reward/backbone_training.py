"""Training of the reward backbone: TRL's RewardTrainer on judged pairs, LoRA on the layers that the encoder uses.

Imports torch, TRL and PEFT; import it where a backbone is trained, and nowhere else.

References
----------
Bradley and Terry (1952); Ouyang et al. (2022), Training language models to follow instructions with human
feedback, arXiv 2203.02155 (the loss); Hu et al. (2021), LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import RewardConfig, RewardTrainer

from reward.backbone_config import BackboneConfig
from reward.judged import Judged


class _Budget(TrainerCallback):  # type: ignore[misc]
    """Ends the training after `max_s` seconds; what was learned by then is kept."""

    def __init__(self, max_s: float) -> None:
        self.max_s = max_s
        self._started_s = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() - self._started_s > self.max_s:
            control.should_training_stop = True


def train(
    model_dir: Path,
    layer: int,
    pairs: Sequence[Judged],
    config: BackboneConfig,
    work_dir: Path,
    num_threads: int | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Train an adapter on `pairs`; return the directory that holds it, and what the training came to.

    Parameters
    ----------
    layer
        Layers of the base model that are kept; the reward is read off the last of them, as the features are.
    work_dir
        Holds what the training writes; the caller removes it.

    Returns
    -------
    tuple
        Directory with ``adapter_config.json`` and ``adapter_model.safetensors``; ``num_trained`` (pairs),
        ``num_steps``, ``mean_loss`` and ``train_s``.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    transformers_logging.set_verbosity_error()  # it would report, layer by layer, what is left out on purpose
    transformers_logging.disable_progress_bar()
    torch.manual_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_dir, num_labels=1, num_hidden_layers=layer, dtype=torch.bfloat16
    )
    trainer = RewardTrainer(
        model=model,
        args=_arguments(config, work_dir),
        train_dataset=Dataset.from_list([_row(tokenizer, pair, config.max_pair_tokens) for pair in pairs]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="SEQ_CLS"
        ),
        callbacks=[_Budget(config.max_minutes * 60)],
    )
    result = trainer.train()
    adapter_dir = work_dir / "adapter"
    trainer.model.save_pretrained(str(adapter_dir), safe_serialization=True)
    return adapter_dir, {
        "num_trained": len(pairs),
        "num_steps": trainer.state.global_step,
        "mean_loss": round(result.training_loss, 4),
        "train_s": round(result.metrics["train_runtime"], 1),
    }


def _arguments(config: BackboneConfig, work_dir: Path) -> RewardConfig:
    return RewardConfig(
        output_dir=str(work_dir / "checkpoints"),
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.micro_batch_pairs,
        gradient_accumulation_steps=max(1, config.batch_pairs // config.micro_batch_pairs),
        max_length=None,  # the rows are cut already; TRL would leave out the pairs that are too long
        bf16=False,  # the weights are bf16 already; autocast only adds copies on the CPU
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=config.seed,
    )


def _row(tokenizer: Any, pair: Judged, max_tokens: int) -> dict[str, list[int]]:
    """Return a pair as the encoder would read it: the end of the prompt and the beginning of the answer."""
    text = tokenizer.apply_chat_template(list(pair.messages), add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    row = {}
    for name, answer in (("chosen_ids", pair.chosen), ("rejected_ids", pair.rejected)):
        reply = tokenizer(answer, add_special_tokens=False)["input_ids"][: max_tokens - 1]
        row[name] = prompt[len(prompt) - min(len(prompt), max_tokens - len(reply)) :] + reply
    return row
