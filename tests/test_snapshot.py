"""The arrays in process: feed rules, reloads at holes, catalogue changes, a Redis that goes and comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest

from infra.settings import Settings
from infra.store import RedisServer
from models.examples import item_hash
from serving.lookup import row_of
from serving.snapshot import Live, Snapshot, Stale, _before
from streaming.events import Item
from streaming.state import Delta, ModelStore, connect
from tests.hand import Hand
from tests.test_api import click, compiled, seeded, serving, settings_with, until

__all__ = ["compiled"]


@pytest.fixture
async def hand(settings: Settings) -> AsyncIterator[Hand]:
    made = Hand(settings)
    yield made
    await made.close()


@pytest.fixture
async def snapshot(settings: Settings) -> AsyncIterator[Snapshot]:
    made = Snapshot(connect(settings.redis), connect(settings.redis), namespace=settings.namespace)
    yield made
    await made.stop()


def rows_of(live: Live) -> dict[str, bytes]:
    """Packed rows by id."""
    items = live.items
    return dict(zip(items.ids, items.pack(np.arange(items.n)), strict=False))


async def test_loaded_and_fed_rows_equal_the_writers(snapshot: Snapshot, hand: Hand) -> None:
    await seeded(hand)
    snapshot.start()
    await until(lambda: snapshot.loaded)
    await hand.learn([click("u1", "i3", 5), click("u2", "fresh", 4)], commit=False)
    await until(lambda: snapshot.live.items_position == hand.next)
    mine, theirs = rows_of(snapshot.live), rows_of(Live(hand.items, snapshot.live.model))
    assert mine == theirs
    assert snapshot.live.items.pack_totals() == hand.items.pack_totals()
    assert snapshot.reloads == 0


async def test_a_delta_is_applied_skipped_or_a_hole() -> None:
    live = Live.empty()
    assert live.apply_item(Delta("rows", 0, 10, (), ())) is True
    assert live.apply_item(Delta("rows", 4, 10, (), ())) is False
    assert live.apply_item(Delta("rows", 8, 12, (), ())) is True
    assert live.items_position == 12
    with pytest.raises(Stale, match="from 12"):
        live.apply_item(Delta("rows", 13, 14, (), ()))
    with pytest.raises(Stale):
        live.apply_step([], Delta("step", 1, 2, (), ()))


async def test_a_hole_reloads(snapshot: Snapshot, hand: Hand) -> None:
    await seeded(hand)
    snapshot.start()
    await until(lambda: snapshot.loaded)
    await hand.learn([click("u3", "lost", 9)], feed=False)
    await hand.learn([click("u3", "found", 8)])
    await until(lambda: snapshot.live.items_position == hand.next)
    assert snapshot.reloads == 1
    assert {"lost", "found"} <= set(snapshot.live.items.ids)


async def test_a_model_step_is_applied_at_its_end_only(snapshot: Snapshot, hand: Hand) -> None:
    await seeded(hand)
    snapshot.start()
    await until(lambda: snapshot.loaded)
    source = Live.empty().model
    key = item_hash("i1")
    row = source.rows.add(np.array([key], np.uint64))
    source.factors.grow()
    source.factors.vectors[row] = 0.25
    source.step = 7
    store, packed = ModelStore(hand.client, hand.keys), source.pack_rows(row)
    await store.publish(Delta("vectors", 0, 5, (key,), packed, step=7))
    await asyncio.sleep(0.1)
    served = snapshot.live.model.factors.vectors
    at = int(snapshot.live.items.rows.find(np.array([key], np.uint64))[0])
    assert not np.allclose(served[at], 0.25)
    await store.publish(Delta("step", 0, 5, (), (), source.dense_bytes(), 7))
    await until(lambda: snapshot.live.model.step == 7)
    assert np.allclose(snapshot.live.model.factors.vectors[at], 0.25)


async def test_the_generation_is_followed(snapshot: Snapshot, hand: Hand) -> None:
    snapshot.start()
    await until(lambda: snapshot.loaded)
    await hand.client.set(hand.keys.pointer, 2)
    await until(lambda: snapshot.keys.generation == 2 and snapshot.loaded)


def test_reading_goes_on_before_all_that_may_be_news() -> None:
    last = 2**64 - 1
    assert _before("900-3", 800) == f"799-{last}"
    assert _before("700-3", 800) == "700-3"
    assert _before("0-0", 800) == "0-0"
    assert _before("900-3", 0) == "0-0"


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that a test may kill."""
    server = RedisServer(tmp_path / "redis")
    server.start()
    server.wait_ready()
    yield server
    server.stop()


async def test_without_redis_answers_come_from_the_arrays(
    settings: Settings, own_redis: RedisServer, topics: object
) -> None:
    settings = settings_with(settings, redis=own_redis.url)
    hand = Hand(settings)
    await topics(settings.partitions)  # type: ignore[operator]
    await seeded(hand)
    async with serving(settings) as (client, app):
        parts = app.state.parts
        await until(lambda: parts.snapshot.live.items.n == 30 and not parts.log_problem)
        own_redis.process.kill()
        await until(lambda: parts.snapshot.degraded)
        began = time.perf_counter()
        body = (await client.get("/v1/recommendations/u1")).json()
        assert (len(body["items"]), body["degraded"]) == (10, True)
        assert "degraded" in body["reason"]
        assert time.perf_counter() - began < 0.3
        waited = (await client.get("/v1/recommendations/u1?after=clicks:0:1")).json()
        assert waited["applied"] is False
        assert (await client.get("/v1/users/u1")).status_code == 503
        assert (await client.get("/health/ready")).status_code == 503
        assert (await client.get("/health/live")).status_code == 200
        own_redis.start()
        own_redis.wait_ready()
        await until(lambda: not parts.snapshot.degraded)
        await hand.close()
        await hand.learn([click("u1", "again", 2)])
        await until(lambda: "again" in parts.snapshot.live.items.ids)
        body = (await client.get("/v1/recommendations/u1")).json()
        assert body["degraded"] is False
    await hand.close()


async def test_a_deleted_item_leaves_every_slate(settings: Settings, topics: object, hand: Hand) -> None:
    settings = settings_with(settings)
    await topics(settings.partitions)  # type: ignore[operator]
    await seeded(hand, items=12)
    async with serving(settings) as (client, app):
        await until(lambda: app.state.parts.snapshot.live.items.n == 12)
        path = "/v1/recommendations/new?n=50&track=false"
        assert "i4" in {item["item_id"] for item in (await client.get(path)).json()["items"]}
        await hand.catalogue_of([Item(item_id="i4", deleted=True)])
        began = time.perf_counter()
        while "i4" in {item["item_id"] for item in (await client.get(path)).json()["items"]}:
            assert time.perf_counter() - began < 1.0
        assert "i4" not in {item["item_id"] for item in (await client.get("/v1/popular?n=50")).json()["items"]}
        await hand.catalogue_of([Item(item_id="i4", title="Back")])
        live = app.state.parts.snapshot.live
        await until(lambda: not live.items.hidden[row_of(live, "i4")], 2.0)
