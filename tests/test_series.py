"""Every series that is named comes out of a running stack after traffic, with the labels that it says, and counts."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from infra import telemetry
from infra.settings import Settings
from infra.stack import Stack
from infra.telemetry import SERIES, Series
from streaming.state import Keys, append_metrics, connect
from streaming.topics import Log, Topics

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]
Samples = dict[str, dict[frozenset[tuple[str, str]], float]]
# What this traffic does not bring about, and what does.
BESIDES = {telemetry.WORLD: "simulated people: the next test"}


def samples(text: str) -> Samples:
    """Name -> labels -> value; buckets without their edge."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = frozenset((name, value) for name, value in sample.labels.items() if name != "le")
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def of(found: Samples, series: Series, **labels: str) -> float | None:
    name = series.name + "_count" * (series.kind == "histogram")
    return found.get(name, {}).get(frozenset(labels.items()))


@pytest.fixture(scope="module")
def stack(kafka: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    settings = Settings.load(
        tmp_path_factory.mktemp("series"), env={}, kafka=kafka, redis=redis_url, namespace=f"series{time.time_ns()}",
        partitions=2, feature_share=1.0,
    )  # fmt: skip
    with Stack(settings, processes=("users", "items", "learner", "api")) as started:
        yield started


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=stack.api, timeout=10) as made:
        yield made


async def scraped(client: httpx.AsyncClient) -> Samples:
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    return samples(answer.text)


async def traffic(client: httpx.AsyncClient, stack: Stack) -> None:
    """What people do, a duplicate, a refused event, a dead letter, and a lookup after an event."""
    items = [{"item_id": f"item-{number}", "title": f"Item {number}"} for number in range(60)]
    assert (await client.post("/v1/items", json=items)).status_code == 202
    while not (await client.get("/v1/popular")).json()["items"]:
        await asyncio.sleep(0.05)
    for turn in range(12):
        for user in ("ann", "ben", "cid"):
            slate = (await client.get(f"/v1/recommendations/{user}?n=3")).json()
            chosen = slate["items"][0]["item_id"]
            common = {"user_id": user, "item_id": chosen, "ts": time.time()}
            events = [
                {"type": "click", **common, "slate_id": slate["slate_id"], "event_id": f"{user}{turn}"},
                {"type": "dwell", **common, "seconds": 40.0, "event_id": f"d{user}{turn}"},
                {"type": "view", **common, "item_id": f"item-{turn % 5}", "event_id": f"v{user}{turn}"},
            ]
            posted = await client.post("/v1/events", json=events)
            assert posted.status_code == 202, posted.text
            await client.get(f"/v1/recommendations/{user}?n=3&after={posted.json()['token']}&wait_ms=2000")
    again = {"type": "click", "user_id": "ann", "item_id": "item-1", "ts": time.time(), "event_id": "ann3"}
    assert (await client.post("/v1/events", json=again)).status_code == 202
    assert (await client.post("/v1/events", json=[{"type": "click"}])).status_code == 202
    log = Log(stack.kafka)
    await log.start()
    await log.append(Topics(stack.settings.namespace, 2).inlet("clicks"), [(0, b"x", b'{"user_id": 1}')])
    await log.stop()


async def until(client: httpx.AsyncClient, done: Callable[[Samples], bool], seconds: float = 150.0) -> Samples:
    end = time.monotonic() + seconds
    while True:
        found = await scraped(client)
        if done(found) or time.monotonic() > end:
            return found
        await asyncio.sleep(0.3)


async def clicking(client: httpx.AsyncClient, clicks: list[str], enough: asyncio.Event) -> None:
    """Click twice a second, for some figures need a step before; each id goes into `clicks`."""
    while not enough.is_set():
        slate = (await client.get("/v1/recommendations/eve?n=3&seen=include")).json()
        click = {"type": "click", "user_id": "eve", "item_id": slate["items"][0]["item_id"], "ts": time.time(),
                 "slate_id": slate["slate_id"], "event_id": f"eve{len(clicks)}"}  # fmt: skip
        if (await client.post("/v1/events", json=click)).status_code == 202:
            clicks.append(click["event_id"])
        await asyncio.sleep(0.5)


async def test_every_series_comes_out_of_a_running_stack(client: httpx.AsyncClient, stack: Stack) -> None:
    await scraped(client)  # from here on what the others tell is counted
    await traffic(client, stack)
    wanted = {series for series in SERIES if series not in BESIDES}

    def missing(found: Samples) -> set[str]:
        names = {series.name + "_count" * (series.kind == "histogram") for series in wanted}
        return names - found.keys()

    clicks, enough = list[str](), asyncio.Event()
    people = asyncio.create_task(clicking(client, clicks, enough))
    found = await until(client, lambda found: not missing(found))
    enough.set()
    await people
    assert not missing(found)

    def settled(found: Samples) -> bool:
        behind = [of(found, telemetry.LAG, fold=fold, partition=p) for fold in ("user", "item") for p in ("0", "1")]
        duplicates = of(found, telemetry.NOT_APPLIED, why="duplicate")
        folded = of(found, telemetry.FOLDED, type="click")
        return (behind, folded, duplicates) == ([0, 0, 0, 0], 37 + len(clicks), 1)

    found = await until(client, settled, 30.0)
    assert settled(found)
    for series in SERIES:
        name = series.name + "_count" * (series.kind == "histogram")
        for labels in found.get(name, {}):
            assert {label for label, _ in labels} == set(series.labels), series
    folded = sum(found[telemetry.FOLDED.name].values())
    assert of(found, telemetry.APPLIED_SECONDS, fold="user") == folded
    assert of(found, telemetry.APPLIED, fold="user") == folded - 1
    assert of(found, telemetry.LETTERS, topic="clicks", why="invalid") == 1
    assert (of(found, telemetry.LEARNT, what="events") or 0) > 0
    assert of(found, telemetry.READY) == of(found, telemetry.REACHABLE, server="kafka") == 1
    assert (of(found, telemetry.TOLD_AGE, process="users-0") or 99) < 10


async def test_what_simulated_people_tell_is_exposed_too(client: httpx.AsyncClient, stack: Stack) -> None:
    store = connect(stack.settings.redis)
    keys = Keys(stack.settings.namespace)
    await append_metrics(store, keys.metrics("world"), {"ours": 1.5, "popular": 1.0, "oracle": 2.0, "topics": "a|b"})
    await store.aclose()
    found = await scraped(client)
    assert [of(found, telemetry.WORLD, slate=name) for name in ("ours", "popular", "best")] == [1.5, 1.0, 2.0]


def freshet(stack: Stack, *words: str) -> str:
    told = subprocess.run(
        [sys.executable, "-P", "-m", "infra.cli", *words, "--data", str(stack.data)], capture_output=True, text=True,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100"}, timeout=60,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    return told.stdout


def test_the_terminal_shows_the_same_stack(stack: Stack) -> None:
    user = json.loads(freshet(stack, "user", "ann", "--json"))
    assert user["counters"]["click"] == 12
    assert user["next"]["items"]
    assert "next slate" in freshet(stack, "user", "ann")
    stages = json.loads(freshet(stack, "top", "--by", "stages", "--interval", "1", "--json"))
    assert {"route", "fold"} >= {row["kind"] for row in stages} != set()
    topics = json.loads(freshet(stack, "top", "--by", "topics", "--interval", "0.2", "--json"))
    assert {row["topic"].partition(".")[2]: row["partitions"] for row in topics}["events"] == 2
    for by in ("rising", "shown", "arms"):
        (first, *_) = json.loads(freshet(stack, "top", "--by", by, "--json"))
        assert first["item_id"].startswith("item-")
        assert first["shown"] > 0
    shown = freshet(stack, "status")
    assert "step" in shown
    assert "users-0" in shown


def test_a_watched_status_is_an_object_a_line_where_there_is_no_terminal(stack: Stack) -> None:
    words = ["status", "--watch", "--json", "--interval", "0.5", "--data", str(stack.data)]
    command = [sys.executable, "-P", "-m", "infra.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        told = [json.loads(watching.stdout.readline()) for _ in range(4)]
        watching.terminate()
    assert told[-1]["problem"] is None
    assert told[-1]["figures"]["users"]["lag"] == 0
    assert told[-1]["processes"]["learner"]["rss_mb"] > 1
