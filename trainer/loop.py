"""The training of every recipe: an adapter on the base model, by TRL, within budgets, resumable after a SIGKILL.

Imports torch, TRL and PEFT; import it where a run trains, and nowhere else.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.runs import METRICS_FILE
from infra.errors import EverloopError
from infra.files import write_whole
from trainer import checkpoints, processes
from trainer.callbacks import Adapter, Keep, Publish, Restore, Seal, Watch
from trainer.checkpoints import CHECKPOINTS_DIR, KEPT_DIR
from trainer.config import RunConfig
from trainer.prepared import ADAPTER_DIR
from trainer.recipe import Material, Recipe, Row

log = logging.getLogger("everloop.training")


class TrainingError(EverloopError):
    """The training came to nothing that may be registered."""


@dataclass(frozen=True, slots=True)
class Trained:
    """An adapter, and how its training went.

    Attributes
    ----------
    stopped_by
        The budget that ended it (``time`` or ``tokens``), or None where it came to its end.
    resumed_from_step
        The step of the checkpoint that it went on from; 0 for none.
    kept
        Steps, and the adapter as it was at each; the last is that of `adapter_dir`.
    """

    adapter_dir: Path
    num_steps: int
    stopped_by: str | None
    resumed_from_step: int
    kept: list[tuple[int, Path]]

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        kept = [(step, str(path)) for step, path in self.kept]
        return asdict(self) | {"adapter_dir": str(self.adapter_dir), "kept": kept}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Trained:
        """Return what :meth:`as_dict` made plain."""
        kept = [(step, Path(path)) for step, path in plain["kept"]]
        return cls(**plain | {"adapter_dir": Path(plain["adapter_dir"]), "kept": kept})


def train(
    recipe: Recipe[Any],
    config: RunConfig,
    rows: Sequence[Row],
    *,
    material: Material,
    model_dir: Path,
    start_from: Path | None,
    run_dir: Path,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
) -> Trained:
    """Train an adapter on `rows`, going on from a checkpoint of the same run where there is one.

    Parameters
    ----------
    material
        What the rows were made from.
    start_from
        The champion's adapter, which the run goes on from and stays close to; None for the base model.
    run_dir
        Gets ``adapter``, ``checkpoints`` and lines in ``metrics.jsonl``.
    on_step
        Called with (step, number of steps); raises an EverloopError where the training must end.

    Raises
    ------
    TrainingError
        Codes ``out_of_memory``, ``loss_not_finite``, ``batch_not_divisible`` and those that `on_step` raises.
    """
    torch.manual_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    checkpoint = checkpoints.newest(run_dir / CHECKPOINTS_DIR)
    resumed_from = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    spent_s = _forget_steps_after(run_dir / METRICS_FILE, resumed_from) if checkpoint else 0.0
    watch = Watch(config, run_dir / METRICS_FILE, on_step, spent_s)
    callbacks: list[Any] = [watch, Seal()]
    if checkpoint is not None:
        log.info("going on from step %d", resumed_from)
        callbacks.append(Restore(checkpoint))
    trainer = recipe.trainer(
        config,
        arguments(config, run_dir),
        {
            **_policy(model_dir, start_from, config),
            "train_dataset": Dataset.from_list(list(rows)),
            "processing_class": tokenizer,
            "callbacks": callbacks,
        },
        material,
    )
    adapter = Adapter(trainer)
    if config.checkpoints_judged:
        trainer.add_callback(Keep(adapter, run_dir / KEPT_DIR, config.checkpoints_judged))
    if material.policy is not None and not recipe.publishes:
        trainer.add_callback(Publish(adapter, material.policy))
    try:
        if checkpoint is not None and _is_last(checkpoint):  # transformers would take one step more
            Restore(checkpoint).on_train_begin(None, None, None, trainer.model)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        if hasattr(trainer, "close"):
            trainer.close()
    watch.raise_if_failed(TrainingError)
    adapter_dir = run_dir / ADAPTER_DIR
    adapter.save(adapter_dir)
    num_steps = max(trainer.state.global_step, resumed_from)
    return Trained(adapter_dir, num_steps, watch.stopped_by, resumed_from, kept_in(run_dir / KEPT_DIR))


def kept_in(directory: Path) -> list[tuple[int, Path]]:
    """Return the steps whose adapters were kept, and where, oldest first."""
    return sorted((int(path.name.rpartition("-")[2]), path) for path in directory.glob("step-*"))


def arguments(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """Return what every trainer's configuration is given.

    Raises
    ------
    TrainingError
        Code ``batch_not_divisible``.
    """
    per_process, left = divmod(config.batch_rows, processes.num_processes())
    micro_batch_rows = min(config.micro_batch_rows, per_process)
    if left or per_process % micro_batch_rows:
        raise TrainingError(
            f"batch_rows = {config.batch_rows} cannot be dealt evenly to {processes.num_processes()} processes in "
            f"micro-batches of {config.micro_batch_rows}.",
            code="batch_not_divisible",
        )
    return {
        "output_dir": str(run_dir / CHECKPOINTS_DIR),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant",
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": micro_batch_rows,
        "gradient_accumulation_steps": per_process // micro_batch_rows,
        "bf16": False,  # the weights are bf16 already; autocast only adds copies on the CPU
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "include_num_input_tokens_seen": config.max_train_tokens is not None,
        "save_strategy": "steps",
        "save_steps": config.checkpoint_steps,
        "save_total_limit": 2,  # where the newest is damaged, the one before it is still there
        "report_to": list(config.report_to),
        "project": "everloop",
        "run_name": run_dir.name,
        "disable_tqdm": True,
        "seed": config.seed,
    }


def _policy(model_dir: Path, start_from: Path | None, config: RunConfig) -> dict[str, Any]:
    """Return the model and, for a new adapter, its configuration.

    TRL then takes the model without the adapter as the reference; of one that is there already it keeps a copy.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    if start_from is not None:
        return {"model": PeftModel.from_pretrained(model, str(start_from), is_trainable=True)}
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear",
        target_parameters=_expert_parameters(model),
        task_type="CAUSAL_LM",
    )
    return {"model": model, "peft_config": lora}


def _expert_parameters(model: torch.nn.Module) -> list[str] | None:
    """Return the weights of experts, which are parameters and no linear layers; None where there are none."""
    found = {
        name.partition(".layers.")[2].partition(".")[2]
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and ".experts." in name
    }
    return sorted(found) or None


def _is_last(checkpoint: Path) -> bool:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return bool(state["global_step"] >= state["max_steps"])


def _forget_steps_after(metrics: Path, step: int) -> float:
    """Drop what a killed process had logged after its last checkpoint: those steps are taken again.

    Returns
    -------
    float
        Seconds that were trained until then.
    """
    lines = [json.loads(line) for line in metrics.read_text().split("\n") if line] if metrics.exists() else []
    kept = [line for line in lines if line.get("step", -math.inf) <= step]
    if processes.is_main():
        write_whole(metrics, "".join(f"{json.dumps(line)}\n" for line in kept))
    return max((line.get("spent_s", 0.0) for line in kept), default=0.0)
