"""``everloop bench training``: a run of the platform beside a bare TRL script with the same data and steps."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flows.preferences import shortened
from infra import report
from infra.settings import load
from trainer.config import RunConfig
from trainer.pairs import pair_of
from trainer.recipe import Material, Row, open_recipe, resolve
from trainer.snapshot import Snapshot

SENTENCES = (
    "It depends on what you would like to know about it, and on how much time there is to explain. ",
    "There are several reasons for it, which are best looked at one after the other. ",
    "Many people have asked this before, and most of them were content with a short answer. ",
    "In the end it is a matter of taste, as so many things are. ",
)


def measure(num_rows: int, runs: int) -> dict[str, Any]:
    """Time both in processes of their own, in turns; return medians, and the medians of each turn's ratios."""
    found: dict[str, list[dict[str, float]]] = {"bare": [], "platform": []}
    with report.Phase("training runs", 2 * runs) as phase:
        for _ in range(runs):
            for kind, results in found.items():
                command = [sys.executable, "-m", "flows.bench.training", kind, str(num_rows)]
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
                phase.advance()
    seconds, peaks = (
        {kind: [one[figure] for one in results] for kind, results in found.items()}
        for figure in ("seconds", "peak_gib")
    )
    return {
        "rows": num_rows,
        "runs": runs,
        "bare_s": statistics.median(seconds["bare"]),
        "platform_s": statistics.median(seconds["platform"]),
        "overhead_ratio": _median_ratio(seconds),
        "bare_gib": statistics.median(peaks["bare"]),
        "platform_gib": statistics.median(peaks["platform"]),
        "memory_ratio": _median_ratio(peaks),
    }


def _median_ratio(figures: dict[str, list[float]]) -> float:
    ratios = [ours / bare for ours, bare in zip(figures["platform"], figures["bare"], strict=True)]
    return statistics.median(ratios)


def rows_of(num_rows: int) -> list[Row]:
    """Return comparisons of a long answer and a short one, all different."""
    rows = []
    for n in range(num_rows):
        answer = f"This is answer {n}. " + "".join(SENTENCES[(n + k) % len(SENTENCES)] for k in range(4))
        rows.append(pair_of([{"role": "user", "content": f"What about number {n}?"}], shortened(answer), answer))
    return rows


def _platform(config: RunConfig, rows: list[Row], model_dir: Path, run_dir: Path) -> None:
    from trainer import loop

    loop.train(
        open_recipe(config.recipe),
        config,
        rows,
        material=Material(Snapshot(), _nothing, _nothing, _nothing, _nothing, (0, 100)),
        model_dir=model_dir,
        start_from=None,
        run_dir=run_dir,
    )


def _nothing(*_: Any) -> list[Any]:
    return []


def _bare(config: RunConfig, rows: list[Row], model_dir: Path, run_dir: Path) -> None:
    """Train as TRL's own examples do; nothing of the platform but the settings."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(config.seed)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16),
        args=DPOConfig(
            output_dir=str(run_dir / "out"),
            learning_rate=config.learning_rate,
            lr_scheduler_type="constant",
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.micro_batch_rows,
            gradient_accumulation_steps=config.batch_rows // config.micro_batch_rows,
            max_length=config.max_row_tokens,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=config.seed,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        peft_config=LoraConfig(
            r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.save_model(str(run_dir / "adapter"))


def main() -> None:
    """Run one of both; print seconds (without imports) and the peak of memory."""
    kind, num_rows = sys.argv[1], int(sys.argv[2])
    _, config = resolve({"recipe": "dpo", "max_rows": num_rows})
    import trl  # noqa: F401
    from trl import DPOTrainer  # noqa: F401

    run = {"platform": _platform, "bare": _bare}[kind]
    with tempfile.TemporaryDirectory(prefix="everloop-training-") as run_dir:
        started_s = time.perf_counter()
        run(config, rows_of(num_rows), load().base_model_dir, Path(run_dir))
        seconds = time.perf_counter() - started_s
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(json.dumps({"seconds": seconds, "peak_gib": peak_gib}))


if __name__ == "__main__":
    main()
