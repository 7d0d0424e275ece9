"""The JSON of the dashboard: its arithmetic by hand, its pages through the ASGI door over real Kafka and Redis."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.settings import Settings
from models.bandit import explored
from models.bandit.posterior import alike_mean
from models.decay import add
from models.examples import Entries, item_hash
from models.factors import DIM
from models.items import CatalogueItem
from models.recommend import Request, Slate
from serving.app import create_app, warm
from serving.dashboard.arms import rising
from serving.dashboard.atlas import Basis, fit
from serving.dashboard.quality import entropy, gini, spread
from serving.dashboard.recent import EVERY_S, SLATES, USERS, Recent
from serving.introspect import posterior
from serving.keys import add_key
from serving.parts import Parts
from serving.snapshot import Live
from streaming.dead_letters import DeadLetters
from streaming.events import Click, Item
from streaming.learn import Dead
from streaming.state import append_metrics
from streaming.topics import end_offsets, read_topic
from streaming.training.controls import control_in
from tests.hand import Hand

NOW = time.time()
PARTITIONS = 2
Make = Callable[..., Awaitable[object]]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Compile once, here, so that no test's time limit pays for it."""
    warm()


# ---- arithmetic


def test_nothing_is_compiled_for_the_page_of_an_item() -> None:
    warm()
    assert alike_mean.signatures
    live, before = Live.empty(), len(alike_mean.signatures)
    row = live.items.set_item(item_hash("a"), "a", CatalogueItem(categories=["x"]))
    live.items.grow()
    assert 0.0 < posterior(live, row)["rating"]["mean"] < 1.0
    assert len(alike_mean.signatures) == before


def test_gini_of_known_spreads() -> None:
    assert gini(np.ones(10)) == pytest.approx(0.0)
    assert gini(np.array([0.0, 0.0, 0.0, 12.0])) == pytest.approx(0.75)
    assert gini(np.array([1.0, 3.0])) == pytest.approx(0.25)
    assert gini(np.zeros(3)) == gini(np.zeros(0)) == 0.0


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(1, 9))
def test_gini_is_half_the_mean_difference_and_knows_no_unit(counts: list[int], factor: int) -> None:
    x = np.array(counts, np.float64)
    if not x.sum():
        return
    expected = np.abs(x[:, None] - x[None, :]).mean() / (2.0 * x.mean())
    assert gini(x) == pytest.approx(expected, abs=1e-9)
    assert gini(factor * x[::-1]) == pytest.approx(expected, abs=1e-9)


def test_entropy_is_one_where_all_kinds_have_their_share() -> None:
    assert entropy([0.25] * 4, 4) == pytest.approx(1.0)
    assert entropy([1.0, 0.0], 2) == 0.0
    assert entropy([0.5, 0.5], 4) == pytest.approx(0.5)
    assert entropy([1.0], 1) == entropy([], 0) == 0.0


def test_an_item_of_two_categories_counts_half_for_each() -> None:
    two = Item(item_id="a", title="", categories=["x", "y"], provider="p", ts=1.0)
    providers, categories = spread([(two, 4.0), (None, 1.0)])  # type: ignore[list-item]
    assert dict(providers) == {"p": 4.0, "": 1.0}
    assert dict(categories) == {"x": 2.0, "y": 2.0, "": 1.0}


def test_explored_is_what_was_taken_though_a_better_one_was_left() -> None:
    candidates = np.array([5.0, 4.0, 4.0, 1.0], np.float32)
    assert explored(np.array([5, 4, 4], np.float32), candidates).tolist() == [0, 0, 0]
    assert explored(np.array([4, 5, 4], np.float32), candidates).tolist() == [1, 0, 0]
    assert explored(np.array([5, 1, 4], np.float32), candidates).tolist() == [0, 1, 0]
    assert explored(np.zeros(0, np.float32), candidates).tolist() == []


# ---- what was served lately


def slate_of(name: str, items: list[int], scores: list[float] | None = None, channel: int = 2) -> Slate:
    k = len(items)
    keys = np.array(items, np.uint64)
    ranks = np.array(scores or list(range(k, 0, -1)), np.float32)
    channels = np.full(k, channel, np.uint8)
    return Slate(
        request=Request(slate_id=name, now=NOW), step=3, rows=np.arange(k), items=keys, scores=ranks, channels=channels,
        propensities=np.full(k, 0.5, np.float32), reasons=[""] * k, candidates=keys, candidate_scores=ranks,
        candidate_channels=channels, places=np.zeros((k, 1), np.uint16), features=np.zeros((k, 1), np.float16),
    )  # fmt: skip


def test_slots_slates_and_users_are_bounded_and_the_oldest_leave() -> None:
    recent = Recent(slots=16)
    for turn in range(SLATES + 50):
        recent.add(slate_of(f"s{turn}", [turn, turn + 1, turn + 2]), f"u{turn}", NOW + turn, {}, degraded=False)
    assert len(recent.kept) == SLATES
    assert recent.kept[0].slate_id == "s50"
    window = recent.window(NOW + SLATES + 50)
    assert len(window.items) == 16
    assert window.items.max() == SLATES + 51
    assert window.slates == 5, "sixteen slots hold five whole slates of three, and one slot of a sixth"
    assert window.items.min() >= SLATES + 44
    for turn in range(USERS + 10):
        recent.add(slate_of("s", [1]), f"v{turn}", NOW, {}, degraded=False)
    assert len(recent.users) == USERS
    assert f"v{USERS + 9}" in recent.users
    assert "v0" not in recent.users


def test_slots_are_counted_by_item() -> None:
    recent = Recent()
    for turn in range(3):
        recent.add(slate_of(f"s{turn}", [7, turn]), "u", NOW + turn, {}, degraded=False)
    window = recent.window(NOW + 3)
    assert window.counts(np.array([9, 7, 1, 0], np.uint64)).tolist() == [0, 3, 1, 1]
    assert window.counts(np.zeros(0, np.uint64)).tolist() == []
    assert Recent().window(NOW).counts(np.array([7], np.uint64)).tolist() == [0]


def test_slots_older_than_the_window_do_not_count() -> None:
    recent = Recent(slots=64)
    recent.add(slate_of("old", [1, 2]), "u", NOW - 2_000, {}, degraded=False)
    recent.add(slate_of("new", [3, 4], [1.0, 2.0]), "u", NOW - 100, {}, degraded=False)
    window = recent.window(NOW)
    assert sorted(window.items.tolist()) == [3, 4]
    assert window.slates == 1
    assert window.seconds == pytest.approx(100)
    assert window.explored.tolist() == [True, False]


def test_of_many_slates_at_once_only_some_are_kept_whole_and_all_are_counted() -> None:
    recent = Recent()
    for turn in range(100):
        recent.add(slate_of(f"s{turn}", [turn]), "u", NOW + turn * EVERY_S / 10, {}, degraded=False)
    assert 8 <= len(recent.kept) <= 12
    assert recent.served == len(recent.window(NOW + 10).items) == 100


# ---- the map


def vectors_of(rng: np.random.Generator, n: int) -> Any:
    """A cloud with two wide directions, as two topics make it."""
    wide = rng.normal(size=(2, DIM))
    return (rng.normal(size=(n, 2)) * (3.0, 1.5) @ wide + 0.1 * rng.normal(size=(n, DIM))).astype(np.float32)


def test_the_map_shows_the_widest_directions_within_its_bounds() -> None:
    vectors = vectors_of(np.random.default_rng(1), 300)
    basis = fit(vectors, 10, 300)
    points = basis.place(vectors)
    assert basis.explained > 0.9
    assert (np.abs(points) <= 1.0).mean() > 0.95
    assert np.abs(points).max() > 0.8
    again = fit(vectors, 10, 300)
    assert np.array_equal(basis.axes, again.axes)


def test_the_map_does_not_flip_or_turn_when_it_is_made_again() -> None:
    rng = np.random.default_rng(2)
    vectors = vectors_of(rng, 300)
    before = fit(vectors, 10, 300)
    turned = Basis(5, 300, 0.9, before.mean, before.axes[:, ::-1] * np.array([1, -1], np.float32))
    moved = vectors + 0.1 * rng.normal(size=vectors.shape).astype(np.float32)
    for old in (before, turned):
        new = fit(moved, 20, 300, old)
        was, now = old.place(vectors), new.place(moved)
        assert np.hypot(*(was - now).T).mean() < 0.1 * np.hypot(*was.T).mean()
    unaligned = fit(moved, 20, 300).place(moved)
    assert np.hypot(*(turned.place(vectors) - unaligned).T).mean() > 0.5


def test_the_map_is_kept_as_it_is_and_what_is_none_is_refused() -> None:
    basis = fit(vectors_of(np.random.default_rng(3), 50), 10, 50)
    fields = {name: str(value) for name, value in basis.to_fields().items()}
    again = Basis.from_fields(fields)
    assert again is not None
    assert again[:3] == basis[:3]
    assert np.array_equal(again.axes, basis.axes)
    assert np.array_equal(again.mean, basis.mean)
    for wrong in ({}, fields | {"weights": "AAAA"}, fields | {"weights": "%"}, fields | {"step": "soon"}):
        assert Basis.from_fields(wrong) is None


# ---- the pages


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[tuple[httpx.AsyncClient, Parts]]:
    """The application, started, with a client that talks to it in process."""
    app = create_app(settings)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as client,
    ):
        yield client, app.state.parts


async def until(check: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.01)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The run's servers with few partitions: topics are made in less time."""
    return Settings.load(
        settings.data, env={}, kafka=settings.kafka, redis=settings.redis, namespace=settings.namespace, port=0,
        partitions=PARTITIONS,
    )  # fmt: skip


@pytest.fixture
async def hand(settings: Settings) -> AsyncIterator[Hand]:
    made = Hand(settings)
    yield made
    await made.close()


@pytest.fixture
async def shop(settings: Settings, topics: Make, hand: Hand) -> AsyncIterator[tuple[httpx.AsyncClient, Parts]]:
    """An API that knows thirty items of three categories, clicked by eight users."""
    await topics(PARTITIONS)
    await hand.catalogue_of([
        Item(item_id=f"i{k}", title=f"Title {k}", categories=[f"c{k % 3}"], provider=f"p{k % 2}", ts=NOW - 1000 + k)
        for k in range(30)
    ])  # fmt: skip
    await hand.learn([
        Click(user_id=f"u{u}", item_id=f"i{(4 * u + k) % 30}", ts=NOW - 600 + u + k, event_id=f"{u}-{k}")
        for u in range(8)
        for k in range(12)
    ])  # fmt: skip
    async with serving(settings) as (client, parts):
        await until(lambda: not parts.log_problem and parts.snapshot.live.items.rows.known >= 30)
        yield client, parts


async def test_what_was_served_is_told_with_what_it_was_drawn_from(shop: tuple[httpx.AsyncClient, Parts]) -> None:
    client, _ = shop
    for user in ("u1", "u2", "new"):
        answer = (await client.get(f"/v1/recommendations/{user}?n=5")).json()
        await asyncio.sleep(EVERY_S)
    await client.get("/v1/recommendations/u3?track=false")
    told = (await client.get("/-/slates?limit=2")).json()
    assert (told["kept"], told["sampled_share"], len(told["slates"])) == (3, 1.0, 2)
    newest = told["slates"][0]
    assert [newest["slate_id"], newest["user_id"], newest["surface"]] == [answer["slate_id"], "new", "home"]
    assert [item["item_id"] for item in newest["items"]] == [item["item_id"] for item in answer["items"]]
    assert all(0 < item["propensity"] <= 1 and item["category"] for item in newest["items"])
    assert set(newest["ms"]) == {"profile", "recommend", "answer"}
    trace = newest["trace"]
    assert trace["candidates"] == sum(trace["channels"].values()) >= 5
    scores = [one["score"] for one in trace["best"]]
    assert scores == sorted(scores, reverse=True)
    assert (await client.get(f"/-/slates/{answer['slate_id']}")).json() == newest
    assert (await client.get("/-/slates/none")).status_code == 404
    assert (await client.get("/-/slates?limit=0")).status_code == 422

    quality = (await client.get("/-/quality")).json()
    assert (quality["slates"], quality["slots"]) == (3, 15)
    shown = {item["item_id"] for one in (await client.get("/-/slates")).json()["slates"] for item in one["items"]}
    assert quality["coverage"] == {"value": round(len(shown) / 30, 5), "shown": len(shown), "eligible": 30}
    assert sum(row["share"] for row in quality["categories"]) == pytest.approx(1, abs=1e-3)
    assert {row["category"]: row["catalogue_share"] for row in quality["categories"]} == dict.fromkeys(
        ("c0", "c1", "c2"), 0.33333
    )
    assert {row["provider"] for row in quality["providers"]} == {"p0", "p1"}
    assert sum(row["slots"] for row in quality["channels"]) == 15
    assert 0 < quality["gini"] < 1
    assert 0 < quality["entropy"] <= 1

    item = (await client.get(f"/-/items/{answer['items'][0]['item_id']}")).json()
    assert item["slots"] == sum(row["slots"] for row in item["channels"]) > 0
    assert item["neighbours_by_vector"] == [], "nothing is learnt of it yet"
    assert (await client.get("/-/items/nothing")).status_code == 404

    found = (await client.get("/-/search?q=TITLE 1")).json()
    assert {"item_id": "i1", "title": "Title 1", "category": "c1"} in found["items"]
    assert len(found["items"]) == 11
    assert (await client.get("/-/search?q=ne")).json() == {"items": [], "users": ["new"]}
    assert (await client.get("/-/search?q=i2&limit=1")).json()["items"][0]["item_id"] == "i2"
    assert (await client.get("/-/search")).status_code == 422


async def test_arms_are_told_as_the_policy_sees_them(shop: tuple[httpx.AsyncClient, Parts]) -> None:
    client, parts = shop
    items = parts.snapshot.live.items
    row, fresh = (items.ids.index(name) for name in ("i4", "i29"))
    items.shown[:30], items.sums[row, :2], items.shown[row] = 40, (50.0, 25.0), 500
    items.shown[fresh] = 7
    told = (await client.get("/-/bandits?limit=3")).json()
    first = told["arms"][0]
    assert (first["item_id"], first["shown"], first["exposures"], first["successes"]) == ("i4", 500, 50.0, 25.0)
    assert first["mean"] == pytest.approx(first["alpha"] / (first["alpha"] + first["beta"]), abs=1e-4)
    assert first["low"] < first["mean"] < first["high"]
    assert not first["still_exploring"]
    assert len(told["arms"]) == 3
    assert [(arm["item_id"], arm["to_go"]) for arm in told["newcomers"]] == [("i29", 23)]
    assert told["newcomers_total"] == 1
    assert (await client.get("/-/bandits?sort=mean")).json()["arms"][0]["item_id"] == "i4"
    assert (await client.get("/-/bandits?sort=unsure")).json()["arms"][-1]["item_id"] == "i4"
    risen = (await client.get("/-/bandits?sort=rising")).json()["arms"]
    factors = [arm["rising"] for arm in risen]
    assert factors == sorted(factors, reverse=True)
    assert (await client.get("/-/bandits?sort=best")).status_code == 422
    assert told["exploration"]["share"] is None


def test_what_rises_has_more_of_the_last_quarter_of_an_hour_than_of_the_day() -> None:
    live = Live.empty()
    rows = np.array([live.items.set_item(number + 1, f"i{number}", CatalogueItem()) for number in range(3)])
    live.items.grow()
    popularity, now = live.items.popularity, 1_795_363_000.0
    times: tuple[list[float], ...] = ([60.0] * 6, [3600.0 * hour for hour in range(6, 0, -1)], [])
    for row, ages in zip(rows.tolist(), times, strict=True):
        for age in ages:
            add(popularity.weights[row], popularity.cells[row], now - age)
    risen, steady, unseen = rising(live, rows, now).tolist()
    assert risen > 1.5 > 1.0 == unseen > steady


async def test_the_map_survives_a_restart_and_shows_a_user(
    shop: tuple[httpx.AsyncClient, Parts], settings: Settings
) -> None:
    client, parts = shop
    assert (await client.get("/-/map")).json() == {"basis": None, "items": []}

    def learnt(parts: Parts, seed: int) -> None:
        live = parts.snapshot.live
        rows = np.arange(30)
        live.model.grow()
        live.model.factors.vectors[rows] = vectors_of(np.random.default_rng(5), 30)
        live.model.factors.vectors[rows] += seed * 0.01
        live.model.rows.hold(rows, 4)
        live.model.step = 50 + seed

    learnt(parts, 0)
    told = (await client.get("/-/map?limit=10")).json()
    assert told["basis"]["rows"] == 30
    assert len(told["items"]) == 10
    assert all(-2 < item[axis] < 2 for item in told["items"] for axis in "xy")
    user = (await client.get("/-/map/users/u1")).json()
    assert user["known"]
    assert -2 < user["hour"]["x"] < 2
    assert len(user["entries"]) == 12
    assert user["entries"][0]["kind"] == "click"
    assert 0 < user["entries"][0]["decay"]["1h"] < user["entries"][0]["decay"]["30d"] <= 1
    nobody = (await client.get("/-/map/users/nobody")).json()
    assert nobody == {"user_id": "nobody", "known": False, "hour": None, "month": None, "entries": []}
    near = (await client.get("/-/items/i1")).json()["neighbours_by_vector"]
    assert len(near) == 10
    assert all(one["item_id"] != "i1" and -1 <= one["similarity"] <= 1 for one in near)
    async with serving(settings) as (again, others):
        await until(lambda: others.snapshot.live.items.rows.known >= 30)
        learnt(others, 1)
        after = (await again.get("/-/map?limit=10")).json()
        assert after["basis"] == told["basis"], "what was stored is used again"
        for one, other in zip(told["items"], after["items"], strict=True):
            assert math.dist((one["x"], one["y"]), (other["x"], other["y"])) < 0.05


# ---- what a person does from there


async def test_the_crowd_is_told_what_is_wished_and_tells_what_it_does(
    shop: tuple[httpx.AsyncClient, Parts], hand: Hand
) -> None:
    client, parts = shop
    idle = (await client.get("/-/crowd")).json()
    assert idle == {
        "wish": {"users": None, "users_t": 0.0, "surge": None, "surge_t": 0.0}, "running": False, "users": None,
        "max_users": 500, "topics": [], "surge": None, "noticed": None,
    }  # fmt: skip
    assert (await client.post("/-/crowd", json={"users": 50})).status_code == 409
    point = {"t": time.time(), "users": 20, "topics": "noir|space opera", "topic": ""}
    await append_metrics(hand.client, hand.keys.metrics("world"), point)
    told = (await client.post("/-/crowd", json={"users": 50})).json()
    assert (told["running"], told["users"], told["topics"], told["surge"]) == (True, 20, ["noir", "space opera"], None)
    assert told["wish"]["users"] == 50
    assert abs(told["wish"]["users_t"] - time.time()) < 5
    told = (await client.post("/-/crowd", json={"surge": "noir"})).json()
    assert (told["wish"]["users"], told["wish"]["surge"]) == (50, "noir")
    assert (await client.get("/-/crowd")).json()["wish"] == told["wish"]
    more = {"topic": "noir", "surge_t": 5.0, "surge_age_s": 2.5, "noticed_s": 2.0}
    await append_metrics(hand.client, hand.keys.metrics("world"), point | more)
    told = (await client.get("/-/crowd")).json()
    assert told["surge"] == {"topic": "noir", "t": 5.0, "age_s": 2.5}
    assert told["noticed"] == {"topic": "noir", "seconds": 2.0}
    for wrong in ({"users": 501}, {"users": -1}, {"surge": "nothing"}, {"surge": "x" * 65}, {}, {"people": 3}):
        assert (await client.post("/-/crowd", json=wrong)).status_code == 422, wrong
    for _ in range(300):
        await parts.snapshot.note("crowd", {"wish": "{}"})
    assert await hand.client.xlen(hand.keys.metrics("crowd")) < 300


async def test_dead_letters_are_read_and_replayed_once(
    shop: tuple[httpx.AsyncClient, Parts], settings: Settings
) -> None:
    client, parts = shop
    good = {"type": "click", "user_id": "ann", "item_id": "i1", "ts": NOW, "event_id": "late"}
    dead = [
        Dead(parts.topics.inlet("clicks"), 0, 7, "$.item_id: expected an id, got nothing", b'{"user_id": "ann"}'),
        Dead(parts.topics.inlet("clicks"), 1, 8, "its fold raised", msgspec.json.encode(good)),
    ]
    await DeadLetters(parts.log, parts.topics).send(dead)
    told = (await client.get("/-/dead-letters")).json()
    assert (told["total"], told["records"]) == (2, 2)
    newest, oldest = told["letters"]
    assert newest["id"] == f"{parts.topics.inlet('clicks')}:1:8"
    assert not newest["replayed"]
    assert '"late"' in newest["excerpt"]
    assert oldest["reason"].startswith("$.item_id")
    assert len((await client.get("/-/dead-letters?limit=1")).json()["letters"]) == 1
    asked = {"ids": [newest["id"], oldest["id"], "no:0:1"]}
    done = (await client.post("/-/dead-letters/replay", json=asked)).json()
    assert done["replayed"] == 1
    assert {one["id"] for one in done["refused"]} == {oldest["id"], "no:0:1"}
    ends = await end_offsets(settings.kafka, {parts.topics.events: PARTITIONS})
    assert sum(ends[parts.topics.events]) == 1
    assert (await client.get("/-/dead-letters")).json()["letters"][0]["replayed"]
    again = (await client.post("/-/dead-letters/replay", json={"ids": [newest["id"]]})).json()
    assert again == {"replayed": 0, "refused": [{"id": newest["id"], "why": "it was replayed before"}]}
    for wrong in ({}, {"all": True, "ids": ["x"]}, {"ids": "x"}, {"ids": [""]}, [1]):
        assert (await client.post("/-/dead-letters/replay", json=wrong)).status_code == 422, wrong


async def test_the_learner_is_told_through_the_log(
    shop: tuple[httpx.AsyncClient, Parts], settings: Settings, hand: Hand
) -> None:
    client, parts = shop
    saved = (await client.post("/-/models/save")).json()
    assert (saved["done"], saved["offset"], saved["step"]) == (False, 0, None)
    async for _, records in read_topic(settings.kafka, parts.topics.examples, {0: 1}):
        assert control_in(Entries.from_bytes(records[0].value)).do == "save"  # type: ignore[union-attr]
    for do in ("pin", "rollback"):
        refused = await client.post(f"/-/models/{do}", json={"version": 3})
        assert (refused.status_code, refused.json()["error"]["where"]) == (409, "body.version")
        for wrong in ({}, {"version": 0}, {"version": "3"}, {"version": 3, "more": 1}):
            assert (await client.post(f"/-/models/{do}", json=wrong)).status_code == 422
    notes = [{"step": 9, "first": 1, "next": 2, "note": "unpin not done: none is pinned"}]
    await hand.client.hset(hand.keys.model_head, mapping={"notes": msgspec.json.encode(notes)})
    refused = await client.post("/-/models/unpin", json={})
    assert refused.status_code == 409
    assert "none is pinned" in refused.json()["error"]["got"]
    notes.append({"step": 10, "first": 2, "next": 3, "note": "save"})
    await hand.client.hset(hand.keys.model_head, mapping={"notes": msgspec.json.encode(notes)})
    assert (await client.post("/-/models/save")).json() == {"done": True, "offset": 2, "step": 10, "note": "save"}


async def test_actions_need_the_admin_scope_and_this_origin(settings: Settings, topics: Make, tmp_path: Path) -> None:
    await topics(PARTITIONS)
    path = tmp_path / "keys.json"
    reader, admin = add_key(path, "reader", ("read", "publish"), 0), add_key(path, "boss", ("admin",), 0)
    guarded = Settings.load(
        settings.data, env={}, kafka=settings.kafka, redis=settings.redis, namespace=settings.namespace, port=0,
        partitions=PARTITIONS, keys=str(path), host="0.0.0.0",
    )  # fmt: skip
    pages = ("bandits", "map", "map/users/u", "items/i", "slates", "slates/s", "quality", "search?q=a", "dead-letters",
             "crowd", "live", "models")  # fmt: skip
    acts = ("models/save", "models/pin", "models/unpin", "models/rollback", "dead-letters/replay", "crowd")
    async with serving(guarded) as (client, _):
        for method, paths in (("GET", pages), ("POST", acts)):
            for page in paths:
                for key, status in (("", 401), (reader, 403)):
                    headers = {"x-api-key": key} if key else {}
                    answer = await client.request(method, f"/-/{page}", headers=headers)
                    assert answer.status_code == status, (method, page, key)
        headers = {"x-api-key": admin, "origin": "https://elsewhere.example"}
        for act in acts:
            assert (await client.post(f"/-/{act}", headers=headers, json={})).status_code == 403
        assert (await client.get("/-/slates", headers={"x-api-key": admin})).status_code == 200
        assert (await client.get("/beacon.js")).status_code == 200
