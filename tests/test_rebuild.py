"""Rebuild beside a running stack, generations and their switch, the line of weights, a state of a time, rederiving."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from infra.recovering import moment
from infra.settings import Settings
from infra.stack import Stack
from models.examples import Entries
from models.profile import unpack
from streaming.learn import Part
from streaming.rebuild import rebuild, verify
from streaming.recovery.apart import Apart
from streaming.recovery.compare import DIGEST, first_differences
from streaming.recovery.cuts import ends
from streaming.recovery.generations import RecoveryError, drop, generations, switch
from streaming.recovery.item_half import ItemHalf
from streaming.recovery.lineage import chain
from streaming.recovery.snapshots import save
from streaming.recovery.user_half import UserHalf
from streaming.state import Keys, Redis, RedisUserStore, connect, read_user
from streaming.topics import Topics, partition_of
from streaming.trainer import StepRecord
from tests.by_log import ByLog, clicks
from tests.test_exactly_once import drained

Made = Callable[..., Awaitable[object]]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Two partitions: topics are made sooner."""
    return replace(settings, partitions=2)


def silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


def step(number: int, first: int, following: int, parent: StepRecord | None, *, seed: int = 1) -> StepRecord:
    """Return a logged step."""
    before = parent.identity if parent else 0
    return StepRecord(number, number - 1, first, following, [following - first], seed, v=2, before=before)


def test_weights_follow_one_line_of_steps() -> None:
    one = step(1, 0, 5, None)
    two = step(2, 5, 9, one)
    three = step(3, 9, 12, two)
    fork = step(2, 5, 20, one)  # another generation went its own way from the first step on
    log = [one, two, two, fork, one, three]
    assert chain(log) == [one, two, three]
    assert chain(log, fork.identity) == [one, fork]
    assert chain(log, three.identity, one.identity) == [two, three]
    assert chain(log, three.identity, fork.identity) is None
    assert chain([two, three]) is None  # the first one is gone
    assert chain([]) == []
    assert step(2, 5, 9, fork).identity != two.identity
    old = [StepRecord(1, 0, 0, 5, [5], 1), StepRecord(2, 1, 5, 9, [4], 1)]
    assert chain([old[0], *old, step(3, 9, 12, old[1])])[:2] == old  # type: ignore[index]


def test_a_hole_in_the_log_ends_a_rebuild_in_words(settings: Settings) -> None:
    """Records deleted between the look at where the logs begin and the fold: no traceback, and a step that works."""
    with pytest.raises(RecoveryError, match=r"events\[0\] goes on at offset 3, folded is up to 0.*new namespace"):
        UserHalf(settings)._apply(Part(0, 3, 4))


def test_times_are_iso_or_seconds() -> None:
    assert moment("1795300000.5") == 1795300000.5
    assert moment("2026-11-22T10:30:00") == moment("2026-11-22T11:30:00+01:00") == moment("2026-11-22T10:30:00Z")
    with pytest.raises(SystemExit):
        moment("yesterday")


async def test_generations_stand_beside_each_other(settings: Settings, topics: Made) -> None:
    """Built while events wait, switched, gone on with, switched back: each generation is what the log folds to."""
    await topics(settings.partitions)
    async with ByLog(settings) as one:
        client, names = one.client, (settings.namespace, settings.partitions)
        await one.run(clicks(300, seed=1), steps=3)
        await one.publish(
            clicks(100, seed=2)
        )  # not derived yet: left to the workers, or their entries would be missing
        report = await rebuild(settings, advance=silent)
        assert (report.generation, report.events, report.steps, report.switched) == (2, 300, 3, False)
        assert await one.everything(2) == await one.everything()
        await one.run(clicks(50, seed=3), steps=2)  # the first generation goes on, and takes steps of its own
        assert await switch(client, names[0], 2, names[1]) == 1
        async with ByLog(settings, 2) as two:
            await two.run(clicks(50, seed=4), steps=1)  # derives again what the first one has derived
            assert (await verify(settings, advance=silent, rederive=True)).differing == []
            after = await two.everything()
        assert await switch(client, names[0], 1, names[1]) == 2
        await one.run(clicks(20, seed=5), steps=1)
        report = await verify(settings, advance=silent)
        assert (report.differing, report.steps) == ([], 6)  # 3, then 2 and 1 of its own: not those of generation 2
        assert (await rebuild(settings, advance=silent)).generation == 3
        assert await one.everything(3) == await one.everything()
        assert after[":{model}:head"] != (await one.everything())[":{model}:head"]
        found = await generations(client, *names)
        assert [(g.number, g.served, g.ready) for g in found] == [(1, True, True), (2, False, True), (3, False, True)]
        await drop(client, names[0], 3, names[1])
        assert not await one.everything(3)
        assert (await rebuild(settings, advance=silent, weights=False)).generation == 4  # a number is not used twice
        assert await one.everything(4) == await one.everything()
        with pytest.raises(RecoveryError, match="is the one that is served"):
            await drop(client, names[0], 1, names[1])
        with pytest.raises(RecoveryError, match=r"generation 3: there is none.*only 1, 2, 4"):
            await switch(client, names[0], 3, names[1])


async def test_what_was_not_built_to_its_end_is_not_served(settings: Settings, topics: Made) -> None:
    await topics(settings.partitions)

    def stop(what: str, done: int, total: int) -> None:
        raise InterruptedError

    async with ByLog(settings) as live:
        await live.run(clicks(50))
        with pytest.raises(InterruptedError):
            await rebuild(settings, advance=stop)
        with pytest.raises(RecoveryError, match="not built to its end: `freshet generation drop 2`"):
            await switch(live.client, settings.namespace, 2, settings.partitions)
        with pytest.raises(RecoveryError, match="--until with --switch"):
            await rebuild(settings, advance=silent, until=time.time(), switch=True)


async def test_with_codec_1_a_rebuild_is_what_the_release_before_reads(settings: Settings, topics: Made) -> None:
    """Whatever it begins from: the logs, a snapshot, weights that are copied as they are."""
    await topics(settings.partitions)
    async with ByLog(settings) as live:
        await live.run(clicks(100))
        await save(settings, advance=silent, name="first")
        back, known = replace(settings, codec=1), "/".join(live.ground.split("/")[:2]).encode()
        assert known != live.ground.encode()
        for how in ({}, {"weights": False}, {"snapshot": "first"}):
            report = await rebuild(back, advance=silent, **how)  # type: ignore[arg-type]
            found = await live.everything(report.generation)
            stamps = {name: value[b"cluster"] for name, value in found.items() if b"cluster" in value}
            assert len(stamps) == settings.partitions + 2
            assert set(stamps.values()) == {known}, (how, stamps)
            versions = {value[0] for name, value in found.items() if ":profile:" in name}
            assert versions == {1}, how


async def test_until_is_the_state_of_that_time(settings: Settings, topics: Made) -> None:
    await topics(settings.partitions)
    async with ByLog(settings) as live:
        await live.run(clicks(150, seed=1), steps=2)
        then = await live.everything()
        await asyncio.sleep(0.05)
        at = time.time()
        await asyncio.sleep(0.05)
        await live.run(clicks(100, seed=2), steps=2)
        report = await rebuild(settings, advance=silent, until=at)
        assert (report.events, report.steps) == (150, 2)
        assert await live.everything(report.generation) == then
        assert (await rebuild(settings, advance=silent, until=at - 3600)).events == 0


async def test_what_differs_is_named(settings: Settings, topics: Made) -> None:
    await topics(settings.partitions)
    async with ByLog(settings) as live:
        await live.run(clicks(150, seed=1), steps=2)
        assert (await verify(settings, advance=silent, rederive=True)).differing == []
        (key, row), *_ = [found async for found in live.weights.scan(live.keys.model_rows)]
        await live.client.hset(
            live.keys.model_rows(key & 255), key.to_bytes(8, "little"), row[:19] + bytes([row[19] ^ 64]) + row[20:]
        )
        (named,) = (await verify(settings, advance=silent)).differing
        assert named.startswith(f"learnt row {key:016x}: differs by up to")
        skipped = await verify(settings, advance=silent, weights=False)
        assert (skipped.differing, skipped.notes) == ([], ["weights were not compared"])
        await live.client.hset(live.keys.model_rows(key & 255), key.to_bytes(8, "little"), row)
        where = await forge_an_entry(live)
        named = (await verify(settings, advance=silent, rederive=True, weights=False)).differing[-1]
        assert named == f"entry of events[{where[0]}]@{where[1]} differs from `examples`"


async def forge_an_entry(live: ByLog) -> tuple[int, int]:
    """Derive new events, but append the last entry of a record with another weight; return its source position."""
    await live.publish(clicks(5, seed=9, users=1))
    original = live.log.append

    async def forging(topic: str, records: Any) -> dict[int, int]:
        made = list(records)
        if topic == live.topics.examples and made:
            entries = Entries.from_bytes(made[0][2])
            entries.weight = entries.weight.copy()
            entries.weight[-1] = 0.25
            made[0] = (0, None, entries.to_bytes())
            places.append((int(entries.partition[-1]), int(entries.offset[-1])))
        return await original(topic, made)

    places: list[tuple[int, int]] = []
    live.log.append = forging  # type: ignore[method-assign]
    await live.run()
    live.log.append = original  # type: ignore[method-assign]
    return places[0]


def test_the_first_entry_that_differs_is_named() -> None:
    def of(*offsets: int, mark: int = 0) -> bytes:
        return b"".join(offset.to_bytes(8, "big") + bytes([mark] * (DIGEST - 8)) for offset in offsets)

    assert first_differences({0: of(1, 2, 5)}, {0: of(1, 2, 5)}) == []
    assert first_differences({0: of(1, 2)}, {0: of(2)}) == []  # 1 was trimmed from `events`
    assert first_differences({0: of(1, 5)}, {0: of(1, 2, 5)}) == ["entry of events[0]@2 is missing in `examples`"]
    assert first_differences({1: of(1, 2, 5)}, {1: of(1, 5)}) == ["entry of events[1]@2 does not come of `events`"]
    assert first_differences({1: of(1)}, {1: of(1, mark=3)}) == ["entry of events[1]@1 differs from `examples`"]


async def test_a_half_works_in_a_process_of_its_own(settings: Settings, topics: Made) -> None:
    await topics(settings.partitions)
    told: list[tuple[str, int, int]] = []
    async with ByLog(settings) as live:
        await live.run(clicks(60))
        cut = await ends(settings)
    with Apart(ItemHalf, settings) as half:
        marks = await half.call("fold", cut.examples, cut.items, advance=lambda *step: told.append(step))
        assert marks == {p: end for p, end in cut.events.items() if end}
        assert told[-1] == ("examples", cut.examples, cut.examples)
        assert await half.call("compare", 1) == []
        with pytest.raises(FileNotFoundError):
            await half.call("load", str(Path(settings.data) / "nowhere"), {})


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_switched_and_back_under_load_counts_are_exact(
    kafka: str, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    """Real processes: rebuild while events flow, switch, exact counts; switch back, exact counts; serving follows."""
    settings = Settings.load(tmp_path, env={}, kafka=kafka, redis=redis_url, namespace=namespace, port=0)
    client, topics = connect(redis_url), Topics(namespace)
    sent: Counter[str] = Counter()
    with Stack(settings, processes=("users", "items", "api")) as stack:
        stop = asyncio.Event()
        flowing = asyncio.create_task(publish(stack.api, sent, stop))
        while not any(one.events for one in await generations(client, namespace, topics.partitions)):
            await asyncio.sleep(0.1)  # nothing is folded yet: there would be no generation to go back to
        await asyncio.sleep(3.0)
        report = await asyncio.wait_for(rebuild(settings, advance=silent, switch=True), 60)
        assert report.switched
        assert report.generation == 2
        assert await follows(stack.api, 2) < 2.0
        await asyncio.sleep(2.0)
        before = await switch(client, namespace, 1, topics.partitions)
        assert before == 2
        assert await follows(stack.api, 1) < 2.0
        await asyncio.sleep(1.0)
        stop.set()
        await flowing
        for number in (1, 2):  # the one that is served, then the other, each caught up with everything
            await switch(client, namespace, number, topics.partitions)
            await drained(client, Keys(namespace, number), kafka, topics, sent.total())
            assert await counted(client, Keys(namespace, number), sent) == sent
    report = await verify(settings, advance=silent, rederive=True)
    assert (report.differing, report.generation) == ([], 2)
    await client.aclose()


async def publish(api: str, sent: Counter[str], stop: asyncio.Event) -> None:
    async with httpx.AsyncClient(base_url=api, timeout=30) as client:
        while not stop.is_set():
            k = sent.total()
            chunk = [
                {
                    "type": "click",
                    "user_id": f"u{i % 23}",
                    "item_id": f"i{i % 17}",
                    "ts": time.time(),
                    "event_id": f"{i}",
                }
                for i in range(k, k + 20)
            ]
            answer = await client.post("/v1/events", json=chunk)
            if answer.status_code in (429, 503):  # a busy machine: what is sent again has the same event ids
                await asyncio.sleep(float(answer.headers["retry-after"]))
                continue
            assert answer.status_code == 202, answer.text
            sent.update(str(event["user_id"]) for event in chunk)
            await asyncio.sleep(0.05)


async def follows(api: str, generation: int) -> float:
    """Return how long after the switch the API serves a generation, s."""
    began = time.monotonic()
    async with httpx.AsyncClient(base_url=api, timeout=10) as client:
        while time.monotonic() < began + 30:
            if (await client.get("/-/state")).json()["snapshot"]["generation"] == generation:
                return time.monotonic() - began
            await asyncio.sleep(0.05)
    raise AssertionError(f"generation {generation} is not served after 30 s")


async def counted(client: Redis, keys: Keys, users: Counter[str]) -> Counter[str]:
    """Return the clicks in each profile."""
    store, found = RedisUserStore(client, keys), Counter[str]()
    for user in users:
        read = await read_user(store, partition_of(user, 8), user)
        found[user] = int(unpack(read.profiles[0], read.seen[0]).counters["click"])
    return found
