"""The verbs `rebuild`, `generation` and `snapshot`: what they ask and show in a terminal; the work is in streaming/.

Knows nothing about folds; starts the stack's Kafka and Redis where none run, so that state can be checked at rest.
Imports what works lazily, for every process of ours reads the verbs.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from infra.settings import Settings
from infra.terminal import LOOK, Data, Json, console, fail, show_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from streaming.rebuild import Report

T = TypeVar("T")
SHOWN = 50
NoWeights = Annotated[
    bool, typer.Option("--no-weights", help="Leave learnt weights out: they take longest (see the verb's text).")
]
Switch = Annotated[bool, typer.Option("--switch", help="Then serve the result: one write, all processes follow.")]


@contextlib.contextmanager
def servers(settings: Settings, data: str) -> Iterator[Settings]:
    """Yield settings whose Kafka and Redis answer: those that run, or the data folder's own, started for the while."""
    from infra.kafka import kafka_answers
    from infra.stack import Stack, StackError
    from infra.store import redis_answers

    if settings.kafka and settings.redis and kafka_answers(settings.kafka) and redis_answers(settings.redis):
        yield settings
        return
    if not (Path(data) / "kafka").is_dir():
        raise StackError(
            f"no servers that answer, and no log in the data folder {data}. Name it with --data DIR, or set"
            " FRESHET_KAFKA and FRESHET_REDIS to servers that run"
        )
    with Stack(Settings.load(data, running=False), processes=("kafka", "redis")) as stack:
        yield stack.settings


class Bars:
    """One progress bar per log that is read, with rate and time left."""

    def __init__(self, screen: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:,.0f}/s"), TimeRemainingColumn(), console=screen,
        )  # fmt: skip
        self._tasks: dict[str, tuple[TaskID, float]] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, what: str, done: int, total: int) -> None:
        """Show how far a log is read."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total, rate=0.0), time.monotonic()
        task, began = self._tasks[what]
        self._progress.update(task, completed=done, total=total, rate=done / max(time.monotonic() - began, 1e-3))


def _with_bars(settings: Settings, work: Callable[[Settings, Callable[[str, int, int], None]], Awaitable[T]]) -> T:
    """Run work on servers that answer, with progress bars."""

    async def run(ready: Settings, bars: Bars) -> T:
        return await work(ready, bars.advance)

    with servers(settings, settings.data) as ready, Bars(console(err=True)) as bars:
        return asyncio.run(run(ready, bars))


def moment(text: str) -> float:
    """Return an ISO time (UTC where it names no zone) or seconds since the epoch as seconds; ends with a reason."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        fail(f"--until: expected a time such as 2026-11-22T10:30:00 (UTC) or 1795300000, got {text!r}")
    return (found if found.tzinfo else found.replace(tzinfo=datetime.UTC)).timestamp()


def _ago(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S") if at else ""


def show_report(report: Report, screen: Console, *, check: bool) -> None:
    """Say what came of it, and the next step."""
    counted = (
        f"{report.events:,} events, {report.profiles:,} profiles, {report.rows:,} item rows, {report.steps:,} steps"
    )
    if report.base:
        screen.print(f"Begun from snapshot {report.base}: the events before it were not folded again.")
    for note in report.notes[:SHOWN]:
        screen.print(f"[yellow]Note[/]: {note}", highlight=False)
    if not check:
        rate = report.as_dict()["events_per_s"]
        screen.print(
            f"Generation {report.generation} is folded from {counted} in {report.seconds:.1f} s: {rate:,} events/s into"
            f" profiles and rows, weights {report.weights_s:.1f} s."
        )
        number = report.generation
        screen.print(
            "It is served from now on; [bold]freshet generation list[/] shows what else there is."
            if report.switched
            else f"[bold]freshet generation switch {number}[/] serves it, [bold]freshet generation drop {number}[/]"
            " deletes it."
        )
    elif report.differing:
        screen.print(f"[red]{len(report.differing)} of {counted} differ from the log:[/]")
        for line in report.differing[:SHOWN]:
            screen.print(" ", line, highlight=False)
        screen.print("Next: keep a copy of the data folder, then [bold]freshet rebuild --switch[/].")
    else:
        more = " Every entry of `examples` is what `events` derives." if report.rederived else ""
        screen.print(
            f"[green]Identical[/]: {counted} are byte for byte what the log folds to ({report.seconds:.1f} s).{more}"
        )


def rebuild_verb(
    check: Annotated[
        bool, typer.Option("--verify", help="Only compare what is served with the log; the workers must be stopped.")
    ] = False,
    rederive: Annotated[
        bool, typer.Option("--rederive", help="Verify, and that `events` gives the same entries of `examples`.")
    ] = False,
    switch: Switch = False,
    until: Annotated[
        str | None, typer.Option(help="Only what was written before TIME, ISO (UTC) or epoch s.", metavar="TIME")
    ] = None,
    no_weights: NoWeights = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Fold the logs again: into the next generation of keys, or to verify this one byte for byte.

    The stack may run meanwhile; where none runs, the data folder's own Kafka and Redis are started for the while.
    Weights are learnt again along the logged steps; with --no-weights they are copied (or, with --verify, not
    compared). With --until the state is that of TIME by the clock of the log: item rows of the entries written
    before it, profiles of exactly the events that those came of. A trimmed log begins from the newest snapshot.

      freshet rebuild                            build beside what is served; `freshet generation` goes on
      freshet rebuild --switch                   build, catch up, then serve it
      freshet rebuild --verify                   names every profile, row and weight that differs; exit 1 if any
      freshet rebuild --rederive --no-weights    the log alone: does `events` still give the same `examples`?
    """
    from streaming import rebuild

    if (check or rederive) and (switch or until):
        fail("--verify and --rederive change nothing: leave --switch and --until out.")
    chosen, check = Settings.load(data), check or rederive
    at = moment(until) if until else 0.0
    if check:
        report = _with_bars(
            chosen, lambda s, advance: rebuild.verify(s, advance=advance, weights=not no_weights, rederive=rederive)
        )
    else:
        report = _with_bars(
            chosen,
            lambda s, advance: rebuild.rebuild(s, advance=advance, switch=switch, until=at, weights=not no_weights),
        )
    _answer(report, as_json, check=check)


def _answer(report: Report, as_json: bool, *, check: bool = False) -> None:
    if as_json:
        show_json(report.as_dict())
    else:
        show_report(report, console(), check=check)
    if report.differing:
        raise SystemExit(1)


# -- generations ------------------------------------------------------------------------------------------------------

generation = typer.Typer(help="Sets of keys beside each other; one is served.", no_args_is_help=True)
Number = Annotated[int, typer.Argument(help="As `freshet generation list` shows it.", metavar="N")]


def _on_redis(settings: Settings, work: Callable[[Settings, Any], Awaitable[T]]) -> T:
    from streaming.state import connect

    async def run(ready: Settings) -> T:
        client = connect(ready.redis)
        try:
            return await work(ready, client)
        finally:
            await client.aclose()

    with servers(settings, settings.data) as ready:
        return asyncio.run(run(ready))


@generation.command("list")
def generation_list(data: Data = None, as_json: Json = False) -> None:
    """List the generations: which is served, how each was made, how far each is folded."""
    from rich.table import Table

    from streaming.recovery.generations import generations

    found = _on_redis(Settings.load(data), lambda s, client: generations(client, s.namespace, s.partitions))
    if as_json:
        show_json([one.as_dict() for one in found])
        return
    table = Table("", "made from", "at (UTC)", "events", "examples", "step", "", box=None, header_style="bold")
    for one in found:
        state = "[green]served[/]" if one.served else "" if one.ready else "[red]not whole[/]"
        made = f"{one.made} until {_ago(one.until)}" if one.until else one.made
        table.add_row(
            str(one.number), made, _ago(one.began), f"{one.events:,}", f"{one.examples:,}", f"{one.step:,}", state
        )
    console().print(table)


@generation.command("switch")
def generation_switch(number: Number, data: Data = None, as_json: Json = False) -> None:
    """Serve another generation: one write. The API follows within 2 s, workers and learner come back in it.

    What came in meanwhile is folded from where it stands, so nothing is lost; switching back works the same way.
    """
    from streaming.recovery.generations import switch
    from streaming.recovery.retention import refuse_behind_the_log

    async def work(settings: Settings, client: Any) -> int:
        await refuse_behind_the_log(settings, number)
        return await switch(client, settings.namespace, number, settings.partitions)

    before = _on_redis(Settings.load(data), work)
    if as_json:
        show_json({"served": number, "before": before})
    else:
        console().print(f"Generation {number} is served; [bold]freshet generation switch {before}[/] goes back.")


@generation.command("drop")
def generation_drop(number: Number, data: Data = None, as_json: Json = False) -> None:
    """Delete a generation that is not served, its model versions too; the logs are not touched."""
    import shutil

    from streaming.recovery.generations import drop
    from streaming.state import Keys
    from streaming.training.versions import home

    chosen = Settings.load(data)
    _on_redis(chosen, lambda s, client: drop(client, s.namespace, number, s.partitions))
    shutil.rmtree(home(chosen, Keys(chosen.namespace, number)), ignore_errors=True)
    if as_json:
        show_json({"dropped": number})
    else:
        console().print(f"Generation {number} is deleted.")


# -- snapshots --------------------------------------------------------------------------------------------------------

snapshot = typer.Typer(
    help="State, offsets and weights in a folder of the data folder.", no_args_is_help=True, rich_markup_mode="rich"
)


@snapshot.command("save")
def snapshot_save(
    name: Annotated[str, typer.Argument(help="Its name; default the time.", show_default=False)] = "",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Write a snapshot: users, rows, catalogue, weights, offsets, each file with its checksum.

    Folded in memory from the newest snapshot and the logs since, so the running stack is not touched; weights are
    those of the learner's last step. Interrupted, it leaves nothing. With FRESHET_RETENTION_DAYS set, records that
    it covers and that are older are then deleted from the logs. Its files hold user ids: delete snapshots that are
    older than an erasure when the law asks for it.
    """
    from streaming.recovery.retention import trim
    from streaming.recovery.snapshots import Manifest, home, save

    async def work(settings: Settings, advance: Callable[[str, int, int], None]) -> tuple[Manifest, dict[str, int]]:
        manifest = await save(settings, advance=advance, name=name)
        return manifest, await trim(settings, manifest)

    chosen = Settings.load(data)
    manifest, gone = _with_bars(chosen, work)
    if as_json:
        show_json({**_told(manifest), "folder": str(home(chosen) / manifest.name), "trimmed": gone})
        return
    screen = console()
    screen.print(
        f"Snapshot {manifest.name}: {manifest.events:,} events, {manifest.counts['profiles']:,} profiles,"
        f" {manifest.counts['rows']:,} rows, step {manifest.weights['step']:,}; {manifest.bytes / 1e6:,.1f} MB in"
        f" {home(chosen) / manifest.name}"
    )
    for topic, count in gone.items():
        screen.print(f"{count:,} records of {topic} that it covers and that are older were deleted.")


def _told(manifest: Any) -> dict[str, Any]:
    import msgspec

    return {**msgspec.to_builtins(manifest), "events": manifest.events, "bytes": manifest.bytes}


@snapshot.command("list")
def snapshot_list(data: Data = None, as_json: Json = False) -> None:
    """List the snapshots that are whole, oldest first, then those whose manifest is damaged, and why."""
    from rich.table import Table

    from streaming.recovery.snapshots import home, told

    chosen = Settings.load(data)
    found, damaged = told(chosen)
    if as_json:
        show_json([*map(_told, found), *({"name": name, "damaged": why} for name, why in damaged.items())])
        return
    for name, why in damaged.items():
        console(err=True).print(f"[red]{name} is damaged[/]:", why, highlight=False)
    if not found:
        if damaged:
            return
        console().print(f"No snapshot in {home(chosen)}. [bold]freshet snapshot save[/] makes one.")
        return
    table = Table("name", "at (UTC)", "events", "profiles", "rows", "step", "MB", box=None, header_style="bold")
    for one in found:
        table.add_row(
            one.name, _ago(one.made), f"{one.events:,}", f"{one.counts['profiles']:,}", f"{one.counts['rows']:,}",
            f"{one.weights['step']:,}", f"{one.bytes / 1e6:,.1f}",
        )  # fmt: skip
    console().print(table)


@snapshot.command("restore")
def snapshot_restore(
    name: Annotated[str, typer.Argument(help="Its name; default the newest.", show_default=False)] = "",
    switch: Switch = False,
    no_weights: NoWeights = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Make the next generation from a snapshot and the logs since: the same bytes as a full rebuild, sooner.

    Every checksum is compared first; from a damaged snapshot nothing is restored. Erasures since then hold.
    """
    from streaming import rebuild

    report = _with_bars(
        Settings.load(data),
        lambda s, advance: rebuild.rebuild(
            s, advance=advance, switch=switch, weights=not no_weights, snapshot=name
        ),
    )  # fmt: skip
    _answer(report, as_json)


@snapshot.command("diff")
def snapshot_diff(
    a: Annotated[str, typer.Argument(help="The older one.")],
    b: Annotated[str, typer.Argument(help="The newer one.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Say what changed from one snapshot to another: users, rows, catalogue, weights, offsets."""
    from rich.table import Table

    from streaming.recovery.snapshots import diff

    found = diff(Settings.load(data), a, b)
    if as_json:
        show_json(found)
        return
    table = Table("", "added", "removed", "changed", "same", "for example", box=None, header_style="bold")
    for kind in ("users", "rows", "catalogue", "weights"):
        one = found[kind]
        named = [f"{what}: {', '.join(names[:3])}" for what, names in one["names"].items()]
        table.add_row(kind, *(f"{one[what]:,}" for what in ("added", "removed", "changed", "same")), "; ".join(named))
    console().print(table)
    for place, (before, after) in found["offsets"].items():
        if before != after:
            console().print(f"{place}: {before:,} -> {after:,}")


def add(app: typer.Typer) -> None:
    """Add these verbs to the console command."""
    app.command("rebuild", rich_help_panel=LOOK)(rebuild_verb)
    app.add_typer(generation, name="generation", rich_help_panel=LOOK)
    app.add_typer(snapshot, name="snapshot", rich_help_panel=LOOK)
