"""How much this process takes on at once: bodies, turns, and when `/v1/events` says 429 instead of being late.

Events wait for nobody's good will: the log holds what was accepted, so what the folds cannot keep up with is better
refused at the door than accepted and applied minutes later. Lookups are never shed. Knows nothing about routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.requests import Request

from infra.telemetry import REQUESTS_SHED, Telemetry
from serving.messages import MAX_BODY, Problem, read_body

MAX_LAG: Final = 100_000
"""Accepted events that the user agents, or the item agent, have not applied yet; about 5 s of their work."""
MAX_LISTS: Final = 8
"""Large bodies of events or items at once: parsed one by one, so that the last waits a third of a second or so."""
LARGE: Final = 16 * 1024
"""Bytes from which on a body is a large one."""
MAX_APPENDING: Final = 64
"""Requests that may wait for Kafka at once."""
MAX_BODIES: Final = 32 * 1024 * 1024
"""Bytes of bodies in this process at once; a quarter of it is kept for lookups and other small ones."""
MAX_DELAY_S: Final = 0.05
"""Mean delay of the event loop, s: beyond it whatever is accepted makes lookups late."""
BODY_S: Final = 10.0
"""How long a client may take to send a body, s."""
SLICE: Final = 100
"""Objects of a list parsed at a stretch, about .5 ms."""
RETRY_S: Final = (1, 4)
"""Retry-After is drawn between these, so that the refused do not come back all at once, s."""
_TICK_S: Final = 0.01
_SMOOTH: Final = 0.1

log = logging.getLogger("freshet.serving")


@dataclass(slots=True)
class Overload:
    """What one API process has on its hands, and the bounds of it.

    `ends` is, by partition of `events`, the offset after the newest acknowledged here; `read_lag` returns, given the
    ends, how many of the events before them each fold has not applied.
    """

    telemetry: Telemetry
    read_lag: Callable[[Mapping[int, int]], Awaitable[dict[str, int]]]
    ends: dict[int, int] = field(default_factory=dict)
    lag: dict[str, int] = field(default_factory=dict)
    delay_s: float = 0.0
    watching: bool = False
    bodies: int = 0
    lists: int = 0
    appending: int = 0
    shed: dict[str, int] = field(default_factory=dict)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def refuse(self, reason: str, where: str, expected: str, got: str) -> Problem:
        """Count a request that is shed and return what it is told: 429, and when to come again."""
        self.shed[reason] = self.shed.get(reason, 0) + 1
        self.telemetry.count(REQUESTS_SHED, reason=reason)
        low, high = RETRY_S
        return Problem(
            429, where, expected, got, do="send the whole request again, with the same event ids, after Retry-After",
            headers={"Retry-After": str(low + secrets.randbelow(high - low + 1))},
        )  # fmt: skip

    def admit(self) -> None:
        """Raise Problem 429 where events that come now would be applied late or make lookups late."""
        for fold, behind in self.lag.items():
            if behind > MAX_LAG:
                raise self.refuse("lag", f"{fold} agent", f"at most {MAX_LAG} events not applied yet", str(behind))
        if self.delay_s > MAX_DELAY_S:
            took = f"{1000 * self.delay_s:.0f} ms"
            raise self.refuse("delay", "this process", f"a delay of at most {1000 * MAX_DELAY_S:.0f} ms", took)
        self.check_appending()

    def check_appending(self) -> None:
        """Raise Problem 429 where as many requests wait for Kafka as may."""
        if self.appending >= MAX_APPENDING:
            raise self.refuse("appending", "Kafka", f"at most {MAX_APPENDING} requests that wait for it", "more")

    @contextlib.asynccontextmanager
    async def body(self, request: Request, *, small: bool = False) -> AsyncIterator[bytes]:
        """Read a body and hold its place while it is worked on; raises Problem 408, 413 or 429."""
        declared = request.headers.get("content-length", "")
        size = min(int(declared), MAX_BODY) if declared.isdigit() else MAX_BODY
        if self.bodies + size > (MAX_BODIES if small else MAX_BODIES * 3 // 4):
            raise self.refuse("bodies", "this process", f"at most {MAX_BODIES} bytes of bodies at once", "more")
        large = size > LARGE and not small
        if large and self.lists >= MAX_LISTS:
            raise self.refuse("lists", "this process", f"at most {MAX_LISTS} large lists at once", "more")
        self.bodies += size
        self.lists += large
        try:
            try:
                async with asyncio.timeout(BODY_S):
                    content = await read_body(request)
            except TimeoutError:
                raise Problem(408, "body", f"all of it within {BODY_S:g} s", "less") from None
            yield content
        finally:
            self.bodies -= size
            self.lists -= large

    @contextlib.asynccontextmanager
    async def turn(self, *, many: bool) -> AsyncIterator[None]:
        """Let one list be parsed at a time; a single object goes past."""
        if not many:
            yield
            return
        async with self._turn:
            yield

    @staticmethod
    async def breathe(index: int) -> None:
        """Between slices of a list let others have the loop, and give them as much time as a slice takes."""
        if index and index % SLICE == 0:
            await asyncio.sleep(0.001)

    def acknowledged(self, last: Mapping[int, int]) -> None:
        """Note the last offsets of `events` that Kafka acknowledged."""
        for partition, offset in last.items():
            self.ends[partition] = max(self.ends.get(partition, 0), offset + 1)

    def at_most(self, ends: Mapping[int, int], noted: Mapping[int, int]) -> None:
        """Forget what lay, before Kafka was asked, beyond the ends that it tells: the topic was deleted and made again.

        Not seen from what is acknowledged alone: the lag that the old ends make refuses whatever would be.
        """
        for partition, end in ends.items():
            if noted.get(partition, 0) > end:
                self.ends[partition] = end

    async def watch_loop(self) -> None:
        """Measure how late this process's event loop is, for as long as it runs."""
        while True:
            began = time.perf_counter()
            await asyncio.sleep(_TICK_S)
            late = max(0.0, time.perf_counter() - began - _TICK_S)
            self.delay_s += _SMOOTH * (late - self.delay_s) if self.watching else -self.delay_s

    async def watch_lag(self) -> None:
        """Ask each second how far the folds are behind what was acknowledged here; unknown while Redis is away."""
        while True:
            await asyncio.sleep(1.0)
            try:
                self.lag = await self.read_lag(self.ends) if self.ends else {}
            except asyncio.CancelledError:
                raise
            except Exception as error:
                log.debug("lag: %s: %s", type(error).__name__, error)
                self.lag = {}

    def state(self) -> dict[str, Any]:
        """Return it for people to read."""
        return {"lag": self.lag, "loop_delay_ms": round(1000 * self.delay_s, 2), "shed": dict(self.shed)}
