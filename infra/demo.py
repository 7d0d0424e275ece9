"""`freshet demo` and `freshet simulate`: simulated people on a stack, and the live table in the terminal.

Composition only: the people are streaming.simulation's, the processes infra.stack's. It knows nothing about how
anything is learnt.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.process import folder_lock
from infra.settings import Settings
from infra.stack import Stack, StackError
from streaming.simulation.people import Api, ApiError, Simulation, inlet_sender
from streaming.simulation.world import World
from streaming.state import StoreError, StoreUnavailable, append_metrics, connect, live_keys, read_metrics
from streaming.topics import Log, Topics

if TYPE_CHECKING:
    from rich.console import Console

MARK = "freshet-demo"
DEMO_SEED = 2026  # held out; see DECISIONS.md


@dataclass(slots=True)
class Screen:
    """What the table shows beside the simulation's own figures."""

    api: str
    began: float
    users: dict[str, float] = field(default_factory=dict)
    learner: dict[str, float] = field(default_factory=dict)
    applied: float = 0.0  # events a second, over the last points
    history: list[dict[str, float]] = field(default_factory=list)


Show = Callable[[Simulation, Screen], None]


def wipe(data: Path) -> None:
    """Empty a demo's data folder; raises StackError where the folder is somebody else's."""
    if data.exists() and any(data.iterdir()):
        if not (data / MARK).exists():
            raise StackError(
                f"{data}: expected an empty folder or that of an earlier demo (it is wiped at the start), got other "
                "files. Choose another one: --data DIR."
            )
        with folder_lock(data / "lock", wait=False) as free:
            if not free:
                raise StackError(
                    f"{data}: a demo runs there already. End it with Ctrl-C, or choose another: --data DIR"
                )
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True, exist_ok=True)
    (data / MARK).write_text("This folder belongs to `freshet demo`, which wipes it at each start.\n")


def run_demo(
    settings: Settings, *, users: int, items: int, rate: float, seed: int, seconds: float, console: Console
) -> dict[str, Any]:
    """Start a stack in a wiped folder, let people come, show the table, end all; returns the report.

    Raises StackError where something cannot start. SIGINT, SIGTERM and SIGHUP end it within ten seconds.
    """
    began = time.time()
    wipe(Path(settings.data))
    with _Interrupts() as interrupts:
        status = console.status("starting")
        status.start()
        stack = Stack(settings, quiet=not console.is_terminal, say=lambda text: status.update(f"{text} ..."))
        report: dict[str, Any] = {}
        try:
            stack.start()
            stack.wait_ready()
            page = time.time() - began
            status.update("telling the items ...")
            report = asyncio.run(
                simulate(
                    stack.settings, stack.api, users=users, items=items, rate=rate, seed=seed, seconds=seconds,
                    began=began, interrupts=interrupts, show=table_shower(console, status, "demo"),
                )
            )  # fmt: skip
            report["seconds_to_page"] = round(page, 1)
        except KeyboardInterrupt:
            pass
        except ApiError as error:
            raise StackError(f"the demo's API does not answer as expected: {error}") from error
        finally:
            status.update("ending all processes ...")
            status.start()
            stack.stop()
            status.stop()
    return report


def run_simulate(
    settings: Settings, api: str, *, users: int, items: int, rate: float, seed: int, seconds: float, console: Console
) -> dict[str, Any]:
    """Let people use the running stack that `settings` names, show the table; returns the report."""
    with _Interrupts() as interrupts:
        status = console.status("telling the items ...")
        status.start()
        try:
            return asyncio.run(
                simulate(
                    settings, api, users=users, items=items, rate=rate, seed=seed, seconds=seconds, began=time.time(),
                    show=table_shower(console, status, "simulate"), interrupts=interrupts,
                )
            )  # fmt: skip
        except ApiError as error:
            raise StackError(
                f"{api} does not answer as expected ({error}). `freshet status` shows what runs."
            ) from error
        finally:
            status.stop()


class _Interrupts:
    """Signals that ask to end, as a flag and a callback, so that the loop ends in order."""

    def __init__(self) -> None:
        self.asked = False
        self.tell: Callable[[], None] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: object) -> None:
        first, self.asked = not self.asked, True
        if self.tell is not None:
            self.tell()
        elif first:
            raise KeyboardInterrupt


def _cancel_from_signal(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    loop.call_soon_threadsafe(task.cancel)


async def simulate(
    settings: Settings, api: str, *, users: int, items: int, rate: float, seed: int, seconds: float, began: float,
    show: Show, interrupts: _Interrupts | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Let the world's people use a running stack for `seconds` (inf: until interrupted); returns the report."""
    async with Api(api, key=settings.admin_key) as client, _inlets(settings) as inlet:
        world = World(users=users, items=items, seed=seed, start=time.time())
        simulation = Simulation(world, client, inlet=inlet)
        await simulation.publish()
        await simulation.wait_served()
        people = asyncio.create_task(simulation.run(seconds, slates_per_s=rate))
        screen = Screen(api, began)
        figures = asyncio.create_task(_figures(settings, simulation, screen, show))
        if interrupts is not None:
            loop = asyncio.get_running_loop()
            interrupts.tell = lambda: _cancel_from_signal(loop, people)
            if interrupts.asked:
                people.cancel()
        try:
            done, _ = await asyncio.wait({people, figures}, return_when=asyncio.FIRST_COMPLETED)
            report = simulation.report()
            for task in done:
                if not task.cancelled() and (error := task.exception()) is not None:
                    raise error
        finally:
            if interrupts is not None:
                interrupts.tell = lambda: None
            people.cancel()
            figures.cancel()
            await asyncio.gather(people, figures, return_exceptions=True)
    for name, at in (("first_slate", simulation.first_slate), ("first_learnt_slate", simulation.first_learnt)):
        report[f"seconds_to_{name}"] = None if at is None else round(at - began, 1)
    report["freshness"] = {name: screen.users.get(name) for name in ("applied_p50_ms", "applied_p99_ms")}
    return report


@contextlib.asynccontextmanager
async def _inlets(settings: Settings) -> AsyncIterator[Any]:
    log = Log(settings.kafka)
    await log.start()
    try:
        yield inlet_sender(log, Topics(settings.namespace, settings.partitions))
    finally:
        await log.stop()


async def _figures(settings: Settings, simulation: Simulation, screen: Screen, show: Show) -> None:
    """Each second: write the world's learning curve, read the agents' figures, show them."""
    client = connect(settings.redis)
    try:
        while True:
            await asyncio.sleep(1.0 - time.time() % 1.0)
            point = simulation.curve()
            screen.history.append(point)
            with contextlib.suppress(StoreError, *StoreUnavailable):
                keys = await live_keys(client, settings.namespace)
                await append_metrics(client, keys.metrics("world"), {**point, **simulation.names()})
                await _read(client, keys, screen)
            show(simulation, screen)
    finally:
        await client.aclose()


async def _read(client: Any, keys: Any, screen: Screen) -> None:
    points = [_numbers(fields) for _, fields in await read_metrics(client, keys.metrics("users"), count=5)]
    busy = [point for point in points if point.get("events")]
    if busy:
        screen.users = busy[-1]
    span = points[-1]["t"] - points[0]["t"] if len(points) > 1 else 0.0
    screen.applied = sum(point["events"] for point in points[1:]) / span if span > 0 else 0.0
    learnt = await read_metrics(client, keys.metrics("learner"), count=1)
    if learnt:
        screen.learner = _numbers(learnt[-1][1])


def _numbers(fields: dict[str, str]) -> dict[str, float]:
    found = {}
    for name, text in fields.items():
        with contextlib.suppress(ValueError):
            found[name] = float(text)
    return found


# ---- the table


def table_shower(console: Console, status: Any, name: str) -> Show:
    """A `Show` for people: a table that redraws in place; where no terminal is, a line each ten seconds."""
    from rich.live import Live

    if not console.is_terminal:
        return _line_shower(console)
    live: Live | None = None

    def show(simulation: Simulation, screen: Screen) -> None:
        nonlocal live
        if live is None:
            status.stop()
            live = Live(console=console, auto_refresh=False, transient=False)
            live.start()
        live.update(table(simulation, screen, name), refresh=True)

    return show


def _line_shower(console: Console) -> Show:
    def show(simulation: Simulation, screen: Screen) -> None:
        point = screen.history[-1]
        if "lead_low" in point and len(screen.history) % 10 == 0:
            console.print(
                f"{time.time() - screen.began:5.0f} s  {screen.applied:4.0f} events/s  expected clicks a slate:"
                f" ours {point['ours']:.2f}, popular {point['popular']:.2f}, oracle {point['oracle']:.2f};"
                f" lead {point['lead_low']:+.3f} to {point['lead_high']:+.3f}",
                soft_wrap=True,
            )

    return show


def table(simulation: Simulation, screen: Screen, name: str = "demo") -> Any:
    """The live table: what flows, how fresh, how good, and where to look."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    point, users = screen.history[-1], screen.users
    flow = Table.grid(padding=(0, 3), expand=False)
    flow.add_column(style="dim")
    flow.add_column(justify="right")
    flow.add_column(style="dim")
    fresh = users.get("applied_p50_ms")
    flow.add_row("events applied", f"[bold]{screen.applied:.0f}[/] /s", f"{point['events']:,.0f} sent so far")
    flow.add_row(
        "event to applied profile", f"[bold]{fresh:.1f}[/] ms" if fresh is not None else "-",
        f"median; 99 % within {users.get('applied_p99_ms', float('nan')):.0f} ms",
    )  # fmt: skip
    waits = (point.get("lookup_p50_ms", float("nan")), point.get("lookup_p99_ms", float("nan")))
    flow.add_row(
        "lookups", f"[bold]{_rate(screen.history):.0f}[/] /s", f"median {waits[0]:.1f} ms, 99 % {waits[1]:.0f} ms"
    )
    step = screen.learner.get("step")
    flow.add_row("model", f"[bold]{step:,.0f}[/] steps" if step else "-", f"{point['items']:,.0f} items told")
    if simulation.errors or simulation.turned_away:
        flow.add_row("[red]errors", f"[red]{simulation.errors}", simulation.problem[:70])
    body = [
        flow, Text(), _score(point, simulation), Text(), _lead(point), Text(),
        Text.assemble("Look and click at  ", (screen.api + "/", "bold underline")),
    ]  # fmt: skip
    since = time.time() - screen.began
    return Panel(
        Group(*body), title=f"[bold]Freshet {name}[/]", subtitle=f"[dim]{since:.0f} s · Ctrl-C ends everything",
        width=min(88, 100), padding=(1, 2), border_style="cyan",
    )  # fmt: skip


def _rate(history: list[dict[str, float]]) -> float:
    recent = history[-6:]
    span = recent[-1]["t"] - recent[0]["t"]
    return 0.0 if span <= 0 else (recent[-1]["slates"] - recent[0]["slates"]) / span


BARS = " ▁▂▃▄▅▆▇█"


def _score(point: dict[str, float], simulation: Simulation) -> Any:
    """Expected clicks of a slate: now as a bar, and each ten seconds since the start."""
    from rich.table import Table

    grid = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    grid.add_column("expected clicks a slate")
    grid.add_column("now", justify="right")
    grid.add_column("")
    grid.add_column("each 10 s since the start", no_wrap=True)
    best = max(point.get("oracle", 0.0), 1e-9)
    past = simulation.by_ten_seconds()[-24:]
    for key, label, colour in (
        ("ours", "Freshet", "cyan"),
        ("popular", "popularity", "yellow"),
        ("oracle", "best possible", "white"),
    ):
        value = point.get(key, 0.0)
        line = "".join(BARS[round(8 * min(1.0, (entry[key] or 0.0) / best))] for entry in past)
        style = f"bold {colour}" if key == "ours" else colour
        grid.add_row(
            f"[{style}]{label}",
            f"[{style}]{value:.2f}",
            f"[{colour}]{'█' * round(18 * value / best):<18}",
            f"[{colour}]{line}",
        )
    return grid


def _lead(point: dict[str, float]) -> Any:
    from rich.text import Text

    if "lead_low" not in point:
        return Text("Lead over popularity: not enough people yet", style="dim")
    sure = point["lead_low"] > 0
    told = f"{point['lead']:+.3f} clicks a slate"
    sure_of = f"{point['lead_low']:+.3f} to {point['lead_high']:+.3f}"
    within = f"\n95 % sure of {sure_of}, over the last {point['lead_s']:.0f} s, paired by person"
    return Text.assemble("Lead over popularity  ", (told, "bold green" if sure else "bold"), (within, "dim"))
