"""The stream of figures: server-sent events at `/-/live`, one frame a second.

A frame joins what the processes wrote to their learning curves in Redis (`users`, `items`, `learner`, `world`) with
what this API process counted itself (`api`) and, where there is news, what went wrong (`broke`). Frames are numbered by
their second, so a browser that lost its connection goes on after the last one it saw (`Last-Event-ID`), also after a
restart of this process. It knows nothing about how the figures came to be, and writes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from infra.telemetry import VIEWERS
from serving.dashboard.here import here_of
from serving.dashboard.news import News
from serving.parts import Parts

log = logging.getLogger("freshet.serving")

CURVES: Final = ("users", "items", "learner", "world")
KEEP_S: Final = 900
MAX_VIEWERS: Final = 64
SLICE: Final = 16
"""Points or frames made at a stretch, about a millisecond."""

HELD: Final = ("lag", "queued", "rss_mb")
COUNTED: Final = {
    "users": ("events", "duplicates", "dead", "poisoned", "erased", "dedupe_overflow"),
    "items": ("events", "duplicates", "dead", "poisoned"),
    "learner": ("events", "joined", "lists", "alarm", "slates", "hits", "ndcg", "reward", "gone", "shown"),
}
"""By curve, what names of counts begin with."""

Point = tuple[str, Mapping[str, str]]
Read = Callable[[str, str, int], Awaitable[Sequence[Point]]]
"""(curve, id or "-", count) -> points after the id, or the newest `count`."""


class Frame(NamedTuple):
    """One second of figures, encoded once for all viewers; `second` since the epoch is its id."""

    second: int
    data: bytes


def numbers(fields: Mapping[str, str]) -> dict[str, float]:
    """The finite numbers among the fields of a point."""
    found = {}
    for name, text in fields.items():
        try:
            value = float(text)
        except ValueError:
            continue
        if math.isfinite(value):
            found[name] = value
    return found


def join(points: Sequence[Mapping[str, float]], curve: str = "users") -> dict[str, float]:
    """One figure per name from a curve's points of one second.

    Counts add up; of what processes hold (`lag`, `queued`, `rss_mb`) the latest of each slot is added; delays are the
    worst; the rest is the latest.
    """
    joined: dict[str, float] = {}
    held: dict[str, dict[float, float]] = {}
    for point in points:
        for name, value in point.items():
            if name in HELD:
                slots = held.setdefault(name, {})
                slots[point.get("slot", 0.0)] = value
                joined[name] = sum(slots.values())
            elif name.startswith(COUNTED.get(curve, ())) and name in joined:
                joined[name] += value
            elif name.startswith("applied_p") and name in joined:
                joined[name] = max(joined[name], value)
            else:
                joined[name] = value
    if joined.get("events") == 0:  # nothing was applied: there is no delay to tell
        joined = {name: value for name, value in joined.items() if not name.startswith("applied_p")}
    return joined


class Live:
    """The frames of the last 15 minutes and those who watch; it reads Redis only while someone does."""

    def __init__(
        self, *, read: Read, here: Callable[[], Mapping[str, Any]], clock: Callable[[], float] = time.time,
        news: News | None = None, viewed: Callable[[int], None] = lambda viewers: None,
    ) -> None:  # fmt: skip
        self._viewed = viewed
        self._read, self._here, self._clock, self._told = read, here, clock, news or News()
        self._frames: deque[Frame] = deque(maxlen=KEEP_S)
        self._last: dict[str, str] = dict.fromkeys(CURVES, "-")
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.viewers = 0

    def enter(self) -> bool:
        """Count a viewer in; False where the house is full."""
        if self.viewers >= MAX_VIEWERS:
            return False
        self.viewers += 1
        self._viewed(self.viewers)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="live")
        return True

    def leave(self) -> None:
        """Count a viewer out; the last one stops the reading."""
        self.viewers -= 1
        self._viewed(self.viewers)
        if self.viewers == 0 and self._task is not None:
            self._task.cancel()
            self._task = None

    async def watch(self, after: int) -> AsyncIterator[Frame]:
        """Frames later than second `after`: those kept, then each new one. A slow viewer skips, nothing piles up."""
        while True:
            news = self._news
            for frame in [frame for frame in self._frames if frame.second > after]:
                after = frame.second
                yield frame
            await news.wait()

    async def _run(self) -> None:
        while True:
            try:
                await self.poll()
            except Exception as error:  # Redis is away: the frame says so, the page stays
                log.debug("live: %s: %s", type(error).__name__, error)
                self._add(int(self._clock()), {"api": {**self._here(), "degraded": True}})
            await asyncio.sleep(1.0 - self._clock() % 1.0 + 0.02)

    async def poll(self) -> None:
        """Read what is new and make the frame of this second, before it those of seconds that nobody watched."""
        second = int(self._clock())
        known = self._frames[-1].second if self._frames else second - KEEP_S
        found: dict[int, dict[str, list[dict[str, float]]]] = {}
        for name in CURVES:
            for turn, (identifier, fields) in enumerate(await self._new_points(name)):
                await self._breathe(turn)
                at = int(identifier.split("-")[0]) // 1000
                if known < at < second - 1 or (not self._frames and known < at < second):
                    found.setdefault(at, {}).setdefault(name, []).append(numbers(fields))
                elif at >= known:
                    found.setdefault(second, {}).setdefault(name, []).append(numbers(fields))
        for turn, at in enumerate(sorted(found.keys() | {second})):
            await self._breathe(turn)
            body: dict[str, Any] = {name: join(points, name) for name, points in found.get(at, {}).items()}
            self._add(at, {**body, "api": dict(self._here())} if at == second else body)

    @staticmethod
    async def _breathe(turn: int) -> None:
        """Let lookups have the loop between slices: whoever comes first asks for a quarter of an hour at once."""
        if turn % SLICE == SLICE - 1:
            await asyncio.sleep(0)

    async def _new_points(self, name: str) -> list[Point]:
        points = list(await self._read(name, self._last[name], KEEP_S))
        if points:
            self._last[name] = points[-1][0]
        elif self._last[name] == "-":
            self._last[name] = "0-0"
        return points

    def _add(self, second: int, body: dict[str, Any]) -> None:
        if self._frames and second <= self._frames[-1].second:
            return
        self._told.look(body)
        news = self._told.take()
        broke = news if self._frames else self._told.last()  # the first frame tells what broke before anybody looked
        more = {"broke": broke} if broke else {}
        self._frames.append(Frame(second, msgspec.json.encode({"t": second, **body, **more})))
        waiting, self._news = self._news, asyncio.Event()
        waiting.set()


def _after(request: Request) -> int:
    text = request.headers.get("last-event-id") or request.query_params.get("after", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0


class _Stream(StreamingResponse):
    """An event stream that counts its viewer out however it ends."""

    def __init__(self, live: Live, after: int) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Content-Type-Options": "nosniff"}
        super().__init__(_messages(live, after), headers=headers, media_type="text/event-stream")
        self._live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._live.leave()


async def _messages(live: Live, after: int) -> AsyncIterator[bytes]:
    yield b"retry: 1000\n\n"
    async for frame in live.watch(after):
        yield b"id: %d\ndata: %b\n\n" % (frame.second, frame.data)


def _answer(live: Live) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        after = _after(request)
        if live.enter():
            return _Stream(live, after)
        return Response("too many viewers\n", 503, headers={"Retry-After": "10"}, media_type="text/plain")

    return answer


def live_of(parts: Parts) -> Live:
    """The frames of one API process: curves from its Redis, and what it counts and holds itself."""

    def viewed(viewers: int) -> None:
        parts.telemetry.set(VIEWERS, viewers)

    viewed(0)
    return Live(
        read=parts.snapshot.read_metrics, here=here_of(parts), clock=parts.clock, news=parts.news, viewed=viewed
    )  # fmt: skip


def stream(live: Live) -> Route:
    """Return the route `/-/live`."""
    return Route("/-/live", _answer(live))
