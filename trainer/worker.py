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
from trainer.failures import explained
from trainer.policy import ServedPolicy
from trainer.prepared import OUTCOME_FILE
from trainer.recipe import resolve
from trainer.record import RunRecord
from trainer.training import PARENT_PID, Training
from trainer.verify import Verification


def make_sure() -> None:
    """Raise where the night is gone that waits for this worker."""
    if not psutil.pid_exists(int(os.environ[PARENT_PID])):
        raise EverloopError("The night that started this worker has died.", code="night_gone")


def open_run(run_id: str) -> tuple[Training, ServedPolicy]:
    """Return the training of a run that the night prepared, and what serves its versions."""
    settings = load()
    sessions = connect(settings.need("database_url"), pool_size=1)
    with sessions() as session:
        run = session.get_one(TrainingRun, run_id)
        recipe, config = resolve(run.config)
        ready = prepared.load(session, settings, run, needs_checkpoint=False)
    record = RunRecord(sessions, settings.runs_dir, make_sure)
    record.take_over(run_id)
    record.current_phase = run.phase
    verification = Verification(config.verifiers, config.verifier_timeout_s)
    policy = ServedPolicy(settings.need("engine_url"), record.run_dir, engine_key=settings.engine_key)
    return Training(sessions, settings, recipe, config, record, ready, verification), policy


def main() -> None:
    """Train the run that the one argument names."""
    run_dir = load().runs_dir / sys.argv[1]
    try:
        training, policy = open_run(sys.argv[1])
        with closing(training.verification), closing(policy):
            training.train(policy)
    except Exception as error:
        known = explained(error)
        if known is None:
            raise
        if processes.is_main():
            why = {"code": known.code, "message": known.message}
            write_whole(run_dir / OUTCOME_FILE, json.dumps(why))


if __name__ == "__main__":
    main()
