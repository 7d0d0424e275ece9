"""Roles as processes of their own, forked from one that has loaded everything: a tenth of a fresh start's CPU."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from infra.settings import Settings

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.warmed"])


def warm() -> None:
    """Have the process to fork from loaded before an event loop begins: its first child waits for it."""
    first = CONTEXT.Process(target=_nothing)
    first.start()
    first.join()


def _nothing() -> None:
    pass


def _run(role: str, settings: Settings, log: Path, prepare: Callable[[], None] | None = None) -> None:
    from streaming import worker
    from streaming.training import process

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if prepare is not None:
        prepare()
    if role == "learner":
        process.run(settings)
    else:
        worker.run(settings, role, settings.worker_slot)  # type: ignore[arg-type]


class Roles:
    """Processes "users", "items", "learner" with a log file each; ended by `stop`.

    Each calls `prepare` before it begins: where a test breaks what runs there.
    """

    def __init__(
        self, settings: Settings, folder: Path, roles: Sequence[str] = ("users", "items", "learner"),
        prepare: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self._logs = {role: folder / f"{role}.log" for role in roles}
        self.processes: dict[str, ForkServerProcess] = {
            role: CONTEXT.Process(target=_run, args=(role, settings, log, prepare), daemon=True)
            for role, log in self._logs.items()
        }
        for process in self.processes.values():
            process.start()

    def text(self, role: str) -> str:
        """What it has written."""
        return self._logs[role].read_text() if self._logs[role].exists() else ""

    def codes(self, timeout: float) -> dict[str, int | None]:
        """Wait for the end of all; None for one that still runs after `timeout` seconds."""
        until = time.monotonic() + timeout
        for process in self.processes.values():
            process.join(max(0.01, until - time.monotonic()))
        return {role: process.exitcode for role, process in self.processes.items()}

    def stop(self) -> None:
        """End what runs, at once."""
        for process in self.processes.values():
            if process.is_alive():
                process.kill()
            process.join(5)
