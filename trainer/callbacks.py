"""What looks at a training: progress, metrics, budgets, cancellation, losses that are none; and its checkpoints."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback

from infra.errors import EverloopError, IntegrityError
from trainer import checkpoints, processes
from trainer.config import RunConfig
from trainer.policy import ServedPolicy
from trainer.recipe import MIN_SPREAD

log = logging.getLogger("everloop.training")

MAX_STEPS_WITHOUT_SPREAD = 3
GIB = 1024**3


class Watch(TrainerCallback):  # type: ignore[misc]
    """Ends a training that must end, and remembers why.

    Parameters
    ----------
    on_step
        Called with (step, number of steps), also when the training begins; raises where it must end.
    spent_s
        Seconds that were trained before the checkpoint that it goes on from.

    Attributes
    ----------
    stopped_by
        The budget that ended it; what was learned by then counts.
    failure
        (code, message) of what makes it worthless.
    """

    def __init__(
        self, config: RunConfig, metrics_path: Path, on_step: Callable[[int, int], None], spent_s: float = 0.0
    ) -> None:
        self.config = config
        self.metrics_path = metrics_path
        self.on_step = on_step
        self.stopped_by: str | None = None
        self.failure: tuple[str, str] | None = None
        self._started_s = time.monotonic() - spent_s
        self._flat_steps = 0

    @property
    def spent_s(self) -> float:
        """Seconds that were trained, also before a checkpoint."""
        return time.monotonic() - self._started_s

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell where the training begins: its pace is that of the steps to come."""
        if processes.is_main():
            self._tell(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the clock, the tokens, the memory and the operator."""
        if processes.is_main():
            self._tell(state)
            self._look(state)
        self._agree()
        if self.failure or self.stopped_by:
            control.should_training_stop = True

    def _agree(self) -> None:
        """Know what the main process knows: all have to stop at the same step."""
        if processes.num_processes() > 1:
            told = [(self.failure, self.stopped_by)]
            torch.distributed.broadcast_object_list(told, src=0)
            self.failure, self.stopped_by = told[0]

    def _tell(self, state: Any) -> None:
        try:
            self.on_step(state.global_step, state.max_steps)
        except EverloopError as error:
            self.failure = error.code, error.message

    def _look(self, state: Any) -> None:
        if (limit := self.config.max_memory_gib) and (used := psutil.Process().memory_info().rss / GIB) > limit:
            self.failure = (
                "out_of_memory",
                f"The run uses {used:.1f} GiB; max_memory_gib is {limit:g}. Fewer micro_batch_rows or "
                "max_row_tokens need less.",
            )
        elif self.spent_s > self.config.max_train_minutes * 60.0:
            self.stopped_by = "time"
        elif (most := self.config.max_train_tokens) and state.num_input_tokens_seen >= most:
            self.stopped_by = "tokens"

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write a line of metrics; a loss or gradient that is no number ends the training."""
        if not processes.is_main():
            return
        logs = dict(logs or {})
        broken = [k for k in ("loss", "grad_norm") if k in logs and not math.isfinite(float(logs[k]))]
        if broken:
            self.failure = (
                "loss_not_finite",
                f"At step {state.global_step} the {broken[0].replace('_', ' ')} is no finite number. A lower "
                "learning_rate may help.",
            )
        if "reward_spread" in logs:
            self._flat_steps = self._flat_steps + 1 if float(logs["reward_spread"]) < MIN_SPREAD else 0
            if self._flat_steps >= MAX_STEPS_WITHOUT_SPREAD:
                self.failure = (
                    "no_reward_spread",
                    f"For {self._flat_steps} steps the rewards of answers to the same prompt hardly differed: "
                    "there is nothing to learn from them. More samples_per_prompt or temperature may help.",
                )
        if self.failure and processes.num_processes() == 1:
            control.should_training_stop = True
        with self.metrics_path.open("a") as file:
            line = {"phase": "train", "step": state.global_step, "spent_s": round(self.spent_s, 1), **logs}
            file.write(json.dumps(line) + "\n")

    def raise_if_failed(self, error: type[EverloopError]) -> None:
        """Raise what makes the training worthless, if anything does; in all processes, or in none."""
        self._agree()
        if self.failure is not None:
            code, message = self.failure
            raise error(message, code=code)


class Seal(TrainerCallback):  # type: ignore[misc]
    """Seals each checkpoint when it is written."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the seal, once every process has written its part."""
        if processes.num_processes() > 1:
            torch.distributed.barrier()
        if processes.is_main():
            checkpoints.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class Adapter:
    """The adapter that a trainer trains, wherever its parts are."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def save(self, directory: Path) -> None:
        """Write it in PEFT's own format; all processes have to call it, and the main one writes."""
        trainer = self._trainer
        whole = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
        if processes.is_main():
            trainer.model.save_pretrained(
                str(directory), state_dict=whole, selected_adapters=["default"], safe_serialization=True
            )
        trainer.accelerator.wait_for_everyone()


class Publish(TrainerCallback):  # type: ignore[misc]
    """Serves the adapter as it is at each checkpoint, so that people can try it while it trains."""

    def __init__(self, adapter: Adapter, policy: ServedPolicy) -> None:
        self.adapter = adapter
        self.policy = policy

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Load it into the engine; a run outlives an engine that is away."""
        try:
            self.policy.publish(self.adapter.save, patience_s=0.0)
        except EverloopError as error:
            log.warning("step %d cannot be tried: %s", state.global_step, error.message)


class Keep(TrainerCallback):  # type: ignore[misc]
    """Keeps the adapter as it is at some steps, evenly spread and the last among them."""

    def __init__(self, adapter: Adapter, directory: Path, number: int) -> None:
        self.adapter = adapter
        self.directory = directory
        self.number = number

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save it at its steps, and where the training is told to stop."""
        steps = {round(state.max_steps * part / self.number) for part in range(1, self.number + 1)}
        if state.global_step in steps or control.should_training_stop:
            self.adapter.save(self.directory / f"step-{state.global_step}")


class Restore(TrainerCallback):  # type: ignore[misc]
    """Puts the adapter of a checkpoint into the model when the training begins.

    Where TRL keeps a reference beside the policy, transformers takes up the reference's directory alone, and the
    run would go on from an untrained policy (transformers 5.19; seen as a loss of log 2).
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Load the weights; those that are missing would be an error."""
        weights = load_file(self.checkpoint / "adapter_model.safetensors")
        missing = set(get_peft_model_state_dict(model)) - set(weights)
        if missing:
            raise IntegrityError(
                f"The checkpoint lacks {len(missing)} weights of the adapter.", code="checkpoint_incomplete"
            )
        set_peft_model_state_dict(model, weights)
