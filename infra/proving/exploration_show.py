"""`freshet bench exploration` in a terminal: progress, the tables, the plot; the work is done in exploration.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.proving.exploration import HELD_OUT, measure, runs
from infra.terminal import console, fail, show_json

if TYPE_CHECKING:
    from rich.console import Console


def exploration_verb(seeds: int, *, as_json: bool, picture: Path | None) -> None:
    """Play that many held-out seeds with a progress bar, print the report."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    screen = console(err=True)
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*shown, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("warm-up", total=runs(seeds))
        done = -1

        def advance(what: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, description=what)

        report = measure(range(HELD_OUT, HELD_OUT + seeds), advance=advance)
    if picture is not None:
        plot(report, str(picture))
    if as_json:
        show_json(report)
    else:
        show(report, console())


def show(report: Mapping[str, Any], screen: Console) -> None:
    """Print regret by preset and policy, discovery, what was compared, and each target with what was found."""
    from rich.table import Table

    presets = list(report["regret"])
    table = Table("regret a slate", *presets, "good new items found", "impressions until then", box=None,
                  header_style="bold", pad_edge=False)  # fmt: skip
    for policy in report["regret"][presets[0]]:
        found = report["discovery"].get("drifting", {}).get(policy)
        until = report["impressions_until_fair_share"].get("drifting", {}).get(policy)
        table.add_row(
            policy, *(_ends(report["regret"][preset][policy]) for preset in presets),
            "-" if found is None else f"{found:.0%}", "-" if until is None else f"{until:.0f}",
        )  # fmt: skip
    table.add_row("[dim]knowing the items[/]", *(_ends(report["informed"][preset]) for preset in presets), "-", "-")
    screen.print(table)
    satisfaction = report["satisfaction"]
    if satisfaction:
        screen.print(
            f"satisfaction a slate, thompson, drifting: rewarded by clicks {_ends(satisfaction['click'])},"
            f" by dwell {_ends(satisfaction['dwell'])}; difference {_ends(satisfaction['difference'])}"
        )
    screen.print(f"lookup: thompson adds {report['lookup_ms_added']:.2f} ms to greedy's"
                 f" {report['lookup_ms_greedy']:.2f}, {report['lookup_ms_added_after_step']:.2f} just after a step of"
                 " the model")  # fmt: skip
    for target in report["targets"]:
        color = "green" if target["reached"] else "red"
        screen.print(f"[{color}]{'reached' if target['reached'] else 'missed'}[/] {target['name']}: {_ends(target)},"
                     f" wanted {target['wanted']:g}", highlight=False)  # fmt: skip


def _ends(found: Mapping[str, Any]) -> str:
    ends = "" if found["low"] is None else f" [dim]({found['low']:.3f} to {found['high']:.3f})[/]"
    return f"{found['mean']:.3f}{ends}"


def plot(report: Mapping[str, Any], path: str) -> None:
    """Draw regret over time after the warm-up, one panel a preset."""
    try:
        import matplotlib
    except ImportError:
        fail("--plot: needs matplotlib; install freshet[plot]", 2)
    matplotlib.use("Agg")
    from matplotlib import pyplot

    presets, block = report["regret_by_block"], report["size"]["block_s"] / 60.0
    figure, panels = pyplot.subplots(1, len(presets), figsize=(4 * len(presets), 4), sharey=True, squeeze=False)
    for panel, (preset, by_policy) in zip(panels[0], presets.items(), strict=True):
        for policy, regrets in by_policy.items():
            panel.plot([block * (k + 1) for k in range(len(regrets))], regrets, label=policy)
        panel.set_title(preset)
        panel.set_xlabel("minutes after the warm-up")
    panels[0][0].set_ylabel("regret, expected clicks a slate")
    figure.tight_layout(rect=(0.0, 0.08, 1.0, 1.0))
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
