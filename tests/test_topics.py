"""Partitions, tokens, creation and preflight, and the producer's order, on a real broker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from hypothesis import given
from hypothesis import strategies as st

from streaming.topics import (
    Log,
    Position,
    TokenError,
    Topics,
    TopicsError,
    create_topics,
    decode_token,
    encode_token,
    partition_of,
    preflight,
)


def test_partitions_are_those_of_javas_default() -> None:
    """Values of Kafka's own Utils.murmur2 (toPositive) for these keys."""
    known = {"21": -973932308, "foobar": -790332482, "abc": 479470107}
    for key, murmur in known.items():
        assert partition_of(key, 1000) == (murmur & 0x7FFFFFFF) % 1000


@given(st.dictionaries(st.integers(0, 99), st.integers(0, 2**53), max_size=8))
def test_tokens_round_trip(offsets: dict[int, int]) -> None:
    assert decode_token(encode_token(offsets)) == Position(offsets)


@given(st.text(max_size=40))
def test_any_other_token_is_refused(text: str) -> None:
    with contextlib.suppress(TokenError):
        decode_token(text)


def test_inlet_positions_are_tokens() -> None:
    assert decode_token("clicks:3:99") == Position({}, ("clicks", 3, 99))
    for wrong in ("events:1:2", "clicks:x:2", "clicks:1", "clicks:1:-2"):
        with pytest.raises(TokenError):
            decode_token(wrong)


async def test_preflight_names_what_is_missing(kafka: str, namespace: str) -> None:
    with pytest.raises(
        TopicsError, match=rf"{namespace}.events: expected 8 partition\(s\), got no such topic.*freshet up"
    ):
        await preflight(kafka, Topics(namespace))
    await create_topics(kafka, Topics(namespace, partitions=2))
    await create_topics(kafka, Topics(namespace, partitions=2))  # again is fine
    assert await preflight(kafka, Topics(namespace, partitions=2))
    with pytest.raises(TopicsError, match=r"expected 8 partition\(s\), got 2.*FRESHET_PARTITIONS"):
        await preflight(kafka, Topics(namespace))


async def test_appends_keep_their_order_and_tell_the_last_offset(
    kafka: str, topics: Callable[..., Awaitable[Topics]]
) -> None:
    made = await topics(partitions=2)
    log = Log(kafka)
    await log.start()
    big = b"x" * 300_000  # beyond a batch, within a message
    values = [f"{i}".encode() for i in range(3000)] + [big]
    assert await log.append(made.events, [(i % 2, b"k", value) for i, value in enumerate(values)]) == {0: 1500, 1: 1499}
    assert await log.append(made.events, [(1, None, b"last")]) == {1: 1500}
    await log.stop()
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka, auto_offset_reset="earliest")
    await consumer.start()
    partitions = [TopicPartition(made.events, p) for p in (0, 1)]
    consumer.assign(partitions)
    found: dict[int, list[bytes | None]] = {0: [], 1: []}
    while sum(map(len, found.values())) < 3002:
        for partition, batch in (await consumer.getmany(timeout_ms=1000)).items():
            found[partition.partition] += [record.value for record in batch]
    await consumer.stop()
    assert found[0] == values[::2]
    assert found[1] == [*values[1::2], b"last"]


async def test_a_producer_that_is_given_no_time_to_stop_leaves_nothing_open(
    kafka: str, topics: Callable[..., Awaitable[Topics]]
) -> None:
    made, log = await topics(2), Log(kafka)
    await log.start()
    await log.append(made.events, [(0, b"k", b"v")])
    assert (producer := log._producer) is not None
    pending = await log.submit(made.events, [(p, b"k", b"v") for p in (0, 1)])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await log.stop()
    assert not any(connection.connected() for connection in producer.client._conns.values())
    assert (await asyncio.wait({producer._sender.sender_task}, timeout=5.0))[0], "its sender ends"
    await asyncio.gather(*pending, return_exceptions=True)
