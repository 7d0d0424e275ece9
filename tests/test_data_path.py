"""The whole path with its real processes: a click over HTTP changes the next slate, so does one through an inlet."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from infra.settings import Settings
from infra.stack import Stack
from streaming.topics import Log, Topics, partition_of

pytestmark = pytest.mark.timeout(180)
PARTITIONS = 2


@pytest.fixture
async def stack(kafka: str, redis_url: str, namespace: str, tmp_path: Path) -> AsyncIterator[Stack]:
    settings = Settings.load(
        tmp_path, env={}, kafka=kafka, redis=redis_url, namespace=namespace, partitions=PARTITIONS, feature_share=1.0
    )
    with Stack(settings, processes=("users", "items", "api")) as started:
        yield started


def event(user: str, item: str, **more: Any) -> dict[str, Any]:
    return {"type": "click", "user_id": user, "item_id": item, "ts": time.time(), **more}


async def slate(client: httpx.AsyncClient, user: str, **query: Any) -> dict[str, Any]:
    """A greedy slate, so that two of them differ by what was learnt and not by chance."""
    answer = await client.get(f"/v1/recommendations/{user}", params={"policy": "greedy", "n": 5, **query})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def ids(body: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in body["items"]]


async def test_a_click_changes_the_next_slate(stack: Stack, kafka: str, namespace: str) -> None:
    async with httpx.AsyncClient(base_url=stack.api, timeout=10) as client:
        await a_crowd_goes_from_bread_to_butter(client)
        before = await slate(client, "ann")
        assert len(before["items"]) == 5
        accepted = await client.post("/v1/events", json=event("ann", "bread", slate_id=before["slate_id"]))
        after = await slate(client, "ann", after=accepted.json()["token"], wait_ms=2000)
        assert after["applied"] is True
        assert "bread" not in ids(after)
        assert "butter" not in ids(before)
        assert ids(after)[0] == "butter"
        assert after["items"][0]["reason"] == "Often chosen after Bread"
        await what_is_known(client, before["slate_id"])
        await exposures_count_when_they_happen(client, ids(before)[0])
        await an_inlet_counts_as_much(client, kafka, Topics(namespace, PARTITIONS))
        await a_deleted_item_is_gone_within_a_second(client)
        await reading_wrote_nothing(client)


async def a_crowd_goes_from_bread_to_butter(client: httpx.AsyncClient) -> None:
    """Twelve users click bread then butter, sixty others what is popular; folded by the item agent on return."""
    await client.post("/v1/items", json=[{"item_id": "bread", "title": "Bread"}, {"item_id": "butter"}])
    clicks = [event(f"many{u}", f"x{(u + k) % 40}") for u in range(60) for k in range(15)]
    clicks += [event(f"few{u}", item) for u in range(12) for item in (f"z{u}", "bread", "butter")]
    answer = await client.post("/v1/events", json=clicks)
    assert answer.json()["rejected"] == 0, answer.text
    end = time.monotonic() + 60
    while (await client.get("/v1/items/butter")).status_code == 404 or not await _followed(client):
        if time.monotonic() > end:
            pytest.fail(
                f"not folded: {(await client.get('/v1/items/bread')).text} {(await client.get('/-/state')).text}"
            )
        await asyncio.sleep(0.1)


async def _followed(client: httpx.AsyncClient) -> bool:
    known = (await client.get("/v1/items/bread")).json()
    weights = {entry["item_id"]: entry["weight"] for entry in known["next"]}
    return weights.get("butter", 0.0) >= 12 and known["catalogue"] is not None


async def what_is_known(client: httpx.AsyncClient, slate_id: str) -> None:
    """The profile holds the click and, once its impression went round the loop, the slate."""
    end = time.monotonic() + 10
    while True:
        known = (await client.get("/v1/users/ann")).json()
        if known["counters"]["impression"] >= 1:
            break
        assert time.monotonic() < end, "the impression did not reach the profile"
        await asyncio.sleep(0.05)
    assert known["counters"]["click"] == 1
    assert [entry["item_id"] for entry in known["sequence"]] == ["bread"]
    assert any(entry["shown"] for entry in known["slates"])
    assert slate_id


async def exposures_count_when_they_happen(client: httpx.AsyncClient, item: str) -> None:
    """An item of the first slate: its posterior knows that it was shown; its interval is that of few exposures."""
    end = time.monotonic() + 10
    while (known := (await client.get(f"/v1/items/{item}")).json())["posterior"]["exposures"] == 0.0:
        assert time.monotonic() < end, "the exposure did not reach the item"
        await asyncio.sleep(0.05)
    assert known["shown"] >= 1
    assert known["still_exploring"]
    click = known["posterior"]["click"]
    assert click["low"] < click["mean"] < click["high"]
    assert click["alpha"] + click["beta"] > 20.0
    assert known["posterior"]["rating"]["observations"] == 0.0


async def an_inlet_counts_as_much(client: httpx.AsyncClient, kafka: str, topics: Topics) -> None:
    """JSON from any Kafka client: the record's position is a token."""
    log = Log(kafka)
    await log.start()
    partition = partition_of("bob", PARTITIONS)
    record = {"user_id": "bob", "item_id": "bread", "ts": time.time()}
    last = await log.append(topics.inlet("clicks"), [(partition, b"bob", json.dumps(record).encode())])
    await log.stop()
    body = await slate(client, "bob", after=f"clicks:{partition}:{last[partition]}", wait_ms=2000)
    assert (body["applied"], ids(body)[0]) == (True, "butter")


async def a_deleted_item_is_gone_within_a_second(client: httpx.AsyncClient) -> None:
    began = time.monotonic()
    assert (await client.delete("/v1/items/butter")).status_code == 202
    while "butter" in ids(await slate(client, "ann", n=50, track="false")):
        assert time.monotonic() - began < 1.0
        await asyncio.sleep(0.01)


async def reading_wrote_nothing(client: httpx.AsyncClient) -> None:
    await slate(client, "stranger")
    await asyncio.sleep(0.3)
    assert (await client.get("/-/state/stranger")).json()["known"] is False
