"""The verbs `bench` and `chaos`: what they ask, and what chaos shows; the work is done in the modules beside.

Imports what works lazily, for every process of ours reads the verbs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.terminal import LEARN, Json, console, ended_by_signals, fail, show_json

if TYPE_CHECKING:
    from rich.console import Console, Group

    from infra.proving.chaos import Report, Run

SHOWN = 14
"""Faults in the live view."""
QUALITY = "Of `bench quality`"


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


def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            help="ingest, lookup, freshness: default. Or, alone: overload, soak, quality, ope, exploration, dashboard.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    seconds: Annotated[
        float | None,
        typer.Option(help="Length of the load (dashboard: before it); default 60, of soak 600.", min=1, max=86_400,
                     show_default=False),
    ] = None,
    backlog: Annotated[int, typer.Option(help="Events that ingest drains.", min=5000, max=5_000_000)] = 200_000,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw memory (soak), NDCG (quality) or regret (exploration) into this picture; of dashboard: "
                     "a folder for screenshots.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A log: file or folder, .gz too.", rich_help_panel=QUALITY, show_default=False)
    ] = None,
    form: Annotated[
        str,
        typer.Option("--format", help="movielens, movietweetings, online-retail, kuairand or csv.",
                     rich_help_panel=QUALITY),
    ] = "csv",
    columns: Annotated[
        str, typer.Option(help="user=...,item=...,ts=...[,rating=...,kind=...] of a csv.", rich_help_panel=QUALITY)
    ] = "",
    protocol: Annotated[
        str,
        typer.Option(help="line: an event at a time; basket: an invoice from one state.", rich_help_panel=QUALITY),
    ] = "line",
    exclude: Annotated[
        str | None,
        typer.Option(help="seen, invoice or none; default as in `replay`.", rich_help_panel=QUALITY,
                     show_default=False),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Only the first N events.", min=100, rich_help_panel=QUALITY, show_default=False),
    ] = None,
    only: Annotated[
        str, typer.Option(help="Only these, of ours and the references: NAME,...", rich_help_panel=QUALITY)
    ] = "",
    resume: Annotated[
        Path, typer.Option(help="Folder of what was computed: a run goes on there.", rich_help_panel=QUALITY)
    ] = Path(".freshet-quality"),
    delays: Annotated[
        int,
        typer.Option(help="Events of the freshness curve; 0: none.", min=0, rich_help_panel=QUALITY),
    ] = 20_000,
    seeds: Annotated[int, typer.Option(help="Worlds that exploration plays.", min=1, max=1000)] = 10,
) -> None:  # fmt: skip
    """Measure ingest, lookups and freshness on a private stack, each beside a floor of the same run.

    10,000 items, 10,000 users; the load comes from a process of its own, with arrivals that do not wait for answers.
    Everything runs in a temporary folder that is deleted afterwards. Other work on the machine shows in the figures.

      freshet bench                              all three, about four minutes
      freshet bench lookup --seconds 20 --json
      freshet bench overload                     three times too many events: are lookups as quick?
      freshet bench soak --plot memory.png       ten minutes of new users and items: is memory flat?

    `quality` ranks a log's events by Freshet and by what a team would pick instead, in this process: popularity,
    item-kNN, ISGD, BPR, River's factorisations, ALS and EASE, each tuned on the first tenth. Results are kept in the
    folder --resume, so a second run computes only what changed.

      freshet bench quality --data ml-latest-small --format movielens --plot ndcg.png
      freshet bench quality --data clicks.csv --columns user=uid,item=sku,ts=when --only ours,ease --json

    `ope` simulates logs with a known truth: how often do the 95 % intervals of `freshet evaluate` hold it?

    `exploration` plays simulated worlds, stationary, drifting and with an abrupt change, under every policy: regret,
    good new items found, what a lookup costs, whether propensities are true.

      freshet bench exploration --seeds 10 --json

    `dashboard` opens every page in a real Chromium beside 200 simulated people: from a click to another slate on the
    screen, bytes, CPU of pages and of ten viewers, errors in the console; with --plot DIR, screenshots.

      freshet bench dashboard --json --plot shots
    """
    if what == ["quality"]:
        from infra.proving.quality.show import quality_verb

        with ended_by_signals():
            quality_verb(data, form, columns, protocol, exclude, limit, only, resume, delays, as_json=as_json,
                         picture=plot)  # fmt: skip
        return
    if what == ["ope"]:
        from infra.proving.coverage import coverage_verb

        with ended_by_signals():
            coverage_verb(as_json=as_json)
        return
    if what == ["exploration"]:
        from infra.proving.exploration_show import exploration_verb

        with ended_by_signals():
            exploration_verb(seeds, as_json=as_json, picture=plot)
        return
    if what == ["dashboard"]:
        from infra.proving.dashboard import dashboard_verb

        with ended_by_signals():
            dashboard_verb(seconds or 60.0, as_json=as_json, shots=plot)
        return
    if what == ["overload"]:
        from infra.proving.overload import overload_verb

        with ended_by_signals():
            overload_verb(seconds or 60.0, as_json=as_json)
        return
    if what == ["soak"]:
        from infra.proving.soak import soak_verb

        with ended_by_signals():
            soak_verb(seconds or 600.0, as_json=as_json, picture=plot)
        return
    from infra.proving.bench import WHAT, bench_for_people, show

    chosen = [name for name in WHAT if name in (what or WHAT)]
    if unknown := set(what or ()) - set(WHAT):
        fail(f"bench: expected some of {', '.join(WHAT)}, got {', '.join(sorted(unknown))}", 2)
    with ended_by_signals():
        report = bench_for_people(chosen, seconds=seconds or 60.0, backlog=backlog, screen=console(err=True))
    if as_json:
        show_json(report)
    else:
        show(report, console())


def add(app: typer.Typer) -> None:
    """Add these verbs to the console command."""
    app.command("bench", rich_help_panel=LEARN)(bench)
    app.command("chaos", rich_help_panel=LEARN)(chaos)
