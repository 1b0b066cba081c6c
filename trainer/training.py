"""From rows to the adapter that is registered: trained here or by `accelerate`, measured, the best one taken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from deploy import registry
from infra.db import Sessions
from infra.files import write_whole
from infra.settings import Settings
from trainer import gold, peak, prepared, processes
from trainer.config import RunConfig
from trainer.material import material_of, words_range
from trainer.policy import ServedPolicy
from trainer.prepared import ANSWERS_FILE, OUTCOME_FILE, Prepared
from trainer.recipe import Material, Recipe, one_per_prompt
from trainer.record import RunRecord
from trainer.rollout import sample_served
from trainer.verify import Verification

if TYPE_CHECKING:
    from trainer.loop import Trained

CHOICE_FILE = "chosen.json"
PARENT_PID = "EVERLOOP_PARENT_PID"
PEAK_SEED = 6
LOOK_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class Registrable:
    """The adapter that came of a training.

    Attributes
    ----------
    kl, num_measured
        Its distance to the base as it is served, and over how many answers that was measured.
    golds_gained
        What answers to the same prompts gained in gold over the champion's.
    """

    adapter_dir: Path
    kl: float = 0.0
    num_measured: int = 0
    golds_gained: Sequence[float] = ()

    def save(self, path: Path) -> None:
        """Write it, for a process that goes on with the run."""
        write_whole(path, json.dumps(asdict(self) | {"adapter_dir": str(self.adapter_dir)}))

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Return what was written, or None where nothing was or the adapter is gone."""
        found = json.loads(path.read_text()) if path.exists() else {}
        adapter_dir = Path(found.pop("adapter_dir", ""))
        return cls(adapter_dir, **found) if found and adapter_dir.is_dir() else None


@dataclass(frozen=True, slots=True)
class Training:
    """The training of one run."""

    sessions: Sessions
    settings: Settings
    recipe: Recipe[Any]
    config: RunConfig
    record: RunRecord
    ready: Prepared
    verification: Verification

    def run(self) -> Registrable:
        """Train; return the adapter to register, and how it was measured.

        Raises
        ------
        TrainingError
            Where the training came to nothing.
        """
        choice_file = self.record.run_dir / CHOICE_FILE
        if chosen := Registrable.load(choice_file):  # it was killed later: another choice would be another release
            return chosen
        rows = self.ready.rows.rows
        steps = max(1, round(len(rows) * self.config.epochs / self.config.rows_per_step))
        self.record.phase("train", steps)
        policy = ServedPolicy(
            self.settings.need("engine_url"), self.record.run_dir, engine_key=self.settings.engine_key
        )
        with closing(policy):
            trained = self._ended() or (self.launch() if self.config.accelerate_config else self.train(policy))
            self.record.metric(
                phase="trained",
                steps=trained.num_steps,
                stopped_by=trained.stopped_by,
                resumed_from_step=trained.resumed_from_step,
            )
            chosen = self._chosen(policy, trained)
        chosen.save(choice_file)
        return chosen

    def _ended(self) -> Trained | None:
        """Return what came of the training of a run that was killed after it."""
        from trainer.loop import Trained

        found = prepared.outcome(self.record.run_dir)
        return Trained.from_dict(found) if found else None

    def train(self, policy: ServedPolicy) -> Trained:
        """Train in this process, or as one of several that `accelerate` started."""
        from trainer import loop

        trained = loop.train(
            self.recipe,
            self.config,
            self.ready.rows.rows,
            material=self.material(policy),
            model_dir=self.settings.base_model_dir,
            start_from=self._adapter_dir(),
            run_dir=self.record.run_dir,
            on_step=self.record.progress,
        )
        if processes.is_main():
            write_whole(self.record.run_dir / OUTCOME_FILE, json.dumps(trained.as_dict()))
        return trained

    def material(self, policy: ServedPolicy) -> Material:
        """Return what recipes are given that sample and score as they train."""
        return material_of(self.settings, self.config, self.record, self.ready, self.verification, policy)

    def launch(self) -> Trained:
        """Train in as many processes as the configuration of `accelerate` says, on its machines and devices."""
        from trainer.loop import Trained, TrainingError

        outcome_file = self.record.run_dir / OUTCOME_FILE
        outcome_file.unlink(missing_ok=True)
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(self.config.accelerate_file)),
            *("--module", "trainer.worker", self.record.run_id),
        ]
        environment = {**os.environ, PARENT_PID: str(os.getpid())}
        launcher = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            status = self._wait_for(launcher)
        finally:  # where this process is told to end, no worker must train beside the one that goes on
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
        outcome = json.loads(outcome_file.read_text()) if outcome_file.exists() else {}
        if "code" in outcome:
            raise TrainingError(outcome["message"], code=outcome["code"])
        if not outcome:
            raise TrainingError(
                f"accelerate ended with status {status}; its reasons are in the log of `flows`.",
                code="worker_failed",
            )
        return Trained.from_dict(outcome)

    def _wait_for(self, launcher: subprocess.Popen[bytes]) -> int:
        """Return how the workers ended: they see that this process lives, not whether the run is its own still."""
        while True:
            with suppress(subprocess.TimeoutExpired):
                return launcher.wait(LOOK_EVERY_S)
            self.record.make_sure()
            self.record.raise_if_cancelled()  # workers that wait for each other, or load, look at nothing

    def _adapter_dir(self) -> Path | None:
        with self.sessions() as session:
            return registry.verified_path(session, self.settings, self.ready.start_from)

    def _chosen(self, policy: ServedPolicy, trained: Trained) -> Registrable:
        """Measure the kept checkpoints, and return the one to register."""
        config, ready = self.config, self.ready
        kept = trained.kept or [(trained.num_steps, trained.adapter_dir)]
        examples = peak.unseen(ready.data, ready.rows, config.judge_prompts, config.seed)
        held_out = ready.data.gate
        if not examples:  # all train: gold would know the others, but the distance to the base can be told
            examples, held_out = one_per_prompt(held_out, config.judge_prompts, config.seed), []
        if not examples:
            return Registrable(trained.adapter_dir)
        self.record.phase("peak", len(kept) + 1)
        scales = peak.Scales(
            policy=policy,
            prompts=[example.messages for example in examples],
            references=[example.answer for example in examples],
            reward=ready.reward,
            gold=gold.fit(ready.reward, held_out),
            words_range=words_range(config, ready.data),
            ask=partial(
                sample_served,
                self.settings,
                config,
                num_samples=1,
                seed=PEAK_SEED,
                on_done=lambda _: self.record.raise_if_cancelled(),
                restore=policy.restore,
            ),
        )
        points = peak.measure_all(scales, ready.champion, kept, self.record.progress)
        chosen = points[-1] if config.register_at == "last" else peak.choose(points[1:], config.max_kl)
        for point in points:
            self.record.metric(phase="peak", taken=point is chosen, **point.as_dict())
        peak.plot(points, chosen, self.record.run_dir / peak.PLOT_FILE)
        if config.keep_answers:
            peak.write_answers(points, self.record.run_dir / ANSWERS_FILE)
        return Registrable(dict(kept)[chosen.step], chosen.kl, chosen.n, peak.gains(chosen, points[0]))
