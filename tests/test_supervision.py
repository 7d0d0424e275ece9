"""What can stand still is provoked with the real broker and real workers; each is recovered from in under 30 s.

A worker that ends with 70 is started again, as `freshet up` does; every click is folded in the end, and once.
`pytest -s` prints the seconds of each case; `OUTAGE_S=30` takes the broker away for that long.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.group import LeaveGroupRequest

from infra.kafka import Broker
from infra.settings import Settings
from infra.telemetry import EXIT_AGAIN
from models.profile import unpack
from streaming import consumer
from streaming.consumer import TP
from streaming.events import Click, encode
from streaming.state import Keys, RedisUserStore, connect, read_user
from streaming.supervision import STALLED_S
from streaming.topics import Log, create_topics, partition_of, topics_of
from tests.forked import Roles, warm

HANGS = "a rebalance hangs"
Fault = Callable[[Any], None]
Start = Callable[..., AbstractAsyncContextManager["Workers"]]
PARTITIONS, USERS, WITHIN_S = 2, [f"u{i}" for i in range(12)], 30.0


@pytest.fixture(scope="module", autouse=True)
def forks() -> None:
    """The process to fork from, before any event loop."""
    warm()


# -- faults inside a worker's process --------------------------------------------------------------------------------


def nobody_fetches_a_partition(app: Any) -> None:
    """As a fetcher that lost track of one: the other partitions go on."""
    app.consumer.pause_partitions({TP(app.conf.id.removesuffix("-users") + ".events", 0)})


def the_agent_ends(app: Any) -> None:
    """As when an agent's stream ends and its task with it: Faust looks after agents that raise only."""
    for name, agent in app.agents.items():
        if name.endswith(".events"):
            for actor in agent._actors:
                actor.stream.channel._throw(StopAsyncIteration())


def its_rebalances_hang(app: Any) -> None:
    """It goes on with its heartbeats, and never joins the group's next generation."""

    async def hang(revoked: Any) -> None:
        print(HANGS, flush=True)
        await asyncio.Event().wait()

    app.consumer._on_partitions_revoked = hang


def arm(fault: Fault, asked: Path) -> None:
    """Have the worker of this process broken by `fault` when the file `asked` is there; the next one is whole."""
    create = consumer.create_app

    def wait(app: Any, loop: asyncio.AbstractEventLoop) -> None:
        while not asked.exists():
            time.sleep(0.05)
        asked.unlink()
        loop.call_soon_threadsafe(fault, app)

    def create_broken(*args: Any, **kwargs: Any) -> Any:
        app = create(*args, **kwargs)
        threading.Thread(target=wait, args=(app, asyncio.get_running_loop()), daemon=True).start()
        return app

    consumer.create_app = create_broken


# -- workers and what they have folded -------------------------------------------------------------------------------


class Workers:
    """Workers of one namespace, one a slot; knows how many clicks of each user were published."""

    def __init__(self, settings: Settings, path: Path) -> None:
        self.settings, self.topics, self.path = settings, topics_of(settings), path
        self.group = f"{settings.namespace}-users"
        self.asked = path / "asked"
        self.slots: dict[int, Roles] = {}
        self.ended: list[str] = []
        self.sent = 0
        self.log, self.client = Log(settings.kafka), connect(settings.redis)

    def start(self, slot: int, fault: Fault | None = None) -> None:
        """Start a worker, one with a fault to come where one is given."""
        folder = self.path / f"{slot}-{len(self.ended)}"
        folder.mkdir(exist_ok=True)
        prepare = partial(arm, fault, self.asked) if fault else None
        self.slots[slot] = Roles(replace(self.settings, worker_slot=slot), folder, ["users"], prepare)

    def pid(self, slot: int) -> int:
        """The process id of a slot's worker."""
        pid = self.slots[slot].processes["users"].pid
        assert pid is not None
        return pid

    def supervise(self) -> None:
        """Start again what ended with 70; nothing may end with another status."""
        for slot, roles in list(self.slots.items()):
            code = roles.processes["users"].exitcode
            if code is not None:
                self.ended.append(roles.text("users"))
                assert code == EXIT_AGAIN, roles.text("users")
                self.start(slot)

    async def folds(self) -> float:
        """Publish a click of each user and wait until all ever published are folded, and once only; seconds it took."""
        began = time.monotonic()
        self.sent += 1
        events = [Click(user_id=u, item_id=f"i{self.sent}", ts=time.time(), event_id=f"{self.sent}") for u in USERS]
        await self.log.append(
            self.topics.events, [(partition_of(e.user_id, PARTITIONS), e.user_id.encode(), encode(e)) for e in events]
        )
        while (counts := set(await self.counts())) != {self.sent}:
            assert max(counts) <= self.sent, "an event was counted twice"
            texts = [roles.text("users")[-1500:] for roles in self.slots.values()]
            assert time.monotonic() - began < WITHIN_S, (counts, self.sent, self.ended, texts)
            self.supervise()
            await asyncio.sleep(0.1)
        return time.monotonic() - began

    async def keeps_folding(self, seconds: float) -> float:
        """Publish again and again for so long: what was lost is not noticed at once; the longest it took, s."""
        until, longest = time.monotonic() + seconds, 0.0
        while time.monotonic() < until:
            longest = max(longest, await self.folds())
            await asyncio.sleep(0.2)
        return longest

    async def breaks(self) -> None:
        """Ask for the fault that a worker was started with."""
        self.asked.touch()
        while self.asked.exists():
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)

    def said(self, text: str) -> bool:
        """Whether a worker that has ended said this."""
        return any(text in last for last in self.ended)

    async def counts(self) -> list[int]:
        """The clicks folded of each user."""
        store = RedisUserStore(self.client, Keys(self.settings.namespace))
        reads = [await read_user(store, partition_of(user, PARTITIONS), user) for user in USERS]
        return [unpack(r.profiles[0], r.seen[0]).counters["click"] if r.profiles[0] else 0 for r in reads]


def settings_of(kafka: str, redis_url: str, namespace: str, path: Path) -> Settings:
    """The settings of one namespace."""
    return Settings.load(path, env={}, kafka=kafka, redis=redis_url, namespace=namespace, partitions=PARTITIONS, port=0)


@asynccontextmanager
async def running(
    settings: Settings, path: Path, workers: int = 1, fault: Fault | None = None
) -> AsyncIterator[Workers]:
    """Workers that have folded a first click of each user, each with a fault to come where one is given."""
    path.mkdir()
    made = Workers(settings, path)
    await create_topics(settings.kafka, made.topics)
    await made.log.start()
    try:
        for slot in range(workers):
            made.start(slot, fault)
        await made.folds()
        yield made
    finally:
        for roles in made.slots.values():
            roles.stop()
        await made.log.stop()
        await made.client.aclose()


# -- the cases: each returns the seconds it took until all was folded ------------------------------------------------


async def stalled_partition(start: Start) -> float:
    async with start(fault=nobody_fetches_a_partition) as workers:
        await workers.breaks()
        took = await workers.folds()
        assert workers.said(f"{workers.topics.events}[0]: no progress at")
        assert took > STALLED_S - 2
        return took


async def dead_agent(start: Start) -> float:
    async with start(fault=the_agent_ends) as workers:
        await workers.breaks()
        took = await workers.folds()
        assert workers.said(f"no task runs the agent of {workers.topics.events}")
        return took


async def stopped_worker(start: Start) -> float:
    """Longer than its session: the other takes its partition; when it goes on it finds its place again."""
    async with start(workers=2) as workers:
        os.kill(workers.pid(0), signal.SIGSTOP)
        took = await workers.folds()
        os.kill(workers.pid(0), signal.SIGCONT)
        return max(took, await workers.keeps_folding(3.0))


async def lost_assignment(start: Start) -> float:
    """The group throws its only member out; it hears of that with a heartbeat, and joins again."""
    async with start() as workers:
        admin, group = AIOKafkaAdminClient(bootstrap_servers=workers.settings.kafka), workers.group
        await admin.start()

        async def members() -> set[str]:
            (described,) = await admin.describe_consumer_groups([group])
            return {member[0] for member in described.groups[0][5]}

        try:
            (before,) = await members()
            answer = await admin._send_request(LeaveGroupRequest(group, before), await admin.find_coordinator(group))
            assert answer.error_code == 0
            took = await workers.keeps_folding(6.0)
            (after,) = await members()
            assert after != before
            return took
        finally:
            await admin.close()


async def stuck_rebalance(start: Start) -> float:
    """The group waits for a member that does not rejoin, but not for ever; that one ends, and comes back."""
    async with start(fault=its_rebalances_hang) as workers:
        await workers.breaks()
        hung = workers.slots[0]
        workers.start(1)
        while HANGS not in hung.text("users"):
            await asyncio.sleep(0.05)
        took = await workers.folds()
        assert took > 5
        return took


CASES = (stalled_partition, dead_agent, stopped_worker, lost_assignment, stuck_rebalance)


@pytest.mark.slow
@pytest.mark.timeout(150)
async def test_each_is_recovered_from_in_time(kafka: str, redis_url: str, namespace: str, tmp_path: Path) -> None:
    """All at once, a namespace each: most of the time is waiting for a session or a watchdog."""

    def start_of(case: Callable[[Start], Awaitable[float]]) -> Start:
        name = f"{namespace}-{case.__name__.replace('_', '-')}"
        return partial(running, settings_of(kafka, redis_url, name, tmp_path), tmp_path / name)

    found = await asyncio.gather(*(case(start_of(case)) for case in CASES), return_exceptions=True)
    for case, seconds in zip(CASES, found, strict=True):
        print(f"{case.__name__}: {seconds!r:.400}")
    if failed := [error for error in found if isinstance(error, Exception)]:
        raise ExceptionGroup("not recovered", failed)
    assert max(found) < WITHIN_S  # type: ignore[type-var, operator]


@pytest.mark.slow
@pytest.mark.timeout(150)
async def test_the_broker_is_gone_for_a_while(redis_url: str, namespace: str, tmp_path: Path) -> None:
    """10 s, longer than the session of 6 s. A worker may start again where the broker comes back without its topics."""
    seconds = float(os.environ.get("OUTAGE_S", "10"))
    broker = Broker.prepare(tmp_path / "kafka", Settings.load(env={}).cache_path)
    try:
        broker.start()
        await asyncio.to_thread(broker.wait_ready)
        settings = settings_of(broker.bootstrap, redis_url, namespace, tmp_path)
        async with running(settings, tmp_path / namespace) as workers:
            await asyncio.to_thread(broker.stop)
            await asyncio.sleep(seconds)
            began = time.monotonic()
            broker.start()
            await asyncio.to_thread(broker.wait_ready)
            ready = time.monotonic() - began
            took = await workers.keeps_folding(3.0)
            print(f"broker gone for {seconds:.0f} s, again ready in {ready:.1f} s: {took}; ended: {len(workers.ended)}")
            assert took < WITHIN_S
    finally:
        broker.stop()
        broker.wipe()
