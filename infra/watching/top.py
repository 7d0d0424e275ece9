"""What `freshet top` tells: rising items, items shown most, best arms, busiest topics, slowest stages.

Rates are differences between two looks at the API. Knows nothing about how the figures came to be.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from infra.telemetry import quantile
from infra.watching.asking import Api
from infra.watching.status import escaped

if TYPE_CHECKING:
    from rich.console import Console

By = Literal["rising", "shown", "arms", "topics", "stages"]
VIEWS: Final[dict[By, str]] = {
    "rising": "items whose share of the last quarter of an hour exceeds that of their day",
    "shown": "items shown most of all",
    "arms": "items with the best click posterior",
    "topics": "topics by records a second",
    "stages": "routes, stages of a slate, folds (accepted to applied) by seconds in all since the look before",
}
KEYS: Final[dict[str, By]] = {"r": "rising", "s": "shown", "a": "arms", "t": "topics", "g": "stages"}
SORTS: Final[dict[By, str]] = {"rising": "rising", "shown": "shown", "arms": "mean"}
TIMED: Final = {"freshet_http_seconds": "route", "freshet_slate_seconds": "stage", "freshet_applied_seconds": "fold"}

Samples = Mapping[str, Mapping[tuple[tuple[str, str], ...], float]]


class Top:
    """Looks at one API again and again; a rate is that since the look before, None at the first."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self._topics: tuple[float, dict[str, list[int]]] = (0.0, {})
        self._series: tuple[float, Samples] = (0.0, {})

    def look(self, by: By, most: int) -> list[dict[str, Any]] | None:
        """Return the rows of one view, the first the most important; None where the API does not answer."""
        if by == "topics":
            return self._busiest(most)
        if by == "stages":
            return self._slowest(most)
        told = self.api.ask(f"/-/bandits?sort={SORTS[by]}&limit={min(most, 200)}")
        return None if told is None else list(told["arms"])

    def _busiest(self, most: int) -> list[dict[str, Any]] | None:
        told, now = self.api.ask("/-/topics"), time.monotonic()
        if told is None:
            return None
        (at, before), ends = self._topics, {row["topic"]: row["end_offsets"] for row in told["topics"]}
        self._topics = (now, ends)
        rows = []
        for name, offsets in ends.items():
            rates = [(end - was) / (now - at) for end, was in zip(offsets, before.get(name, []), strict=False)]
            rows.append(
                {
                    "topic": name, "partitions": len(offsets), "records": sum(offsets),
                    "rate": round(sum(rates), 2) if rates else None,
                    "busiest_partition": rates.index(max(rates)) if rates and max(rates) > 0 else None,
                    "busiest_rate": round(max(rates), 2) if rates else None,
                }
            )  # fmt: skip
        rows.sort(key=lambda row: (-(row["rate"] or 0.0), -row["records"]))
        return rows[:most]

    def _slowest(self, most: int) -> list[dict[str, Any]] | None:
        found, now = self.api.series(), time.monotonic()
        if not found:
            return None
        (at, before), self._series = self._series, (now, found)
        rows: list[dict[str, Any]] = []
        for series, label in TIMED.items():
            since = {name: counted(found, before, series + name, label) for name in ("_bucket", "_count", "_sum")}
            for what, edges in since["_bucket"].items():
                count = edges.get(math.inf, 0.0)
                if count <= 0:
                    continue
                seconds = since["_sum"][what][math.inf]
                ordered = sorted(edges.items())
                rows.append(
                    {
                        "kind": label, "what": what, "rate": round(count / (now - at), 2) if at else None,
                        "count": round(count), "seconds": round(seconds, 4),
                        "mean_ms": round(1000 * seconds / count, 3),
                        "p50_ms": round(1000 * quantile(ordered, 0.5), 3),
                        "p99_ms": round(1000 * quantile(ordered, 0.99), 3),
                    }
                )  # fmt: skip
        rows.sort(key=lambda row: -row["seconds"])
        return rows[:most]


def counted(found: Samples, before: Samples, name: str, label: str) -> dict[str, dict[float, float]]:
    """Return what a series counted since the look before, by a label and upper edge (inf where it has none)."""
    out: dict[str, dict[float, float]] = {}
    for labels, value in found.get(name, {}).items():
        held = dict(labels)
        edges, edge = out.setdefault(held[label], {}), float(held.get("le", "inf"))
        edges[edge] = edges.get(edge, 0.0) + value - before.get(name, {}).get(labels, 0.0)
    return out


# -- for people -------------------------------------------------------------------------------------------------------


def picture(top: Top, by: By, console: Console) -> Any:
    """Return one view for a terminal of this size."""
    from rich.console import Group
    from rich.table import Table

    rows = top.look(by, max(3, console.height - 6))
    head = Table.grid(expand=True)
    head.add_column()
    head.add_column(justify="right")
    head.add_row(f"[bold]Freshet top[/] {top.api.address}", f"{time.strftime('%H:%M:%S')}  [dim]q ends[/]")
    return Group(head, _tabs(by), "", f"[red]{top.api.why_not()}[/]" if rows is None else table(by, rows))


def _tabs(by: By) -> str:
    tabs = (f"[reverse] {key} {view} [/]" if view == by else f"[dim] {key} [/]{view} " for key, view in KEYS.items())
    return " ".join(tabs)


def table(by: By, rows: list[dict[str, Any]]) -> Any:
    """Return the rows of one view for people."""
    from rich.table import Table

    shown = Table(box=None, header_style="bold", pad_edge=False, title=VIEWS[by], title_justify="left",
                  title_style="dim")  # fmt: skip
    columns = {"topics": _topic, "stages": _stage, "rising": _rising}.get(by, _arm)
    for at, name in enumerate(columns(None)):
        shown.add_column(name, justify="right" if at else "left", no_wrap=True, overflow="ellipsis")
    for row in rows:
        shown.add_row(*columns(row))
    return shown if rows else "[dim]nothing yet[/]"


def _arm(row: Mapping[str, Any] | None) -> tuple[str, ...]:
    if row is None:
        return "item", "shown", "15 min", "clicks", "mean", "95 %", "new"
    return (
        escaped(row["title"] or row["item_id"]), f"{row['shown']:,}", f"{100 * row['share']:.1f} %",
        f"{row['successes']:.0f}/{row['exposures']:.0f}", f"{row['mean']:.3f}", f"{row['low']:.2f}-{row['high']:.2f}",
        "new" if row["still_exploring"] else "",
    )  # fmt: skip


def _rising(row: Mapping[str, Any] | None) -> tuple[str, ...]:
    item, *rest = _arm(row)
    return (item, "rising" if row is None else f"x {row['rising']:.1f}", *rest)


def _topic(row: Mapping[str, Any] | None) -> tuple[str, ...]:
    if row is None:
        return "topic", "records/s", "records", "partitions", "busiest partition"
    busiest = "" if row["busiest_partition"] is None else f"{row['busiest_partition']}: {row['busiest_rate']:.1f}/s"
    rate = "" if row["rate"] is None else f"{row['rate']:.1f}"
    return row["topic"], rate, f"{row['records']:,}", str(row["partitions"]), busiest


def _stage(row: Mapping[str, Any] | None) -> tuple[str, ...]:
    if row is None:
        return "what", "", "each s", "mean ms", "p50 ms", "p99 ms", "s in all"
    rate = f"{row['rate']:.1f}" if row["rate"] is not None else ""
    figures = (f"{row[name]:.2f}" for name in ("mean_ms", "p50_ms", "p99_ms"))
    return row["what"], row["kind"], rate, *figures, f"{row['seconds']:.2f}"
