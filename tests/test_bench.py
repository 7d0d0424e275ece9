"""The arithmetic of `freshet bench`, and its load generator against a tiny server; nothing here asserts a time."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from infra.proving import bench, load, overload
from streaming.events import Click, decode, parse_json
from streaming.topics import partition_of

ROOT = Path(__file__).parent.parent


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300))
def test_percentiles_are_values_that_occurred(values: list[float]) -> None:
    found = load.percentiles(values)
    ordered = sorted(round(v, 3) for v in values)
    assert found["max_ms"] == ordered[-1]
    for name, share in (("p50_ms", 0.5), ("p95_ms", 0.95), ("p99_ms", 0.99)):
        value = found[name]
        assert value in ordered
        assert sum(v <= value for v in ordered) >= share * len(ordered) - 1e-9


def test_percentiles_by_hand_and_of_nothing() -> None:
    hundred = np.arange(1.0, 101.0)
    assert load.percentiles(hundred) == {"p50_ms": 50.0, "p95_ms": 95.0, "p99_ms": 99.0, "max_ms": 100.0}
    assert set(load.percentiles([]).values()) == {None}


@pytest.mark.parametrize(("rate", "seconds"), [(200.0, 60.0), (5.0, 3.0), (1000.0, 0.5)])
def test_arrivals_are_poisson_ascending_and_of_the_seed(rate: float, seconds: float) -> None:
    times = load.arrivals(rate, seconds, np.random.default_rng(1))
    assert np.array_equal(times, load.arrivals(rate, seconds, np.random.default_rng(1)))
    assert (np.diff(times) > 0).all()
    assert times[0] >= 0
    assert times[-1] < seconds
    assert abs(len(times) - rate * seconds) < 5 * (rate * seconds) ** 0.5
    assert len(load.arrivals(0.0, 10.0, np.random.default_rng(1))) == 0


@pytest.mark.parametrize("seconds", [3.0, 20.0, 60.0, 64.0])
def test_lookups_and_their_floor_take_turns(seconds: float) -> None:
    on, off = load.windows(seconds)
    rng = np.random.default_rng(2)
    lookups = load.placed(load.arrivals(50, seconds, rng), on, off, 0.0)
    floor = load.placed(load.arrivals(50, seconds / 2, rng), off, on, on)
    assert (lookups % (on + off) <= on).all()
    assert (floor % (on + off) >= on).all()
    assert max(lookups[-1], floor[-1]) < 1.5 * seconds


def test_the_floor_has_the_keys_of_what_it_is_a_floor_of() -> None:
    record, keys = load.Record([1.0], [0.1]).figures(1.0), {k.partition(".")[2] for k in bench.LABELS}
    fresh = load.fresh_figures([1.0], [2.0])
    rates = bench._rates_of(100, 2.0, 1.0, {"a": 1.0}, {"a": 1.5, "b": 0.5})
    assert keys <= record.keys() | fresh.keys() | rates.keys()
    assert (rates["events_per_s"], rates["profiles_per_s"], rates["cpu_s"]) == (50, 100, {"a": 0.5, "b": 0.5})
    assert bench.TARGETS.keys() <= bench.LABELS.keys()
    assert {key.partition(".")[0] for key in bench.LABELS} == set(bench.WHAT) == bench.FLOORS.keys()


def test_verdicts() -> None:
    assert bench.verdict("ingest.events_per_s", 20_000) == "yes"
    assert bench.verdict("ingest.events_per_s", 19_999) == "no"
    assert bench.verdict("lookup.p99_ms", 15.1) == "no"
    assert bench.verdict("lookup.p50_ms", 1.0) == bench.verdict("lookup.p99_ms", None) == ""


def test_the_backlog_names_every_item_and_user_and_repeats_by_zipf() -> None:
    records = list(bench.clicks(30_000, 8, now=1.8e9))
    events = [decode(value) for _, _, value in records]
    assert all(isinstance(event, Click) for event in events)
    items = Counter(event.item_id for event in events if isinstance(event, Click))
    assert len(items) == bench.ITEMS
    assert items["item-0"] > 10 * items["item-100"] > 0
    assert len({event.user_id for event in events}) == bench.USERS
    assert len({event.event_id for event in events}) == len(events)
    assert all(p == partition_of(e.user_id, 8) for (p, _, _), e in zip(records, events, strict=True))
    assert all(e.ts < 1.8e9 for e in events)


@pytest.fixture
async def api() -> AsyncIterator[str]:
    """A server with the routes that the generator calls; every tenth lookup fails."""
    calls: Counter[str] = Counter()

    async def answer(request: web.Request) -> web.Response:
        calls[request.method + request.path.split("/")[2]] += 1
        if request.method == "POST":
            return web.json_response({"token": "t"}, status=202)
        return web.json_response({"items": []}, status=500 if calls["GETrecommendations"] % 10 == 9 else 200)

    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_the_generator_sends_its_schedule_and_counts_errors(api: str) -> None:
    words = ["lookup", "--api", api, "--seconds", "1", "--rate", "60", "--events", "40"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "infra.proving.load", *words, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    found = json.loads(out)
    assert found.keys() >= found["floor"].keys() == found["events"].keys()
    assert found["sent"] > 20
    assert found["floor"]["sent"] > 10
    assert found["events"]["sent"] > 20
    assert found["errors"] == found["problems"]["GET answered 500"] >= 1
    assert found["events"]["errors"] == 0
    assert 0 < found["p50_ms"] <= found["p99_ms"] <= found["max_ms"]
    assert found["late_p99_ms"] >= 0


async def test_a_flood_counts_what_was_accepted_shed_and_failed() -> None:
    """Three answers of a server that is full: each counted as what it is, and every list has ids of its own."""
    ids: set[str] = set()
    answers = [202, 429, 503] * 4

    async def take(request: web.Request) -> web.Response:
        clicks = await request.json()
        ids.update(click["event_id"] for click in clicks)
        assert all(parse_json(json.dumps(click).encode()).ts > 1.7e9 for click in clicks[:3])
        status = answers.pop()
        headers = {"Retry-After": "3"} if status == 429 else {}
        return web.json_response({"accepted": len(clicks)}, status=status, headers=headers)

    app = web.Application(client_max_size=1 << 20)
    app.router.add_post("/v1/events", take)
    async with TestServer(app) as server, aiohttp.ClientSession(str(server.make_url("/"))) as session:
        flood = load.Flood(session, users=100, items=100, seed=1)
        told = [await flood.post(0.0) for _ in range(12)]
    assert flood.statuses == {"202": 4, "429": 4, "503": 4}
    assert flood.retry_after == {"3": 4}
    assert (flood.accepted, len(ids)) == (4 * load.FLOOD_LIST, 12 * load.FLOOD_LIST)
    assert sorted(set(told)) == ["", "POST answered 503"]


def test_the_promises_of_overload_are_read_off_its_figures() -> None:
    lookups = {"errors": 0}
    kept = {
        "ratio_p99": 2.9, "failed": 0, "retry_after_s": {"1": 2}, "before": lookups, "during": lookups,
        "after": lookups,
        "rss_start_mb": {"api": 200.0}, "rss_max_mb": {"api": 300.0}, "drained_s": 0.0,
    }  # fmt: skip
    assert all(overload.verdicts(kept).values())
    for change in ({"ratio_p99": 3.1}, {"failed": 1}, {"retry_after_s": {"none": 1}}, {"drained_s": None},
                   {"during": {"errors": 1}}, {"rss_max_mb": {"api": 600.0}}, {"ratio_p99": None}):  # fmt: skip
        assert list(overload.verdicts({**kept, **change}).values()).count(False) == 1
    assert (overload.ratio(30.0, 10.0), overload.ratio(None, 1.0), overload.ratio(1.0, None)) == (3.0, None, None)


async def test_latency_counts_from_the_scheduled_arrival() -> None:
    """One request blocks the whole generator: those that were due meanwhile have waited, and say so."""
    import time

    async def blocking(due: float) -> str:
        time.sleep(0.05)
        return ""

    records = await load.open_loop({"x": np.array([0.0, 0.001, 0.002])}, {"x": blocking})
    assert len(records["x"].latency_ms) == 3
    assert records["x"].latency_ms[2] >= 3 * 50 - 2 - 1
    assert records["x"].late_ms[2] >= 2 * 50 - 2 - 1
