"""What the verbs `rebuild` and `dead-letters` show in a terminal; the work is done in streaming/.

Knows nothing about folds; starts the stack's Kafka and Redis where none run, so that state can be checked at rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from infra.settings import Settings
from infra.stack import Stack
from streaming.dead_letters import Letter, letters
from streaming.rebuild import Report, rebuild, verify


@contextlib.contextmanager
def servers(settings: Settings, data: str) -> Iterator[Settings]:
    """Yield settings whose Kafka and Redis answer: those that run, or the data folder's own, started for the while."""
    if settings.kafka and settings.redis:
        yield settings
        return
    with Stack(Settings.load(data, running=False), processes=("kafka", "redis")) as stack:
        yield stack.settings


class Bars:
    """One progress bar per log that is read, with rate and time left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:,.0f}/s"), TimeRemainingColumn(), console=console,
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
        self._progress.update(task, completed=done, rate=done / max(time.monotonic() - began, 1e-3))


def run_rebuild(settings: Settings, data: str, console: Console, *, check: bool, switch: bool) -> Report:
    """Rebuild the next generation, or verify this one, with progress bars."""
    with servers(settings, data) as ready, Bars(console) as bars:
        if check:
            return asyncio.run(verify(ready, advance=bars.advance))
        return asyncio.run(rebuild(ready, advance=bars.advance, switch=switch))


def show_report(report: Report, console: Console, *, check: bool, switch: bool) -> None:
    """Say what came of it, and the next step."""
    counted = f"{report.events:,} events, {report.profiles:,} profiles, {report.rows:,} item rows"
    if not check:
        console.print(f"Generation {report.generation} is folded from {counted} in {report.seconds:.1f} s.")
        done = (
            "It is served from now on; start the workers." if switch else "[bold]freshet rebuild --switch[/] serves it."
        )
        console.print(done)
    elif report.differing:
        console.print(f"[red]{len(report.differing)} of {counted} differ from the log:[/]")
        for line in report.differing[:50]:
            console.print(" ", line, highlight=False)
        console.print("Next: keep a copy of the data folder, then [bold]freshet rebuild --switch[/].")
    else:
        console.print(
            f"[green]Identical[/]: {counted} are byte for byte what the log folds to ({report.seconds:.1f} s)."
        )


def find_letters(settings: Settings, data: str) -> list[Letter]:
    """Return the dead letters."""
    with servers(settings, data) as ready:
        return asyncio.run(letters(ready))


def show_letters(found: list[Letter], console: Console) -> None:
    """Show dead letters as a table, newest last."""
    if not found:
        console.print("No dead letters: every record so far could be folded.")
        return
    table = Table("position", "reason", "original", box=None, header_style="bold", pad_edge=False)
    for letter in found[-200:]:
        table.add_row(letter.name, letter.reason, letter.text()[:80])
    console.print(table)
    console.print(f"{len(found)} in all. [bold]freshet dead-letters show POSITION[/] shows one whole.")


def letter_as_dict(letter: Letter) -> dict[str, Any]:
    """Return a dead letter for `--json`."""
    return {"position": letter.name, "reason": letter.reason, "at": letter.at, "original": letter.text()}
