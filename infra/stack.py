"""The local stack: Kafka, Redis and Freshet's own processes as children of one supervisor, in one data folder.

Used by `freshet up` and `freshet demo`, and as a library by tests, bench and live replay:

    with Stack(data=folder, namespace="t1") as stack:
        requests.get(stack.api + "/health/ready")

Knows nothing of what the processes compute: it starts them, restarts them when they end, and ends them by id.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import urlsplit

import psutil

from infra.kafka import Broker, kafka_answers, run_blocking
from infra.process import Process, folder_lock, free_port
from infra.settings import Settings, read_stack
from infra.store import RedisServer, redis_answers
from infra.telemetry import EXIT_FOR_GOOD, READY_FILE
from streaming.kafka.address import shown

PROCESSES = ("kafka", "redis", "users", "items", "learner", "api")
BEHIND = 5
"""Nice value of what works behind the API and Redis (workers, Kafka; the learner twice): lookups go first."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
log = logging.getLogger("freshet.stack")


class StackError(RuntimeError):
    """The stack cannot run; the message says what was tried and what to do next."""


class Detour(Protocol):
    """A proxy that clients of a server are sent to; `lead_to` tells it where that server listens."""

    port: int

    def lead_to(self, port: int) -> None:
        """Carry connections to this port from now on."""


class Child:
    """One supervised process: restarted with growing pauses, unless it is meant to be ended.

    `worked` says of the last run whether it came to do its work: then what ended it is no failure to start, and the
    pause begins small again, however soon it ended.
    """

    def __init__(
        self, process: Process, start: Callable[[], None], ready: Callable[[], bool],
        worked: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.process, self.start, self.ready, self.worked = process, start, ready, worked
        self.wanted = True
        self.failures = 0
        self.restarts = 0
        self.next_start = 0.0

    @property
    def name(self) -> str:
        """Name of the process."""
        return self.process.name

    def watch(self, now: float) -> None:
        """Start it again when it ended and its pause is over."""
        if not self.wanted or self.process.pid is not None:
            return
        if self.process.code == EXIT_FOR_GOOD:
            self.wanted = False
            log.error("%s ended for good; what it said last:\n%s", self.name, self.process.tail())
        elif not self.next_start:
            lasted = now - self.process.started_at > 20 or self.worked()
            self.failures = 0 if lasted else self.failures + 1
            pause = min(10.0, 0.1 * 2**self.failures)
            self.next_start = now + pause
            log.warning(
                "%s ended with code %s; starting it again in %.1f s. Its log: %s",
                self.name, self.process.code, pause, self.process.log,
            )  # fmt: skip
        elif now >= self.next_start:
            self.next_start = 0.0
            self.restarts += 1
            self.start()


class Stack:
    """A stack in one data folder; state survives `stop`, crashes of its processes and of this process.

    `processes` names which of PROCESSES to run; `kafka`, `redis` (or the settings of that name) are servers to use
    instead of own ones; `through` names proxies ("kafka", "redis") that clients of own servers are sent to. Other
    keyword arguments are settings.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        processes: Sequence[str] = PROCESSES,
        quiet: bool = True,
        say: Callable[[str], None] = lambda text: None,
        env: dict[str, str] | None = None,
        through: Mapping[str, Detour] | None = None,
        **overrides: object,
    ) -> None:
        if unknown := set(processes) - set(PROCESSES):
            raise StackError(f"processes: expected some of {', '.join(PROCESSES)}, got {', '.join(sorted(unknown))}")
        given = settings or Settings.load(running=False, **overrides)  # type: ignore[arg-type]
        self.data = Path(given.data).resolve()
        self.settings = _with(given, data=str(self.data))
        self.processes, self.quiet, self.say = tuple(processes), quiet, say
        self.extra_env, self._through = env or {}, dict(through or {})
        self.children: dict[str, Child] = {}
        self.broker: Broker | None = None
        self.store: RedisServer | None = None
        self._guard = threading.RLock()
        self._ending = threading.Event()
        self._watcher: threading.Thread | None = None
        self._held = contextlib.ExitStack()
        self._recorded: dict[str, int] | None = None
        self._over_cap = False

    @property
    def kafka(self) -> str:
        """`host:port` of the broker in use."""
        return self.settings.kafka

    @property
    def redis(self) -> str:
        """Address of the Redis in use."""
        return self.settings.redis

    @property
    def api(self) -> str:
        """Base URL of the API."""
        host = self.settings.host if self.settings.host not in ("0.0.0.0", "::", "::1") else "127.0.0.1"
        return f"http://{host}:{self.settings.port}"

    # -- life -------------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start everything: servers first, then topics, then the rest. Raises what explains itself on failure."""
        self._lock()
        try:
            self._end_leftovers()
            self._start_servers()
            self._make_topics()
            for child in self._own_children():
                self.children[child.name] = child
                child.start()
            self._record()
            self._watcher = threading.Thread(target=self._watch, name="stack", daemon=True)
            self._watcher.start()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End all: Freshet's processes together, then the servers together; under 10 s, by process id."""
        self._ending.set()
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join(5)
        with self._guard:
            servers = [child for name, child in self.children.items() if name in ("kafka", "redis")]
            own = [child for child in self.children.values() if child not in servers]
            _stop_together([child.process for child in own], 3.5)
            _stop_together([child.process for child in servers], 4.5)
            if self.children:
                self._record()
            self.children.clear()
        self._held.close()

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- what tests and people do to it -----------------------------------------------------------------------------

    def pids(self) -> dict[str, int]:
        """Name -> process id of what lives now."""
        with self._guard:
            return {name: pid for name, child in self.children.items() if (pid := child.process.pid) is not None}

    def kill(self, name: str, *, hold: bool = False) -> None:
        """SIGKILL one process; the supervisor starts it again, unless `hold`."""
        with self._guard:
            child = self.children[name]
            child.wanted = not hold
            child.process.kill()

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send one process a signal; what ends it is started again."""
        with self._guard:
            self.children[name].process.signal(number)

    def join(self, slot: int) -> str:
        """Start one more worker in a slot of its own, until it is held; returns its name."""
        with self._guard:
            name = f"users-{slot}"
            self.children.setdefault(name, self._worker(slot))
            self.restart(name)
        return name

    def hold(self, name: str) -> None:
        """End one process in order and leave it ended until `restart`."""
        with self._guard:
            child = self.children[name]
            child.wanted = False
        child.process.stop()  # may take seconds, in which the others are watched

    def restart(self, name: str) -> None:
        """End one process in order, if it lives, and start it now."""
        with self._guard:
            child = self.children[name]
            child.process.stop()
            child.wanted, child.next_start, child.failures = True, 0.0, 0
            child.start()
            self._record()

    def waiting_for(self) -> list[str]:
        """Names of the processes that are not ready yet."""
        with self._guard:
            children = list(self.children.values())
        return [child.name for child in children if not (child.process.pid is not None and child.ready())]

    def wait_ready(self, timeout: float = 120.0) -> None:
        """Wait until every process does its work; raises StackError naming one that does not, with its log's end."""
        until = time.monotonic() + timeout
        while waiting := self.waiting_for():
            self.say("waiting for " + ", ".join(waiting))
            for name in waiting:
                child = self.children[name]
                if child.failures >= 3 or not child.wanted:
                    raise StackError(
                        f"{name} does not stay up; its log {child.process.log} ends:\n{child.process.tail(20)}"
                    )
            if time.monotonic() > until:
                child = self.children[waiting[0]]
                raise StackError(
                    f"not ready after {timeout:.0f} s: {', '.join(waiting)}. The log {child.process.log} ends:\n"
                    f"{child.process.tail(20)}"
                )
            time.sleep(0.05)

    # -- start, step by step ----------------------------------------------------------------------------------------

    def _lock(self) -> None:
        path = self.data / "lock"
        self.data.mkdir(parents=True, exist_ok=True)
        if not self._held.enter_context(folder_lock(path, wait=False)):
            self._held.close()
            raise StackError(
                f"{self.data} is in use by another `freshet up` (process {path.read_text().strip() or 'unknown'}). "
                "End that one with Ctrl-C, or choose another folder: --data DIR."
            )
        path.write_text(str(os.getpid()))

    def _end_leftovers(self) -> None:
        """After a kill -9 of a supervisor, wait for its children to be gone and end those that stay."""
        recorded = read_stack(self.data) or {}
        left = []
        for pid, created in (recorded.get("created") or {}).items():
            with contextlib.suppress(psutil.Error, ValueError):
                process = psutil.Process(int(pid))
                if abs(process.create_time() - created) < 1.0:
                    left.append(process)
        if left:
            self.say("waiting for the last run's processes to end")
            _, alive = psutil.wait_procs(left, timeout=3)
            for process in alive:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(alive, timeout=3)

    def _start_servers(self) -> None:
        logs = self.data / "logs"
        if self.settings.kafka:
            self._must_answer("Kafka", self.settings.kafka, "FRESHET_KAFKA", kafka_answers(self.settings.kafka))
        elif "kafka" in self.processes:
            self.say("preparing Kafka")
            self.broker = Broker.prepare(
                self.data / "kafka", self.settings.cache_path, quiet=self.quiet, say=self.say, log=logs / "kafka.log",
                advertised=self._through["kafka"].port if "kafka" in self._through else 0,
            )  # fmt: skip
            self.broker.process.nice = BEHIND
            self._add(Child(self.broker.process, self.broker.start, self.broker.ready))
            self.broker.start()
            self._lead("kafka", self.broker.port)
        if self.settings.redis:
            self._must_answer("Redis", self.settings.redis, "FRESHET_REDIS", redis_answers(self.settings.redis))
        elif "redis" in self.processes:
            self.store = RedisServer(self.data / "redis", log=logs / "redis.log")
            self._add(Child(self.store.process, self.store.start, self.store.ready))
            self.store.start()
        if self.store is not None:
            self.say("waiting for Redis")
            self.store.wait_ready()
            port = self._lead("redis", self.store.port)
            self.settings = _with(self.settings, redis=f"redis://127.0.0.1:{port}/0")
        if self.broker is not None:
            self.say("waiting for Kafka")
            self.broker.wait_ready()
            self.settings = _with(self.settings, kafka=f"127.0.0.1:{self._lead('kafka', self.broker.port)}")

    def _lead(self, name: str, port: int) -> int:
        """Return the port that clients of a server come to: its own, or its proxy's, which is told the way."""
        if name not in self._through:
            return port
        self._through[name].lead_to(port)
        return self._through[name].port

    def _add(self, child: Child) -> None:
        self.children[child.name] = child

    @staticmethod
    def _must_answer(what: str, address: str, variable: str, answered: bool) -> None:
        if not answered:
            raise StackError(
                f"{what} at {shown(address)} does not answer. It was named by {variable} (or --{what.lower()}): start "
                f"it, correct the address, or unset {variable} so that Freshet starts its own."
            )

    def _make_topics(self) -> None:
        if self.settings.kafka:
            self.say("creating topics")
            make_topics(self.settings)

    def _own_children(self) -> list[Child]:
        if "api" in self.processes:
            port = self.settings.port
            wanted = range(port, min(port + 50, 65536)) if port else ()  # 0: any
            self.settings = _with(self.settings, port=free_port(*wanted))
        made = []
        for name in self.processes:
            if name == "users":
                made += [self._worker(slot) for slot in range(self.settings.workers)]
            elif name == "items":
                made.append(self._child("items", ["worker", "--role", "items"], nice=BEHIND))
            elif name == "learner":
                made.append(self._child("learner", ["learner"], nice=2 * BEHIND))
            elif name == "api":
                made.append(self._child("api", ["serve"]))
        return made

    def _worker(self, slot: int) -> Child:
        return self._child(f"users-{slot}", ["worker", "--role", "users", "--slot", str(slot)], slot=slot, nice=BEHIND)

    def _child(self, name: str, verb: list[str], *, nice: int = 0, slot: int = 0) -> Child:
        mark = self.data / "run" / f"{name}.ready"
        mark.parent.mkdir(parents=True, exist_ok=True)
        settings = _with(self.settings, worker_slot=slot)
        env = {
            **os.environ, "PYTHONUNBUFFERED": "1", **ONE_THREAD, **settings.environment(), READY_FILE: str(mark),
            **self.extra_env,
        }  # fmt: skip
        process = Process(
            name,
            [sys.executable, "-P", "-m", "infra.cli", *verb],
            log=self.data / "logs" / f"{name}.log",
            env=env,
            nice=nice,
        )

        def start() -> None:
            mark.unlink(missing_ok=True)
            process.start()

        def ready() -> bool:
            if name == "api":
                return _marked(mark, process.pid) and _api_ready(self.api)  # another API may have our port
            return _marked(mark, process.pid) or time.monotonic() - process.started_at > 10

        return Child(process, start, ready, lambda: _marked(mark, process.last_pid))

    # -- while it runs ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        round_ = 0
        while not self._ending.wait(0.1):
            round_ += 1
            with self._guard:
                for child in self.children.values():
                    child.watch(time.monotonic())
                self._record()
                if round_ % 50 == 0:
                    for child in self.children.values():
                        child.process.trim_log()
            if round_ % 300 == 1:
                self._check_disk()

    def _check_disk(self) -> None:
        size = folder_bytes(self.data) / 1e9
        over = size > self.settings.disk_cap_gb
        if over and not self._over_cap:
            log.warning(
                "%s holds %.1f GB, over the cap of %g GB (FRESHET_DISK_CAP_GB). The log keeps every event: stop, and "
                "delete the folder if you can do without, or give it more room.",
                self.data, size, self.settings.disk_cap_gb,
            )  # fmt: skip
        self._over_cap = over

    def _record(self) -> None:
        """Write `stack.json` when a process came or went."""
        pids = self.pids()
        if pids == self._recorded:
            return
        created = {}
        for pid in pids.values():
            with contextlib.suppress(psutil.Error):
                created[str(pid)] = psutil.Process(pid).create_time()
        content = {
            "kafka": self.kafka,
            "redis": self.redis,
            "api": self.api if "api" in self.processes else "",
            "namespace": self.settings.namespace,
            "partitions": self.settings.partitions,
            "supervisor": os.getpid(),
            "processes": pids,
            "created": created,
        }
        part = self.data / "stack.json.part"
        part.touch(mode=0o600)  # an address may hold a password
        part.write_text(json.dumps(content, indent=2))
        os.replace(part, self.data / "stack.json")
        self._recorded = pids


def make_topics(settings: Settings) -> None:
    """Create the namespace's topics where they are missing; raises StackError when they are there but otherwise."""
    from streaming.topics import Topics, TopicsError, create_topics, preflight

    topics = Topics(settings.namespace, settings.partitions, settings.retention_inlets_days)
    run_blocking(lambda: create_topics(settings.kafka, topics))
    until = time.monotonic() + 20
    while True:  # a topic is in the metadata a moment after it was created
        try:
            run_blocking(lambda: preflight(settings.kafka, topics))
            return
        except TopicsError as error:
            if time.monotonic() > until or "got no such topic" not in str(error):
                raise StackError(str(error)) from error
        time.sleep(0.1)


def _with(settings: Settings, **changes: object) -> Settings:
    from dataclasses import replace

    return replace(settings, **changes)  # type: ignore[arg-type]


def _marked(mark: Path, pid: int | None) -> bool:
    try:
        return pid is not None and mark.read_text() == str(pid)
    except OSError:
        return False


def _api_ready(api: str) -> bool:
    parts = urlsplit(api)
    line = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=2)
    try:
        line.request("GET", "/health/ready")
        return line.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        line.close()


def _stop_together(processes: list[Process], timeout: float) -> None:
    for process in processes:
        process.signal(signal.SIGTERM)
    until = time.monotonic() + timeout
    for process in processes:
        if not process.wait(max(0.0, until - time.monotonic())):
            log.warning("%s did not end within %.1f s of SIGTERM; killing it", process.name, timeout)
            process.kill()


def folder_bytes(path: Path) -> int:
    """Bytes on disk under a folder; files that vanish meanwhile count nothing."""
    total = 0
    for root, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_blocks * 512
    return total
