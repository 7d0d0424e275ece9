"""Aliases, erasures and a deleted item on real servers while the worker is killed: exact, and the same from the log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from infra.settings import Settings
from infra.stack import Stack
from models.profile import unpack
from serving.snapshot import Snapshot
from streaming.events import Click, Item, encode, short
from streaming.item_agent import ItemAgent
from streaming.kafka.ground import Ground
from streaming.rebuild import log_ends, rebuild, refuse_while_workers_run, verify
from streaming.state import ItemStore, Keys, Redis, RedisUserStore, connect, read_user
from streaming.supervision import Progress
from streaming.topics import Log, Topics, epoch, partition_of
from tests.hand import Hand
from tests.test_api import until

PEOPLE, BEFORE, AFTER, GONE = 12, 20, 10, 6
Message = dict[str, Any] | str
"""An event, or the user to delete."""


def click(user: str, item: str, ts: float, event_id: str) -> dict[str, Any]:
    return {"type": "click", "user_id": user, "item_id": item, "ts": ts, "event_id": event_id}


def messages(now: float) -> tuple[list[list[Message]], list[Message], list[list[Message]]]:
    """Return what clients send, each person's in order: before any login, the logins (each twice), all after."""
    before: list[list[Message]] = []
    logins: list[Message] = []
    after: list[list[Message]] = []
    for k in range(PEOPLE):
        before.append([click(f"cookie-{k}", f"i{i}", now + i, f"c{k}-{i}") for i in range(BEFORE)])
        alias = {"type": "alias", "user_id": f"ann-{k}", "anonymous_id": f"cookie-{k}", "ts": now + 30}
        logins += [{**alias, "event_id": f"login-{k}"}] * 2
        after.append([click(f"ann-{k}", f"j{i}", now + 40 + i, f"a{k}-{i}") for i in range(AFTER)])
    for k in range(GONE):
        user = f"gone-{k}"
        some: list[Message] = [click(user, f"i{i}", now + i, f"g{k}-{i}") for i in range(10)]
        before.append(some)
        after.append([user, *some[:3], *(click(user, f"late{i}", now + i, f"l{k}-{i}") for i in range(4))])
    return before, logins, after


async def tell(client: httpx.AsyncClient, told: list[list[Message]], pause: float) -> None:
    """Send every person's messages in their order, people interleaved, a few at a time."""
    rng, left = np.random.default_rng(1), [list(each) for each in told]
    while left := [each for each in left if each]:
        each = left[rng.integers(len(left))]
        answer = await send(client, each)
        assert answer.status_code == 202, answer.text
        await asyncio.sleep(pause)


async def send(client: httpx.AsyncClient, each: list[Message]) -> httpx.Response:
    if isinstance(each[0], str):
        return await client.delete(f"/v1/users/{each.pop(0)}")
    some = [each.pop(0) for _ in range(min(5, len(each))) if not isinstance(each[0], str)]
    return await client.post("/v1/events", json=some)


async def drained(client: Redis, keys: Keys, kafka: str, topics: Topics) -> None:
    """Wait until the log is folded and grows no more: merges are appended while it is folded."""
    store, deadline, before = RedisUserStore(client, keys), time.monotonic() + 60, None
    while time.monotonic() < deadline:
        ends = await log_ends(kafka, topics)
        reads = await store.read({p: [] for p in range(topics.partitions)})
        head = await ItemStore(client, keys).head()
        done = all(read.applied == ends[topics.events, p] for p, read in reads.items())
        if done and int(head.get("next", 0)) == ends[topics.examples, 0] and ends == before:
            return
        before = ends
        await asyncio.sleep(0.3)
    raise AssertionError("not drained after 60 s")


async def check(store: RedisUserStore) -> None:
    """Everybody's clicks once, under the id that they have now; nothing of who was erased."""

    async def view_of(user: str) -> Any:
        read = await read_user(store, partition_of(user, 8), user)
        return unpack(read.profiles[0], read.seen[0])

    for k in range(PEOPLE):
        ann, cookie = await view_of(f"ann-{k}"), await view_of(f"cookie-{k}")
        assert ann.counters["click"] == BEFORE + AFTER, k
        assert (len(ann.items), len(ann.seen), ann.counters["duplicate"]) == (BEFORE + AFTER, BEFORE + AFTER, 0)
        assert (cookie.known, len(cookie.items), len(cookie.seen)) == (False, 0, 0)
    for k in range(GONE):
        view = await view_of(f"gone-{k}")
        assert (view.known, len(view.items), len(view.seen), view.ended > 0) == (False, 0, 0, True), k


async def test_serving_hears_of_a_deletion_whose_agent_died_before_it_told(
    settings: Settings, topics: Callable[..., Awaitable[Topics]]
) -> None:
    """The catalogue is committed, then fed; an agent that comes back says where it is, and a reader behind reloads."""
    hand, made, log = Hand(settings), await topics(), Log(settings.kafka)
    snapshot = Snapshot(connect(settings.redis), connect(settings.redis), namespace=settings.namespace)
    await log.start()
    try:
        await hand.catalogue_of([Item(item_id="a", title="A"), Item(item_id="b", title="B")])
        snapshot.start()
        await until(lambda: snapshot.loaded)
        await hand.catalogue_of([Item(item_id="a", deleted=True)], feed=False)
        agent = ItemAgent(
            topics=made, store=ItemStore(hand.client, hand.keys), log_=log, progress=Progress(),
            ground=Ground(log, made, await epoch(settings.kafka, made)),
        )  # fmt: skip
        await agent.offsets({})
        await until(lambda: snapshot.live.items.eligible.sum() == 1)
    finally:
        await snapshot.stop()
        await hand.close()
        await log.stop()


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_identity_survives_kills_and_a_rebuild(
    kafka: str, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    client = connect(redis_url)
    try:
        await scenario(client, Settings.load(
            tmp_path, env={}, kafka=kafka, redis=redis_url, namespace=namespace, port=0, epsilon=0.0,
        ))  # fmt: skip
    finally:
        await client.aclose()


async def scenario(client: Redis, settings: Settings) -> None:
    topics, keys = Topics(settings.namespace), Keys(settings.namespace)
    before, logins, after = messages(time.time() - 100)
    with Stack(settings, processes=("users", "items", "api")) as stack:
        async with httpx.AsyncClient(base_url=stack.api, timeout=30) as http:
            await tell(http, before, 0.0)
            await drained(client, keys, settings.kafka, topics)
            await killed_with_merges_appended_and_nothing_committed(client, http, stack, settings, logins)
            await tell(http, after, 0.0)
            await a_deleted_item_stays_away(http, stack, settings)
            await drained(client, keys, settings.kafka, topics)
            await erased_as_seen_from_outside(http)
    await check(RedisUserStore(client, keys))
    await refuse_while_workers_run(settings)
    assert (await verify(settings, advance=lambda *_: None)).differing == []
    report = await rebuild(settings, advance=lambda *_: None)
    await check(RedisUserStore(client, Keys(settings.namespace, report.generation)))


async def killed_with_merges_appended_and_nothing_committed(
    client: Redis, http: httpx.AsyncClient, stack: Stack, settings: Settings, logins: list[Message]
) -> None:
    """Hold writes to Redis, log in, and kill the worker as soon as a merge lies in the log: each comes twice."""
    topics = Topics(settings.namespace)

    async def total() -> int:
        ends = await log_ends(settings.kafka, topics)
        return sum(ends[topics.events, p] for p in range(topics.partitions))

    published = await total() + len(logins)
    await client.execute_command("CLIENT", "PAUSE", "20000", "WRITE")
    try:
        assert (await http.post("/v1/events", json=logins)).status_code == 202
        deadline = time.monotonic() + 15
        while await total() <= published:
            assert time.monotonic() < deadline, "the worker appended no merge"
            await asyncio.sleep(0.02)
        stack.kill("users-0")
    finally:
        await client.execute_command("CLIENT", "UNPAUSE")
    await drained(client, Keys(settings.namespace), settings.kafka, topics)
    assert await total() > published + PEOPLE


async def a_deleted_item_stays_away(http: httpx.AsyncClient, stack: Stack, settings: Settings) -> None:
    """Delete the most popular item, restart who holds items, then a late event names it: no slate has it."""
    log = Log(settings.kafka)
    await log.start()
    for item in ("i0", "i1"):
        assert (await http.delete(f"/v1/items/{item}")).status_code == 202
    late = Click(user_id="late", item_id="i0", ts=time.time() - 1000)
    await log.append(Topics(settings.namespace).events, [(partition_of("late", 8), b"late", encode(late))])
    stack.kill("items")
    await log.append(Topics(settings.namespace).events, [(partition_of("late", 8), b"late", encode(late))])
    await log.stop()
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        popular = {item["item_id"] for item in (await http.get("/v1/popular?n=100")).json()["items"]}
        if popular and not popular & {"i0", "i1"}:
            break
        await asyncio.sleep(0.2)
    slate = (await http.get("/v1/recommendations/new?n=100&track=false")).json()["items"]
    assert {"i2", "i3"} <= {item["item_id"] for item in slate}
    assert not {item["item_id"] for item in slate} & {"i0", "i1"}
    assert not popular & {"i0", "i1"}


async def erased_as_seen_from_outside(http: httpx.AsyncClient) -> None:
    answer = await http.delete("/v1/users/gone-0")
    receipt = answer.json()
    assert answer.status_code == 202
    assert receipt["user_id"] == "gone-0"
    assert "kept with the log" in receipt["raw_events"]["rule"]
    assert receipt["raw_events"]["until"] is None
    assert receipt["inlets"]["until"].startswith("20")
    assert short("gone-0") in receipt["logs"]["rule"]
    assert "FRESHET_MAX_USERS" in receipt["cap"]["rule"]
    assert "originals" in receipt["dead_letters"]["rule"]
    slate = await http.get(f"/v1/recommendations/gone-0?after={receipt['token']}&wait_ms=2000&track=false")
    assert slate.json()["applied"] is True
    assert slate.json()["items"]
    known = (await http.get("/v1/users/gone-0")).json()
    assert (known["known"], known["sequence"], known["seen"], known["first_time"]) == (False, [], 0, None)
    assert (await http.get("/v1/users/nobody")).json()["known"] is False
