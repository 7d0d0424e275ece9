"""`freshet chaos`: a private stack, a known stream, faults at random times; then every count and every byte compared.

The clients know what was accepted (infra/proving/publisher.py), the log says what state must be (`rebuild --verify`).
Composition only; knows nothing about how events are folded or how a fault is done (infra/proving/faults.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from infra.proving.faults import FAULTS, SECOND, Fault, Target, drawn
from infra.proving.proxy import Proxy
from infra.proving.publisher import KINDS, Publisher, Truth
from infra.settings import Settings
from infra.stack import Stack
from models.examples import item_hash
from models.items import Items
from models.profile import unpack
from models.rows import Rows
from streaming.rebuild import verify
from streaming.state import (
    ItemStore,
    Keys,
    ModelStore,
    RedisUserStore,
    StoreError,
    StoreUnavailable,
    connect,
    live_keys,
    read_user,
)
from streaming.topics import INLETS, LogError, Topics, end_offsets, partition_of, topic_end

GAP_S: Final = 7.0
"""Mean time from one fault to the next, s."""
RATE: Final = 150.0
"""Events per second that the clients publish."""
WARM_S: Final = 2.0
POLL_S: Final = 0.1
PATIENCE_S: Final = 90.0
"""How long clients try, and how long the stack may take to catch up, once the faults are over, s."""
Tell = Callable[["Run"], None]
log = logging.getLogger("freshet.chaos")


class ChaosError(RuntimeError):
    """The run itself failed; the message says where its data folder is."""


@dataclass(slots=True)
class Hit:
    """One fault that was done: when (s since the first), what it did, and when an event after it was applied."""

    kind: str
    at: float
    began: float
    does: str = ""
    over: bool = False
    recovered_s: float | None = None
    beyond: dict[int, int] = field(default_factory=dict)
    """Partition of `events` -> offset of the first event accepted after it."""


@dataclass(slots=True)
class Run:
    """What is known while it runs: for the live view."""

    kills: int
    hits: list[Hit] = field(default_factory=list)
    published: int = 0
    accepted: int = 0
    behind: int = 0
    stall_s: float = 0.0
    stage: str = "starting"


@dataclass(slots=True)
class Report:
    """What came of it. `lost`, `applied_twice` and `rows_differing` must be 0, and nothing may be left unknown."""

    published: int = 0
    accepted: int = 0
    applied: int = 0
    duplicates: int = 0
    lost: int = 0
    applied_twice: int = 0
    rows_differing: int = 0
    dead_lettered: int = 0
    unknown: int = 0
    sent_again: int = 0
    kills: dict[str, int] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)
    stall_max_s: float = 0.0
    recover_p50_s: float | None = None
    recover_max_s: float | None = None
    recover_worst: str = ""
    unrecovered: int = 0
    seconds: float = 0.0
    chaos_s: float = 0.0
    drain_s: float = 0.0
    verify_s: float = 0.0
    events_per_s: float = 0.0
    seed: int = 0
    profiles: int = 0
    rows: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)
    lookups: dict[str, int] = field(default_factory=dict)
    problems: dict[str, int] = field(default_factory=dict)
    differing: list[str] = field(default_factory=list)
    data: str = ""
    repeat: str = ""

    @property
    def held(self) -> bool:
        """Whether every promise held."""
        return not (self.lost or self.applied_twice or self.rows_differing or self.unknown or self.dead_lettered)

    def as_dict(self) -> dict[str, Any]:
        """Return it for `--json`."""
        return {**asdict(self), "held": self.held}


def run_chaos(
    *, kills: int, seed: int, seconds: float | None = None, data: Path | None = None,
    tell: Tell = lambda run: None,
) -> Report:  # fmt: skip
    """Do it and return the report; the data folder is deleted where all held and none was named.

    Raises ChaosError, StackError and what explains itself of Kafka and Redis.
    """
    folder = Path(tempfile.mkdtemp(prefix="freshet-chaos-")) if data is None else data
    gap = seconds / kills if seconds else GAP_S
    repeat = f"freshet chaos --kills {kills} --seed {seed}" + (f" --seconds {seconds:g}" if seconds else "")
    report = asyncio.run(_Chaos(folder, kills, seed, gap, tell).run())
    report.repeat = repeat
    if report.held and data is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        report.data = str(folder)
    return report


def _log_into(path: Path) -> logging.Handler:
    """Write what the supervisor and the faults say into the data folder, beside the processes' logs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s"))
    handler.addFilter(lambda record: record.name.startswith("freshet"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("freshet").setLevel(logging.INFO)
    return handler


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


class _Chaos:
    """One run."""

    def __init__(self, folder: Path, kills: int, seed: int, gap: float, tell: Tell) -> None:
        self.seed, self.gap, self.tell = seed, gap, tell
        self.random = random.Random(seed + 1)
        self.proxies = {name: Proxy(name, seed=seed) for name in ("kafka", "redis", "api")}
        settings = Settings.load(
            folder, running=False, kafka="", redis="", namespace="fr", port=0, host="127.0.0.1", admin_key="",
            workers=1, feature_share=0.5,
        )  # fmt: skip
        for proxy in self.proxies.values():
            proxy.start()
        self.stack = Stack(settings, through={name: self.proxies[name] for name in ("kafka", "redis")})
        self.topics = Topics(settings.namespace, settings.partitions)
        self.watching = Run(kills)
        self.report = Report(seed=seed)
        self._busy: set[str] = set()
        self._applied: dict[str, dict[int, int]] = {}
        self._moved = 0.0

    async def run(self) -> Report:
        """Start, publish, hit, drain, compare."""
        began = time.monotonic()
        told = _log_into(self.stack.data / "logs" / "chaos.log")
        try:
            await asyncio.to_thread(self.stack.start)
            await asyncio.to_thread(self.stack.wait_ready)
            self.proxies["api"].lead_to(self.stack.settings.port)
            publisher = Publisher(
                f"http://127.0.0.1:{self.proxies['api'].port}", self.stack.kafka, self.topics, rate=RATE, seed=self.seed
            )
            try:
                await self._hit_and_drain(publisher)
            finally:
                await asyncio.to_thread(publisher.stop)
            await self._compare(publisher.truth)
        finally:
            await asyncio.to_thread(self.stack.stop)
            for proxy in self.proxies.values():
                proxy.stop()
            logging.getLogger().removeHandler(told)
            told.close()
        self.report.seconds = round(time.monotonic() - began, 1)
        return self.report

    # -- faults -------------------------------------------------------------------------------------------------------

    async def _hit_and_drain(self, publisher: Publisher) -> None:
        report, began = self.report, time.monotonic()
        publisher.start()
        self._moved = began
        watcher = asyncio.create_task(self._watch(publisher))
        try:
            await asyncio.sleep(WARM_S)
            self.watching.stage = "faults"
            await self._inflict(time.monotonic())
            report.chaos_s = round(time.monotonic() - began, 1)
            self.watching.stage = "draining"
            await self._drain(publisher)
            report.drain_s = round(time.monotonic() - began - report.chaos_s, 1)
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
        report.published, report.accepted = publisher.published, publisher.accepted
        report.unknown, report.sent_again = publisher.truth.unknown.total(), publisher.sent_again
        report.events_per_s = round(publisher.accepted / max(report.chaos_s, 1e-9), 1)
        report.lookups, report.problems = dict(publisher.lookups), dict(publisher.problems)
        report.kills = dict(Counter(hit.kind for hit in self.watching.hits))
        report.faults = [
            {"at_s": round(hit.at, 1), "kind": hit.kind, "does": hit.does, "recovered_s": _rounded(hit.recovered_s)}
            for hit in self.watching.hits
        ]
        report.restarts = {name: child.restarts for name, child in self.stack.children.items() if child.restarts}
        report.stall_max_s = round(self.watching.stall_s, 2)
        recovered = sorted((hit.recovered_s, hit.kind) for hit in self.watching.hits if hit.recovered_s is not None)
        report.unrecovered = len(self.watching.hits) - len(recovered)
        if recovered:
            report.recover_p50_s = round(recovered[len(recovered) // 2][0], 2)
            report.recover_max_s, report.recover_worst = round(recovered[-1][0], 2), recovered[-1][1]

    async def _inflict(self, start: float) -> None:
        """Do the faults of this seed at its times, one at a time on each target, others meanwhile."""
        log.info("the faults begin")
        target = Target(self.stack, self.proxies, self.random)
        under_way: set[asyncio.Task[None]] = set()
        due = start
        for kind in drawn(self.watching.kills, self.seed):
            fault = FAULTS[kind]
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            while fault.on in self._busy:
                await asyncio.sleep(0.05)
            now = time.monotonic()
            hit = Hit(kind, now - start, now)
            self.watching.hits.append(hit)
            self._busy.add(fault.on)
            under_way.add(asyncio.create_task(self._do(fault, hit, target)))
            due = max(due, now - self.gap) + self.gap * self.random.uniform(0.3, 1.7)
        await asyncio.gather(*under_way)
        await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _do(self, fault: Fault, hit: Hit, target: Target) -> None:
        try:
            hit.does = await asyncio.to_thread(fault.does, target)
        finally:
            hit.over = True
            log.info("%s: %s", hit.kind, hit.does)
            self._busy.discard(fault.on)

    # -- what becomes of it -------------------------------------------------------------------------------------------

    async def _watch(self, publisher: Publisher) -> None:
        """Read every position ten times a second: recoveries, stalls, and the live view."""
        assert self.stack.store is not None
        client = connect(self.stack.store.url, timeout=1.0)
        keys = Keys(self.stack.settings.namespace)
        try:
            while True:
                with contextlib.suppress(StoreError, *StoreUnavailable, TimeoutError):
                    async with asyncio.timeout(2.0):
                        self._note(await self._positions(client, keys), publisher)
                self._stalls(publisher)
                self.tell(self.watching)
                await asyncio.sleep(POLL_S)
        finally:
            await client.aclose()

    async def _positions(self, client: Any, keys: Keys) -> dict[str, dict[int, int]]:
        """Return state -> partition of `events` -> next offset folded into it."""
        reads = await RedisUserStore(client, keys).read({p: [] for p in range(self.topics.partitions)})
        found = {"users": {p: read.applied for p, read in reads.items()}}
        for name, head in (("items", keys.item_applied), ("learner", keys.model_head)):
            found[name] = msgspec.json.decode(await client.hget(head, "marks") or b"{}", type=dict[int, int])
        return found

    def _note(self, applied: dict[str, dict[int, int]], publisher: Publisher) -> None:
        now = time.monotonic()
        if applied["users"] != self._applied.get("users"):
            self._moved = now
        self._applied = applied
        waiting = [hit for hit in self.watching.hits if hit.recovered_s is None]
        landed = [publisher.landed.popleft() for _ in range(len(publisher.landed))]
        for hit in waiting:
            for request in landed:
                if request.began > hit.began:
                    for partition, offset in request.offsets.items():
                        hit.beyond.setdefault(partition, offset)
            if len(hit.beyond) == self.topics.partitions and all(
                applied[state].get(partition, 0) > offset
                for state in FAULTS[hit.kind].states
                for partition, offset in hit.beyond.items()
            ):
                hit.recovered_s = now - hit.began
                log.info("%s of %.1f s: recovered in %.1f s", hit.kind, hit.at, hit.recovered_s)

    def _stalls(self, publisher: Publisher) -> None:
        applied, watching = self._applied.get("users", {}), self.watching
        watching.published, watching.accepted = publisher.published, publisher.accepted
        watching.behind = sum(max(0, o + 1 - applied.get(p, 0)) for p, o in publisher.highest.copy().items())
        now = time.monotonic()
        if watching.behind:
            watching.stall_s = max(watching.stall_s, now - self._moved)
        else:
            self._moved = now

    async def _drain(self, publisher: Publisher) -> None:
        """End the faults, let the clients deliver what is left, wait until every state stands at its log's end."""
        for name in self.stack.pids():
            self.stack.signal(name, signal.SIGCONT)
        if f"users-{SECOND}" in self.stack.children:
            await asyncio.to_thread(self.stack.hold, f"users-{SECOND}")
        await asyncio.to_thread(publisher.finish, PATIENCE_S)
        deadline, left = time.monotonic() + PATIENCE_S, ["everything"]
        while left:
            with contextlib.suppress(LogError, StoreError, *StoreUnavailable, TimeoutError):
                async with asyncio.timeout(10.0):
                    left = await self._behind()
            if time.monotonic() > deadline:
                ended = [name for name, child in self.stack.children.items() if child.process.pid is None]
                raise ChaosError(
                    f"not caught up {PATIENCE_S:.0f} s after the last fault: {'; '.join(left)}."
                    f" Ended: {', '.join(ended) or 'none'}. The data folder is {self.stack.data}"
                )
            await asyncio.sleep(0.2)

    async def _behind(self) -> list[str]:
        assert self.stack.store is not None
        topics, client = self.topics, connect(self.stack.store.url, timeout=2.0)
        inlets = {name: topics.inlet(name) for name in INLETS}
        wanted = {topics.events: topics.partitions, topics.examples: 1, topics.items: 1}
        wanted |= dict.fromkeys(inlets.values(), topics.partitions)
        try:
            ends = await end_offsets(self.stack.kafka, wanted)
            keys = Keys(self.stack.settings.namespace)
            reads = await RedisUserStore(client, keys).read({p: [] for p in range(topics.partitions)})
            items, model = await ItemStore(client, keys).head(), await ModelStore(client, keys).head()
        finally:
            await client.aclose()
        places = [(f"events[{p}]", reads[p].applied, end) for p, end in enumerate(ends[topics.events])]
        for name, topic in inlets.items():  # its records are keyed by user, so they go to the partition they lie in
            places += [(f"{name}[{p}]", reads[p].marks.get(f"{name}:{p}", 0), end) for p, end in enumerate(ends[topic])]
        places += [
            ("item rows", int(items.get("next", 0)), ends[topics.examples][0]),
            ("catalogue", int(items.get("catalogue", 0)), ends[topics.items][0]),
            ("weights", int(model.get("next", 0)), ends[topics.examples][0]),
        ]
        return [f"{name} at {at} of {end}" for name, at, end in places if at != end]

    # -- the comparison -----------------------------------------------------------------------------------------------

    async def _compare(self, truth: Truth) -> None:
        """Compare counts with what the clients know, and bytes with an uninterrupted fold of the same log."""
        report, self.watching.stage = self.report, "comparing"
        self.tell(self.watching)
        own = [name for name in self.stack.children if name not in ("kafka", "redis")]
        await asyncio.gather(*(asyncio.to_thread(self.stack.hold, name) for name in own))
        report.dead_lettered = await topic_end(self.stack.kafka, self.topics.dead_letters)
        client = connect(self.stack.redis)
        try:
            keys = await live_keys(client, self.stack.settings.namespace)
            users = await self._compare_users(RedisUserStore(client, keys), truth)
            items = self._compare_items(await ItemStore(client, keys).load(), truth)
            report.lost, report.applied_twice = (max(pair) for pair in zip(users, items, strict=True))
        finally:
            await client.aclose()
        began = time.monotonic()
        found = await verify(self.stack.settings, advance=lambda *_: None)
        report.verify_s = round(time.monotonic() - began, 1)
        report.profiles, report.rows = found.profiles, found.rows
        report.rows_differing = len(found.differing)
        report.differing += found.differing[:50]

    async def _compare_users(self, store: RedisUserStore, truth: Truth) -> tuple[int, int]:
        """Return how many events are lost and how many were applied twice, by the users' counters."""
        report, partitions, lost, twice = self.report, self.topics.partitions, 0, 0
        for user in sorted({user for user, _ in (*truth.counts, *truth.unknown)}):
            read = await read_user(store, partition_of(user, partitions), user)
            counters = unpack(read.profiles[0], read.seen[0]).counters
            report.duplicates += counters["duplicate"]
            for kind in KINDS:
                found, least = counters[kind], truth.counts[user, kind]
                most = least + truth.unknown[user, kind]
                report.applied += found
                self._differs(f"user {user}, {kind}s", found, least, most)
                lost, twice = lost + max(0, least - found), twice + max(0, found - most)
        return lost, twice

    def _compare_items(self, loaded: tuple[dict[str, bytes], list[tuple[int, bytes]]], truth: Truth) -> tuple[int, int]:
        """The same by the items' undecayed counts: a user counts once, however many events met the item."""
        items, rows, lost, twice = Items(rows=Rows()), loaded[1], 0, 0
        if rows:
            items.load(np.array([key for key, _ in rows], np.uint64), [value for _, value in rows])
        wanted = {item_hash(item): (item, count) for item, count in truth.met.items()}
        at = items.rows.find(np.array(sorted(wanted), np.uint64))
        for key, row in zip(sorted(wanted), at.tolist(), strict=True):
            item, count = wanted[key]
            found = round(float(items.popularity.weights[row, -1])) if row >= 0 else 0
            most = count + truth.unknown.total()
            self._differs(f"item {item}, users that met it", found, count, most)
            lost, twice = lost + max(0, count - found), twice + max(0, found - most)
        return lost, twice

    def _differs(self, what: str, found: int, least: int, most: int) -> None:
        if not least <= found <= most:
            self.report.differing.append(f"{what}: published {least}, applied {found}")
