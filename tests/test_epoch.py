"""What state was folded from: the epoch of a log names its cluster, its partitions and the ids of its topics."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from streaming.topics import Topics, TopicsError, create_topics, describe, epoch, moved


async def delete(kafka: str, *names: str) -> None:
    """Delete topics and wait until the broker knows them no more."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    await admin.delete_topics(list(names))
    await admin.close()
    while any(partitions for partitions, _ in (await describe(kafka, names))[1].values()):
        await asyncio.sleep(0.02)


async def test_a_topic_that_was_made_again_has_another_epoch(
    kafka: str, topics: Callable[..., Awaitable[Topics]]
) -> None:
    made = await topics(2)
    first = await epoch(kafka, made)
    assert first == await epoch(kafka, made)
    cluster, partitions, *ids = first.split("/")
    assert (len(cluster), partitions, [len(uuid) for uuid in ids]) == (22, "2", [22, 22, 22])
    await delete(kafka, made.examples)
    with pytest.raises(TopicsError, match=made.examples):
        await epoch(kafka, made)
    await create_topics(kafka, made)
    second = await epoch(kafka, made)
    assert moved(first, second) == f"`examples` was made again (was {ids[1]}, is {second.split('/')[3]})"
    assert (await describe(kafka, [made.steps, "nowhere"]))[1]["nowhere"] == (0, "")


def test_what_the_previous_version_wrote_is_compared_as_far_as_it_goes() -> None:
    now = "c/8/e/x/i"
    assert moved("", now) == moved("c/8", now) == moved(now, now) == ""
    assert moved("d/8", now) == "another cluster (was d, is c)"
    assert moved("c/4", now) == "another number of partitions (was 4, is 8)"
    assert moved("c/8/f/x/i", now) == "`events` was made again (was f, is e)"
