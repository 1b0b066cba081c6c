"""One of the processes of a run that `accelerate` starts: ``python -m trainer.worker RUN``.

It reads what the night prepared, trains, and leaves the outcome in the run's directory. The night waits for it, and
registers, judges and deploys; where the night dies, the workers end too.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing

import psutil

from deploy.runs import TrainingRun
from infra.db import connect
from infra.errors import EverloopError
from infra.files import write_whole
from infra.settings import load
from trainer import prepared, processes
from trainer.policy import ServedPolicy
from trainer.recipe import resolve
from trainer.record import RunRecord
from trainer.training import OUTCOME_FILE, PARENT_PID, Training
from trainer.verify import Verification


class WorkerRecord(RunRecord):
    """The record of a run as its workers see it: it is over when the night is gone, too."""

    def is_cancelled(self) -> bool:
        """Tell whether somebody asked for the end of the run, or nobody waits for it any more."""
        return not psutil.pid_exists(int(os.environ[PARENT_PID])) or super().is_cancelled()


def open_run(run_id: str) -> tuple[Training, ServedPolicy]:
    """Return the training of a run that the night prepared, and what serves its versions."""
    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=1)
    with sessions() as session:
        run = session.get_one(TrainingRun, run_id)
        recipe, config = resolve(run.config)
        ready = prepared.load(session, settings, run, needs_checkpoint=False)
    record = WorkerRecord(sessions, settings.runs_dir)
    record.take_over(run_id)
    verification = Verification(config.verifiers, config.verifier_timeout_s)
    policy = ServedPolicy(settings.need("engine_url"), record.run_dir)
    return Training(sessions, settings, recipe, config, record, ready, verification), policy


def main() -> None:
    """Train the run that the one argument names."""
    training, policy = open_run(sys.argv[1])
    with closing(training.verification), closing(policy):
        try:
            outcome = training.train(policy).as_dict()
        except EverloopError as error:
            outcome = {"code": error.code, "message": error.message}
    if processes.is_main():
        write_whole(training.record.run_dir / OUTCOME_FILE, json.dumps(outcome))


if __name__ == "__main__":
    main()
