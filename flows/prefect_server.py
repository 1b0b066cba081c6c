"""Prefect's server as the embedded stack starts it: made to schedule on SQLAlchemy 2.1.

Scheduled runs are inserted many at once, from dictionaries with a key `state` beside the columns. That is a hybrid
attribute of Prefect's, which SQLAlchemy 2.0 passed over; 2.1 asks it what to do with the value, and raises where it
does not say. So Prefect 3.8 schedules nothing there, and nobody hears of it (docs/adr/0026).
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import MutableMapping
from typing import Any

from prefect.server.database.orm_models import FlowRun


def _passed_over(cls: type[Any], mapping: MutableMapping[str, Any], value: Any) -> None:
    """Leave the value where it is: Prefect inserts states by themselves, from the same dictionaries."""


def main() -> None:
    """Say what to do with `state`, then become `prefect server start` with the arguments of this process."""
    vars(FlowRun)["state"].inplace.bulk_dml(_passed_over)
    sys.argv = ["prefect", "server", "start", *sys.argv[1:]]
    # In this process: Prefect serves in it, too.
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
