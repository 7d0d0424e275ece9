"""`freshet bench overload`: far more events than can be applied, beside lookups that must not notice.

A pinned generator, in a process of its own, asks for 50 slates a second throughout and for a minute offers events at
three times what `bench ingest` sustains. Told: what was accepted and shed and how, lookups before, during and after,
the largest resident set of each process, the largest lag and how long it took to drain. Composition only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import psutil

from infra.proving import bench
from infra.stack import Stack
from streaming.state import ModelStore, connect, live_keys
from streaming.topics import Topics, topic_end

if TYPE_CHECKING:
    from rich.console import Console

RATE: Final = 50.0
OFFERED: Final = 75_000.0
"""Events offered a second: three times the 25,000 that `bench ingest` sustains on two cores."""
SAMPLE_S: Final = 0.5
DRAIN_S: Final = 180.0
WORSE: Final = 3.0
"""How many times the 99 % of lookups without load theirs may be under it."""


class Watch:
    """Samples of memory and lag while a load runs, from a thread."""

    def __init__(self, stack: Stack) -> None:
        self._stack, self._stop = stack, threading.Event()
        self.rss_start, self.rss_max = dict[str, float](), dict[str, float]()
        self.lag_max: dict[str, int] = {}
        self.delay_max_ms = 0.0
        self.shed: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            for name, pid in self._stack.pids().items():
                with contextlib.suppress(psutil.Error):
                    megabytes = psutil.Process(pid).memory_info().rss / 1e6
                    self.rss_start.setdefault(name, round(megabytes, 1))
                    self.rss_max[name] = round(max(megabytes, self.rss_max.get(name, 0.0)), 1)
            told = state_of(self._stack).get("overload", {})
            self.shed = told.get("shed", self.shed)
            for fold, behind in told.get("lag", {}).items():
                self.lag_max[fold] = max(behind, self.lag_max.get(fold, 0))
            self.delay_max_ms = max(self.delay_max_ms, told.get("loop_delay_ms", 0.0))


def state_of(stack: Stack) -> dict[str, Any]:
    """Return what `/-/state` tells; empty where it gives no answer in time."""
    with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(f"{stack.api}/-/state", timeout=5) as answer:
        return dict(json.load(answer))
    return {}


def run_overload(
    *, seconds: float = 60.0, offered: float = OFFERED, advance: bench.Advance = lambda *_: None
) -> dict[str, Any]:
    """Measure on a private stack; raises BenchError, StackError."""
    machine: dict[str, Any] = {"cores": os.cpu_count(), "load_before": bench.load_now()}
    with bench.private_stack() as stack:
        asyncio.run(bench.warm_up(stack, advance))
        words = ["lookup", "--seconds", "3", "--rate", str(RATE), "--events", str(RATE)]
        bench.load_process(stack, words, 4.5, "warming up", advance)
        time.sleep(2.0)
        words = ["overload", "--seconds", str(seconds), "--rate", str(RATE), "--events", str(offered)]
        before = bench.cpu_seconds(stack)
        with Watch(stack) as watch:
            began = time.perf_counter()
            found = bench.load_process(stack, words, seconds + 40.0, "overload", advance)
            took = time.perf_counter() - began
            used = bench.cpu_seconds(stack)
            drained = asyncio.run(drain(stack, lambda left: advance("draining", max(0.0, 1e6 - left), 1e6)))
    shares = {name: round((used[name] - before.get(name, 0.0)) / took, 3) for name in used}
    return {
        "machine": {**machine, "load_after": bench.load_now()}, **found,
        "ratio_p99": ratio(found["during"]["p99_ms"], found["before"]["p99_ms"]),
        "ratio_p50": ratio(found["during"]["p50_ms"], found["before"]["p50_ms"]),
        "rss_start_mb": watch.rss_start, "rss_max_mb": watch.rss_max, "lag_max": watch.lag_max,
        "loop_delay_max_ms": watch.delay_max_ms, "shed_requests": watch.shed, "cpu_share": shares, **drained,
    }  # fmt: skip


def ratio(during: float | None, before: float | None) -> float | None:
    """Return how many times `before` `during` is, None where either is not known."""
    return round(during / before, 2) if during is not None and before else None


async def drain(stack: Stack, advance: Callable[[int], None]) -> dict[str, Any]:
    """Wait until profiles, item rows and then weights are up to date; return how long each took from the last lookup.

    The generator's lookups after the flood last 20 s, in which most of it drains: those s are not counted here.
    """
    began, rows_at = time.monotonic(), -1.0
    client = connect(stack.settings.redis)
    try:
        learnt = ModelStore(client, await live_keys(client, stack.settings.namespace))
        while time.monotonic() - began < DRAIN_S:
            lag = (await asyncio.to_thread(state_of, stack)).get("overload", {}).get("lag", {"unknown": 1})
            end = await topic_end(stack.settings.kafka, Topics(stack.settings.namespace).examples)
            behind = end - int((await learnt.head()).get("next", 0))
            advance(sum(lag.values()) + behind)
            if rows_at < 0 and not any(lag.values()):
                rows_at = round(time.monotonic() - began, 1)
            if rows_at >= 0 and behind <= 0:
                return {"drained_s": rows_at, "learner_drained_s": round(time.monotonic() - began, 1)}
            await asyncio.sleep(0.5)
        return {"drained_s": rows_at if rows_at >= 0 else None, "learner_drained_s": None, "learner_left": behind}
    finally:
        await client.aclose()


def verdicts(report: Mapping[str, Any]) -> dict[str, bool]:
    """Return each promise and whether this run kept it."""
    worse = report["ratio_p99"]
    return {
        f"lookups at 99 % within {WORSE:g} times": worse is not None and worse <= WORSE,
        "every refusal a 429 with Retry-After": report["failed"] == 0 and "none" not in report["retry_after_s"],
        "no lookup failed": sum(report[part]["errors"] for part in ("before", "during", "after")) == 0,
        "no process grew by more than 300 MB": all(
            most - report["rss_start_mb"].get(name, most) < 300 for name, most in report["rss_max_mb"].items()
        ),
        "the lag drained": report["drained_s"] is not None,
    }  # fmt: skip


def show(report: Mapping[str, Any], screen: Console) -> None:
    """Print it for people."""
    from rich.table import Table

    table = Table("lookups", "p50 ms", "p95 ms", "p99 ms", "max ms", "errors", box=None, header_style="bold")
    for part in ("before", "during", "after"):
        row = report[part]
        table.add_row(part, *(f"{row[f'{name}_ms']:.1f}" for name in ("p50", "p95", "p99", "max")), str(row["errors"]))
    screen.print(table)
    screen.print(
        f"\nevents: {report['offered']:,} offered ({report['offered_per_s']:,}/s), {report['accepted']:,} accepted"
        f" ({report['accepted_per_s']:,}/s), {report['shed']:,} shed, {report['failed']:,} failed;"
        f" statuses {report['statuses']}, Retry-After {report['retry_after_s']}"
    )
    screen.print(f"lag at most {report['lag_max']}, gone {report['drained_s']} s after the last lookup")
    grown = ", ".join(f"{name} {report['rss_start_mb'].get(name)}->{rss}" for name, rss in report["rss_max_mb"].items())
    screen.print(f"resident memory, MB, at the start and at most: {grown}\n")
    for promise, kept in verdicts(report).items():
        screen.print(f"[{'green' if kept else 'red'}]{'yes' if kept else 'no '}[/] {promise}")


def overload_verb(seconds: float, *, as_json: bool) -> None:
    """Run it from the command line."""
    from infra.terminal import console, show_json

    screen = console(err=True)
    with screen.status("starting") as status:
        report = run_overload(
            seconds=seconds, advance=lambda name, done, total: status.update(f"{name}: {done:,.0f} of {total:,.0f}")
        )
    if as_json:
        show_json(report)
    else:
        show(report, console())
