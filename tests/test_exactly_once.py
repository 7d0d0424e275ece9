"""Publish over HTTP and an inlet, with repeats, killing the worker: counts are exact and rebuild is identical."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from infra.settings import Settings
from infra.stack import Stack
from models.examples import item_hash
from models.profile import unpack
from streaming.rebuild import RebuildError, log_ends, rebuild, refuse_while_workers_run, verify
from streaming.state import ItemStore, Keys, Redis, RedisUserStore, connect, read_user
from streaming.topics import Log, Topics, partition_of

USERS, ITEMS, EVENTS = 40, 30, 3000


def stream(seed: int) -> list[dict[str, Any]]:
    """Return clicks with ids; their order and repeats are the clients' business."""
    rng, now = np.random.default_rng(seed), time.time()
    return [
        {
            "type": "click", "user_id": f"u{rng.integers(USERS)}", "item_id": f"i{rng.integers(ITEMS)}",
            "ts": now - i * 0.01, "event_id": f"e{i}",
        }
        for i in range(EVENTS)
    ]  # fmt: skip


async def publish(api: str, kafka: str, topics: Topics, events: list[dict[str, Any]], pause: float) -> None:
    """Send parts over HTTP and into the inlet; each tenth chunk twice, as a client that saw no answer would."""
    log = Log(kafka)
    await log.start()
    async with httpx.AsyncClient(base_url=api, timeout=30) as client:
        for at in range(0, len(events), 50):
            chunk = events[at : at + 50]
            for _ in range(2 if at % 500 == 0 else 1):
                if at % 150 == 0:
                    records = [(0, e["user_id"].encode(), json.dumps(e).encode()) for e in chunk]
                    await log.append(topics.inlet("clicks"), records)
                else:
                    answer = await client.post("/v1/events", json=chunk)
                    assert answer.status_code == 202, answer.text
            await asyncio.sleep(pause)
    await log.stop()


async def drained(client: Redis, keys: Keys, kafka: str, topics: Topics, events: int) -> None:
    """Wait until every accepted event is folded into profiles, and every entry into item rows."""
    store, deadline = RedisUserStore(client, keys), time.monotonic() + 60
    while time.monotonic() < deadline:
        ends = await log_ends(kafka, topics)
        reads = await store.read({p: [] for p in range(topics.partitions)})
        total = sum(ends[topics.events, p] for p in range(topics.partitions))
        done = all(read.applied == ends[topics.events, p] for p, read in reads.items()) and total >= events
        head = await ItemStore(client, keys).head()
        if done and int(head.get("next", 0)) == ends[topics.examples, 0]:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("not drained after 60 s")


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("form", ["chunks", "stock"])
async def test_killed_thrice_counts_are_exact_and_rebuild_is_identical(
    kafka: str, redis_url: str, namespace: str, tmp_path: Path, form: str
) -> None:
    client = connect(redis_url)
    try:
        await exactly_once(client, kafka, redis_url, namespace, tmp_path, form)
    finally:
        await client.aclose()


async def exactly_once(client: Redis, kafka: str, redis_url: str, namespace: str, tmp_path: Path, form: str) -> None:
    topics, keys = Topics(namespace), Keys(namespace)
    settings = Settings.load(tmp_path, env={}, kafka=kafka, redis=redis_url, namespace=namespace, consumer=form, port=0)
    events = stream(1)
    with Stack(settings, processes=("users", "items", "api")) as stack:
        publishing = asyncio.create_task(publish(stack.api, kafka, topics, events[: EVENTS // 2], 0.05))
        for _ in range(2):
            await asyncio.sleep(0.8)
            stack.kill("users-0")
        await publishing
        await drained(client, keys, kafka, topics, EVENTS // 2)
        before = (await log_ends(kafka, topics))[topics.examples, 0]
        await client.execute_command("CLIENT", "PAUSE", "20000", "WRITE")
        publishing = asyncio.create_task(publish(stack.api, kafka, topics, events[EVENTS // 2 :], 0.02))
        await kill_between_produce_and_commit(stack, client, kafka, topics, before)
        await publishing
        stack.kill("items")
        await drained(client, keys, kafka, topics, EVENTS)
        with pytest.raises(RebuildError, match="still run"):
            await asyncio.wait_for(verify(settings, advance=lambda *_: None), 60)
    await check_counts(client, keys, events)
    await refuse_while_workers_run(settings)  # the killed members' session ends
    report = await verify(settings, advance=lambda *_: None)
    assert report.differing == []
    assert (report.profiles, report.rows) == (USERS, ITEMS)
    if form == "chunks":
        await a_flipped_byte_is_named(client, keys, settings)
        await the_next_generation_is_the_same(client, keys, settings)


async def kill_between_produce_and_commit(stack: Stack, client: Redis, kafka: str, topics: Topics, before: int) -> None:
    """With writes to Redis held, wait until the worker appended to `examples`; kill it before its commit is done."""
    try:
        deadline = time.monotonic() + 15
        while (await log_ends(kafka, topics))[topics.examples, 0] == before:
            assert time.monotonic() < deadline, "the worker appended nothing to examples"
            await asyncio.sleep(0.05)
        stack.kill("users-0")
    finally:
        await client.execute_command("CLIENT", "UNPAUSE")


async def check_counts(client: Redis, keys: Keys, events: list[dict[str, Any]]) -> None:
    """Every user's clicks and every item's voices are those of the published stream, each counted once."""
    store = RedisUserStore(client, keys)
    for user, clicks in Counter(event["user_id"] for event in events).items():
        read = await read_user(store, partition_of(user, 8), user)
        view = unpack(read.profiles[0], read.seen[0])
        assert view.counters["click"] == clicks, user
        mine = {item_hash(e["item_id"]) & 0xFFFFFFFF for e in events if e["user_id"] == user}
        assert set(view.seen.tolist()) == mine


async def a_flipped_byte_is_named(client: Redis, keys: Keys, settings: Settings) -> None:
    name = keys.profile(partition_of("u7", 8), "u7")
    stored = await client.get(name)
    await client.set(name, stored[:60] + bytes([stored[60] ^ 1]) + stored[61:])
    (key, row), *_ = [found async for found in ItemStore(client, keys).scan(keys.item_rows)]
    await client.hset(keys.item_rows(key & 255), key.to_bytes(8, "little"), row[:9] + bytes([row[9] ^ 1]) + row[10:])
    report = await verify(settings, advance=lambda *_: None)
    assert report.differing == [
        f"{name}: stored {len(stored)} bytes, folded {len(stored)}, first difference at byte 60",
        f"item row {key:016x}: stored {len(row)} bytes, folded {len(row)}, first difference at byte 9",
    ]
    await client.set(name, stored)
    await client.hset(keys.item_rows(key & 255), key.to_bytes(8, "little"), row)


async def the_next_generation_is_the_same(client: Redis, keys: Keys, settings: Settings) -> None:
    progress: list[tuple[str, int, int]] = []
    report = await rebuild(settings, advance=lambda *step: progress.append(step), switch=True)
    assert (report.generation, report.profiles) == (2, USERS)
    assert {what for what, done, total in progress if done == total} == {"events", "examples"}
    built = Keys(keys.namespace, 2)
    assert int(await client.get(keys.pointer)) == 2

    async def values(which: Keys) -> dict[str, Any]:
        names = [n.decode() async for n in client.scan_iter(f"{which.prefix}:*profile*", count=1000)]
        return {name.removeprefix(which.prefix): await client.get(name) for name in names}

    assert await values(built) == await values(keys)
    scan: Callable[[Keys], Any] = lambda which: ItemStore(client, which).scan(which.item_rows)  # noqa: E731
    assert {row async for row in scan(built)} == {row async for row in scan(keys)}
    assert (await verify(settings, advance=lambda *_: None)).differing == []
