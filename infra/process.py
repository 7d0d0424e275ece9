"""One child process: started, watched and ended by its id; knows nothing of what it runs.

A child dies with this process, even when this process is killed: on Linux the kernel signals it (PR_SET_PDEATHSIG,
set by a short wrapper that then becomes the command). That signal is tied to the *thread* that started the child, so
every child is started by one thread that lives as long as this process.

A child has a session of its own, and a kernel with autogroups shares the processor between sessions first: there `nice`
alone would weigh a child against nobody but its own threads, so its group gets the same weight (the kernel takes one
such change each 100 ms from who is not root: hence again).
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LOG_BYTES = 16 << 20  # a log beyond this is moved aside, once: NAME.log.1
_STARTER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="starter")
_PORTS = range(20_000, 32_000)  # below the range that the kernel hands out to outgoing connections
_WRAPPER = """
import ctypes, os, sys, time
parent, death, nice = map(int, sys.argv[1:4])
ctypes.CDLL(None).prctl(1, death, 0, 0, 0)
if os.getppid() != parent: sys.exit(1)
if nice:
    os.nice(nice)
    for _ in range(20):
        try:
            with open("/proc/self/autogroup", "w") as group: group.write(str(nice))
        except BlockingIOError: time.sleep(.05)
        except OSError: break
        else: break
os.execvp(sys.argv[4], sys.argv[4:])
"""


class Process:
    """A child with a log file; `start` may be called again after its end."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        nice: int = 0,
        on_parent_death: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.name, self.command, self.log = name, list(command), log
        self.env, self.nice, self.on_parent_death = env, nice, on_parent_death
        self.started_at = 0.0
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The id of the living child; None when there is none."""
        return self._child.pid if self._child is not None and self._child.poll() is None else None

    @property
    def last_pid(self) -> int | None:
        """The id of the last child, living or not."""
        return None if self._child is None else self._child.pid

    @property
    def code(self) -> int | None:
        """Exit code of the last child (negative: the signal that ended it); None while it runs."""
        return None if self._child is None else self._child.poll()

    def start(self) -> None:
        """Start the child; does nothing while it lives."""
        if self.pid is None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self._child = _STARTER.submit(self._spawn).result()
            self.started_at = time.monotonic()

    def _spawn(self) -> subprocess.Popen[bytes]:
        command = self.command
        if sys.platform == "linux":
            arguments = [str(os.getpid()), str(int(self.on_parent_death)), str(self.nice)]
            command = [sys.executable, "-I", "-S", "-c", _WRAPPER, *arguments, *command]
        with self.log.open("ab") as log:  # appending, so that the log can be cut while it is written
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=None if self.env is None else dict(self.env),
                start_new_session=True,  # Ctrl-C reaches the parent only, which ends its children in order
            )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the living child, if there is one."""
        if self._child is not None and self.pid is not None:
            self._child.send_signal(number)

    def wait(self, timeout: float) -> bool:
        """Wait for the end; False when it still runs after `timeout` seconds."""
        if self._child is None:
            return True
        try:
            self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End the child at once (SIGKILL) and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self.wait(5)

    def stop(self, timeout: float = 5.0) -> None:
        """End the child: SIGTERM, and SIGKILL when it still runs after `timeout` seconds."""
        self.signal(signal.SIGTERM)
        if not self.wait(timeout):
            self.kill()

    def tail(self, lines: int = 8) -> str:
        """The last lines of its log."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 8192))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def trim_log(self) -> None:
        """Move a log aside that has outgrown LOG_BYTES."""
        with contextlib.suppress(OSError):
            if self.log.stat().st_size > LOG_BYTES:
                shutil.copyfile(self.log, self.log.with_suffix(".log.1"))
                os.truncate(self.log, 0)


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(*preferred: int) -> int:
    """The first of the preferred ports that is free, else a free one from a range of our own."""
    for port in preferred:
        if port and port_is_free(port):
            return port
    choice = random.SystemRandom()
    for _ in range(1000):
        port = choice.choice(_PORTS)
        if port_is_free(port):
            return port
    raise OSError(f"no free port found from {_PORTS.start} to {_PORTS.stop - 1}")


def answers(host: str, port: int, timeout: float = 0.5) -> bool:
    """Whether something listens there."""
    try:
        with socket.create_connection((host, port), timeout=timeout):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def folder_lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock on a file; yields False when another process holds it and `wait` is False."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
