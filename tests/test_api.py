"""The HTTP door through the front: every route, limits, errors, who may ask, tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from infra.settings import Settings
from serving.app import create_app, warm
from serving.guard import BindingError
from streaming.events import Click, Item
from streaming.topics import encode_token, partition_of
from tests.hand import Hand

NOW = time.time()
PARTITIONS = 2
Make = Callable[..., Awaitable[object]]


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[tuple[httpx.AsyncClient, FastAPI]]:
    """The application, started, with a client that talks to it in process."""
    app = create_app(settings)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as client,
    ):
        yield client, app


async def until(check: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.01)


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Compile once, here, so that no test's time limit pays for it."""
    warm()


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The run's servers with few partitions: topics are made in less time."""
    return settings_with(settings)


@pytest.fixture
async def api(settings: Settings, topics: Make) -> AsyncIterator[httpx.AsyncClient]:
    await topics(PARTITIONS)
    async with serving(settings) as (client, app):
        await until(lambda: not app.state.parts.log_problem and not app.state.parts.snapshot.degraded)
        yield client


@pytest.fixture
async def hand(settings: Settings) -> AsyncIterator[Hand]:
    made = Hand(settings)
    yield made
    await made.close()


def click(user: str, item: str, ago: float = 60.0, **more: Any) -> Click:
    return Click(user_id=user, item_id=item, ts=NOW - ago, event_id=f"{user}-{item}-{ago}", **more)


async def seeded(hand: Hand, users: int = 8, items: int = 30) -> None:
    """Let some users click some items, so that there is something to serve."""
    await hand.learn([click(f"u{u}", f"i{(4 * u + k) % items}", 600 - u - k) for u in range(users) for k in range(12)])


def event(**more: Any) -> dict[str, Any]:
    return {"type": "click", "user_id": "ann", "item_id": "i1", "ts": NOW, **more}


async def test_one_event_is_acknowledged_with_an_id_and_a_token(api: httpx.AsyncClient) -> None:
    answer = await api.post("/v1/events", json=event())
    assert answer.status_code == 202
    body = answer.json()
    assert body["accepted"] == 1
    assert len(body["verdicts"][0]["event_id"]) == 32
    assert body["token"] == encode_token({partition_of("ann", PARTITIONS): 0})
    again = await api.post("/v1/events", json=[event(event_id="e1"), event(type="view", user_id="bob")])
    assert again.json()["verdicts"][0]["event_id"] == "e1"


async def test_all_five_types_are_taken_and_others_are_not(api: httpx.AsyncClient) -> None:
    good = [
        event(),
        event(type="dwell", seconds=31.5),
        event(type="rating", value=4, scale=[1, 5]),
        event(type="action", name="like"),
        event(type="view", slate_id="s", position=3, surface="home", context={"device": "tv"}, later_field=1),
    ]
    bad = [event(type=t) for t in ("impression", "item", "alias", "erase", "nonsense")]
    body = (await api.post("/v1/events", json=good + bad)).json()
    assert [v["status"] for v in body["verdicts"]] == ["accepted"] * 5 + ["rejected"] * 5
    assert (body["accepted"], body["rejected"]) == (5, 5)
    assert all(("anonymous_id" if k == 2 else "type") in v["reason"] for k, v in enumerate(body["verdicts"][5:]))


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"ts": NOW + 86_400}, "body.ts"),
    ({"ts": "today"}, "body.ts"),
    ({"ts": NOW * 1000}, "body.ts"),
    ({"user_id": ""}, "body.user_id"),
    ({"item_id": "x" * 257}, "body.item_id"),
    ({"type": "dwell", "seconds": -1}, "body.seconds"),
    ({"type": "rating", "value": 9, "scale": [1, 5]}, "body.value"),
    ({"event_id": "x" * 129}, "body.event_id"),
    ({"context": {f"k{i}": "v" for i in range(17)}}, "body.context"),
]


async def test_one_invalid_object_says_where_expected_and_got(api: httpx.AsyncClient) -> None:
    for broken, where in BROKEN:
        answer = await api.post("/v1/events", json=event(**broken))
        error = answer.json()["error"]
        assert (answer.status_code, error["where"]) == (422, where)
        assert error["expected"]
        assert error["got"]


async def test_malformed_bodies_are_422(api: httpx.AsyncClient) -> None:
    for body in (b"", b"{", b"[1,", b"null", b'{"type":"click"}', b"\xff\xfe", b"[" * 5000):
        answer = await api.post("/v1/events", content=body)
        assert answer.status_code == 422, body
        assert set(answer.json()["error"]) >= {"where", "expected", "got"}


async def test_numbers_that_are_not_finite_are_refused(api: httpx.AsyncClient) -> None:
    for text in ("NaN", "1e999", "Infinity"):
        body = f'[{{"type":"click","user_id":"u","item_id":"i","ts":{text}}}]'
        answer = await api.post("/v1/events", content=body)
        assert answer.status_code == 422 or answer.json()["rejected"] == 1


async def test_limits_of_size(api: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100_000

    declared = await api.post("/v1/events", content=b" " * (1024 * 1024 + 1))
    chunked = await api.post("/v1/events", content=chunks())
    many = await api.post("/v1/events", json=[event()] * 1001)
    crowd = await api.post("/v1/events", json=[event(user_id=f"u{i % 4}") for i in range(1000)])
    one = await api.post("/v1/events", json=[event()] * 257)
    assert [r.status_code for r in (declared, chunked, many, crowd, one)] == [413, 413, 413, 202, 422]
    assert one.json()["error"]["where"] == "body[256].user_id"


async def test_an_empty_catalogue_answers_with_a_reason(api: httpx.AsyncClient) -> None:
    answer = await api.get("/v1/recommendations/ann")
    body = answer.json()
    assert (answer.status_code, body["items"], body["degraded"]) == (200, [], False)
    assert "no item is known" in body["reason"]
    assert (await api.get("/v1/popular")).json()["items"] == []


async def test_a_slate_follows_the_profile_and_the_query(api: httpx.AsyncClient, hand: Hand) -> None:
    await seeded(hand)
    await until(lambda: _parts(api).snapshot.live.items.n == 30)
    plain = (await api.get("/v1/recommendations/u1?n=5")).json()
    assert len({item["item_id"] for item in plain["items"]}) == 5
    assert set(plain["items"][0]) >= {"item_id", "score", "channel", "reason"}
    seen = {entry["item_id"] for entry in (await api.get("/v1/users/u1")).json()["sequence"]}
    offered = {item["item_id"] for item in (await api.get("/v1/recommendations/u1?n=100")).json()["items"]}
    assert offered.isdisjoint(seen)
    included = (await api.get("/v1/recommendations/u1?n=100&seen=include&policy=greedy")).json()
    assert {item["item_id"] for item in included["items"]} >= seen
    without = (await api.get("/v1/recommendations/new?n=100&exclude=i1,i2&exclude=i3")).json()
    assert {"i1", "i2", "i3"}.isdisjoint(item["item_id"] for item in without["items"])
    posted = await api.post("/v1/recommendations/new", json={"n": 3, "exclude": ["i1"], "context": {"a": "b"}})
    assert len(posted.json()["items"]) == 3


async def test_categories_titles_and_trace(api: httpx.AsyncClient, hand: Hand) -> None:
    await seeded(hand)
    await hand.catalogue_of([Item(item_id=f"i{k}", title=f"Item {k}", categories=["even"]) for k in range(0, 30, 2)])
    await until(lambda: len(_parts(api).snapshot.live.items.catalogue) == 15)
    body = (await api.get("/v1/recommendations/new?n=50&categories=even&trace=true")).json()
    assert len(body["items"]) == 15
    assert all(item["title"].startswith("Item ") for item in body["items"])
    assert {"profile", "recommend", "answer"} <= set(body["trace"]["ms"])
    assert body["trace"]["channels"]
    none = (await api.get("/v1/recommendations/new?categories=nothing")).json()
    assert (none["items"], "categories" in none["reason"]) == ([], True)


QUERIES = [
    ("n=0", "query.n"),
    ("n=101", "query.n"),
    ("n=x", "query.n"),
    ("n=1&n=2", "query.n"),
    ("seen=maybe", "query.seen"),
    ("wait_ms=2001", "query.wait_ms"),
    ("after=nonsense!", "after"),
    ("after=clicks:1:x", "after"),
    ("context=%7B1", "query.context"),
    ("context=5", "query.context"),
    ("colour=red", "query"),
]


async def test_a_wrong_query_is_422(api: httpx.AsyncClient) -> None:
    for query, where in QUERIES:
        answer = await api.get(f"/v1/recommendations/ann?{query}")
        assert (answer.status_code, answer.json()["error"]["where"]) == (422, where), query


async def test_tokens_wait_for_the_users_partition_only(api: httpx.AsyncClient, hand: Hand) -> None:
    await seeded(hand)
    token = (await api.post("/v1/events", json=event(user_id="u1"))).json()["token"]
    p = partition_of("u1", PARTITIONS)
    applied = (await api.get("/-/state/u1")).json()["applied"]
    ahead = encode_token({p: applied})
    other = encode_token({(p + 1) % PARTITIONS: 10**6, p: applied - 1})
    assert (await api.get(f"/v1/recommendations/u1?after={token}")).json()["applied"] is True
    assert (await api.get(f"/v1/recommendations/u1?after={other}")).json()["applied"] is True
    began = time.perf_counter()
    late = (await api.get(f"/v1/recommendations/u1?after={ahead}&wait_ms=60")).json()
    assert late["applied"] is False
    assert late["items"]
    assert 0.04 < time.perf_counter() - began < 0.5
    waiting = asyncio.create_task(api.get(f"/v1/recommendations/u1?after={ahead}&wait_ms=2000"))
    await asyncio.sleep(0.05)
    await hand.learn([click("u1", "i29", 1)])
    assert (await waiting).json()["applied"] is True


async def test_a_token_may_name_a_record_of_an_inlet(api: httpx.AsyncClient, hand: Hand) -> None:
    came = click("u1", "i1", 5)
    came.source = ("clicks", 3, 41)
    await hand.learn([came])
    assert (await api.get("/v1/recommendations/u1?after=clicks:3:41")).json()["applied"] is True
    assert (await api.get("/v1/recommendations/u1?after=clicks:3:42&wait_ms=0")).json()["applied"] is False


async def test_popular_and_similar(api: httpx.AsyncClient, hand: Hand) -> None:
    await seeded(hand)
    await until(lambda: _parts(api).snapshot.live.items.n == 30)
    popular = [item["item_id"] for item in (await api.get("/v1/popular?n=5")).json()["items"]]
    assert len(popular) == 5
    left = (await api.get(f"/v1/popular?n=100&user_id=u1&exclude={popular[0]}")).json()["items"]
    seen = {entry["item_id"] for entry in (await api.get("/v1/users/u1")).json()["sequence"]}
    assert (seen | {popular[0]}).isdisjoint(item["item_id"] for item in left)
    similar = (await api.get(f"/v1/similar/{popular[0]}?n=4")).json()["items"]
    assert len(similar) == 4
    assert popular[0] not in {item["item_id"] for item in similar}
    assert (await api.get("/v1/similar/unheard")).status_code == 404


async def test_items_are_put_deleted_and_read(api: httpx.AsyncClient, hand: Hand) -> None:
    put = await api.put("/v1/items/a%2Fb", json={"title": "A", "categories": ["x"]})
    deleted = await api.delete("/v1/items/gone")
    bulk = await api.post("/v1/items", json=[{"item_id": "c"}, {"title": "no id"}, {"item_id": "d", "deleted": True}])
    assert [r.status_code for r in (put, deleted, bulk)] == [202, 202, 202]
    assert put.json() == {"item_id": "a/b", "offset": 0}
    assert [v["status"] for v in bulk.json()["verdicts"]] == ["accepted", "rejected", "accepted"]
    assert (await api.put("/v1/items/x", json={"item_id": "y"})).status_code == 422
    assert (await api.put("/v1/items/x", json={"title": 5})).json()["error"]["where"] == "body.title"
    records = await _records(_parts(api))
    assert [(r["item_id"], r.get("deleted", False)) for r in records] == [
        ("a/b", False), ("gone", True), ("c", False), ("d", True),
    ]  # fmt: skip
    await hand.catalogue_of([Item(item_id="a/b", title="A", categories=["x"])])
    await until(lambda: _parts(api).snapshot.live.items.n == 1)
    body = (await api.get("/v1/items/a%2Fb")).json()
    assert (body["catalogue"]["title"], body["eligible"]) == ("A", True)
    assert (await api.get("/v1/items/unheard")).status_code == 404


async def test_what_we_know_of_a_user_is_readable(api: httpx.AsyncClient, hand: Hand) -> None:
    await hand.learn([click("ann", "i1", 3600), click("ann", "i2", 30)])
    await hand.catalogue_of([Item(item_id="i2", title="Second")])
    await until(lambda: _parts(api).snapshot.live.items.catalogue)
    body = (await api.get("/v1/users/ann")).json()
    assert body["counters"]["click"] == 2
    assert [entry["item_id"] for entry in body["sequence"]] == ["i2", "i1"]
    assert body["sequence"][0]["title"] == "Second"
    assert body["sequence"][1]["decay"]["1h"] == pytest.approx(0.5, abs=0.1)
    nobody = (await api.get("/v1/users/nobody")).json()
    assert (nobody["known"], nobody["sequence"]) == (False, [])
    assert (await api.get("/-/state/nobody")).json()["known"] is False


async def test_the_system_explains_itself(api: httpx.AsyncClient, settings: Settings) -> None:
    await until(lambda: _parts(api).warm, 60)
    assert (await api.get("/health/live")).json() == {"status": "live"}
    assert (await api.get("/health/ready")).json() == {"status": "ready", "reasons": []}
    topics = (await api.get("/-/topics")).json()["topics"]
    assert {t["topic"]: t["partitions"] for t in topics}[f"{settings.namespace}.events"] == PARTITIONS
    assert (await api.get("/-/models")).json()["step"] == 0
    state = (await api.get("/-/state")).json()
    assert state["snapshot"]["loaded"]
    assert state["impressions"]["limit"] == settings.impression_buffer
    rows = {row["name"]: row["value"] for row in (await api.get("/-/settings")).json()}
    assert rows["namespace"] == settings.namespace
    text = (await api.get("/metrics")).text
    assert 'freshet_http_seconds_count{method="GET",route="/-/topics",status="200"} 1.0' in text


async def test_openapi_describes_every_route_and_docs_need_no_network(api: httpx.AsyncClient) -> None:
    document = (await api.get("/openapi.json")).json()
    described = {(m.upper(), path) for path, operations in document["paths"].items() for m in operations}
    routed = {
        (method, route.path_format)
        for route in _app(api).routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    assert routed <= described
    names = {p["name"] for p in document["paths"]["/v1/recommendations/{user_id}"]["get"]["parameters"]}
    assert names >= {"user_id", "n", "surface", "context", "exclude", "categories", "seen", "after", "wait_ms", "track"}
    references = str(document).split("#/components/schemas/")[1:]
    assert {text.split("'")[0] for text in references} <= set(document["components"]["schemas"])
    page = (await api.get("/docs")).text
    assert "/v1/recommendations/{user_id}" in page
    assert "http://" not in page.replace("http://127.0.0.1", "")
    assert "https://" not in page


async def test_unknown_paths_and_methods(api: httpx.AsyncClient) -> None:
    assert (await api.get("/nothing/here")).status_code == 404
    assert (await api.put("/v1/events", json={})).status_code == 405


async def test_a_browser_of_another_site_is_refused(api: httpx.AsyncClient) -> None:
    assert (await api.get("/v1/popular", headers={"Host": "evil.example"})).status_code == 403
    assert (await api.get("/v1/popular", headers={"Host": "localhost:8000"})).status_code == 200
    assert (await api.get("/v1/popular", headers={"Host": "[::1]:8000"})).status_code == 200
    crossed = await api.post("/v1/events", json=event(), headers={"Origin": "http://evil.example"})
    own = await api.post("/v1/events", json=event(), headers={"Origin": "http://127.0.0.1:8000"})
    assert (crossed.status_code, own.status_code) == (403, 202)


async def test_beyond_loopback_a_key_is_needed(settings: Settings, topics: Make) -> None:
    open_door = settings_with(settings, host="0.0.0.0")
    with pytest.raises(BindingError, match="FRESHET_ADMIN_KEY"):
        create_app(open_door)
    await topics(PARTITIONS)
    async with serving(settings_with(settings, host="0.0.0.0", admin_key="k" * 20)) as (client, _):
        assert (await client.get("/health/live")).status_code == 200
        for path in ("/v1/popular", "/metrics", "/-/settings", "/docs", "/openapi.json", "/nothing"):
            assert (await client.get(path)).status_code == 401, path
        assert (await client.get("/v1/popular", headers={"X-API-Key": "wrong"})).status_code == 401
        named = await client.get("/v1/popular", headers={"X-API-Key": "k" * 20, "Host": "shop.example"})
        settings_page = await client.get("/-/settings", headers={"Authorization": "Bearer " + "k" * 20})
        assert (named.status_code, settings_page.status_code) == (200, 200)
        assert "k" * 20 not in settings_page.text


def settings_with(settings: Settings, **changes: Any) -> Settings:
    """The same settings but for some."""
    given = {name: getattr(settings, name) for name in ("kafka", "redis", "namespace", "port")}
    return Settings.load(settings.data, env={}, **{**given, "partitions": PARTITIONS, **changes})


def _app(client: httpx.AsyncClient) -> FastAPI:
    return client._transport.app  # type: ignore[attr-defined,no-any-return]


def _parts(client: httpx.AsyncClient) -> Any:
    return _app(client).state.parts


async def _records(parts: Any) -> list[dict[str, Any]]:
    import msgspec
    from aiokafka import AIOKafkaConsumer, TopicPartition

    consumer = AIOKafkaConsumer(bootstrap_servers=parts.settings.kafka)
    await consumer.start()
    try:
        place = TopicPartition(parts.topics.items, 0)
        consumer.assign([place])
        await consumer.seek_to_beginning(place)
        end = (await consumer.end_offsets([place]))[place]
        return [msgspec.msgpack.decode((await consumer.getone()).value) for _ in range(end)]
    finally:
        await consumer.stop()
