"""The verb `chaos`: what it asks and shows in a terminal; the work is done in infra/proving/chaos.py.

Imports what works lazily, for every process of ours reads the verbs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.terminal import LEARN, Json, console, show_json

if TYPE_CHECKING:
    from rich.console import Console, Group

    from infra.proving.chaos import Report, Run

SHOWN = 14
"""Faults in the live view."""


def chaos(
    kills: Annotated[int, typer.Option(help="Faults to inflict.", min=1, max=100_000)] = 20,
    seed: Annotated[int, typer.Option(help="Draws the faults, their times and the stream.", min=0)] = 1,
    seconds: Annotated[
        float | None,
        typer.Option(help="Spread the faults over this long; default: 7 s each.", min=1, show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Data folder to use and keep; must be new.", metavar="DIR", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Break everything at random times, then prove that nothing was lost, counted twice or stored otherwise.

    Starts a private Kafka, Redis, workers, learner and API, and publishes a known stream through HTTP and the Kafka
    inlets, with retries, repeats and lost answers. Meanwhile it kills, terminates and stops processes, lets a second
    worker join and leave, rolls Redis back by up to a second, and cuts, stalls and half-closes the connections to
    Kafka, Redis and the API. Then it lets the stack catch up and compares every user's and item's counts with what was
    published, and every byte of every profile and item row with an uninterrupted fold of the same log.

      freshet chaos                              20 faults, about three minutes
      freshet chaos --kills 100 --seed 7 --json  about thirteen minutes; exit 1 unless all held
      freshet chaos --data broken && freshet rebuild --verify --data broken

    lost            accepted events that no count shows
    applied_twice   counted more often than published
    rows_differing  profiles, rows, entries whose bytes differ from the fold of the log
    recover_*       from a fault until an event accepted after it is applied, in every partition
    stall_max_s     longest time without any progress while accepted events waited
    """
    from infra.proving.chaos import run_chaos
    from infra.stack import StackError

    if data is not None and data.exists() and any(data.iterdir()):
        raise StackError(f"{data} is not empty: chaos wants a folder of its own")
    screen = console(err=True)
    if as_json or not screen.is_terminal:
        report = run_chaos(kills=kills, seed=seed, seconds=seconds, data=data)
    else:
        from rich.live import Live

        with Live(console=screen, refresh_per_second=4, transient=True) as live:
            began = time.monotonic()
            report = run_chaos(
                kills=kills, seed=seed, seconds=seconds, data=data,
                tell=lambda run: live.update(view(run, time.monotonic() - began)),
            )  # fmt: skip
    if as_json:
        show_json(report.as_dict())
    else:
        show(report, console())
    if not report.held:
        raise SystemExit(1)


def view(run: Run, seconds: float) -> Group:
    """Return the live view: how far it is, what waits, the newest faults and what became of them."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table("at", "fault", "what", "recovered in", box=None, header_style="bold", pad_edge=False)
    for hit in run.hits[-SHOWN:]:
        after = "[green]" + f"{hit.recovered_s:.1f} s" if hit.recovered_s is not None else "[yellow]..."
        table.add_row(f"{hit.at:,.0f} s", hit.kind.replace("_", " "), hit.does or "under way", after)
    line = (
        f"[bold]{run.stage}[/]  {len(run.hits)} of {run.kills} faults, {seconds:,.0f} s;"
        f" {run.published:,} events published, {run.accepted:,} accepted, {run.behind:,} wait;"
        f" longest stall {run.stall_s:.1f} s"
    )
    return Group(table, "", ProgressBar(total=run.kills, completed=len(run.hits), width=60), line)


def show(report: Report, screen: Console) -> None:
    """Say what held and what did not, and the next step."""
    from rich.table import Table

    told = report.as_dict()
    table = Table(box=None, show_header=False, pad_edge=False)
    for name in ("published", "accepted", "applied", "duplicates", "sent_again"):
        table.add_row(name.replace("_", " "), f"{told[name]:,}")
    for name in ("lost", "applied_twice", "rows_differing", "dead_lettered", "unknown"):
        table.add_row(name.replace("_", " "), f"[{'red' if told[name] else 'green'}]{told[name]:,}")
    table.add_row("recovered in", f"{_s(report.recover_p50_s)} half of them, {_s(report.recover_max_s)} the slowest"
                  + (f" ({report.recover_worst.replace('_', ' ')})" if report.recover_worst else ""))  # fmt: skip
    table.add_row("longest stall", _s(report.stall_max_s))
    screen.print(table)
    screen.print(_counted("Faults", report.kills))
    screen.print(_counted("Restarts by the supervisor", report.restarts))
    for line in report.differing[:20]:
        screen.print(f"[red]{line}", highlight=False)
    if report.held:
        screen.print(f"[green]All held[/]: {sum(report.kills.values())} faults in {report.chaos_s:.0f} s,"
                     f" {report.events_per_s:.0f} events/s, {report.profiles} profiles and {report.rows} item rows"
                     " byte for byte.")  # fmt: skip
    else:
        screen.print(f"[red]Not held.[/] Logs and state: {report.data}. Again: [bold]{report.repeat}[/]")


def _s(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _counted(what: str, counts: dict[str, Any]) -> str:
    return f"[dim]{what}: " + (", ".join(f"{n.replace('_', ' ')} {c}" for n, c in sorted(counts.items())) or "none")


def add(app: typer.Typer) -> None:
    """Add these verbs to the console command."""
    app.command("chaos", rich_help_panel=LEARN)(chaos)
