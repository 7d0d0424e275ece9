"""What can stand still is provoked with the real broker and real workers; each is recovered from in under 30 s.

All at once, in namespaces of their own: most of the time is waiting for a session or a watchdog.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.group import LeaveGroupRequest

from infra.kafka import Broker
from infra.settings import Settings
from infra.telemetry import EXIT_AGAIN
from models.profile import unpack
from streaming.agents import attach, topics_of
from streaming.consumer import REBALANCE_S, TP, Bounds, Member, create_app
from streaming.events import Click, encode
from streaming.state import Keys, RedisUserStore, connect, read_user
from streaming.supervision import STALLED_S, Progress, Watchdog
from streaming.topics import Ends, Log, create_topics, partition_of
from tests.forked import Roles, warm

PARTITIONS, USERS, WITHIN_S = 2, [f"u{i}" for i in range(12)], 30.0


@pytest.fixture(scope="module", autouse=True)
def forks() -> None:
    """The process to fork from, before any event loop."""
    warm()


class Fleet:
    """Workers of one namespace, started again where they end with 70 as a supervisor does; counts what it published."""

    def __init__(self, kafka: str, redis_url: str, namespace: str, path: Path, workers: int = 1) -> None:
        self.settings = Settings.load(
            path, env={}, kafka=kafka, redis=redis_url, namespace=namespace, partitions=PARTITIONS, port=0
        )
        self.topics, self.path, self.workers = topics_of(self.settings), path / namespace, workers
        self.slots: dict[int, Roles] = {}
        self.ended: list[int | None] = []
        self.sent = 0

    async def __aenter__(self) -> Fleet:
        self.path.mkdir()
        await create_topics(self.settings.kafka, self.topics)
        self.log, self.client = Log(self.settings.kafka), connect(self.settings.redis)
        await self.log.start()
        for slot in range(self.workers):
            self.start(slot)
        self._supervisor = asyncio.create_task(self._supervise())
        await self.folds()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._supervisor.cancel()
        for roles in self.slots.values():
            roles.stop()
        await self.log.stop()
        await self.client.aclose()

    def start(self, slot: int) -> None:
        folder = self.path / str(slot)
        folder.mkdir(exist_ok=True)
        self.slots[slot] = Roles(replace(self.settings, worker_slot=slot), folder, ["users"])

    def pid(self, slot: int) -> int:
        pid = self.slots[slot].processes["users"].pid
        assert pid is not None
        return pid

    async def _supervise(self) -> None:
        while True:
            await asyncio.sleep(0.2)
            for slot, roles in self.slots.items():
                code = roles.processes["users"].exitcode
                if code is not None:
                    self.ended.append(code)
                    assert code == EXIT_AGAIN, roles.text("users")
                    self.start(slot)

    async def click(self) -> None:
        """A click of each user: both partitions get some."""
        self.sent += 1
        events = [Click(user_id=u, item_id=f"i{self.sent}", ts=time.time(), event_id=f"{self.sent}") for u in USERS]
        await self.log.append(
            self.topics.events, [(partition_of(e.user_id, PARTITIONS), e.user_id.encode(), encode(e)) for e in events]
        )

    async def folds(self) -> float:
        """Publish, wait until every click ever published is folded, and once only; return the seconds it took."""
        began = time.monotonic()
        await self.click()
        store = RedisUserStore(self.client, Keys(self.settings.namespace))
        while True:
            reads = [await read_user(store, partition_of(u, PARTITIONS), u) for u in USERS]
            counts = {unpack(r.profiles[0], r.seen[0]).counters["click"] if r.profiles[0] else 0 for r in reads}
            if counts == {self.sent}:
                return time.monotonic() - began
            assert max(counts) <= self.sent, "an event was counted twice"
            texts = {slot: roles.text("users")[-600:] for slot, roles in self.slots.items()}
            assert time.monotonic() - began < WITHIN_S + 10, (self.settings.namespace, counts, self.sent, texts)
            await asyncio.sleep(0.1)


async def a_worker_is_stopped_longer_than_its_session(fleet: Fleet) -> float:
    """The other takes its partitions; when it goes on it finds its place again."""
    os.kill(fleet.pid(0), signal.SIGSTOP)
    took = await fleet.folds()
    os.kill(fleet.pid(0), signal.SIGCONT)
    return max(took, await fleet.folds())


async def a_member_is_thrown_out_of_its_group(fleet: Fleet) -> float:
    admin = AIOKafkaAdminClient(bootstrap_servers=fleet.settings.kafka)
    await admin.start()
    group = f"{fleet.settings.namespace}-users"
    node = await admin.find_coordinator(group)
    (described,) = await admin.describe_consumer_groups([group])
    ((_, _, _, _, _, members, *_),) = described.groups
    answer = await admin._send_request(LeaveGroupRequest(group, members[0][0]), node)
    assert answer.error_code == 0
    await admin.close()
    return await fleet.folds()


class _Hangs(ConsumerRebalanceListener):  # type: ignore[misc]
    """A callback that does not return until the test is over."""

    def __init__(self) -> None:
        self.over = asyncio.Event()

    async def on_partitions_revoked(self, revoked: Any) -> None:
        if revoked:
            await self.over.wait()

    async def on_partitions_assigned(self, assigned: Any) -> None:
        pass


async def a_member_joins_and_hangs_while_another_joins(fleet: Fleet) -> float:
    """It sends heartbeats, holds partitions and does not rejoin: the group waits for it, but not for ever."""
    from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor

    hung = AIOKafkaConsumer(
        bootstrap_servers=fleet.settings.kafka, group_id=f"{fleet.settings.namespace}-users", session_timeout_ms=6000,
        heartbeat_interval_ms=1000, rebalance_timeout_ms=REBALANCE_S * 1000, enable_auto_commit=False,
        partition_assignment_strategy=[RoundRobinPartitionAssignor],
    )  # fmt: skip
    listener = _Hangs()
    hung.subscribe([fleet.topics.events], listener=listener)
    await hung.start()
    while not hung.assignment():
        await asyncio.sleep(0.05)
    fleet.start(1)
    try:
        return await fleet.folds()
    finally:
        listener.over.set()
        await hung.stop()


async def a_dead_agent_and_a_partition_nobody_fetches(fleet: Fleet) -> float:
    """An app of the worker's kind in this process; its watchdog names what a new process mends in two seconds."""
    topic, progress, seen = fleet.topics.events, Progress(), list[TP]()

    async def seek(assigned: Bounds, committed: dict[TP, int]) -> dict[TP, int]:
        progress.assign(assigned)
        for tp, (_, end) in assigned.items():
            progress.seek(tp, end)
        return {tp: end for tp, (_, end) in assigned.items()}

    async def run(batches: Any) -> None:
        async for batch in batches:
            for tp, records in batch.items():
                progress.move(tp, records[-1][0] + 1)
                seen.append(tp)

    app = create_app(
        f"{fleet.settings.namespace}-other", kafka=fleet.settings.kafka, form="chunks", instance="other-0", seek=seek,
        on_crash=lambda name, error: None,
    )  # fmt: skip
    attach(app, topic, run)
    app.finalize()
    await app.start()
    ends = Ends(fleet.settings.kafka)
    watchdog = Watchdog(Member(app), progress, ends, fleet.client.ping)
    try:
        while len(progress.next) < PARTITIONS:
            await asyncio.sleep(0.05)
        assert await watchdog.wrong() == ""
        app.consumer._thread._consumer._subscription.pause(TopicPartition(topic, 0))
        await fleet.click()
        began = time.monotonic()
        while not (reason := await watchdog.wrong()):
            assert time.monotonic() - began < WITHIN_S, seen
            await asyncio.sleep(1.0)
        assert reason.startswith(f"{topic}[0]: no progress at"), reason
        took = time.monotonic() - began
        assert took >= STALLED_S - 2
        (agent,) = app.agents.values()
        (actor,) = agent._actors
        actor.actor_task.cancel()
        await asyncio.sleep(0.1)
        await watchdog.wrong()
        await asyncio.sleep(2.1)
        assert await watchdog.wrong() == f"no task runs the agent of {topic}"
        return took
    finally:
        await ends.stop()
        await app.stop()


@pytest.mark.skip(reason="written, never seen to pass: run it alone on a quiet machine first")
@pytest.mark.slow
@pytest.mark.timeout(150)
async def test_each_is_recovered_from_in_time(kafka: str, redis_url: str, namespace: str, tmp_path: Path) -> None:
    cases: dict[Callable[[Fleet], Awaitable[float]], int] = {
        a_worker_is_stopped_longer_than_its_session: 2,
        a_member_is_thrown_out_of_its_group: 1,
        a_member_joins_and_hangs_while_another_joins: 1,
        a_dead_agent_and_a_partition_nobody_fetches: 1,
    }

    async def one(at: int, case: Callable[[Fleet], Awaitable[float]], workers: int) -> float:
        async with Fleet(kafka, redis_url, f"{namespace}-{at}", tmp_path, workers) as fleet:
            return await case(fleet)

    async with asyncio.TaskGroup() as group:
        tasks = {c.__name__: group.create_task(one(at, c, n)) for at, (c, n) in enumerate(cases.items())}
    seconds = {name: round(task.result(), 1) for name, task in tasks.items()}
    print(seconds)
    assert max(seconds.values()) < WITHIN_S, seconds


@pytest.mark.skip(reason="written, never seen to pass: run it alone on a quiet machine first")
@pytest.mark.slow
@pytest.mark.timeout(150)
async def test_the_broker_is_gone_for_a_while(redis_url: str, namespace: str, tmp_path: Path) -> None:
    """8 s, longer than the session of 6 s; `OUTAGE_S=30 pytest` for longer. Nobody needs to be started again."""
    seconds = float(os.environ.get("OUTAGE_S", "8"))
    broker = Broker.prepare(tmp_path / "kafka", Settings.load(env={}).cache_path)
    try:
        broker.start()
        await asyncio.to_thread(broker.wait_ready)
        async with Fleet(broker.bootstrap, redis_url, namespace, tmp_path) as fleet:
            await asyncio.to_thread(broker.stop)
            await asyncio.sleep(seconds)
            broker.start()
            await asyncio.to_thread(broker.wait_ready)
            took = await fleet.folds()
            print({"broker_gone_s": seconds, "recovered_s": round(took, 1)})
            assert took < WITHIN_S
            assert fleet.ended == []
    finally:
        broker.stop()
        broker.wipe()
