"""Wrong cluster, wrong epoch: each is provoked with the real broker; the process ends before it writes, for good."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, RecordsToDelete

from infra.settings import Settings
from infra.telemetry import EXIT_AGAIN, EXIT_FOR_GOOD
from streaming.events import Click, encode
from streaming.rebuild import rebuild
from streaming.recovery.generations import RecoveryError
from streaming.state import ItemStore, Keys, ModelStore, Redis, RedisUserStore, UserWrite, connect
from streaming.topics import Log, Topics, create_topics, describe, end_offsets, epoch, partition_of
from tests.forked import Roles, warm


@pytest.fixture(scope="module", autouse=True)
def forks() -> None:
    """The process to fork from, before any event loop."""
    warm()


@dataclass
class Case:
    """Topics with ten records in each partition and state that was folded up to six of them, in each role."""

    settings: Settings
    topics: Topics
    client: Redis
    path: Path

    async def begin(self) -> None:
        await create_topics(self.settings.kafka, self.topics)
        await self.fill(10)
        await self.fold(6, await epoch(self.settings.kafka, self.topics))

    async def fill(self, count: int) -> None:
        log = Log(self.settings.kafka)
        await log.start()
        for topic in (self.topics.events, self.topics.examples):
            for partition in range(self.topics.partitions if topic == self.topics.events else 1):
                await log.append(topic, [(partition, b"k", b"v") for _ in range(count)])
        await log.stop()

    async def fold(self, following: int, stored: str) -> None:
        """Write what each role would have committed at `following`."""
        keys = Keys(self.settings.namespace)
        users = RedisUserStore(self.client, keys)
        writes = [UserWrite(p, 0, following, {}, profiles={"u": b"p"}) for p in range(self.topics.partitions)]
        assert await users.commit(writes, stored) == [None] * self.topics.partitions
        head = {"next": str(following), "cluster": stored}
        for store in (ItemStore(self.client, keys), ModelStore(self.client, keys)):
            assert await store.commit(expected=0, head=head, keys=[], values=[]) is None

    async def admin(self, call: Callable[[AIOKafkaAdminClient], Awaitable[Any]]) -> None:
        client = AIOKafkaAdminClient(bootstrap_servers=self.settings.kafka)
        await client.start()
        await call(client)
        await client.close()

    async def remake(self) -> None:
        names = [self.topics.events, self.topics.examples]
        await self.admin(lambda admin: admin.delete_topics(names))
        while any(count for count, _ in (await describe(self.settings.kafka, names))[1].values()):
            await asyncio.sleep(0.02)
        await create_topics(self.settings.kafka, self.topics)

    async def everything(self) -> tuple[dict[str, Any], dict[str, list[int]]]:
        """Return the bytes of every key and the end of every topic of the namespace."""
        names = [n async for n in self.client.scan_iter(f"{self.settings.namespace}*", count=1000)]
        values = {name.decode(): await self.client.dump(name) for name in names if b":metrics:" not in name}
        _, found = await describe(self.settings.kafka, list(self.topics.specs()))
        return values, await end_offsets(self.settings.kafka, {name: count for name, (count, _) in found.items()})

    async def end(self, roles: Roles, said: str, step: str = "freshet rebuild --switch") -> None:
        """Each role ends for good, some after one more start, and says why and what to do."""
        codes = await asyncio.to_thread(roles.codes, 40)
        roles.stop()
        if again := [role for role, code in codes.items() if code == EXIT_AGAIN]:  # what a supervisor does
            second = Roles(self.settings, self.path, again)
            codes |= await asyncio.to_thread(second.codes, 40)
            second.stop()
        for role, code in codes.items():
            assert code == EXIT_FOR_GOOD, (role, code, roles.text(role))
            assert said in roles.text(role), (role, roles.text(role))
            assert step in roles.text(role), (role, roles.text(role))


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    made = connect(redis_url)
    yield made
    await made.aclose()


async def case_of(kafka: str, redis_url: str, client: Redis, path: Path, namespace: str) -> Case:
    settings = Settings.load(path, env={}, kafka=kafka, redis=redis_url, namespace=namespace, partitions=2, port=0)
    made = Case(settings, Topics(namespace, 2), client, path / namespace)
    made.path.mkdir()
    await made.begin()
    return made


async def made_again_and_refilled(case: Case) -> str:
    await case.remake()
    await case.fill(12)
    return "was made again"


async def another_cluster(case: Case) -> str:
    _, rest = (await epoch(case.settings.kafka, case.topics)).split("/", 1)
    keys = Keys(case.settings.namespace)
    for name in (keys.applied(0), keys.applied(1), keys.item_applied, keys.model_head):
        await case.client.hset(name, "cluster", f"another/{rest}")
    return "another cluster (was another, is "


async def more_partitions(case: Case) -> str:
    names = [name for name, (count, _) in case.topics.specs().items() if count == 2]
    await case.admin(lambda admin: admin.create_partitions({name: NewPartitions(4) for name in names}))
    while any(count != 4 for count, _ in (await describe(case.settings.kafka, names))[1].values()):
        await asyncio.sleep(0.02)
    case.settings, case.topics = replace(case.settings, partitions=4), replace(case.topics, partitions=4)
    return "another number of partitions (was 2, is 4)"


async def redis_ahead(case: Case) -> str:
    await case.client.hset(Keys(case.settings.namespace).applied(1), "next", 17)
    for name in (Keys(case.settings.namespace).item_applied, Keys(case.settings.namespace).model_head):
        await case.client.hset(name, "next", 17)
    return "folded up to offset 17, but"


async def records_deleted(case: Case) -> str:
    places = [TopicPartition(case.topics.events, 1), TopicPartition(case.topics.examples, 0)]
    await case.admin(lambda admin: admin.delete_records({place: RecordsToDelete(8) for place in places}))
    return "2 records were deleted before they were folded"


PROVOKED = (made_again_and_refilled, another_cluster, more_partitions, redis_ahead, records_deleted)


@pytest.mark.slow
async def test_each_role_ends_for_good_before_it_writes(
    kafka: str, redis_url: str, client: Redis, tmp_path: Path, namespace: str
) -> None:
    """Five namespaces at once, a worker, an item agent and a learner each."""
    running = []
    for at, provoke in enumerate(PROVOKED):
        case = await case_of(kafka, redis_url, client, tmp_path, f"{namespace}-{at}")
        said = await provoke(case)
        running.append((case, said, await case.everything(), Roles(case.settings, case.path)))
    for case, said, before, roles in running:
        many = "partitions" in said
        await case.end(roles, said, "a new namespace" if many else "freshet rebuild --switch")
        assert ("freshet rebuild" in roles.text("users")) != many
        assert await case.everything() == before
        if many:  # histories would stay where the old number put their users
            with pytest.raises(RecoveryError, match=r"another number of partitions.*a new namespace"):
                await rebuild(case.settings, advance=lambda *_: None, switch=True)
            assert await case.everything() == before


@pytest.mark.slow
async def test_a_topic_made_again_under_running_processes(
    kafka: str, redis_url: str, client: Redis, tmp_path: Path, namespace: str
) -> None:
    """Refilled at once beyond the old offset, where the records look like those that would have come next."""
    case = await case_of(kafka, redis_url, client, tmp_path, namespace)
    await case.remake()
    names = [n async for n in case.client.scan_iter(f"{case.settings.namespace}*", count=1000)]
    await case.client.delete(*names)
    log = Log(case.settings.kafka)
    await log.start()

    async def click(count: int) -> None:
        events = [Click(user_id=f"u{i % 7}", item_id=f"i{i}", ts=1.0, event_id=str(i)) for i in range(count)]
        records = [(partition_of(e.user_id, 2), e.user_id.encode(), encode(e)) for e in events]
        await log.append(case.topics.events, records)

    await click(40)
    running = Roles(case.settings, case.path)
    keys, deadline = Keys(case.settings.namespace), time.monotonic() + 40
    while True:
        folded = [int(await case.client.hget(keys.applied(p), "next") or 0) for p in (0, 1)]
        following = [int(await case.client.hget(name, "next") or 0) for name in (keys.item_applied, keys.model_head)]
        if sum(folded) == 40 and min(following) > 0 and following[0] == following[1]:
            break
        assert time.monotonic() < deadline, (folded, following)
        await asyncio.sleep(0.1)
    await asyncio.sleep(1.0)
    state, _ = await case.everything()
    await case.remake()
    await click(80)
    await log.stop()
    await case.end(running, "was made again")
    assert (await case.everything())[0] == state
