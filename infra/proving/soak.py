"""`freshet bench soak`: does memory stay flat while users and items come and go for as long as it runs?

A private stack with small caps (CAP users, CAP items) is given events of ever new users on ever new items through its
API, lookups with their impressions, catalogue changes and a viewer of the live page. Every few seconds the memory of
each process is read, and what Redis uses. Knows the stack from outside only.

Flat: over the second half of the run the straight line through the samples grows by less than SHARE of its level or
SLACK_MB, whichever is more, in ten minutes. Kafka's JVM takes its heap (256 MB) as it pleases: it has to stay below
BROKER_MB instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import numpy as np
import psutil

from infra.proving.bench import BenchError
from infra.settings import Settings
from infra.stack import Stack
from infra.terminal import console, show_json
from streaming.state import ItemStore, Keys, ModelStore, connect, live_keys

if TYPE_CHECKING:
    from rich.console import Console

CAP: Final = 2000
PARTITIONS: Final = 2
EVENTS_PER_S: Final = 300.0
LOOKUPS_PER_S: Final = 25.0
CHANGES_PER_S: Final = 2.0
POST: Final = 15
"""Events in one request."""
AT_ONCE: Final = 300
"""Users, and items, that are about at one time."""
LIFE: Final = 12
"""Events after which a user, or an item, is replaced by a new one, on average."""
SAMPLE_S: Final = 3.0
WARM: Final = 0.25
"""Share of the run that passes before `start` is read: caps are reached, code is compiled."""
SHARE: Final = 0.05
SLACK_MB: Final = 8.0
BROKER_MB: Final = 400.0
CATALOGUE: Final = 200
Advance = Callable[[str, float, float], None]


@dataclass(slots=True)
class Churn:
    """Users and items who stay for a while: each event may be the last of its user or its item."""

    random: random.Random = field(default_factory=lambda: random.Random(1))
    users: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)
    made: Counter[str] = field(default_factory=Counter)

    def someone(self) -> str:
        """Return a user that is about."""
        return self._one(self.users, "user")

    def event(self) -> dict[str, Any]:
        """Return the next event."""
        self.made["event"] += 1
        kind = self.random.choice(("click", "click", "click", "dwell", "action"))
        fields: dict[str, dict[str, Any]] = {"dwell": {"seconds": 40.0}, "action": {"name": "like"}}
        more = fields.get(kind, {})
        return {
            "type": kind, "user_id": self.someone(), "item_id": self._one(self.items, "item"), "ts": time.time(),
            "event_id": f"soak-{self.made['event']}", **more,
        }  # fmt: skip

    def _one(self, about: list[str], kind: str) -> str:
        place = self.random.randrange(AT_ONCE)
        if len(about) < AT_ONCE or self.random.random() < 1.0 / LIFE:
            self.made[kind] += 1
            name = f"{kind}-{self.made[kind]}-{self.random.getrandbits(40):010x}"
            if len(about) < AT_ONCE:
                about.append(name)
                return name
            about[place] = name
        return about[place]


@dataclass(slots=True)
class Soak:
    """Samples by name, MB, at the same times (s since the beginning), and what was done meanwhile."""

    seconds: float
    times: list[float] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, at: float, values: Mapping[str, float]) -> None:
        """Take one sample of everything; what is missing repeats its last value, or its first."""
        self.times.append(at)
        for name in self.samples.keys() | values.keys():
            known = self.samples.setdefault(name, [])
            known += [values.get(name, 0.0)] * (len(self.times) - 1 - len(known))
            known.append(values.get(name, known[-1] if known else 0.0))

    def report(self) -> dict[str, Any]:
        """Return start, end, slope over the second half, max and verdict of each name, MB and MB a minute."""
        parts = {name: judge(self.times, values, self.seconds) for name, values in sorted(self.samples.items())}
        if "kafka" in parts and parts["kafka"]["max_mb"] is not None:
            parts["kafka"]["flat"] = parts["kafka"]["flat"] or parts["kafka"]["max_mb"] < BROKER_MB
        return {
            "seconds": round(self.times[-1], 1) if self.times else 0.0, "flat": all(p["flat"] for p in parts.values()),
            "not_flat": [name for name, part in parts.items() if not part["flat"]], "memory": parts,
            "done": dict(self.done), "kept": dict(self.counts),
            "criterion": f"grows by less than {SHARE:.0%} of its level or {SLACK_MB:g} MB in 10 minutes, second half;"
            f" kafka stays below {BROKER_MB:g} MB",
        }  # fmt: skip


def judge(times: Sequence[float], values: Sequence[float], seconds: float) -> dict[str, Any]:
    """Return what became of one series: start after warming up, end, slope (MB a minute) over the second half."""
    t, v = np.asarray(times), np.asarray(values)
    warm, half = v[t >= WARM * seconds], t >= 0.5 * seconds
    if half.sum() < 3 or not len(warm):
        return {"start_mb": None, "end_mb": None, "max_mb": None, "slope_mb_min": None, "flat": False}
    slope = float(np.polyfit(t[half] / 60.0, v[half], 1)[0])
    level = float(v[half].mean())
    return {
        "start_mb": round(float(warm[0]), 1), "end_mb": round(float(v[-1]), 1), "max_mb": round(float(v.max()), 1),
        "slope_mb_min": round(slope, 3), "flat": 10.0 * slope < max(SHARE * level, SLACK_MB),
    }  # fmt: skip


def run_soak(seconds: float, *, data: Path | None = None, advance: Advance = lambda *_: None) -> dict[str, Any]:
    """Run the stack under churn for so long and report; raises StackError. With `data` the folder is kept."""
    with tempfile.TemporaryDirectory(prefix="freshet-soak-") as folder:
        settings = Settings.load(
            data or folder, running=False, env={}, namespace="soak", port=0, partitions=PARTITIONS, max_users=CAP,
            max_items=CAP, feed_mb=4,
        )  # fmt: skip
        stack = Stack(settings)
        advance("starting", 0, seconds)
        with stack:
            soak = asyncio.run(_run(stack, seconds, advance))
    report = soak.report()
    report["samples"] = {"t": [round(t, 1) for t in soak.times], **{k: soak.samples[k] for k in sorted(soak.samples)}}
    return report


async def _run(stack: Stack, seconds: float, advance: Advance) -> Soak:
    soak, churn, began = Soak(seconds), Churn(), time.monotonic()
    async with aiohttp.ClientSession(stack.api, timeout=aiohttp.ClientTimeout(total=10)) as session:
        tasks = [
            asyncio.create_task(work)
            for work in (
                _paced(EVENTS_PER_S / POST, lambda: _post(session, churn, soak)),
                _paced(LOOKUPS_PER_S, lambda: _look(session, churn, soak)),
                _paced(CHANGES_PER_S, lambda: _change(session, churn, soak)),
                _watch(session, soak),
            )
        ]
        try:
            while (at := time.monotonic() - began) < seconds:
                await asyncio.sleep(min(SAMPLE_S, seconds - at) if seconds - at > 0.5 else 0.5)
                at = time.monotonic() - began
                soak.add(at, await _memory(stack))
                advance("soaking", min(at, seconds), seconds)
                for task in tasks:
                    if task.done():
                        task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    soak.counts = await _kept(stack, churn)
    return soak


async def _paced(rate: float, work: Callable[[], Any]) -> None:
    """Begin a piece of work `rate` times a second; at most 64 are under way."""
    under_way: set[asyncio.Task[Any]] = set()
    following = time.monotonic()
    try:
        while True:
            following = max(following + 1.0 / rate, time.monotonic() - 1.0)
            await asyncio.sleep(max(0.0, following - time.monotonic()))
            if len(under_way) < 64:
                task = asyncio.create_task(work())
                under_way.add(task)
                task.add_done_callback(under_way.discard)
    finally:
        for task in under_way:
            task.cancel()


async def _ask(soak: Soak, what: str, call: Any) -> Any:
    """Do a request and count how it ended."""
    try:
        async with call as answer:
            body = await answer.json()
            soak.done[f"{what} {answer.status}"] += 1
            return body
    except (TimeoutError, aiohttp.ClientError, ValueError) as error:
        soak.done[f"{what} {type(error).__name__}"] += 1
        return None


async def _post(session: aiohttp.ClientSession, churn: Churn, soak: Soak) -> None:
    await _ask(soak, "events", session.post("/v1/events", json=[churn.event() for _ in range(POST)]))


async def _look(session: aiohttp.ClientSession, churn: Churn, soak: Soak) -> None:
    await _ask(soak, "lookup", session.get(f"/v1/recommendations/{churn.someone()}"))


async def _change(session: aiohttp.ClientSession, churn: Churn, soak: Soak) -> None:
    """Write or delete one of a fixed number of catalogue items: the catalogue is the operator's, and is not capped."""
    name = f"catalogue-{churn.random.randrange(CATALOGUE)}"
    if churn.random.random() < 0.2:
        await _ask(soak, "item deleted", session.delete(f"/v1/items/{name}"))
        return
    body = {"title": f"{name} {churn.random.getrandbits(32)}", "categories": [f"c{churn.random.randrange(9)}"]}
    await _ask(soak, "item written", session.put(f"/v1/items/{name}", json=body))


async def _watch(session: aiohttp.ClientSession, soak: Soak) -> None:
    """Look at the live page and the metrics as people do: come, read for some seconds, leave, come again."""
    while True:
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(15), session.get("/-/live") as answer:
                async for _ in answer.content:
                    pass
        soak.done["views"] += 1
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with session.get("/metrics") as answer:
                await answer.read()


async def _memory(stack: Stack) -> dict[str, float]:
    """Return the resident memory of each process, MB, and what Redis says it uses."""
    found: dict[str, float] = {}
    for name, pid in stack.pids().items():
        with contextlib.suppress(psutil.Error):
            found[name] = round(psutil.Process(pid).memory_info().rss / 1e6, 2)
    client = connect(stack.redis)
    try:
        found["redis, used"] = round(int((await client.info("memory"))["used_memory"]) / 1e6, 2)
    finally:
        await client.aclose()
    return found


async def _kept(stack: Stack, churn: Churn) -> dict[str, int]:
    """Return how many users and items there were, and how many are kept."""
    client = connect(stack.redis)
    try:
        keys: Keys = await live_keys(client, stack.settings.namespace)
        users = [await client.zcard(keys.active(p)) for p in range(PARTITIONS)]
        _, items = await ItemStore(client, keys).load()
        _, learnt = await ModelStore(client, keys).load()
    finally:
        await client.aclose()
    return {
        "users_made": churn.made["user"], "users_kept": sum(users), "items_made": churn.made["item"],
        "items_kept": len(items), "items_learnt": len(learnt), "events": churn.made["event"],
    }  # fmt: skip


# -- for people -------------------------------------------------------------------------------------------------------


def soak_verb(seconds: float, *, as_json: bool, picture: Path | None) -> None:
    """Run, draw and tell; exits with 1 where something is not flat."""
    report = soak_for_people(seconds, console(err=True))
    if picture is not None:
        plot(report, str(picture))
    if as_json:
        show_json(report)
    else:
        show(report, console())
    if not report["flat"]:
        raise SystemExit(1)


def soak_for_people(seconds: float, screen: Console) -> dict[str, Any]:
    """Run with a progress bar on `screen`."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>12}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("starting", total=seconds)
        return run_soak(
            seconds, advance=lambda name, done, total: bar.update(task, description=name, completed=done, total=total)
        )


def show(report: Mapping[str, Any], screen: Console) -> None:
    """Print each process's memory and whether it is flat."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", "start MB", "end MB", "max MB", "MB/min, second half", "flat"):
        table.add_column(column, justify="left" if not column else "right")
    for name, part in report["memory"].items():
        cells = ["-" if part[key] is None else f"{part[key]:,.2f}" for key in ("start_mb", "end_mb", "max_mb")]
        slope = "-" if part["slope_mb_min"] is None else f"{part['slope_mb_min']:+.3f}"
        table.add_row(name, *cells, slope, "[green]yes" if part["flat"] else "[red]no")
    screen.print(table)
    kept = report["kept"]
    screen.print(
        f"[dim]{kept['events']:,} events; {kept['users_made']:,} users came, {kept['users_kept']:,} are kept (cap"
        f" {CAP:,}); {kept['items_made']:,} items came, {kept['items_kept']:,} are kept, {kept['items_learnt']:,}"
        f" learnt (cap {CAP:,}). Flat: {report['criterion']}."
    )
    screen.print("[dim]" + ", ".join(f"{name} {count:,}" for name, count in sorted(report["done"].items())))


def plot(report: Mapping[str, Any], path: str) -> None:
    """Draw memory over time, one line a process, into an image file."""
    try:
        import matplotlib
    except ImportError as error:
        raise BenchError("--plot: needs matplotlib; install freshet[plot]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    samples = dict(report["samples"])
    minutes = [t / 60 for t in samples.pop("t")]
    figure, axes = pyplot.subplots(figsize=(9, 5))
    for name, values in samples.items():
        axes.plot(minutes, values, label=name)
    axes.axvline(minutes[-1] / 2, color="grey", linewidth=0.5)
    axes.set_xlabel("minutes")
    axes.set_ylabel("MB")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
