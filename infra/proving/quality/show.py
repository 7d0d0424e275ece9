"""`freshet bench quality` in a terminal: options, progress, the table, the plot; the work is done in run.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.replaying import parse_columns
from infra.terminal import console, show_json
from streaming.replay.logs import EXCLUSIONS, ReplayError, read_log

if TYPE_CHECKING:
    from rich.console import Console


def quality_verb(
    data: Path | None, form: str, columns: str, protocol: str, exclude: str | None, limit: int | None,
    only: str, folder: Path, freshness: int, *, as_json: bool, picture: Path | None,
) -> None:  # fmt: skip
    """Read the log, run the bench with a progress bar, print the report."""
    from infra.proving.quality.run import bench

    if data is None:
        raise ReplayError("bench quality: expected a log to rank, got none; name it: --data PATH --format FORMAT")
    log = read_log(data, form, parse_columns(columns), limit)
    exclusion = exclude or EXCLUSIONS.get(form, "none")
    chosen = [name.strip() for name in only.split(",") if name.strip()]
    screen = console(err=True)
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*shown, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        before = ""

        def advance(what: str, done: int, total: int) -> None:
            nonlocal before
            if what != before:
                bar.reset(task, description=what, total=total)
                before = what
            bar.update(task, completed=done, total=total)

        report = bench(
            log, protocol=protocol, exclusion=exclusion, folder=folder, only=chosen or None, freshness=freshness,
            advance=advance,
        )  # fmt: skip
    report = {"data": data.name, "format": form, "limit": limit, **report}
    if picture is not None:
        plot(report, str(picture))
    if as_json:
        show_json(report)
    else:
        show(report, console())


def show(report: dict[str, Any], screen: Console) -> None:
    """Print the report: one line a method, the best reference first."""
    from rich.table import Table

    screen.print(
        f"[bold]{report['data']}[/], protocol {report['protocol']}, excluded: {report['exclusion']};"
        f" {report['events']:,} events, {report['counted']:,} targets counted ({report['never_seen_share']:.1%} never"
        f" seen before), {report['users']:,} users, {report['items']:,} items"
    )
    screen.print(f"[dim]references tuned on the first {report['tuned_on']:,} events; fits: {report['refits']}")
    rows = {"Freshet": report.get("ours", {}), **report["references"]}
    ranked = {name: row for name, row in rows.items() if "ndcg@10" in row}
    if ranked:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for name in ("", "HR@10", "NDCG@10", "95 %", "ahead by, NDCG@10", "s", "chosen"):
            table.add_column(name, justify="left" if name in ("", "chosen") else "right", overflow="fold")
        for name in sorted(ranked, key=lambda n: (n != "Freshet", -ranked[n]["ndcg@10"])):
            row, lead = ranked[name], report["lead"].get(name, {})
            table.add_row(
                name + (" *" if row.get("judged_from") else ""), f"{row['hit_rate@10']:.4f}", f"{row['ndcg@10']:.4f}",
                _interval(row["ndcg@10_interval"], plain=True), _lead(lead, "ndcg@10"), f"{row.get('seconds', 0):.0f}",
                ", ".join(f"{k} {v}" for k, v in (row.get("chosen") or _half_life(row)).items()),
            )  # fmt: skip
        screen.print(table)
        if any(row.get("judged_from") for row in ranked.values()):
            screen.print("[dim]* learns the first 20 % and is judged, as is the lead over it, on the rest")
    for key, title in (("auc", "likes above hates, AUC"), ("auc_per_user", "AUC within users"),
                       ("rating_rmse", "error of predicted ratings, RMSE")):  # fmt: skip
        found = {name: row[key] for name, row in rows.items() if key in row}
        if not found:
            continue
        table = Table(title, "", "Freshet minus it", box=None, header_style="bold", pad_edge=False)
        for name in sorted(found, key=lambda n: found[n] * (1 if key == "rating_rmse" else -1)):
            table.add_row(name, f"{found[name]:.4f}", _lead(report["lead"].get(name, {}), key))
        screen.print(table)
    if "freshness" in report:
        _freshness(report["freshness"], screen)
    for row in report["bad_rows"]["first"][:3]:
        screen.print("[yellow]could not be read:[/] " + row)


def _freshness(told: dict[str, Any], screen: Console) -> None:
    from rich.table import Table

    table = Table("NDCG@10, held back by", *told["learning"], box=None, header_style="bold", pad_edge=False)
    for name, title in (("user_state", "user state"), ("learning", "learning")):
        table.add_row(title, *(f"{row['ndcg@10']:.4f}" for row in told[name].values()))
    screen.print(table, f"[dim]freshness over the first {told['events']:,} events, s of stream time")


def _half_life(row: dict[str, Any]) -> dict[str, Any]:
    return {"half_life": row["half_life"]} if "half_life" in row else {}


def _lead(lead: dict[str, Any], key: str) -> str:
    if key not in lead:
        return ""
    return f"{lead[key]:+.4f} " + (_interval(lead[f"{key}_interval"]) if f"{key}_interval" in lead else "")


def _interval(ends: list[float], *, plain: bool = False) -> str:
    low, high = ends
    return f"[{low:.4f}, {high:.4f}]" if plain else f"[{low:+.4f}, {high:+.4f}]"


def plot(report: dict[str, Any], path: str) -> None:
    """Draw NDCG@10 over the stream, ours beside the five best references, and the freshness curve, into a picture."""
    try:
        import matplotlib
    except ImportError as error:
        raise ReplayError("--plot: needs matplotlib; install freshet[plot]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    fresh = report.get("freshness")
    figure, axes = pyplot.subplots(
        1, 2 if fresh else 1, figsize=(14 if fresh else 9, 4.5), layout="constrained", squeeze=False
    )
    axis = axes[0][0]
    references = sorted(report["references"].items(), key=lambda pair: -pair[1].get("ndcg@10", -1.0))[:5]
    for name in ["ours", *(name for name, row in references if "ndcg@10" in row)]:
        periods = [period for period in report["over_time"].get(name, ()) if period["events"]]
        if periods:
            places = [report["events"] * (i + 1) / len(periods) for i in range(len(periods))]
            axis.plot(places, [period["ndcg@10"] for period in periods], linewidth=2.5 if name == "ours" else 1.2,
                      label="Freshet" if name == "ours" else name.replace("_", " "))  # fmt: skip
    axis.set(xlabel="events", ylabel="NDCG@10", ylim=(0, None), title=report["data"])
    axis.legend(frameon=False)
    if fresh:
        for name, title in (("user_state", "user state"), ("learning", "learning")):
            axes[0][1].plot(list(fresh[name]), [row["ndcg@10"] for row in fresh[name].values()], "o-", label=title)
        axes[0][1].set(xlabel="held back by", ylabel="NDCG@10", ylim=(0, None),
                       title=f"what freshness is worth, first {fresh['events']:,} events")  # fmt: skip
        axes[0][1].legend(frameon=False)
    for each in axes[0]:
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
