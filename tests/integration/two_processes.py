"""One of two processes that `accelerate` starts on the CPU: trains what the arguments say (run by test_scale.py).

accelerate 1.15 takes up FSDP for accelerators only and gives CPU processes plain data parallelism; here it is told
to shard, so that the way of a GPU host is gone without one. Nothing of the platform is changed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from accelerate import state
from accelerate.utils import DistributedType
from transformers import Trainer

from trainer import loop
from trainer.pairs import pair_of
from trainer.recipe import Material, resolve
from trainer.record import RunCancelledError
from trainer.snapshot import Snapshot

SETTINGS = {"recipe": "dpo", "batch_rows": 4, "lora_rank": 4, "max_row_tokens": 64, "checkpoint_steps": 2}


def shard_on_cpu() -> None:
    """Have accelerate shard over CPU processes as it does over accelerators."""
    begin = state.AcceleratorState.__init__

    def begin_sharded(self, *arguments, fsdp_plugin=None, **more):
        begin(self, *arguments, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if getattr(self, "fsdp_plugin", None) is not None:
            self.distributed_type = DistributedType.FSDP

    state.AcceleratorState.__init__ = begin_sharded


def write_late() -> None:
    """Have this process write its part of a checkpoint later than the main one."""
    save = Trainer._save_rng_state

    def save_late(self, output_dir):
        time.sleep(2.0)
        save(self, output_dir)

    Trainer._save_rng_state = save_late


def train(model_dir: Path, run_dir: Path, micro_batch_rows: int, **told) -> loop.Trained:
    """Train on twelve comparisons, three steps."""
    run_dir.mkdir(exist_ok=True)
    recipe, config = resolve({**SETTINGS, "micro_batch_rows": micro_batch_rows, "checkpoints_judged": 2})
    rows = [
        pair_of([{"role": "user", "content": f"What is {n}?"}], f"It is {n}.", f"The answer {n} is long.")
        for n in range(12)
    ]

    def nothing(*_):
        return []

    return loop.train(
        recipe,
        config,
        rows,
        material=Material(Snapshot(), nothing, nothing, nothing, nothing, (0, 100)),
        model_dir=model_dir,
        start_from=None,
        run_dir=run_dir,
        **told,
    )


def die_at_the_end(step: int, num_steps: int) -> None:
    """Kill this process where the last step was made but nothing of it was written."""
    if step == num_steps:
        os.kill(os.getpid(), signal.SIGKILL)


def cancel(step: int, num_steps: int) -> None:
    """Ask for the end."""
    raise RunCancelledError("The run was cancelled.")


if __name__ == "__main__":
    shard_on_cpu()
    if os.environ["RANK"] == "1":
        write_late()
    what = sys.argv[3] if len(sys.argv) > 3 else ""
    # Only the main process is told of steps: the other one must stop at the same.
    told = {"die": {"on_step": die_at_the_end}, "cancel": {"on_step": cancel}}.get(what, {})
    train(Path(sys.argv[1]), Path(sys.argv[2]), 2, **told)
