"""Slates on their way to the log: what is logged, no answer waits, drops are counted, a Kafka that goes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from infra.kafka import Broker
from infra.settings import Settings
from models.examples import Shown, item_hash
from models.features import F
from serving.app import _always
from serving.slates import Impressions
from streaming.events import Impression, decode
from streaming.topics import LogError, Topics, _counted, create_topics, partition_of
from tests.hand import Hand
from tests.test_api import PARTITIONS, compiled, event, seeded, serving, settings_with, until

__all__ = ["compiled"]

Records = Sequence[tuple[int, bytes, bytes]]


async def test_what_does_not_fit_is_dropped_and_counted() -> None:
    gate = asyncio.Event()
    sent: list[tuple[int, bytes, bytes]] = []

    async def append(records: Records) -> None:
        await gate.wait()
        sent.extend(records)

    told: list[int] = []
    impressions = Impressions(append=append, limit=5, on_change=lambda me: told.append(me.dropped))
    taken = [impressions.offer(lambda k=k: (0, b"", b"%d" % k)) for k in range(8)]  # type: ignore[misc]
    assert taken == [True] * 5 + [False] * 3
    assert (impressions.dropped, len(impressions), told[-1]) == (3, 5, 3)
    impressions.start()
    gate.set()
    await impressions.stop()
    assert [value for _, _, value in sent] == [b"0", b"1", b"2", b"3", b"4"]
    assert (impressions.appended, impressions.failed) == (5, 0)


async def test_what_kafka_does_not_take_is_counted_and_the_next_goes_on() -> None:
    failures = [OSError("gone")]

    async def append(records: Records) -> None:
        if failures:
            raise failures.pop()

    impressions = Impressions(append=append, limit=5)
    impressions.start()
    impressions.offer(lambda: (0, b"", b"a"))
    await until(lambda: impressions.failed == 1)
    impressions.offer(lambda: (0, b"", b"b"))
    await until(lambda: impressions.appended == 1)
    await impressions.stop()


async def test_what_still_waits_at_the_end_counts_as_failed() -> None:
    async def append(records: Records) -> None:
        await asyncio.Event().wait()

    impressions = Impressions(append=append, limit=500)
    impressions.start()
    for _ in range(150):
        impressions.offer(lambda: (0, b"", b""))
    await impressions.stop(drain_s=0.05)
    assert (impressions.failed, impressions.appended, len(impressions)) == (150, 0, 0)


async def logged(settings: Settings) -> list[Impression]:
    """Every impression in the log."""
    consumer = AIOKafkaConsumer(bootstrap_servers=settings.kafka)
    await consumer.start()
    try:
        places = [TopicPartition(Topics(settings.namespace).events, p) for p in range(PARTITIONS)]
        consumer.assign(places)
        await consumer.seek_to_beginning(*places)
        count = sum((await consumer.end_offsets(places)).values())
        records = [await consumer.getone() for _ in range(count)]
    finally:
        await consumer.stop()
    for record in records:
        assert record.partition == partition_of(record.key.decode(), PARTITIONS)
    found = [decode(record.value) for record in records]
    return [each for each in found if isinstance(each, Impression)]


@pytest.mark.parametrize("share", [0.0, 1.0])
async def test_a_slate_is_logged_with_what_made_it(settings: Settings, topics: Any, share: float) -> None:
    settings = settings_with(settings, feature_share=share)
    await topics(PARTITIONS)
    hand = Hand(settings)
    await seeded(hand)
    async with serving(settings) as (client, app):
        parts = app.state.parts
        await until(lambda: not parts.log_problem and parts.snapshot.live.items.n == 30)
        await client.get("/v1/recommendations/u1?track=false")
        body = (await client.get('/v1/recommendations/u1?n=4&surface=feed&context={"a":"b"}')).json()
        await until(lambda: parts.impressions.appended == 1)
    await hand.close()
    (impression,) = await logged(settings)
    shown = Shown.from_bytes(impression.payload)
    assert impression.slate_id == body["slate_id"]
    assert impression.shown == [item["item_id"] for item in body["items"]]
    assert (impression.user_id, impression.surface, impression.context) == ("u1", "feed", {"a": "b"})
    assert shown.slate == item_hash(body["slate_id"])
    assert shown.items.tolist() == [item_hash(each) for each in impression.shown]
    assert (shown.propensities > 0).all()
    assert (shown.propensities <= 1).all()
    assert shown.features.shape[1] == F
    assert (len(shown.candidates) > 4) == (share == 1.0)


async def test_without_kafka_lookups_go_on_and_events_are_told_to_come_back(
    redis_url: str, namespace: str, tmp_path: Path
) -> None:
    broker = Broker.prepare(tmp_path / "kafka", Settings.load(env={}).cache_path)
    broker.start()
    broker.wait_ready()
    settings = Settings.load(
        tmp_path,
        env={},
        kafka=broker.bootstrap,
        redis=redis_url,
        namespace=namespace,
        partitions=2,
        impression_buffer=3,
    )
    hand = Hand(settings)
    try:
        await create_topics(settings.kafka, Topics(namespace, 2))
        await seeded(hand)
        async with serving(settings) as (client, app):
            await until(lambda: not app.state.parts.log_problem and app.state.parts.snapshot.live.items.n == 30)
            assert (await client.post("/v1/events", json=event())).status_code == 202
            broker.process.kill()
            await _without_kafka(client, app.state.parts)
            broker.start()
            await asyncio.to_thread(broker.wait_ready)  # the application runs in this loop: held up, it would shed
            await until(lambda: not app.state.parts.log_problem, 20)
            assert (await client.post("/v1/events", json=event())).status_code == 202
    finally:
        await hand.close()
        broker.stop()


async def _without_kafka(client: httpx.AsyncClient, parts: Any) -> None:
    began = time.perf_counter()
    refused = await client.post("/v1/events", json=event())
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert time.perf_counter() - began < 3.0
    for _ in range(8):
        body = (await client.get("/v1/recommendations/u1")).json()
        assert (len(body["items"]), body["degraded"]) == (10, False)
    assert parts.impressions.dropped > 0
    await until(lambda: parts.log_problem)
    began = time.perf_counter()
    assert (await client.post("/v1/events", json=event())).status_code == 503
    assert time.perf_counter() - began < 0.5
    assert (await client.get("/health/ready")).status_code == 503


async def test_a_library_cannot_end_what_must_run_always() -> None:
    """aiokafka cancels tasks of its own and waits for them; whoever waits with it is not told to end by that."""
    begun = 0

    async def work() -> None:
        nonlocal begun
        begun += 1
        foreign = asyncio.create_task(asyncio.sleep(60))
        foreign.cancel()
        if begun == 1:
            await foreign
        if begun == 2:
            raise OSError("gone")
        await asyncio.sleep(60)

    task = asyncio.create_task(_always("work", work))
    await until(lambda: begun == 3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_delivery_that_the_producer_gave_up_is_a_failed_one() -> None:
    future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(_counted(future, 1))
    await asyncio.sleep(0)
    future.cancel()
    with pytest.raises(LogError, match="gave the record up"):
        await waiting
