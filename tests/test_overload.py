"""What the API does when there is too much, or when what is stored cannot be read: it says so, and goes on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from infra.settings import Settings
from serving import overload
from serving.app import create_app, warm
from serving.parts import Parts
from streaming.dead_letters import DeadLetters
from streaming.events import Click
from streaming.learn import Dead
from streaming.topics import partition_of
from tests.hand import Hand

NOW = time.time()
PARTITIONS = 2
Make = Callable[..., Awaitable[object]]


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Compile once, here, so that no test's time limit pays for it."""
    warm()


@asynccontextmanager
async def _serving(settings: Settings) -> AsyncIterator[tuple[httpx.AsyncClient, Parts]]:
    app = create_app(settings)
    parts: Parts = app.state.parts
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client,
    ):
        await _until(lambda: not parts.log_problem and not parts.snapshot.degraded)
        yield client, parts


async def _until(check: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.01)


@pytest.fixture
async def api(settings: Settings, topics: Make) -> AsyncIterator[tuple[httpx.AsyncClient, Parts]]:
    await topics(PARTITIONS)
    given = {name: getattr(settings, name) for name in ("kafka", "redis", "namespace", "port")}
    async with _serving(Settings.load(settings.data, env={}, **given, partitions=PARTITIONS)) as made:
        yield made


def _clicks(count: int, user: str = "u") -> list[dict[str, Any]]:
    return [
        {"type": "click", "user_id": f"{user}{k}", "item_id": f"i{k % 5}", "ts": NOW, "event_id": f"{user}-{k}"}
        for k in range(count)
    ]


async def test_events_are_shed_while_the_folds_are_behind_and_lookups_go_on(
    api: tuple[httpx.AsyncClient, Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, parts = api
    monkeypatch.setattr(overload, "MAX_LAG", 5)
    assert (await client.post("/v1/events", json=_clicks(20))).status_code == 202
    await _until(lambda: parts.overload.lag.get("user") == 20)  # nobody folds here
    shed = await client.post("/v1/events", json=_clicks(1, "late"))
    assert shed.status_code == 429
    assert 1 <= int(shed.headers["retry-after"]) <= 4
    error = shed.json()["error"]
    assert (error["where"], error["got"]) == ("user agent", "20")
    assert "same event ids" in error["do"]
    assert (await client.get("/v1/recommendations/u1")).status_code == 200
    assert (await client.post("/v1/items", json={"item_id": "x"})).status_code == 202
    text = (await client.get("/metrics")).text
    assert 'freshet_requests_shed_total{reason="lag"} 1.0' in text
    assert 'freshet_fold_lag_events{fold="user"} 20.0' in text
    assert (await client.get("/-/state")).json()["overload"]["shed"] == {"lag": 1}
    store = parts.snapshot._users
    reads = await store.read({p: [] for p in range(PARTITIONS)})
    assert sum(read.applied for read in reads.values()) == 0
    monkeypatch.setattr(overload, "MAX_LAG", 20)
    assert (await client.post("/v1/events", json=_clicks(1, "again"))).status_code == 202


async def test_ends_of_a_topic_that_was_made_again_are_forgotten_and_dead_letters_are_told(
    api: tuple[httpx.AsyncClient, Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, parts = api
    await _until(lambda: parts.dead_letters == 0)
    parts.overload.ends = {0: 500_000}  # as the topic of before had left it
    monkeypatch.setattr("serving.app.ENDS_S", 1.0)
    await DeadLetters(parts.log, parts.topics).send([Dead(parts.topics.events, 0, 7, "a reason", b"bytes")])
    await _until(lambda: parts.dead_letters == 1)
    await _until(lambda: parts.overload.ends == {0: 0} and not any(parts.overload.lag.values()))
    assert (await client.post("/v1/events", json=_clicks(20))).status_code == 202
    assert sum(parts.overload.ends.values()) == 20
    assert (await client.get("/-/state")).json()["dead_letters"] == 1
    assert "freshet_dead_letters 1.0" in (await client.get("/metrics")).text


async def test_every_buffer_refuses_beyond_its_bound_and_shows_in_the_metrics(
    api: tuple[httpx.AsyncClient, Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, parts = api
    event = _clicks(1)[0]
    monkeypatch.setattr(overload, "MAX_BODIES", 4000)
    big = json.dumps([{**event, "surface": "s" * 60, "context": {"k": "v" * 250}} for _ in range(10)])
    assert 3000 < len(big) < 8000
    refused = await client.post("/v1/events", content=big)
    assert (refused.status_code, refused.json()["error"]["where"]) == (429, "this process")
    assert (await client.post("/v1/events", json=event)).status_code == 202
    assert (await client.post("/v1/recommendations/u", json={"n": 3})).status_code == 200
    monkeypatch.setattr(overload, "MAX_BODIES", 32 << 20)
    parts.overload.appending, kept = overload.MAX_APPENDING, parts.overload.appending
    assert (await client.post("/v1/events", json=event)).status_code == 429
    assert (await client.post("/v1/items", json={"item_id": "x"})).status_code == 429
    parts.overload.appending = kept
    parts.overload.watching, parts.overload.delay_s = True, 10.0
    late = await client.post("/v1/events", json=event)
    assert (late.status_code, late.json()["error"]["where"]) == (429, "this process")
    parts.overload.delay_s = 0.0
    assert (await client.post("/v1/events", json=event)).status_code == 202
    assert (parts.overload.bodies, parts.overload.appending) == (0, 0)
    text = (await client.get("/metrics")).text
    for name in (await client.get("/-/state")).json()["buffers"]:
        assert f'freshet_buffer_used{{buffer="{name}"}} 0.0' in text
        assert f'freshet_buffer_bound{{buffer="{name}"}}' in text
    assert "freshet_loop_delay_seconds" in text
    assert "freshet_event_skew_seconds_count" in text


async def test_a_body_that_does_not_come_is_given_up(
    api: tuple[httpx.AsyncClient, Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, parts = api
    monkeypatch.setattr(overload, "BODY_S", 0.1)

    async def dribble() -> AsyncIterator[bytes]:
        yield b'{"type":'
        await asyncio.sleep(0.5)
        yield b'"click"}'

    assert (await client.post("/v1/events", content=dribble())).status_code == 408
    assert parts.overload.bodies == 0


async def test_a_large_list_leaves_the_loop_to_others(api: tuple[httpx.AsyncClient, Parts]) -> None:
    """While lists of 1,000 are parsed, one at a time, another task gets the loop between slices."""
    client, _ = api
    turns: list[float] = []

    async def other() -> None:
        while True:
            turns.append(time.perf_counter())
            await asyncio.sleep(0)

    await client.post("/v1/events", json=_clicks(10, "first"))
    task = asyncio.create_task(other())
    answers = await asyncio.gather(*(client.post("/v1/events", json=_clicks(1000, f"b{k}-")) for k in range(4)))
    task.cancel()
    assert {answer.status_code for answer in answers} == {202}
    assert len(turns) > 4 * (1000 / overload.SLICE)


async def test_a_profile_nobody_can_read_is_an_unknown_user_counted_and_named(
    api: tuple[httpx.AsyncClient, Parts], settings: Settings
) -> None:
    client, parts = api
    hand = Hand(parts.settings)
    try:
        await hand.learn(
            [Click(user_id=f"u{k}", item_id=f"i{k % 7}", ts=NOW - 60 + k, event_id=f"e{k}") for k in range(20)]
        )
        await _until(lambda: parts.snapshot.live.items.n == 7)
        keys = parts.snapshot.keys
        for user, value in (("u1", b"\x09garbage"), ("u2", b"\x7f" + bytes(99)), ("u3", b"")):
            await hand.client.set(keys.profile(partition_of(user, PARTITIONS), user), value)
        await hand.client.set(keys.seen(partition_of("u4", PARTITIONS), "u4"), b"123")
    finally:
        await hand.close()
    for user in ("u1", "u2", "u4"):
        answer = await client.get(f"/v1/recommendations/{user}")
        body = answer.json()
        assert (answer.status_code, body["degraded"]) == (200, False)
        assert len(body["items"]) == 7
        assert "unknown user" in body["reason"]
        assert (await client.get(f"/v1/popular?user_id={user}")).status_code == 200
        known = (await client.get(f"/v1/users/{user}")).json()
        assert "freshet rebuild" in known["problem"]
        assert known["sequence"] == []
    named = (await client.get("/-/state")).json()["unreadable_profiles"]
    assert set(named) == {"u1", "u2", "u4"}
    assert f"freshet_profiles_unreadable_total {float(sum(named.values()))}" in (await client.get("/metrics")).text
    assert (await client.get("/v1/recommendations/u5")).json().get("reason") is None
