"""The embedded broker is started anew before it has grown large."""

from __future__ import annotations

import psutil

from infra.settings import Settings
from infra.stack.supervisor import Supervisor

MIB = 1024**2
MAX_BROKER_MIB = 512.0


def renew_broker(settings: Settings, max_mib: float = MAX_BROKER_MIB) -> float | None:
    """Start the embedded broker anew where it holds more than it may; return what it held (MiB), or None.

    Tansu's storage in memory keeps all that it was ever given: it applies no ``retention.ms`` and knows no
    DeleteRecords. What it holds are copies; what a consumer has not applied comes again from the outbox.
    """
    supervisor = Supervisor(settings)
    if not supervisor.running():
        return None
    pid = next((part.pid for part in supervisor.status() if part.name == "broker"), None)
    if pid is None:  # the settings name another
        return None
    broker = psutil.Process(pid)
    held_mib = float(broker.memory_info().rss) / MIB
    if held_mib <= max_mib:
        return None
    broker.terminate()  # supervisord starts it again, even if this process ends here
    return held_mib
