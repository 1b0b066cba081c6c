"""supervisord: its configuration file, and talking to it over its socket."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
import xmlrpc.client
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from infra.errors import SetupError
from infra.settings import Settings
from infra.stack.parts import Part

MAX_SOCKET_PATH_BYTES = 100
MARKER = "EVERLOOP_STACK"
STOP_WAIT_S = 9  # what is not gone by then is killed; every part is made to be gone sooner, its work done


@dataclass(frozen=True, slots=True)
class PartStatus:
    """One part as supervisord sees it."""

    name: str
    state: str
    pid: int | None
    uptime_s: int
    restarts: int


def socket_path(settings: Settings, name: str = "supervisor") -> Path:
    """Return a control socket, supervisord's if unset; in the temporary directory where the home's path is long."""
    path = settings.run_dir / f"{name}.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
        return path
    of_home = hashlib.sha256(os.fsencode(settings.home)).hexdigest()[:16]
    suffix = "" if name == "supervisor" else f"-{name}"
    return Path(tempfile.gettempdir()) / f"everloop-{of_home}{suffix}.sock"


def write_config(settings: Settings, parts: Sequence[Part]) -> Path:
    """Write ``supervisord.conf`` (readable by its owner only) and return its path."""
    lines = [
        "[unix_http_server]",
        f"file={socket_path(settings)}",
        "chmod=0600",
        "[supervisord]",
        f"logfile={settings.log_dir / 'supervisord.log'}",
        f"pidfile={settings.run_dir / 'supervisord.pid'}",
        f"childlogdir={settings.log_dir}",
        "minfds=1024",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
    ]
    for part in parts:
        environment = {"EVERLOOP_HOME": str(settings.home), MARKER: str(settings.home), **part.environment}
        pairs = ",".join(f'{k}="{v}"' for k, v in sorted(environment.items()))
        lines += [
            f"[program:{part.name}]",
            f"command={shlex.join(part.command)}".replace("%", "%%"),
            f"environment={pairs}".replace("%", "%%"),
            f"directory={settings.home}",
            f"priority={part.priority}",
            f"stopsignal={part.stop_signal}",
            f"stdout_logfile={settings.log_dir / part.name}.log",
            "autostart=false",
            "autorestart=true",
            "startsecs=1",
            "startretries=1000",
            "stopasgroup=true",
            "killasgroup=true",
            f"stopwaitsecs={STOP_WAIT_S}",
            "redirect_stderr=true",
            "stdout_logfile_maxbytes=20MB",
            "stdout_logfile_backups=2",
        ]
    path = settings.run_dir / "supervisord.conf"
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)
    return path


class Supervisor:
    """A client of the stack's supervisord."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.socket = socket_path(settings)

    @property
    def _rpc(self) -> Any:
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(None, None, serverurl=f"unix://{self.socket}")
        return xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport).supervisor

    def running(self) -> bool:
        """Tell whether supervisord answers."""
        if not self.socket.exists():
            return False
        try:
            return bool(self._rpc.getState()["statename"] == "RUNNING")
        except (OSError, xmlrpc.client.Error):
            return False

    def pid(self) -> int:
        """Return supervisord's process id."""
        return int(self._rpc.getPID())

    def launch(self, config: Path) -> None:
        """Start supervisord; it puts itself into the background.

        Raises
        ------
        SetupError
            Code ``supervisor_failed``, with what it said.
        """
        done = subprocess.run(
            [sys.executable, "-m", "supervisor.supervisord", "-c", str(config)],
            capture_output=True,
            text=True,
            env={**os.environ, MARKER: str(self.settings.home)},
        )
        deadline = time.monotonic() + 10
        while not self.running():
            if done.returncode != 0 or time.monotonic() > deadline:
                raise SetupError(
                    f"supervisord did not start: {done.stderr or done.stdout}", code="supervisor_failed"
                )
            time.sleep(0.05)

    def start(self, *names: str) -> None:
        """Start parts without waiting for them."""
        for name in names:
            try:
                self._rpc.startProcess(name, False)
            except xmlrpc.client.Fault as fault:
                if "ALREADY_STARTED" not in fault.faultString:
                    raise

    def stop(self, name: str) -> None:
        """Stop a part and wait for it."""
        self._rpc.stopProcess(name, True)

    def status(self) -> list[PartStatus]:
        """Return the state of each part."""
        restarts = self._restarts()
        return [
            PartStatus(
                name=info["name"],
                state=info["statename"].lower(),
                pid=info["pid"] or None,
                uptime_s=max(0, info["now"] - info["start"]) if info["pid"] else 0,
                restarts=restarts.get(info["name"], 0),
            )
            for info in self._rpc.getAllProcessInfo()
        ]

    def _restarts(self) -> dict[str, int]:
        """Count the unexpected exits that supervisord logged since it started."""
        log = (self.settings.log_dir / "supervisord.log").read_text(errors="replace")
        counts: dict[str, int] = {}
        for line in log.rpartition("supervisord started with pid")[2].splitlines():
            _, found, rest = line.partition("WARN exited: ")
            if not found:
                _, found, rest = line.partition("INFO exited: ")
            if found and "stopped" not in rest:
                name = rest.split()[0]
                counts[name] = counts.get(name, 0) + 1
        return counts

    def shutdown(self, timeout_s: float = 40.0) -> None:
        """Stop every part and supervisord itself, and whatever they may have left behind."""
        if self.running():
            pid = self.pid()
            self._rpc.shutdown()
            try:
                psutil.Process(pid).wait(timeout_s)
            except psutil.NoSuchProcess:
                pass
            except psutil.TimeoutExpired:
                psutil.Process(pid).kill()
        leftovers = stack_processes(self.settings.home)
        for process in leftovers:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        for process in psutil.wait_procs(leftovers, timeout=10)[1]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.socket.unlink(missing_ok=True)


def stack_processes(home: Path) -> list[psutil.Process]:
    """Return all processes that belong to the stack of `home`, by the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            if process.environ().get(MARKER) == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found
