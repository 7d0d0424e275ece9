"""The page and its event stream, through the ASGI door, with learning curves in memory."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from serving.dashboard import files
from serving.dashboard.freshness import Freshness
from serving.dashboard.live import KEEP_S, MAX_VIEWERS, Live, Point, join, stream
from serving.dashboard.news import News
from serving.dashboard.stages import Stages


class Curves:
    """Learning curves in memory; ids are `<ms>-0` as in Redis."""

    def __init__(self) -> None:
        self.points: dict[str, list[Point]] = {}

    def add(self, name: str, time: float, **fields: float) -> None:
        self.points.setdefault(name, []).append((f"{int(time * 1000)}-0", {k: str(v) for k, v in fields.items()}))

    async def read(self, name: str, after: str, count: int) -> Sequence[Point]:
        points = self.points.get(name, [])
        floor = -1 if after == "-" else int(after.split("-")[0])
        return [point for point in points if int(point[0].split("-")[0]) > floor][-count:]


class Clock:
    """A clock that the test moves."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def make(curves: Curves, clock: Clock, here: Mapping[str, Any] | None = None) -> Live:
    return Live(read=curves.read, here=lambda: here or {"step": 3}, clock=clock)


async def get(app: Starlette, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    """One whole answer."""
    async with request(app, path, headers) as messages:
        start = await anext(messages)
        body = b"".join([message["body"] async for message in messages])
    return start["status"], {k.decode(): v.decode() for k, v in start["headers"]}, body


@asynccontextmanager
async def request(
    app: Starlette, path: str, headers: Mapping[str, str] | None = None
) -> AsyncIterator[AsyncIterator[Any]]:
    """A GET through the ASGI door whose messages are read as they come; leaving it is the client going away."""
    bare, _, query = path.partition("?")
    sent: asyncio.Queue[Any] = asyncio.Queue()
    gone = asyncio.Event()
    told = [(k.encode(), v.encode("latin-1")) for k, v in (headers or {}).items()]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": bare, "raw_path": bare.encode(), "query_string": query.encode(), "headers": told, "root_path": "",
    }  # fmt: skip
    first = True

    async def receive() -> dict[str, Any]:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": b"", "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def messages() -> AsyncIterator[Any]:
        while True:
            message = await asyncio.wait_for(sent.get(), 5.0)
            yield message
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                return

    task = asyncio.create_task(app(scope, receive, sent.put))
    try:
        yield messages()
    finally:
        gone.set()
        await asyncio.wait_for(task, 5.0)


async def frames(messages: AsyncIterator[Any], count: int) -> list[tuple[int, dict[str, Any]]]:
    """The next `count` frames of a stream: (id, data)."""
    found: list[tuple[int, dict[str, Any]]] = []
    async for message in messages:
        if match := re.fullmatch(rb"id: (\d+)\ndata: (.*)\n\n", message.get("body", b"")):
            found.append((int(match[1]), json.loads(match[2])))
            if len(found) == count:
                break
    return found


async def test_the_page_and_its_files_come_with_a_strict_policy() -> None:
    app = Starlette(routes=files.routes())
    for page in ("/", "/dashboard"):
        status, headers, body = await get(app, page)
        assert status == 200
        assert headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in headers["content-security-policy"]
        for path in re.findall(rb'(?:src|href)="(/static/[^"]+)"', body):
            status, headers, _ = await get(app, path.decode())
            assert status == 200, path
            again = await get(app, path.decode(), {"if-none-match": headers["etag"]})
            assert again[0] == 304
            assert again[2] == b""
    for path in ("/static/../live.py", "/static/", "/static/none.js"):
        assert (await get(app, path))[0] == 404


async def test_a_file_that_changed_is_served_as_it_is_now(tmp_path: Path) -> None:
    path = tmp_path / "a.js"
    path.write_text("one")
    app = Starlette(routes=[Route("/a.js", files.File(path).answer)])
    _, before, body = await get(app, "/a.js")
    assert body == b"one"
    path.write_text("two")
    os.utime(path, (1e9, 1e9))
    status, after, body = await get(app, "/a.js", {"if-none-match": before["etag"]})
    assert (status, body) == (200, b"two")
    assert after["etag"] != before["etag"]


def test_all_files_together_are_small() -> None:
    assert sum(path.stat().st_size for path in files.files()) < 300_000


def test_the_page_needs_no_network_and_has_nothing_inline() -> None:
    for path in files.files():
        if "vendor" in path.parts:
            continue
        text = path.read_text()
        assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/(?:2000|1999)/)[a-z0-9-]+\.[a-z]+", text), path
        assert not re.search(r"\son[a-z]+=\"", text), path
        assert "style=" not in text, path
        assert "innerHTML" not in text, path


async def test_frames_join_the_curves_and_this_process() -> None:
    curves, clock = Curves(), Clock(2_000.5)
    curves.add("users", 1_998.2, t=1_998.2, events=10, applied_p50_ms=2.0, applied_p99_ms=8.0, lag=1)
    curves.add("users", 1_998.9, t=1_998.9, events=30, applied_p50_ms=4.0, applied_p99_ms=6.0, lag=2)
    curves.add("world", 1_999.1, ours=1.2, popular=0.9, oracle=2.0, lead_low=float("nan"))
    app = Starlette(routes=[stream(make(curves, clock))])
    async with request(app, "/-/live") as messages:
        start = await anext(messages)
        assert dict(start["headers"])[b"content-type"].startswith(b"text/event-stream")
        got = await frames(messages, 3)
    assert [second for second, _ in got] == [1_998, 1_999, 2_000]
    assert got[0][1]["users"] == {"t": 1_998.9, "events": 40, "applied_p50_ms": 4.0, "applied_p99_ms": 8.0, "lag": 2}
    assert got[1][1]["world"] == {"ours": 1.2, "popular": 0.9, "oracle": 2.0}
    assert got[2][1]["api"] == {"step": 3}


async def test_a_browser_that_comes_back_goes_on_where_it_was_even_after_a_restart() -> None:
    curves, clock = Curves(), Clock(5_000.5)
    for second in range(4_950, 5_000):
        curves.add("users", second + 0.5, t=second + 0.5, events=1)
    for live in (make(curves, clock), make(curves, clock)):
        app = Starlette(routes=[stream(live)])
        async with request(app, "/-/live", {"last-event-id": "4989"}) as messages:
            got = await frames(messages, 11)
        assert [second for second, _ in got] == list(range(4_990, 5_001))
        async with request(app, "/-/live?after=4998") as messages:
            assert [second for second, _ in await frames(messages, 2)] == [4_999, 5_000]
        async with request(app, "/-/live", {"last-event-id": "not a number"}) as messages:
            assert len(await frames(messages, 51)) == 51


async def test_new_frames_reach_every_viewer() -> None:
    curves, clock = Curves(), Clock(7_000.9)
    live = make(curves, clock)
    app = Starlette(routes=[stream(live)])
    async with request(app, "/-/live") as one, request(app, "/-/live") as other:
        assert [second for second, _ in await frames(one, 1) + await frames(other, 1)] == [7_000, 7_000]
        clock.now = 7_001.9
        curves.add("users", 7_001.5, events=5)
        await live.poll()
        for messages in (one, other):
            ((second, data),) = await frames(messages, 1)
            assert (second, data["users"]["events"]) == (7_001, 5)


async def test_seconds_that_nobody_watched_are_told_one_by_one() -> None:
    curves, clock = Curves(), Clock(7_000.9)
    live = make(curves, clock)
    await live.poll()
    for second in range(7_001, 7_010):
        curves.add("users", second + 0.4, events=1)
    clock.now = 7_010.2
    await live.poll()
    got = [(frame.second, json.loads(frame.data).get("users", {}).get("events")) for frame in live._frames]
    assert got == [(7_000, None), *((second, 1) for second in range(7_001, 7_009)), (7_010, 1)]


async def test_viewers_are_bounded_and_the_last_one_stops_the_reading() -> None:
    live = make(Curves(), Clock(9_000.0))
    app = Starlette(routes=[stream(live)])
    live.viewers = MAX_VIEWERS - 1
    async with request(app, "/-/live") as messages:
        await frames(messages, 1)
        status, headers, _ = await get(app, "/-/live")
        assert (status, headers["retry-after"]) == (503, "10")
    assert live.viewers == MAX_VIEWERS - 1
    live.viewers = 0
    async with request(app, "/-/live") as messages:
        await frames(messages, 1)
        assert live.viewers == 1
    assert live.viewers == 0
    assert live._task is None
    async with request(app, "/-/live", {"last-event-id": "\u00b2"}) as messages:  # a digit, and no number
        assert await frames(messages, 1)
    assert live.viewers == 0


async def test_without_redis_the_stream_goes_on_and_says_degraded() -> None:
    async def away(name: str, after: str, count: int) -> Sequence[Point]:
        raise ConnectionError("no")

    app = Starlette(routes=[stream(Live(read=away, here=lambda: {"step": 1}, clock=Clock(50.0)))])
    async with request(app, "/-/live") as messages:
        ((_, data),) = await frames(messages, 1)
    assert data["api"] == {"step": 1, "degraded": True}


def test_joining_tells_no_delay_where_nothing_was_applied() -> None:
    assert join([{"events": 0.0, "applied_p50_ms": 0.0, "lag": 0.0}]) == {"events": 0.0, "lag": 0.0}
    assert KEEP_S == 900


def test_lookups_and_stages_are_told_since_the_last_time() -> None:
    stages = Stages()
    assert stages.take(0) == {"lookups_s": 0, "errors_s": 0, "shed_s": 0}
    for duration in [0.0015] * 98 + [0.005] * 2:
        stages.put("lookup", duration)
        stages.put("profile", duration / 2)
    stages.failed += 3
    figures = stages.take(7)
    assert figures["lookups_s"] / figures["errors_s"] == pytest.approx(100 / 3, rel=0.01)
    assert figures["shed_s"] / figures["errors_s"] == pytest.approx(7 / 3, rel=0.01)
    assert figures["lookup_p50_ms"] == pytest.approx(1.5)
    assert figures["lookup_p95_ms"] == pytest.approx(1.5)
    assert figures["lookup_p99_ms"] == pytest.approx(5.0, rel=0.01)
    assert figures["profile_p50_ms"] == pytest.approx(0.75)
    assert stages.take(7) == {"lookups_s": 0, "errors_s": 0, "shed_s": 0}
    for _ in range(10_000):
        stages.put("lookup", 0.001)
    stages.put("lookup", 1.0)
    assert stages.take(7)["lookup_p50_ms"] == 1.0


def test_what_several_workers_hold_is_added_once_each_and_counts_all_of_the_time() -> None:
    points = [
        {"slot": 0.0, "lag": 5.0, "events": 10.0, "events_click": 4.0},
        {"slot": 1.0, "lag": 7.0, "events": 20.0, "events_click": 1.0},
        {"slot": 0.0, "lag": 2.0, "events": 1.0, "events_click": 1.0},
    ]
    assert join(points) == {"slot": 0.0, "lag": 9.0, "events": 31.0, "events_click": 6.0}
    cumulative = [{"slates": 10.0, "ours": 1.0}, {"slates": 12.0, "ours": 2.0}]
    assert join(cumulative, "world") == {"slates": 12.0, "ours": 2.0}
    assert join(cumulative, "learner")["slates"] == 22.0


async def test_what_broke_is_told_once_and_to_a_new_viewer_all_of_it() -> None:
    curves, clock, news = Curves(), Clock(7_000.9), News()
    here = {"degraded": False, "reason": "no Redis"}
    live = Live(read=curves.read, here=lambda: here | {"degraded": clock.now > 7_002}, clock=clock, news=news)
    logger = logging.Logger("freshet.test")
    logger.addHandler(news)
    logger.warning("before anybody looked")
    for second, alarms in ((7_000.5, 0), (7_001.5, 1), (7_002.5, 0)):
        curves.add("learner", second, t=second, alarm_encoder=alarms)
        clock.now = second + 0.4
        await live.poll()
    told = [[line["what"] for line in json.loads(frame.data).get("broke", [])] for frame in live._frames]
    assert told[0] == ["API: before anybody looked"]
    assert [line.partition(":")[0] for line in told[1]] == ["drift"]
    assert told[2] == ["API: degraded: no Redis"]
    assert len(news.last()) == 3
    for at in range(200):
        news.tell(f"line {at}")
    assert len(news.last()) == 50
    logger.warning("%d of %s", "one")
    assert news.last()[-1]["what"] == "API: %d of %s", "who logs meets no error, whatever the arguments"


async def test_from_an_accepted_event_to_the_first_lookup_that_asked_for_it() -> None:
    freshness = Freshness()
    assert freshness.figures() == {}
    freshness.accepted({0: 4, 1: 9})
    since = freshness.asked(1, 9)
    assert since is not None
    await asyncio.sleep(0.01)
    freshness.answered(since)
    assert freshness.asked(1, 9) is None
    assert freshness.asked(0, 3) is None
    figures = freshness.figures()
    assert figures["changed_n"] == 1
    assert 10 <= figures["changed_p50_ms"] == figures["changed_p99_ms"] < 1000
    for offset in range(5_000):
        freshness.accepted({0: offset})
    assert freshness.asked(0, 4) is None, "what waited longest left"
