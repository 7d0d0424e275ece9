"""The verbs `rebuild` and `dead-letters`: what they ask and show in a terminal; the work is done in streaming/.

Knows nothing about folds; starts the stack's Kafka and Redis where none run, so that state can be checked at rest.
Imports what works lazily, for every process of ours reads the verbs.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.settings import Settings
from infra.terminal import LOOK, Data, Json, console, fail, show_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from streaming.dead_letters import Letter
    from streaming.rebuild import Report


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
        self._progress.update(task, completed=done, rate=done / max(time.monotonic() - began, 1e-3))


def run_rebuild(settings: Settings, data: str, screen: Console, *, check: bool, switch: bool) -> Report:
    """Rebuild the next generation, or verify this one, with progress bars."""
    from streaming.rebuild import rebuild, verify

    with servers(settings, data) as ready, Bars(screen) as bars:
        if check:
            return asyncio.run(verify(ready, advance=bars.advance))
        return asyncio.run(rebuild(ready, advance=bars.advance, switch=switch))


def show_report(report: Report, screen: Console, *, check: bool, switch: bool) -> None:
    """Say what came of it, and the next step."""
    counted = f"{report.events:,} events, {report.profiles:,} profiles, {report.rows:,} item rows"
    if not check:
        screen.print(f"Generation {report.generation} is folded from {counted} in {report.seconds:.1f} s.")
        done = (
            "It is served from now on; start the workers." if switch else "[bold]freshet rebuild --switch[/] serves it."
        )
        screen.print(done)
    elif report.differing:
        screen.print(f"[red]{len(report.differing)} of {counted} differ from the log:[/]")
        for line in report.differing[:50]:
            screen.print(" ", line, highlight=False)
        screen.print("Next: keep a copy of the data folder, then [bold]freshet rebuild --switch[/].")
    else:
        screen.print(
            f"[green]Identical[/]: {counted} are byte for byte what the log folds to ({report.seconds:.1f} s)."
        )


def find_letters(settings: Settings, data: str) -> list[Letter]:
    """Return the dead letters."""
    from streaming.dead_letters import letters

    with servers(settings, data) as ready:
        return asyncio.run(letters(ready))


def show_letters(found: list[Letter], screen: Console) -> None:
    """Show dead letters as a table, newest last."""
    if not found:
        screen.print("No dead letters: every record so far could be folded.")
        return
    from rich.table import Table

    table = Table("position", "reason", "original", box=None, header_style="bold", pad_edge=False)
    for letter in found[-200:]:
        table.add_row(letter.name, letter.reason, letter.text()[:80])
    screen.print(table)
    screen.print(f"{len(found)} in all. [bold]freshet dead-letters show POSITION[/] shows one whole.")


def letter_as_dict(letter: Letter) -> dict[str, Any]:
    """Return a dead letter for `--json`."""
    return {"position": letter.name, "reason": letter.reason, "at": letter.at, "original": letter.text()}


# -- the verbs --------------------------------------------------------------------------------------------------------


def rebuild_verb(
    check: Annotated[bool, typer.Option("--verify", help="Only compare what is served with the log.")] = False,
    switch: Annotated[bool, typer.Option("--switch", help="Serve the result; the workers must be stopped.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Fold the log again from its beginning: into the next generation of keys, or to verify this one byte for byte.

    Starts the data folder's own Kafka and Redis where no stack runs.

      freshet rebuild --verify                   names every profile and row that differs; exit 1 if any
      freshet rebuild --switch                   rebuild, then serve what was rebuilt
    """
    chosen = Settings.load(data)
    report = run_rebuild(chosen, chosen.data, console(err=True), check=check, switch=switch)
    if as_json:
        show_json(report.as_dict())
    else:
        show_report(report, console(), check=check, switch=switch)
    if report.differing:
        raise SystemExit(1)


dead_letters = typer.Typer(help="Read what could not be folded, with its reason.", no_args_is_help=True)


@dead_letters.command("list")
def dead_letters_list(data: Data = None, as_json: Json = False) -> None:
    """List every dead letter: where it came from, why, how it began."""
    chosen = Settings.load(data)
    found = find_letters(chosen, chosen.data)
    if as_json:
        show_json([letter_as_dict(letter) for letter in found])
    else:
        show_letters(found, console())


@dead_letters.command("show")
def dead_letters_show(
    position: Annotated[str, typer.Argument(help="topic:partition:offset, as `list` shows it.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Show one dead letter whole."""
    chosen = Settings.load(data)
    for letter in find_letters(chosen, chosen.data):
        if letter.name == position:
            shown = letter_as_dict(letter)
            if as_json:
                show_json(shown)
            else:
                console().print(*(f"[bold]{name}[/] {value}" for name, value in shown.items()), sep="\n")
            return
    fail(f"no dead letter at {position}; `freshet dead-letters list` shows all.")


def add(app: typer.Typer) -> None:
    """Add these verbs to the console command."""
    app.command("rebuild", rich_help_panel=LOOK)(rebuild_verb)
    app.add_typer(dead_letters, name="dead-letters", rich_help_panel=LOOK)
