"""What `freshet bench` measures, on a private stack in a folder that is deleted afterwards: ingest, lookup, freshness.

Each figure stands beside a floor measured in the same run by the simplest thing that could do the same: a consumer that
reads the backlog and drops it, a route that answers nothing, a bare record through Kafka. So a slow or busy machine
shows in both. Composition only: the load comes from `infra.proving.load` in a process of its own, and nothing here
knows how events are folded or slates found.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import psutil

from infra.process import Process, free_port
from infra.settings import Settings
from infra.stack import Stack, make_topics
from streaming.events import Click, encode
from streaming.state import ItemStore, ModelStore, RedisUserStore, connect, live_keys
from streaming.topics import Log, Record, Topics, end_offsets, partition_of

if TYPE_CHECKING:
    from rich.console import Console

WHAT: Final = ("ingest", "lookup", "freshness")
ITEMS: Final = 10_000
USERS: Final = 10_000
BACKLOG: Final = 200_000
WARM_EVENTS: Final = 60_000
RATE: Final = 200.0
"""Lookups and events per second of the lookup bench."""
LIGHT: Final = 50.0
"""The same of the freshness bench."""
POLL_S: Final = 0.05
STALLED_S: Final = 60.0
APPEND: Final = 5000
TARGETS: Final[dict[str, tuple[str, float]]] = {
    "ingest.events_per_s": (">=", 20_000),
    "lookup.p99_ms": ("<=", 15),
    "freshness.applied_p50_ms": ("<=", 20),
    "freshness.applied_p99_ms": ("<=", 100),
    "freshness.item_delete_max_ms": ("<=", 1000),
}
"""What two cores with 10k items and 10k users should reach."""
LABELS: Final = {
    "ingest.events_per_s": "events/s until profiles and item rows are committed",
    "ingest.profiles_per_s": "events/s until profiles are committed",
    "lookup.p50_ms": "lookup, median",
    "lookup.p95_ms": "lookup, 95 %",
    "lookup.p99_ms": "lookup, 99 %",
    "lookup.max_ms": "lookup, slowest",
    "freshness.applied_p50_ms": "accepted to applied, median",
    "freshness.applied_p99_ms": "accepted to applied, 99 %",
    "freshness.applied_max_ms": "accepted to applied, slowest",
    "freshness.item_delete_ms": "deletion to gone from slates, median",
    "freshness.item_delete_max_ms": "deletion to gone from slates, slowest",
}
FLOORS: Final = {
    "ingest": "a plain aiokafka consumer reads the same backlog",
    "lookup": "GET /health/live at the same rate beside the same events",
    "freshness": "a bare record produced and consumed with aiokafka",
}
Advance = Callable[[str, float, float], None]
"""Progress: (what, done, of how much)."""


class BenchError(RuntimeError):
    """A measurement could not be made; the message says what happened and where to look."""


def run_bench(
    what: Sequence[str], *, seconds: float = 60.0, backlog: int = BACKLOG, advance: Advance = lambda *_: None
) -> dict[str, Any]:
    """Measure each of `what` and return {name: figures with `floor` and `cpu`}, with the machine they come from.

    Raises BenchError, StackError and what explains itself of Kafka and Redis.
    """
    report: dict[str, Any] = {"machine": {"cores": os.cpu_count(), "load_before": load_now()}}
    if "ingest" in what:
        report["ingest"] = _ingest(backlog, advance)
    if {"lookup", "freshness"} & set(what):
        with private_stack() as stack:
            asyncio.run(warm_up(stack, advance))
            load_process(stack, ["lookup", *_rates(3.0, RATE)], 4.5, "warming up", advance)
            if "lookup" in what:
                report["lookup"] = _lookup(stack, seconds, advance)
            if "freshness" in what:
                report["freshness"] = _freshness(stack, max(10.0, seconds * 2 / 3), advance)
    report["machine"]["load_after"] = load_now()
    return report


def load_now() -> float:
    """Return the machine's load of the last minute."""
    return round(os.getloadavg()[0], 2)


@contextlib.contextmanager
def private_stack(*processes: str) -> Iterator[Stack]:
    """Yield a private stack that is ready, of all processes or of some, in a folder that is deleted."""
    with tempfile.TemporaryDirectory(prefix="freshet-bench-", ignore_cleanup_errors=True) as folder:
        settings = Settings.load(
            folder, running=False, namespace=f"bench-{uuid.uuid4().hex[:8]}", host="127.0.0.1", port=free_port(),
            admin_key="", workers=1, consumer="chunks",
        )  # fmt: skip
        with Stack(settings, **({"processes": processes} if processes else {})) as stack:  # type: ignore[arg-type]
            if "api" in stack.children:
                _must_be_ours(stack)
            yield stack


def _must_be_ours(stack: Stack) -> None:
    """Raise BenchError where another API answers at our address: two stacks that start at once may take one port."""
    with urllib.request.urlopen(f"{stack.api}/-/settings", timeout=5) as answer:
        told = {row["name"]: row["value"] for row in json.load(answer)}
    if told["namespace"] != stack.settings.namespace:
        raise BenchError(f"{stack.api} is the API of namespace {told['namespace']}, not of this bench: start again")


# -- ingest -----------------------------------------------------------------------------------------------------------


def _ingest(backlog: int, advance: Advance) -> dict[str, Any]:
    """Drain a backlog with a user worker and an item agent that start on it, then with a bare consumer."""
    with private_stack("kafka", "redis") as servers:
        _drain(servers, "warming up", 2000, advance)  # compiles kernels where no cache holds them
        found = _drain(servers, "ingest", backlog, advance)
        floor = load_process(
            servers, ["consume", "--kafka", servers.kafka, "--topic", found.pop("topic")], 5.0, "bare consumer", advance
        )
        found["floor"] = {"events_per_s": floor["events_per_s"], "profiles_per_s": floor["events_per_s"]}
    return found


def _drain(servers: Stack, name: str, count: int, advance: Advance) -> dict[str, Any]:
    settings = Settings.load(
        servers.data / f"of-{count}", running=False, kafka=servers.kafka, redis=servers.redis, consumer="chunks",
        namespace=f"{servers.settings.namespace}-{count}", workers=1,
    )  # fmt: skip
    workers = Stack(settings, processes=("users", "items"))
    make_topics(settings)
    asyncio.run(preload(settings, count, lambda done: advance("writing the backlog", done, count)))
    with workers:
        found = asyncio.run(drained(settings, count, lambda: cpu_seconds(servers, workers), _named(advance, name)))
    return {**found, "topic": Topics(settings.namespace, settings.partitions).events}


def _named(advance: Advance, name: str) -> Callable[[float, float], None]:
    return lambda done, total: advance(name, done, total)


def clicks(count: int, partitions: int, *, seed: int = 1, now: float) -> Iterator[Record]:
    """Yield records of `events`: clicks a millisecond apart that end at `now`, users drawn evenly, items by Zipf 1.

    The first ITEMS of them name every item and every user once.
    """
    rng = np.random.default_rng(seed)
    shares = np.cumsum(1.0 / np.arange(1, ITEMS + 1))
    items = np.minimum(np.searchsorted(shares / shares[-1], rng.random(count)), ITEMS - 1)
    users = rng.integers(USERS, size=count)
    once = min(count, ITEMS)
    items[:once], users[:once] = rng.permutation(ITEMS)[:once], rng.permutation(USERS)[:once]
    for k, (user, item) in enumerate(zip(users.tolist(), items.tolist(), strict=True)):
        click = Click(
            user_id=f"user-{user}", item_id=f"item-{item}", ts=now - (count - k) / 1000, surface="home",
            event_id=f"{seed:08x}{k:024x}", position=k % 10,
        )  # fmt: skip
        yield partition_of(click.user_id, partitions), click.user_id.encode(), encode(click)


async def preload(settings: Settings, count: int, advance: Callable[[int], None]) -> None:
    """Append `count` clicks to the log."""
    topic, log = Topics(settings.namespace, settings.partitions).events, Log(settings.kafka)
    await log.start()
    try:
        records = list(clicks(count, settings.partitions, now=time.time()))
        for at in range(0, count, APPEND):
            await log.append(topic, records[at : at + APPEND])
            advance(min(count, at + APPEND))
    finally:
        await log.stop()


async def drained(
    settings: Settings, count: int, cpu: Callable[[], dict[str, float]], advance: Callable[[float, float], None]
) -> dict[str, Any]:
    """Watch Redis until `count` events are in profiles and in item rows; rates from the first sample that shows some.

    Raises BenchError where nothing moves for a minute.
    """
    client = connect(settings.redis)
    try:
        keys = await live_keys(client, settings.namespace)
        users, items = RedisUserStore(client, keys), ItemStore(client, keys)
        first: tuple[float, int] | None = None
        before, profiles_at, best, moved = cpu(), 0.0, -1, time.perf_counter()
        while True:
            reads = await users.read({p: [] for p in range(settings.partitions)})
            applied = sum(read.applied for read in reads.values())
            rows = sum(json.loads((await items.head()).get("marks", b"{}")).values())
            now = time.perf_counter()
            if first is None and applied:
                first, before = (now, applied), cpu()
            profiles_at = profiles_at or (now if applied >= count else 0.0)
            if rows >= count and first is not None:
                return _rates_of(count - first[1], now - first[0], profiles_at - first[0], before, cpu())
            if applied + rows > best:
                best, moved = applied + rows, now
                advance(rows, count)
            if now - moved > STALLED_S:
                raise BenchError(f"stalled at {applied:,} profiles' and {rows:,} rows' events of {count:,}")
            await asyncio.sleep(POLL_S)
    finally:
        await client.aclose()


def _rates_of(
    events: int, seconds: float, profile_seconds: float, before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, Any]:
    spent = {name: round(after[name] - before.get(name, 0.0), 2) for name in after}
    return {
        "events_per_s": round(events / max(seconds, 1e-9)),
        "profiles_per_s": round(events / max(profile_seconds, 1e-9)),
        "events": events, "seconds": round(seconds, 2), "cpu_s": spent,
        "cpu_us_per_event": {name: round(1e6 * s / max(events, 1), 1) for name, s in spent.items()},
    }  # fmt: skip


def cpu_seconds(*stacks: Stack) -> dict[str, float]:
    """Return the CPU time (user and system, s) that each living process of these stacks has used."""
    found = {}
    for stack in stacks:
        for name, pid in stack.pids().items():
            with contextlib.suppress(psutil.Error):
                times = psutil.Process(pid).cpu_times()
                found[name] = times.user + times.system
    return found


# -- lookup and freshness ---------------------------------------------------------------------------------------------


async def warm_up(stack: Stack, advance: Advance) -> None:
    """Let the stack learn clicks on every item by every user, up to the learner."""
    settings = stack.settings
    await preload(settings, WARM_EVENTS, lambda done: advance("warming up", done, WARM_EVENTS))
    await drained(settings, WARM_EVENTS, dict, _named(advance, "warming up"))
    client = connect(settings.redis)
    try:
        learnt = ModelStore(client, await live_keys(client, settings.namespace))
        topic, until = Topics(settings.namespace).examples, time.monotonic() + 2 * STALLED_S
        (end,) = (await end_offsets(settings.kafka, {topic: 1}))[topic]
        while (at := int((await learnt.head()).get("next", 0))) < end:
            advance("warming up: learner", at, end)
            if time.monotonic() > until:
                raise BenchError(f"the learner is at {at} of {end} entries after {2 * STALLED_S:.0f} s")
            await asyncio.sleep(0.1)
    finally:
        await client.aclose()


def _rates(seconds: float, rate: float) -> list[str]:
    return ["--seconds", str(seconds), "--rate", str(rate), "--events", str(rate)]


def _lookup(stack: Stack, seconds: float, advance: Advance) -> dict[str, Any]:
    return _measured(stack, ["lookup", *_rates(seconds, RATE)], 1.5 * seconds, "lookup", advance)


def _freshness(stack: Stack, seconds: float, advance: Advance) -> dict[str, Any]:
    topic = f"{stack.settings.namespace}.echo"
    words = ["freshness", *_rates(seconds, LIGHT), "--kafka", stack.kafka, "--topic", topic]
    return _measured(stack, words, seconds, "freshness", advance)


def _measured(stack: Stack, words: list[str], seconds: float, name: str, advance: Advance) -> dict[str, Any]:
    """Run the load and add the share of a core that each process used meanwhile."""
    before, began = cpu_seconds(stack), time.perf_counter()
    found = load_process(stack, words, seconds, name, advance)
    after, took = cpu_seconds(stack), time.perf_counter() - began
    shares = {name: round((after[name] - before.get(name, 0.0)) / took, 3) for name in after}
    found["cpu_share"] = {**shares, "generator": found.pop("generator_cpu_share")}
    return found


def load_process(stack: Stack, words: list[str], seconds: float, name: str, advance: Advance) -> dict[str, Any]:
    """Run the load generator against a stack and return what it found; raises BenchError with its last words."""
    path = stack.data / "logs" / f"load-{uuid.uuid4().hex[:8]}.log"
    sizes = ["--users", str(USERS), "--items", str(ITEMS), "--partitions", str(stack.settings.partitions)]
    command = [sys.executable, "-P", "-m", "infra.proving.load", *words, "--api", stack.api, *sizes]
    process, began = Process("load", command, log=path), time.monotonic()
    process.start()
    try:
        while not process.wait(0.25):
            advance(name, min(time.monotonic() - began, seconds), seconds)
    finally:
        process.stop(1.0)
    return _last_line(path, process.code)


def _last_line(path: Path, code: int | None) -> dict[str, Any]:
    lines = path.read_text(errors="replace").splitlines() or [""]
    with contextlib.suppress(ValueError):
        found = json.loads(lines[-1])
        if code == 0 and isinstance(found, dict):
            return found
    raise BenchError(f"the load generator ended with code {code}; it said last:\n" + "\n".join(lines[-12:]))


# -- for people -------------------------------------------------------------------------------------------------------


def bench_for_people(what: Sequence[str], *, seconds: float, backlog: int, screen: Console) -> dict[str, Any]:
    """Measure, with a progress bar on `screen`."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>22}"), BarColumn(), TextColumn("{task.fields[rate]}"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=screen, transient=True) as bar:
        tasks: dict[str, tuple[TaskID, float]] = {}

        def advance(name: str, done: float, total: float) -> None:
            if name not in tasks:
                for task, _ in tasks.values():
                    bar.update(task, visible=False)
                tasks[name] = bar.add_task(name, total=total, rate=""), time.monotonic()
            task, began = tasks[name]
            rate = done / max(time.monotonic() - began, 1e-3)
            bar.update(task, completed=done, total=total, rate=f"{rate:,.0f}/s" if rate > 2 else "")

        bar.add_task("starting", total=None, rate="")
        return run_bench(what, seconds=seconds, backlog=backlog, advance=advance)


def verdict(key: str, value: float | None) -> str:
    """Return "yes" or "no" where `key` has a target, "" where it has none."""
    if key not in TARGETS or value is None:
        return ""
    sign, bound = TARGETS[key]
    return "yes" if (value >= bound if sign == ">=" else value <= bound) else "no"


def show(report: Mapping[str, Any], screen: Console) -> None:
    """Print each figure beside its floor and its target."""
    from rich.table import Table

    for name in (name for name in WHAT if name in report):
        figures = report[name]
        table = Table(box=None, header_style="bold", pad_edge=False, title=name, title_justify="left")
        for column in ("", "measured", "floor", "target", "reached"):
            table.add_column(column, justify="left" if not column else "right")
        for key in (key for key in LABELS if key.startswith(name + ".")):
            value, floor = (part.get(key.partition(".")[2]) for part in (figures, figures["floor"]))
            sign, bound = TARGETS.get(key, ("", 0.0))
            reached = verdict(key, value)
            colour = {"yes": "green", "no": "red", "": "white"}[reached]
            table.add_row(LABELS[key], f"[{colour}]{_number(value)}", _number(floor),
                          f"{sign} {bound:,.0f}" if sign else "", f"[{colour}]{reached}")  # fmt: skip
        screen.print(table)
        for line in _notes(name, figures):
            screen.print(f"[dim]{line}")
        screen.print()
    machine = report["machine"]
    screen.print(f"[dim]{machine['cores']} cores, load {machine['load_before']} before, {machine['load_after']} after.")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def _notes(name: str, figures: Mapping[str, Any]) -> Iterator[str]:
    yield f"floor: {FLOORS[name]}"
    if name == "ingest":
        yield "CPU, us an event: " + ", ".join(f"{n} {us:g}" for n, us in figures["cpu_us_per_event"].items())
        return
    yield "CPU, share of a core: " + ", ".join(f"{n} {share:.2f}" for n, share in figures["cpu_share"].items())
    yield f"errors: {figures['errors']}; the generator was late by {figures['late_p99_ms']} ms (99 %)"
