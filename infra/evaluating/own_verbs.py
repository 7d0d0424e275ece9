"""`freshet export`, `freshet compare` and `freshet evaluate --policy` in a terminal: what they ask and show."""

from __future__ import annotations

import asyncio
import datetime
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from infra.recovering import Bars, servers
from infra.settings import Settings
from infra.terminal import LEARN, Data, Json, console, fail, show_json

if TYPE_CHECKING:
    from rich.console import Console

    from streaming.replay.prequential import Exclusion, Protocol, Replay

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_COLOURS = {"better": "green", "worse": "red"}


def since_of(text: str, now: float) -> float:
    """Return a time in s: an ISO time (UTC where it names no zone), s since the epoch, or a duration before `now`."""
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text):
        return now - float(found[1]) * _UNITS[found[2]]
    try:
        return float(text)
    except ValueError:
        pass
    try:
        at = datetime.datetime.fromisoformat(text)
    except ValueError:
        fail(
            "--since: expected a time such as 2026-11-22T10:30:00 (UTC) or 1795300000, or a duration such as 7d or 90m,"
            f" got {text!r}", 2,
        )  # fmt: skip
    return (at if at.tzinfo else at.replace(tzinfo=datetime.UTC)).timestamp()


def export(
    what: Annotated[list[str], typer.Argument(help="One or more of these tables.", metavar="slates|events|items")],
    since: Annotated[
        str, typer.Option(help="Only what the log took since then: a time, or 7d, 12h, 90m.", metavar="TIME|DURATION")
    ] = "",
    form: Annotated[
        str | None,
        typer.Option("--format", help="csv, csv.gz or parquet (freshet\\[parquet]); default by --out, else csv.",
                     show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder, or a file for one table; default freshet-export.", show_default=False)
    ] = None,
    pseudonyms: Annotated[
        bool, typer.Option("--pseudonyms", help="Users under a keyed hash whose key is not kept; without event ids.")
    ] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write what was served and what came of it: one row a shown position, with its propensity and its outcomes.

    Tables hold user ids: they are personal data, readable by you alone, and an erasure does not reach a file that was
    written before it. With --pseudonyms users get other names in each run, so ask for the tables in one; whoever has
    the log can still match them by times and items.

      freshet export slates events items --out log          # what `freshet evaluate` and `freshet replay` read
      freshet export slates --since 7d --format parquet
      freshet replay log --format freshet

    slates: an outcome joins the slate that it names, else the newest of the user's last four that shows its item,
    within an hour of stream time, each event once; a reward counts each kind of outcome once a position. At most 50,000
    slates of a partition wait at a time. events: what was applied, each once, without users who were forgotten.
    The log is read whole, so that --since changes no label. items: the catalogue as of now.
    """
    from infra.evaluating.export import export as run
    from infra.evaluating.export import places

    settings, paths = Settings.load(data), places(what, form, out)
    if any(path.suffix == ".parquet" for path in paths.values()):
        from streaming.replay.exports import arrow

        arrow()
    at = since_of(since, time.time()) if since else 0.0
    with servers(settings, settings.data) as ready, Bars(console(err=True)) as bars:
        told = asyncio.run(run(ready, paths, since=at, pseudonyms=pseudonyms, advance=bars.advance))
    if as_json:
        show_json(told)
        return
    screen = console()
    for name, file in told["files"].items():
        screen.print(f"[bold]{name}[/]: {file['rows']:,} rows in {file['path']}")
    if {"slates", "events"} & told["files"].keys():
        screen.print(
            f"The log holds {told['slates']:,} slates and {told['events']:,} events; {told['joined']:,} of"
            f" {told['outcomes']:,} outcomes joined a slate. Left out: {told['duplicates']:,} duplicates,"
            f" {told['erased']:,} of users who were forgotten, {told['unreadable']:,} unreadable."
        )
    if told["early"]:
        screen.print(f"[yellow]{told['early']:,} slates were closed before their hour ended: more waited than may")
    if not pseudonyms:
        screen.print(
            "[dim]These files hold user ids: delete them when the law asks for it. --pseudonyms renames users."
        )


@contextmanager
def _bars(screen: Console | None) -> Iterator[Callable[[str, int, int], None]]:
    if screen is None:
        yield lambda what, done, total: None
        return
    with Bars(screen) as bars:
        yield bars.advance


def evaluate_own(log: Path, policy: Path, logged: Path | None, seed: int, *, as_json: bool) -> None:
    """Evaluate the settings of a file on an export; logged: a file of those it was made under, else of this shell."""
    from infra.evaluating.candidate import read_candidate
    from infra.evaluating.own_log import judge, read_own_log, run

    present = read_candidate(logged, drawing=True)[0] if logged is not None else Settings.load(running=False)
    settings, given = read_candidate(policy, drawing=True, present=present)
    read = read_own_log(log)
    total = len(read.things)
    with _bars(None if as_json else console(err=True)) as advance:
        rows = run(read, settings, present, tell=lambda done: advance("replay", done, total))
    report = {"log": str(log), "policy": given, "rejected_rows": len(read.rejected), **judge(rows, seed=seed)}
    if as_json:
        show_json(report)
    else:
        _show_own(report, console())


def _show_own(report: dict[str, Any], screen: Console) -> None:
    settings = ", ".join(f"{name} = {value}" for name, value in report["policy"].items()) or "the defaults"
    screen.print(
        f"[bold]{settings}[/] on {report['slates']:,} slates, {report['positions']:,} positions,"
        f" {report['users']:,} users"
    )
    apart, value = report["difference"], report["value"]
    if apart["value"] is not None:
        screen.print(
            f"reward per position: logged {report['logged']['value']:.5f}, under these settings {value['value']:.5f}\n"
            f"[bold]difference {apart['value']:+.5f} [{apart['low']:+.5f}, {apart['high']:+.5f}][/] (95 %, over users;"
            f" taken that {report['assumes']})",
        )  # fmt: skip
        screen.print(f"[dim]effective positions {report['effective_sample_size']:,.0f} of {report['positions']:,}")
        for name, title in (("position", "each position by itself"), ("slate", "whole slates, without assumption")):
            row = report["estimates"][name]
            screen.print(
                f"[dim]{title}: {row['value']:+.5f} [{row['low']:+.5f}, {row['high']:+.5f}]" if "value" in row
                else f"[dim]{title}: no number, {row['reason']}"
            )  # fmt: skip
    if report["redrawn_slates"]:
        screen.print(f"[dim]only the drawing changes: the scores of {report['redrawn_slates']:,} slates are the log's")
    for warning in report["overlap"]["warnings"]:
        screen.print(f"[yellow]{warning}")
    if report["rejected_rows"]:
        screen.print(f"[yellow]{report['rejected_rows']:,} rows of events could not be read")
    why = f" ({report['reason']})" if "reason" in report else ""
    screen.print(f"[{_COLOURS.get(report['verdict'], 'yellow')}]{report['verdict']}[/]{why}")


def compare(
    a: Annotated[Path, typer.Argument(help="Settings as they are, TOML; empty: the defaults.", metavar="A.toml")],
    b: Annotated[Path, typer.Argument(help="Settings as they might be.", metavar="B.toml")],
    log: Annotated[Path, typer.Option(help="What `freshet replay` reads: an export, a csv, a data set.")],
    form: Annotated[str, typer.Option("--format", help="As of `freshet replay`; freshet: an export.")] = "freshet",
    columns: Annotated[str, typer.Option(help="Of a csv, as of `freshet replay`.")] = "",
    exclude: Annotated[
        str | None, typer.Option(help="seen, invoice or none; default by format.", show_default=False)
    ] = None,
    protocol: Annotated[str, typer.Option(help="line or basket, as of `freshet replay`.")] = "line",
    limit: Annotated[int | None, typer.Option(help="Only the first N events.", min=1, show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw NDCG of both over time.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Replay one log through two configurations and say what the second changes: the safe way to change a setting.

    Each event is ranked by both before both learn it. Differences are B minus A on the same events, with 95 % intervals
    over users drawn again.

      freshet export events items --out log
      freshet compare now.toml heads.toml --log log             # heads.toml: head_weights = [["hide", -2]]
      freshet compare a.toml b.toml --log ml-latest-small --format movielens --plot both.png

    Of one's own log: users chose from what they were shown, which speaks for the settings of that time; views are left
    out. A replay ranks, so it sees event_weights, head_weights, rewards, feature_share (default here 1), first_share
    (here 0) and seed, and refuses others by name; how slates are drawn (policy, epsilon) is for `freshet evaluate`.
    """
    from infra.evaluating.candidate import chosen, read_candidate
    from infra.evaluating.paired import compare as run
    from infra.evaluating.paired import plot as draw
    from infra.replaying import parse_columns
    from streaming.replay.logs import EXCLUSIONS, read_log

    if exclude not in (None, "seen", "invoice", "none"):
        fail(f"--exclude: expected seen, invoice or none, got {exclude!r}", 2)
    if protocol not in ("line", "basket"):
        fail(f"--protocol: expected line or basket, got {protocol!r}", 2)
    sides = []
    for path, other in ((a, b), (b, a)):
        settings, given = read_candidate(path, drawing=False)
        name = path.name if path.name != other.name else str(path)
        sides.append((name, chosen(settings, list(given)), settings.seed))
    read = read_log(log, form, parse_columns(columns), limit)
    total = len(read.events)
    with _bars(None if as_json else console(err=True)) as advance:

        def progress(name: str, done: int, replay: Replay) -> None:
            advance(name, done, total)

        report = run(
            read, sides[0], sides[1], exclusion=cast("Exclusion", exclude or EXCLUSIONS[form]),
            protocol=cast("Protocol", protocol), progress=progress,
        )  # fmt: skip
    if plot is not None:
        draw(report, str(plot))
    if as_json:
        show_json({"log": str(log), "bad_rows": read.bad, **report})
    else:
        _show_compared(report, console())


def _show_compared(report: dict[str, Any], screen: Console) -> None:
    from rich.table import Table

    first, second = report["a"], report["b"]
    screen.print(f"{report['events']:,} events, {report['users']:,} users, {report['items']:,} items")
    table = Table(box=None, header_style="bold")
    for name in ("", first["name"], second["name"], "difference", "95 %"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    names = {"hit_rate@10": "HR@10", "ndcg@10": "NDCG@10", "rating_rmse": "rating RMSE", "auc": "AUC"}
    for key, title in names.items():
        if (apart := report["difference"].get(key)) is not None:
            table.add_row(
                title, f"{first[key]:.4f}", f"{second[key]:.4f}", f"{apart['value']:+.4f}",
                f"{apart['low']:+.4f} .. {apart['high']:+.4f}",
            )  # fmt: skip
    screen.print(table)
    screen.print(f"[{_COLOURS.get(report['verdict'], 'yellow')}]{report['says']}")


def add(app: typer.Typer) -> None:
    """Add these verbs to the console command."""
    app.command("export", rich_help_panel=LEARN)(export)
    app.command("compare", rich_help_panel=LEARN)(compare)
