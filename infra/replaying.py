"""`freshet replay` for people: reads options, shows progress, prints the report. The work is in streaming/replay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from models import metrics
from streaming.replay.logs import EXCLUSIONS, ReplayError, ReplayLog, read_log
from streaming.replay.prequential import Exclusion, Protocol, Replay, run

if TYPE_CHECKING:
    from rich.console import Console


def parse_columns(text: str) -> dict[str, str]:
    """Read `user=a,item=b,...`; raises ReplayError."""
    pairs = [part.split("=", 1) for part in text.split(",") if part.strip()]
    for pair in pairs:
        if len(pair) != 2 or not pair[1]:
            raise ReplayError(f"--columns: expected user=...,item=...,ts=..., got {'='.join(pair)!r}")
    return {name.strip(): column.strip() for name, column in pairs}


def replay(
    path: Path,
    form: str,
    columns: str,
    exclude: str | None,
    limit: int | None,
    seed: int,
    screen: Console | None,
    *,
    protocol: str = "line",
    live: bool = False,
) -> dict[str, Any]:
    """Read and replay a log, with a progress bar where there is a screen; returns the report."""
    if exclude not in (None, "seen", "invoice", "none"):
        raise ReplayError(f"--exclude: expected seen, invoice or none, got {exclude!r}")
    if protocol not in ("line", "basket") or (live and protocol != "line"):
        raise ReplayError(f"--protocol: expected line or basket (basket not with --live), got {protocol!r}")
    log = read_log(path, form, parse_columns(columns), limit)
    exclusion = cast(Exclusion, exclude or EXCLUSIONS[form])
    if live:
        return _live(log, exclusion, seed, screen)
    if screen is None:
        return run(log, exclusion=exclusion, protocol=cast(Protocol, protocol), seed=seed)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns_shown = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    with Progress(*columns_shown, console=screen, transient=True) as bar:
        task = bar.add_task("replay", total=len(log.events), rate="", figures="")

        def progress(done: int, state: Replay) -> None:
            recent = np.array(state.trail.ranks[-5000:])
            ndcg = metrics.summary(recent[~np.isnan(recent)])["ndcg@10"]
            speed = bar.tasks[task].speed
            bar.update(
                task, completed=done, rate=f"{speed:,.0f}/s" if speed else "", figures=f"NDCG@10 lately {ndcg:.3f}"
            )

        return run(log, exclusion=exclusion, protocol=cast(Protocol, protocol), seed=seed, progress=progress)


def _live(log: ReplayLog, exclusion: Exclusion, seed: int, screen: Console | None) -> dict[str, Any]:
    from infra.replaying_live import run_live

    if screen is None:
        return run_live(log, exclusion=exclusion, seed=seed)
    from rich.progress import Progress

    with Progress(console=screen, transient=True) as bar:
        task = bar.add_task("live", total=len(log.events))
        return run_live(log, exclusion=exclusion, seed=seed, tell=lambda done: bar.update(task, completed=done))


def show(result: dict[str, Any], screen: Console) -> None:
    """Print a report as tables."""
    from rich.table import Table

    screen.print(
        f"[bold]{result['events']:,}[/] events, {result['users']:,} users, {result['items']:,} items;"
        f" {result['never_seen_share']:.1%} of the targets never seen before (not averaged);"
        f" learn {result['learn_us_per_event']:.0f} us, recommend {result['recommend_us_per_request']:.0f} us"
    )
    table = Table(box=None, header_style="bold")
    for name in ("", "HR@10", "NDCG@10", "MRR@10"):
        table.add_column(name, justify="left" if not name else "right")
    rows = {"Freshet": result["metrics"]}
    rows |= {f"popularity, {name}": row for name, row in result["baseline"]["half_lives"].items()}
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.4f}" for key in ("hit_rate@10", "ndcg@10", "mrr@10")))
    screen.print(table)
    if "live" in result:
        live = result["live"]
        screen.print(
            f"live: {live['seconds']:.0f} s, {live['events_per_s']:.0f} events/s; NDCG@10 in process"
            f" {live['in_process']['ndcg@10']:.4f}, differs by {live['ndcg_difference']:.4f}"
            f" (allowed {live['allowed']:.4f})"
        )
    lead = result["lead"]
    best = result["baseline"]["popularity"]["half_life"]
    screen.print(
        f"NDCG@10 ahead of popularity {best}, the best in hindsight: {lead['ndcg@10']:+.4f}"
        f" [{lead['low']:+.4f}, {lead['high']:+.4f}] (95 %, over users)"
    )
    if "auc" in result:
        judged = result["judged"]
        screen.print(
            f"likes above hates: AUC {result['auc']:.4f}, mean of {judged['users']:,} users {judged['user_auc']:.4f}"
            f" ({judged['likes']:,} likes, {judged['hates']:,} hates)"
        )
    if "rating_rmse" in result:
        screen.print(f"ratings, each predicted before it was learnt: RMSE {result['rating_rmse']:.4f}")
    for title, part in (("history", "by_history_length"), ("channel", "channels")):
        pieces = [f"{name} {_figure(row)}" for name, row in result[part].items()]
        screen.print(f"by {title}: " + "  ".join(pieces))
    _show_cold(result["cold_start"], screen)
    if result["catalogue"]["bad_rows"]:
        screen.print(f"[yellow]{result['catalogue']['bad_rows']:,} catalogue rows could not be read[/], the first:")
        screen.print("  " + result["catalogue"]["first"][0], markup=False)
    bad = result["bad_rows"]
    if bad["count"]:
        screen.print(f"[yellow]{bad['count']:,} rows could not be read[/]:")
        for row in bad["first"]:
            screen.print("  " + row, markup=False)
    for reason, count in result["dropped_rows"].items():
        screen.print(f"dropped {count:,}: {reason}")


def _show_cold(cold: dict[str, Any], screen: Console) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("earlier events", "count", "HR@10", "popularity", "NDCG@10", "popularity", "lead (95 %)"):
        table.add_column(name, justify="left" if name == "earlier events" else "right", no_wrap=True)
    for who in ("user", "item"):
        for label, row in cold[who].items():
            if row["events"]:
                alone, lead = row["popularity"], row["lead"]
                table.add_row(
                    f"{who} {label}", f"{row['events']:,}", f"{row['hit_rate@10']:.3f}",
                    f"{alone['hit_rate@10']:.3f}", f"{row['ndcg@10']:.4f}", f"{alone['ndcg@10']:.4f}",
                    f"{lead['ndcg@10']:+.4f} [{lead['low']:+.4f}, {lead['high']:+.4f}]",
                )  # fmt: skip
    screen.print(table)


def _figure(row: dict[str, Any]) -> str:
    return f"{row['ndcg@10']:.3f}" if "ndcg@10" in row else f"{row['recall']:.0%} ({row['only_share']:.1%} alone)"
