"""The load generator of `freshet bench`: a process of its own, so that its cost is not taken from what it measures.

    python -m infra.proving.load lookup    --api URL --seconds 60 --rate 200 --events 200
    python -m infra.proving.load freshness --api URL --kafka HOST:PORT --topic NAME --seconds 40
    python -m infra.proving.load overload  --api URL --seconds 60 --rate 50 --events 75000
    python -m infra.proving.load consume   --kafka HOST:PORT --topic NAME --partitions 8

Open loop: arrivals follow a Poisson schedule drawn beforehand, whatever the answers do, and every latency counts from
the *scheduled* arrival, so that a server that stalls cannot slow its own load down and look well. A generator that is
itself behind shows in `late_p99_ms`. Prints one JSON object. Knows the API and a topic from outside only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import numpy as np
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from numpy.typing import NDArray

from streaming.kafka.address import client_options

F64 = NDArray[np.float64]

WINDOW_S: Final = 10.0
"""Measured load runs in windows of about this length; the floor has half a window after each, s."""
TIMEOUT_S: Final = 10.0
CONNECTIONS: Final = 256
FRESH_SAMPLES_PER_S: Final = 10.0
DELETES_PER_S: Final = 0.5
GONE_WITHIN_S: Final = 5.0
FLOOD_LIST: Final = 500
"""Events of one request of the flood."""
FLOOD_BODIES: Final = 40
AROUND_S: Final = 20.0
"""Length of the load before and after the flood, s."""
_JSON: Final = {"Content-Type": "application/json"}


# -- arithmetic -------------------------------------------------------------------------------------------------------


def arrivals(rate: float, seconds: float, rng: np.random.Generator) -> F64:
    """Return the arrival times f64[n] (s, ascending, below `seconds`) of a Poisson process of `rate` per second."""
    if rate <= 0 or seconds <= 0:
        return np.empty(0)
    expected = rate * seconds
    gaps = rng.exponential(1.0 / rate, int(expected + 10 * math.sqrt(expected) + 10))
    times = np.cumsum(gaps)
    return times[times < seconds]


def windows(seconds: float) -> tuple[float, float]:
    """Return the lengths (measured, floor) of the alternating windows that make up `seconds` of measured load, s."""
    length = seconds / max(1, round(seconds / WINDOW_S))
    return length, length / 2


def placed(times: F64, on: float, off: float, first: float) -> F64:
    """Spread times over windows of `on` seconds that begin at `first` and lie `off` seconds apart."""
    return np.asarray(first + times + np.floor(times / on) * off)


def percentiles(values_ms: Sequence[float] | F64) -> dict[str, float | None]:
    """Return p50, p95, p99 and max of times in ms by nearest rank: each is a value that occurred; None of nothing."""
    ordered = np.sort(np.asarray(values_ms, np.float64))
    ranks = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99, "max_ms": 1.0}
    if not len(ordered):
        return dict.fromkeys(ranks)
    return {name: round(float(ordered[max(0, math.ceil(len(ordered) * q) - 1)]), 3) for name, q in ranks.items()}


# -- open loop --------------------------------------------------------------------------------------------------------

Send = Callable[[float], Awaitable[str]]
"""Does one request, given the clock time it was due at; returns "" or what went wrong."""


@dataclass(slots=True)
class Record:
    """What became of the requests of one kind: latency from the scheduled arrival, lateness of the generator, ms."""

    latency_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def figures(self, seconds: float) -> dict[str, Any]:
        """Return percentiles, counts and errors; failed requests count with the time they took."""
        return {
            **percentiles(self.latency_ms), "sent": len(self.latency_ms),
            "per_s": round(len(self.latency_ms) / seconds, 1) if seconds else 0.0,
            "errors": sum(self.errors.values()), "problems": dict(self.errors.most_common(5)),
            "late_p50_ms": percentiles(self.late_ms)["p50_ms"], "late_p99_ms": percentiles(self.late_ms)["p99_ms"],
        }  # fmt: skip


async def open_loop(schedules: Mapping[str, F64], sends: Mapping[str, Send]) -> dict[str, Record]:
    """Send each kind at its scheduled times (s from now), never waiting for answers; return what became of each.

    A thread paces it: its sleeps are true to about 0.1 ms, those of an event loop to a whole one.
    """
    names = [name for name, times in schedules.items() for _ in times]
    times = np.concatenate([np.empty(0), *schedules.values()])
    order = np.argsort(times, kind="stable").tolist()
    records = {name: Record() for name in schedules}
    loop, running, done = asyncio.get_running_loop(), set[asyncio.Task[None]](), asyncio.Event()
    began = time.perf_counter() + 0.05

    async def one(name: str, due: float) -> None:
        record = records[name]
        record.late_ms.append(1000 * (time.perf_counter() - due))
        try:
            problem = await sends[name](due)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            problem = f"{type(error).__name__}: {error}"[:120]
        record.latency_ms.append(1000 * (time.perf_counter() - due))
        if problem:
            record.errors[problem] += 1

    def fire(name: str, due: float) -> None:
        task = loop.create_task(one(name, due))
        running.add(task)
        task.add_done_callback(running.discard)

    def pace() -> None:
        for k in order:
            due = began + float(times[k])
            if (pause := due - time.perf_counter()) > 0:
                time.sleep(pause)
            loop.call_soon_threadsafe(fire, names[k], due)
        loop.call_soon_threadsafe(done.set)

    threading.Thread(target=pace, name="pace", daemon=True).start()
    await done.wait()
    while running:
        await asyncio.wait(set(running))
    return records


# -- what is sent -----------------------------------------------------------------------------------------------------


class Visitors:
    """Requests of many users to one API: clicks on Zipf-1 items by users drawn evenly, lookups, liveness."""

    def __init__(self, session: aiohttp.ClientSession, *, users: int, items: int, seed: int) -> None:
        self.session, self.rng = session, np.random.default_rng(seed)
        self.users, self.items = users, items
        self.shares = np.cumsum(1.0 / np.arange(1, items + 1))
        self.shares /= self.shares[-1]
        self.waited_ms: list[float] = []
        self.applied_ms: list[float] = []
        self.deleted_ms: list[float] = []
        self._count = 0

    def _user(self) -> str:
        return f"user-{self.rng.integers(self.users)}"

    def _click(self, user: str) -> bytes:
        item = int(np.searchsorted(self.shares, self.rng.random()))
        self._count += 1
        event = {"type": "click", "user_id": user, "item_id": f"item-{item}", "ts": time.time(), "surface": "home",
                 "event_id": f"{self.rng.integers(2**63):016x}{self._count:08x}"}  # fmt: skip
        return json.dumps(event).encode()

    async def live(self, due: float) -> str:
        """GET /health/live: the floor, an answer that does nothing."""
        return (await self._get("/health/live"))[0]

    async def lookup(self, due: float) -> str:
        """GET a slate."""
        return (await self._get(f"/v1/recommendations/{self._user()}"))[0]

    async def event(self, due: float) -> str:
        """POST one click."""
        return (await self._post(self._click(self._user())))[0]

    async def sample(self, due: float) -> str:
        """POST a click; time the lookup that waits until it is applied, less the same lookup without waiting."""
        user = self._user()
        problem, body = await self._post(self._click(user))
        if problem:
            return problem
        path, began = f"/v1/recommendations/{user}", time.perf_counter()
        problem, answer = await self._get(f"{path}?wait_ms=2000&after={json.loads(body)['token']}")
        waited = time.perf_counter() - began
        if problem or not json.loads(answer).get("applied"):
            return problem or "not applied within 2 s"
        began = time.perf_counter()
        problem, _ = await self._get(path)
        self.waited_ms.append(1000 * waited)
        self.applied_ms.append(1000 * (waited - (time.perf_counter() - began)))
        return problem

    async def delete(self, due: float) -> str:
        """DELETE the first item of a slate; time from the acknowledgement to the first slate without it."""
        path = f"/v1/recommendations/{self._user()}?policy=greedy&track=false"
        problem, answer = await self._get(path)
        if problem or not (served := json.loads(answer)["items"]):
            return problem or "empty slate"
        item = served[0]["item_id"]
        async with self.session.delete(f"/v1/items/{item}") as response:
            if response.status != 202:
                return f"DELETE answered {response.status}"
        began = time.perf_counter()
        while time.perf_counter() - began < GONE_WITHIN_S:
            problem, answer = await self._get(path)
            if problem:
                return problem
            if item not in {entry["item_id"] for entry in json.loads(answer)["items"]}:
                self.deleted_ms.append(1000 * (time.perf_counter() - began))
                return ""
            await asyncio.sleep(0.002)
        return f"still there after {GONE_WITHIN_S:g} s"

    async def _get(self, path: str) -> tuple[str, bytes]:
        async with self.session.get(path) as response:
            body = await response.read()
            return "" if response.status == 200 else f"GET answered {response.status}", body

    async def _post(self, body: bytes) -> tuple[str, bytes]:
        async with self.session.post("/v1/events", data=body, headers=_JSON) as response:
            answer = await response.read()
            return "" if response.status == 202 else f"POST answered {response.status}", answer


def _session(api: str) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    return aiohttp.ClientSession(api, connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S))


async def lookup(options: argparse.Namespace) -> dict[str, Any]:
    """Lookups and, in windows between them, liveness requests at the same rate, both beside the same events."""
    on, off = windows(options.seconds)
    rng = np.random.default_rng(options.seed)
    total = options.seconds * 1.5
    schedules = {
        "lookup": placed(arrivals(options.rate, options.seconds, rng), on, off, 0.0),
        "live": placed(arrivals(options.rate, options.seconds / 2, rng), off, on, on),
        "event": arrivals(options.events, total, rng),
    }
    async with _session(options.api) as session:
        visitors = Visitors(session, users=options.users, items=options.items, seed=options.seed)
        records = await open_loop(
            schedules, {"lookup": visitors.lookup, "live": visitors.live, "event": visitors.event}
        )
    return {
        **records["lookup"].figures(options.seconds), "floor": records["live"].figures(options.seconds / 2),
        "events": records["event"].figures(total),
    }  # fmt: skip


async def freshness(options: argparse.Namespace) -> dict[str, Any]:
    """Paired waits for applied clicks and deletions beside a light load, and a bare record through Kafka as floor."""
    rng, seconds = np.random.default_rng(options.seed), options.seconds
    rates = {"lookup": options.rate, "event": options.events, "sample": FRESH_SAMPLES_PER_S, "delete": DELETES_PER_S,
             "echo": FRESH_SAMPLES_PER_S}  # fmt: skip
    async with _session(options.api) as session, Echo(options.kafka, options.topic) as echo:
        visitors = Visitors(session, users=options.users, items=options.items, seed=options.seed)
        sends: dict[str, Send] = {
            "lookup": visitors.lookup, "event": visitors.event, "sample": visitors.sample, "delete": visitors.delete,
            "echo": echo.send,
        }  # fmt: skip
        records = await open_loop({name: arrivals(rate, seconds, rng) for name, rate in rates.items()}, sends)
    return {
        **fresh_figures(visitors.applied_ms, visitors.deleted_ms),
        "floor": fresh_figures(echo.took_ms, echo.took_ms),
        "samples": len(visitors.applied_ms), "deletes": len(visitors.deleted_ms),
        "with_lookup": percentiles(visitors.waited_ms),
        "errors": sum(sum(record.errors.values()) for record in records.values()),
        "problems": {name: dict(r.errors.most_common(3)) for name, r in records.items() if r.errors},
        "late_p99_ms": percentiles([late for r in records.values() for late in r.late_ms])["p99_ms"],
    }  # fmt: skip


def fresh_figures(applied_ms: Sequence[float], deleted_ms: Sequence[float]) -> dict[str, float | None]:
    """Return the keys that freshness and its floor share; `item_delete_ms` is the median."""
    applied, deleted = percentiles(applied_ms), percentiles(deleted_ms)
    return {
        "applied_p50_ms": applied["p50_ms"], "applied_p99_ms": applied["p99_ms"], "applied_max_ms": applied["max_ms"],
        "item_delete_ms": deleted["p50_ms"], "item_delete_max_ms": deleted["max_ms"],
    }  # fmt: skip


# -- too much ---------------------------------------------------------------------------------------------------------


class Flood:
    """Lists of clicks to one API, faster than it can take them; a list that is refused is given up, not sent again.

    Bodies are made beforehand and get fresh ids and times by replacing text of the same length.
    """

    def __init__(self, session: aiohttp.ClientSession, *, users: int, items: int, seed: int) -> None:
        self.session, self.sent, self.accepted = session, 0, 0
        self.statuses: Counter[str] = Counter()
        self.retry_after: Counter[str] = Counter()
        rng = np.random.default_rng(seed)
        shares = np.cumsum(1.0 / np.arange(1, items + 1))
        self._bodies = []
        for _ in range(FLOOD_BODIES):
            rows = np.minimum(np.searchsorted(shares / shares[-1], rng.random(FLOOD_LIST)), items - 1).tolist()
            whose = rng.integers(users, size=FLOOD_LIST).tolist()
            clicks = [
                {"type": "click", "user_id": f"user-{user}", "item_id": f"item-{item}", "ts": 1111111111.125,
                 "surface": "home", "event_id": f"@@@@@@@@@@@@{k:04d}"}
                for k, (user, item) in enumerate(zip(whose, rows, strict=True))
            ]  # fmt: skip
            self._bodies.append(json.dumps(clicks).encode())

    async def post(self, due: float) -> str:
        """POST one list."""
        body = self._bodies[self.sent % FLOOD_BODIES]
        self.sent += 1
        body = body.replace(b"@@@@@@@@@@@@", b"%012d" % self.sent).replace(b"1111111111.125", b"%.3f" % time.time())
        try:
            async with self.session.post("/v1/events", data=body, headers=_JSON) as response:
                answer = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self.statuses[type(error).__name__] += 1
            raise
        self.statuses[str(response.status)] += 1
        if response.status == 202:
            self.accepted += int(json.loads(answer)["accepted"])
        elif response.status == 429:
            self.retry_after[response.headers.get("Retry-After", "none")] += 1
        return "" if response.status in (202, 429) else f"POST answered {response.status}"


async def overload(options: argparse.Namespace) -> dict[str, Any]:
    """Lookups at one rate before, during and after a flood of events, from one core: this process is pinned to it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rng, around = np.random.default_rng(options.seed), min(options.seconds, AROUND_S)
    found: dict[str, Any] = {}
    async with _session(options.api) as session, _session(options.api) as flooding:
        visitors = Visitors(session, users=options.users, items=options.items, seed=options.seed)
        flood = Flood(flooding, users=options.users, items=options.items, seed=options.seed)
        for part, seconds in (("before", around), ("during", options.seconds), ("after", around)):
            schedules = {"lookup": arrivals(options.rate, seconds, rng)}
            if part == "during":
                schedules["flood"] = arrivals(options.events / FLOOD_LIST, seconds, rng)
            print(json.dumps({"part": part, "at": time.time()}), flush=True)
            records = await open_loop(schedules, {"lookup": visitors.lookup, "flood": flood.post})
            found[part] = records["lookup"].figures(seconds)
            if part == "during":
                found["posts"] = records["flood"].figures(seconds)
    offered = flood.sent * FLOOD_LIST
    return {
        **found, "offered": offered, "accepted": flood.accepted, "shed": flood.statuses["429"] * FLOOD_LIST,
        "failed": offered - flood.accepted - flood.statuses["429"] * FLOOD_LIST,
        "offered_per_s": round(offered / options.seconds), "accepted_per_s": round(flood.accepted / options.seconds),
        "statuses": dict(flood.statuses), "retry_after_s": dict(sorted(flood.retry_after.items())),
        "list": FLOOD_LIST,
    }  # fmt: skip


# -- Kafka alone ------------------------------------------------------------------------------------------------------


class Echo:
    """Bare produce-to-consume: a record to a topic of its own and back, acks=all, nothing done with it."""

    def __init__(self, kafka: str, topic: str) -> None:
        self._kafka, self._topic = kafka, topic
        self.took_ms: list[float] = []
        self._sent: dict[bytes, float] = {}

    async def __aenter__(self) -> Echo:
        admin = AIOKafkaAdminClient(**client_options(self._kafka))
        await admin.start()
        await admin.create_topics([NewTopic(self._topic, 1, 1)])
        await admin.close()
        self._producer = AIOKafkaProducer(**client_options(self._kafka), acks="all", enable_idempotence=True)
        self._consumer = AIOKafkaConsumer(**client_options(self._kafka), auto_offset_reset="earliest")
        await self._producer.start()
        await self._consumer.start()
        self._consumer.assign([TopicPartition(self._topic, 0)])
        await self._producer.send_and_wait(self._topic, b"first", partition=0)
        await self._consumer.getone()
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._producer.stop()
        await self._consumer.stop()

    async def send(self, due: float) -> str:
        """Append one record."""
        value = f"{due:.9f}".encode()
        self._sent[value] = time.perf_counter()
        await self._producer.send_and_wait(self._topic, value, partition=0)
        return ""

    async def _read(self) -> None:
        async for record in self._consumer:
            self.took_ms.append(1000 * (time.perf_counter() - self._sent.pop(record.value)))


async def consume(options: argparse.Namespace) -> dict[str, Any]:
    """Read a whole topic and do nothing with it; the clock starts at the first batch, which does not count."""
    places = [TopicPartition(options.topic, p) for p in range(options.partitions)]
    consumer = AIOKafkaConsumer(**client_options(options.kafka), auto_offset_reset="earliest")
    await consumer.start()
    try:
        ends = await consumer.end_offsets(places)
        consumer.assign(places)
        for place in places:
            consumer.seek(place, 0)
        left, began, counted = sum(ends.values()), 0.0, 0
        while left > 0:
            for records in (await consumer.getmany(timeout_ms=1000)).values():
                left -= len(records)
                counted += len(records) if began else 0
            began = began or time.perf_counter()
        seconds = time.perf_counter() - began
    finally:
        await consumer.stop()
    return {"events": sum(ends.values()), "events_per_s": round(counted / max(seconds, 1e-9)), "seconds": seconds}


# -- the process ------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the options of this process."""
    made = argparse.ArgumentParser("python -m infra.proving.load", description="Load generator of `freshet bench`.")
    made.add_argument("what", choices=("lookup", "freshness", "overload", "consume"))
    for name in ("api", "kafka", "topic"):
        made.add_argument(f"--{name}", default="")
    for name, number in (("seconds", 60.0), ("rate", 200.0), ("events", 200.0)):
        made.add_argument(f"--{name}", type=float, default=number)
    for name, whole in (("users", 10_000), ("items", 10_000), ("seed", 1), ("partitions", 8)):
        made.add_argument(f"--{name}", type=int, default=whole)
    return made


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Do what was asked; the answer says what this process itself cost."""
    began, cpu = time.perf_counter(), time.process_time()
    kinds = {"lookup": lookup, "freshness": freshness, "overload": overload, "consume": consume}
    found = await kinds[options.what](options)
    found["generator_cpu_s"] = round(time.process_time() - cpu, 2)
    found["generator_cpu_share"] = round((time.process_time() - cpu) / (time.perf_counter() - began), 3)
    return found


if __name__ == "__main__":
    json.dump(uvloop.run(run(parser().parse_args())), sys.stdout)
