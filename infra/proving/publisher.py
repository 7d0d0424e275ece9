"""A known stream and the clients that publish it through both doors, with the retries and repeats of real clients.

What was accepted is counted here, on the client's side, by event id: the truth that state is compared with. Each user
meets each item once (a click, and perhaps a view, a dwell, a rating, a save around it), so that an item's undecayed
count must be the number of users that met it. Knows nothing about faults or about state.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from streaming.topics import Log, LogError, Record, Topics, decode_token, partition_of

USERS: Final = 240
ITEMS: Final = 1000
TIMEOUT_S: Final = 4.0
INLET_TIMEOUT_S: Final = 12.0
WAITING: Final = 300
"""Messages under way at which the clients draw no new ones."""
LOST_ANSWERS: Final = 0.02
"""Share of requests whose client hangs up before the answer and sends them again."""
REPEATS: Final = 0.05
"""Share of messages that are sent once more, seconds after they were accepted, through either door."""
LOOKUPS_PER_S: Final = 4.0
CATALOGUE_PER_S: Final = 1.0
KINDS: Final = ("click", "dwell", "rating", "action", "view")
Event = dict[str, Any]


@dataclass(slots=True)
class Landed:
    """A request that was accepted: when it was sent (monotonic) and the highest offset of `events` by partition."""

    began: float
    offsets: dict[int, int]


@dataclass(slots=True)
class Truth:
    """What the clients know: accepted events by (user, kind), users that met an item, and what is still unknown."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    met: Counter[str] = field(default_factory=Counter)
    unknown: Counter[tuple[str, str]] = field(default_factory=Counter)


class Stream:
    """Draws visits: the events of one user and one item that the user has not met before."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.slates: dict[str, tuple[str, list[str]]] = {}
        self._met: dict[str, set[str]] = {}
        self._count = 0

    def visit(self) -> list[Event]:
        """Return the events of one visit, some seconds old (some: days) and in no order."""
        draw = self.random
        user = f"u{draw.randrange(USERS)}"
        item, slate = self._item(user)
        base = time.time() - (draw.uniform(0, 172_800) if draw.random() < 0.02 else draw.uniform(0, 5))
        kinds = ["click", *(kind for kind, p in (("view", 0.3), ("dwell", 0.4), ("rating", 0.1), ("action", 0.1))
                            if draw.random() < p)]  # fmt: skip
        events = [self._event(kind, user, item, slate, base) for kind in kinds]
        draw.shuffle(events)
        return events

    def _item(self, user: str) -> tuple[str, str]:
        met = self._met.setdefault(user, set())
        slate, shown = self.slates.pop(user, ("", []))
        fresh = [item for item in shown if item not in met]
        if fresh and self.random.random() < 0.5:
            item = self.random.choice(fresh)
        else:
            slate, first = "", self.random.randrange(ITEMS)
            item = next(name for k in range(1_000_000) if (name := f"i{first + k * 7}") not in met)
        met.add(item)
        return item, slate

    def _event(self, kind: str, user: str, item: str, slate: str, base: float) -> Event:
        self._count += 1
        event: Event = {"type": kind, "user_id": user, "item_id": item, "event_id": f"e{self._count}",
                        "ts": base + self.random.uniform(0, 2)}  # fmt: skip
        if slate:
            event["slate_id"] = slate
        more: dict[str, Event] = {"dwell": {"seconds": 45.0}, "rating": {"value": 4.0}, "action": {"name": "save"}}
        return {**event, **more.get(kind, {})}


class Publisher:
    """Clients on an event loop and a thread of their own: `start`, then `finish`; counts may be read meanwhile."""

    def __init__(self, api: str, kafka: str, topics: Topics, *, rate: float, seed: int) -> None:
        self._api, self._kafka, self._topics, self._rate = api, kafka, topics, rate
        self.stream = Stream(seed)
        self.truth = Truth()
        self.published = self.accepted = self.sent_again = self.requests = self.catalogue = 0
        self.lookups: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.landed: deque[Landed] = deque(maxlen=100_000)
        self.highest: dict[int, int] = {}
        self._under_way: set[asyncio.Task[None]] = set()
        self._messages = 0
        self._drawing, self._ending, self._patience = True, False, float("inf")
        self._met: set[tuple[str, str]] = set()
        self._open: dict[str, list[Event]] = {}
        self._log: Log | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="publisher", daemon=True)

    def start(self) -> None:
        """Begin to publish."""
        self._thread.start()

    def finish(self, patience_s: float) -> bool:
        """Publish nothing new, wait until all is accepted; False where the clients' patience ended before."""
        self._patience = time.monotonic() + patience_s
        self._drawing = False
        self._thread.join(patience_s + 30)
        return not self.truth.unknown

    def stop(self) -> None:
        """End at once."""
        self._drawing, self._patience = False, 0.0
        if self._thread.is_alive():
            self._thread.join(20)

    async def _run(self) -> None:
        async with aiohttp.ClientSession(self._api, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
            others = [asyncio.create_task(self._look(session)), asyncio.create_task(self._change_catalogue(session))]
            await self._draw(session)
            while self._under_way and time.monotonic() < self._patience + INLET_TIMEOUT_S:
                await asyncio.wait(set(self._under_way), timeout=1.0)
            for task in [*others, *self._under_way]:
                task.cancel()
            await asyncio.gather(*others, *self._under_way, return_exceptions=True)
            for message in self._open.values():
                self.truth.unknown.update((event["user_id"], event["type"]) for event in message)
        if self._log is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._log.stop(), 3)

    async def _draw(self, session: aiohttp.ClientSession) -> None:
        draw, due = self.stream.random, time.monotonic()
        while self._drawing:
            size = draw.choice((1, 1, 1, 1, 1, 1, 2, 3, 5, 8, 30))
            message = [event for _ in range(size) for event in self.stream.visit()]
            self.published += len(message)
            self._open[message[0]["event_id"]] = message
            task = asyncio.create_task(self._deliver(session, message))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
            due = max(due + len(message) / self._rate, time.monotonic() - 1.0)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            while self._messages >= WAITING and self._drawing:
                await asyncio.sleep(0.05)

    async def _deliver(self, session: aiohttp.ClientSession, message: list[Event]) -> None:
        """Send until accepted, count it, perhaps send it once more."""
        draw, pause = self.stream.random, 0.1
        http = draw.random() < 0.65
        self._messages += 1
        try:
            while not await self._attempt(session, message, http=http):
                if time.monotonic() > self._patience:
                    return
                self.sent_again += len(message)
                await asyncio.sleep(pause * draw.uniform(0.5, 1.5))
                pause = min(2 * pause, 1.5)
        finally:
            self._messages -= 1
        self._count(message)
        if draw.random() < REPEATS:
            await asyncio.sleep(draw.uniform(0.1, 8.0))
            if time.monotonic() < self._patience:
                self.sent_again += len(message)
                await self._attempt(session, message, http=draw.random() < 0.5)

    def _count(self, message: list[Event]) -> None:
        self.accepted += len(message)
        del self._open[message[0]["event_id"]]
        for event in message:
            self.truth.counts[event["user_id"], event["type"]] += 1
            if event["type"] != "view" and (pair := (event["user_id"], event["item_id"])) not in self._met:
                self._met.add(pair)
                self.truth.met[event["item_id"]] += 1

    async def _attempt(self, session: aiohttp.ClientSession, message: list[Event], *, http: bool) -> bool:
        self.requests += 1
        try:
            return await (self._post(session, message) if http else self._produce(message))
        except Exception as error:  # whatever a client's library raises: real clients send again (told by `problems`)
            self.problems[type(error).__name__] += 1
            return False
        except asyncio.CancelledError:  # not ours, but of a producer that another message found broken
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self.problems["CancelledError"] += 1
            return False

    async def _post(self, session: aiohttp.ClientSession, message: list[Event]) -> bool:
        hurry = self.stream.random.random() < LOST_ANSWERS
        limit = aiohttp.ClientTimeout(total=0.004 if hurry else TIMEOUT_S)
        began = time.monotonic()
        async with session.post("/v1/events", json=message, timeout=limit) as response:
            body = await response.read()
            if response.status in (429, 503):
                self.problems[str(response.status)] += 1
                await asyncio.sleep(min(2.0, float(response.headers.get("Retry-After", 1))))
                return False
            if response.status != 202:
                raise aiohttp.ClientError(f"{response.status}: {body[:200]!r}")
        answer = json.loads(body)
        if answer["accepted"] != len(message):
            raise aiohttp.ClientError(f"accepted {answer['accepted']} of {len(message)}")
        offsets = decode_token(answer["token"]).events
        self.landed.append(Landed(began, offsets))
        for partition, offset in offsets.items():
            self.highest[partition] = max(offset, self.highest.get(partition, -1))
        return True

    async def _produce(self, message: list[Event]) -> bool:
        """Append to the inlets; a client whose producer failed makes a new one."""
        topics = self._topics
        by_inlet: dict[str, list[Record]] = {}
        for event in message:
            user = event["user_id"]
            record = (partition_of(user, topics.partitions), user.encode(), json.dumps(event).encode())
            by_inlet.setdefault(topics.inlet(event["type"] + "s"), []).append(record)
        log = await self._connected()
        try:
            async with asyncio.timeout(INLET_TIMEOUT_S):
                for inlet, records in by_inlet.items():
                    await log.append(inlet, records)
        except (LogError, OSError, TimeoutError):
            if self._log is log:
                self._log = None
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(log.stop(), 2)
            raise
        return True

    async def _connected(self) -> Log:
        if self._log is None:
            log = Log(self._kafka)
            async with asyncio.timeout(INLET_TIMEOUT_S):
                await log.start()
            if self._log is None:
                self._log = log
            else:
                await log.stop()
        return self._log

    async def _look(self, session: aiohttp.ClientSession) -> None:
        """Ask for slates; some of the next visits come of them."""
        while self._drawing:
            await asyncio.sleep(self.stream.random.expovariate(LOOKUPS_PER_S))
            user = f"u{self.stream.random.randrange(USERS)}"
            try:
                async with session.get(f"/v1/recommendations/{user}") as response:
                    found = json.loads(await response.read())
                    self.lookups["degraded" if found.get("degraded") else str(response.status)] += 1
                    if response.status == 200 and found["items"]:
                        shown = [item["item_id"] for item in found["items"]]
                        self.stream.slates[user] = (found["slate_id"], shown)
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
                self.lookups["failed"] += 1

    async def _change_catalogue(self, session: aiohttp.ClientSession) -> None:
        """Store catalogue entries; the last one of an item is the truth, whatever became of the others."""
        while self._drawing:
            await asyncio.sleep(self.stream.random.expovariate(CATALOGUE_PER_S))
            item = f"i{self.stream.random.randrange(ITEMS)}"
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with session.put(f"/v1/items/{item}", json={"title": f"title {time.time():.3f}"}) as response:
                    self.catalogue += response.status == 202
