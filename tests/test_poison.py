"""A poisonous event never stops a partition: it is set aside with reason and traceback, the rest is folded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from infra.settings import Settings
from infra.telemetry import EXIT_FOR_GOOD
from models.items import PoisonError
from models.profile import unpack
from streaming.agents import UserAgent
from streaming.consumer import TP
from streaming.dead_letters import MARK, DeadLetters, Intent, letters, replay
from streaming.events import Click, Weights, encode, short
from streaming.item_agent import ItemAgent
from streaming.kafka.ground import Ground
from streaming.learn import Embed, Part, UserFold
from streaming.rebuild import verify
from streaming.state import (
    ItemStore,
    Keys,
    ModelStore,
    Redis,
    RedisUserStore,
    RowStore,
    UserWrite,
    connect,
    read_user,
)
from streaming.supervision import Progress
from streaming.topics import Log, Topics, end_offsets, epoch, partition_of, read_topic, topic_end
from streaming.trainer import LearningError, Trainer
from streaming.training.process import _blamed
from streaming.users.memory import MemoryUserStore
from tests.forked import Roles, warm

POISON, PARTITIONS = "u3", 2
USERS = [f"u{i}" for i in range(8)]


@pytest.fixture(scope="module", autouse=True)
def forks() -> None:
    """The process to fork from, before any event loop."""
    warm()


class World:
    """A log with topics, a user agent over it whose embedding may raise, and what it has folded."""

    def __init__(self, settings: Settings, topics: Topics, log: Log, client: Redis, epoch: str) -> None:
        self.settings, self.topics, self.log, self.client = settings, topics, log, client
        self.keys, self.progress, self.epoch = Keys(settings.namespace), Progress(), epoch
        self.at = dict.fromkeys(range(PARTITIONS), 0)

    async def click(self, users: Sequence[str], tag: str) -> None:
        events = [Click(user_id=u, item_id=f"i{i}", ts=1.0, event_id=f"{tag}{i}") for i, u in enumerate(users)]
        await self.log.append(
            self.topics.events, [(partition_of(e.user_id, PARTITIONS), e.user_id.encode(), encode(e)) for e in events]
        )

    async def fold(self, embed: Embed | None = None, store: RedisUserStore | None = None) -> None:
        """Let an agent that has just come fold what the log holds beyond what is applied, as one micro-batch."""
        agent = UserAgent(
            topics=self.topics, store=store or RedisUserStore(self.client, self.keys), log_=self.log,
            progress=self.progress, ground=Ground(self.log, self.topics, self.epoch),
            fold=UserFold(Weights(), embed=embed),
        )  # fmt: skip
        (ends,) = (await end_offsets(self.settings.kafka, {self.topics.events: PARTITIONS})).values()
        first = await agent.offsets({TP(self.topics.events, p): (0, end) for p, end in enumerate(ends)})
        batch: dict[TP, list[tuple[int, int, bytes]]] = {}
        async for partition, records in read_topic(self.settings.kafka, self.topics.events, dict(enumerate(ends))):
            tp = TP(self.topics.events, partition)
            if fresh := [(r.offset, r.timestamp, r.value) for r in records if r.offset >= first[tp]]:
                batch.setdefault(tp, []).extend(fresh)
        self.at = dict(enumerate(ends))
        await agent.apply(batch)

    async def clicks(self) -> dict[str, float]:
        store = RedisUserStore(self.client, self.keys)
        found: dict[str, float] = {}
        for user in USERS:
            read = await read_user(store, partition_of(user, PARTITIONS), user)
            found[user] = unpack(read.profiles[0], read.seen[0]).counters["click"] if read.profiles[0] else 0
        return found

    async def folded_to(self) -> dict[int, int]:
        reads = await RedisUserStore(self.client, self.keys).read({p: [] for p in range(PARTITIONS)})
        return {p: read.applied for p, read in reads.items()}


@pytest.fixture
async def world(settings: Settings, topics: Callable[..., Awaitable[Topics]], namespace: str) -> AsyncIterator[World]:
    made = await topics(PARTITIONS)
    chosen = Settings.load(
        settings.data, env={}, kafka=settings.kafka, redis=settings.redis, namespace=namespace, partitions=PARTITIONS
    )
    log, client = Log(settings.kafka), connect(settings.redis)
    await log.start()
    yield World(chosen, made, log, client, await epoch(settings.kafka, made))
    await log.stop()
    await client.aclose()


def raising_for(item: int) -> Embed:
    """A bug of ours, in the one callable the fold is handed: it raises where a profile holds so many events."""

    def embed(profiles: Any, rows: Any) -> list[bytes]:
        if (profiles.n[rows] == item).any():
            raise ZeroDivisionError("a bug of ours")
        return [b"e"] * len(rows)

    return embed


async def test_an_event_whose_fold_raises_is_set_aside_and_comes_back_once(world: World) -> None:
    await world.click([*USERS, POISON, *USERS], "a")
    await world.fold(raising_for(3))
    assert await world.folded_to() == world.at
    expected = dict.fromkeys(USERS, 2)
    assert await world.clicks() == expected
    assert (world.progress.poisoned, world.progress.events) == (1, 16)
    (letter,) = await letters(world.settings)
    assert letter.reason.startswith(
        f"its fold raised ZeroDivisionError 3 times, on profile and event of user {short('u3')}"
    )
    assert "'u3'" not in letter.reason  # reasons are logged; a user who is erased stays in no log
    assert "dead-letters replay" in letter.reason
    assert 'raise ZeroDivisionError("a bug of ours")' in letter.reason

    assert (await replay(world.settings, reason="no such reason")).appended == []
    assert (await replay(world.settings, position=letter.name)).appended == [letter.name]
    assert (await replay(world.settings)).before == [letter.name]
    await world.fold()
    assert await world.clicks() == expected | {POISON: 3}
    (letter,) = await letters(world.settings)
    assert len(letter.replays) == 1


async def test_a_replay_that_is_cut_off_is_finished_by_the_next(world: World) -> None:
    """Killed after the event went into the log, before the word of it: it is appended again, and taken once."""
    await world.click([POISON] * 3, "a")
    await world.fold(raising_for(3))
    (letter,) = await letters(world.settings)
    sent = await world.log.append(world.topics.dead_letters, [(0, MARK, msgspec.msgpack.encode(Intent(letter.name)))])
    event = letter.event(world.topics)
    event.source = ("dead-letters", 0, sent[0])
    await world.log.append(world.topics.events, [(letter.partition, POISON.encode(), encode(event))])
    for _ in range(2):
        assert (await replay(world.settings)).before == [letter.name]
    await world.fold()
    assert sum(world.at.values()) == 5
    assert (await world.clicks())[POISON] == 3


async def test_profile_bytes_that_are_damaged_stop_that_user_only(world: World) -> None:
    await world.click(USERS, "a")
    await world.fold()
    name = world.keys.profile(partition_of(POISON, PARTITIONS), POISON)
    whole = await world.client.get(name)
    await world.client.set(name, whole[:40])
    await world.click([*USERS, POISON], "b")
    await world.fold()
    assert await world.folded_to() == world.at
    assert await world.client.get(name) == whole[:40]
    found = await letters(world.settings)
    assert [
        letter.reason.startswith(f"the stored profile of user {short('u3')} cannot be read") for letter in found
    ] == [True] * 2
    assert all("freshet rebuild --switch" in letter.reason for letter in found)
    await world.client.set(name, whole)
    assert await world.clicks() == dict.fromkeys(USERS, 2) | {POISON: 1}
    # What was set aside is not folded from where it lies, by no rebuild either: it is still to be replayed.
    report = await verify(world.settings, advance=lambda *_: None)
    assert [line for line in report.differing if "profile" in line] == []
    assert len((await replay(world.settings)).appended) == 2
    await world.fold()
    assert await world.clicks() == dict.fromkeys(USERS, 2) | {POISON: 3}
    report = await verify(world.settings, advance=lambda *_: None)
    assert [line for line in report.differing if "profile" in line] == []


async def test_a_profile_of_a_later_version_stops_the_worker_for_good(world: World, tmp_path: Path) -> None:
    await world.click([POISON], "a")
    await world.client.set(world.keys.profile(partition_of(POISON, PARTITIONS), POISON), b"\x09" + bytes(127))
    roles = Roles(world.settings, tmp_path, ["users"])
    try:
        assert await asyncio.to_thread(roles.codes, 60) == {"users": EXIT_FOR_GOOD}, roles.text("users")
        assert "a later version of Freshet wrote it" in roles.text("users")
    finally:
        roles.stop()
    assert await letters(world.settings) == []


def test_a_part_without_events_is_folded() -> None:
    """Only what could not be read, or was set aside, lay there: the offset and the range go on all the same."""
    store = MemoryUserStore()
    outcome = UserFold(Weights()).fold([Part(0, 0, 3)], {0: store.read_now(0, [])})
    assert store.commit_now(outcome.writes[0]) is None
    assert store.applied[0][0] == 3
    assert outcome.records[0].ranges == [(0, 0, 3)]


class Killed(BaseException):
    """Stands for the end of a process: no code of ours catches it."""


class NoCommitOfNothing(RedisUserStore):
    """A store whose process is killed as it commits that an event was set aside: its letter is written."""

    async def commit(self, writes: Sequence[UserWrite], cluster: str = "") -> list[int | None]:
        if not any(write.profiles for write in writes):
            raise Killed
        return await super().commit(writes, cluster)


async def test_killed_between_letter_and_commit_the_letter_holds_and_is_written_once(world: World) -> None:
    """The next worker's fold does not raise: were the event folded then, its replay would count it twice."""
    place = partition_of(POISON, PARTITIONS)
    await world.click([*USERS, POISON], "a")
    await world.log.append(world.topics.events, [(place, POISON.encode(), b"no event")])
    await world.click([POISON, *(user for user in USERS if user != POISON)], "b")
    with pytest.raises(Killed):
        await world.fold(raising_for(3), NoCommitOfNothing(world.client, world.keys))
    assert (await world.folded_to())[place] < world.at[place]
    world.progress = Progress()
    await world.fold()
    assert await world.folded_to() == world.at
    assert (world.progress.poisoned, world.progress.dead) == (0, 0)
    assert await world.clicks() == dict.fromkeys(USERS, 2)
    assert await topic_end(world.settings.kafka, world.topics.dead_letters) == 2
    unread, poison = await letters(world.settings)
    assert poison.reason.startswith("its fold raised ZeroDivisionError 3 times")
    outcome = await replay(world.settings)
    assert (outcome.appended, list(outcome.bad)) == ([poison.name], [unread.name])
    await world.fold()
    assert (await world.clicks())[POISON] == 3
    report = await verify(world.settings, advance=lambda *_: None)
    assert [line for line in report.differing if "profile" in line] == []


class NoThirdFault(RowStore):
    """A store whose process is killed before it notes a third fault."""

    async def blame(self, first: int, following: int, text: str) -> int:
        if await self.blamed(first) == 2:
            raise Killed
        return await super().blame(first, following, text)


@pytest.mark.parametrize("role", ["items", "learner"])
async def test_a_record_is_never_skipped_without_its_letter(world: World, role: str) -> None:
    """Killed while it sets a record of `examples` aside: what counts the third fault comes after the letter."""
    bases = (NoThirdFault, ItemStore if role == "items" else ModelStore)
    store: Any = type("Store", bases, {})(world.client, world.keys)
    cause = IndexError("a bug of ours")
    for _ in range(2):
        await store.blame(7, 8, "IndexError")
    agent = ItemAgent(
        topics=world.topics, store=store, log_=world.log, progress=world.progress,
        ground=Ground(world.log, world.topics, world.epoch),
    )  # fmt: skip
    trainer = Trainer(store=store)
    trainer.last_value = b"bytes"
    for _ in range(2):
        if role == "items":
            blaming: Any = agent._poisoned(PoisonError(7, cause), b"bytes")
        else:
            blaming = _blamed(LearningError(7, 8, cause), store, DeadLetters(world.log, world.topics), trainer)
        with pytest.raises(Killed):
            await blaming
    assert (await store.faults())[7].count == 2
    (letter,) = await letters(world.settings)
    assert (letter.topic, letter.offset, letter.original) == (world.topics.examples, 7, b"bytes")
    assert "raised 3 times" in letter.reason
