"""What `freshet user` tells: the sequence of one user with its decaying weights, counters, and the next slate.

Knows nothing about how any of it came to be; it asks the API.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from infra.watching.asking import Api
from infra.watching.status import duration, escaped

BAR: Final = 10


def collect(api: Api, user_id: str, *, n: int) -> dict[str, Any] | None:
    """Return what is known of a user, and as `next` the slate they would get now; None where the API says nothing."""
    place = quote(user_id, safe="")
    told: dict[str, Any] | None = api.ask(f"/v1/users/{place}")
    if told is not None:
        told["next"] = api.ask(f"/v1/recommendations/{place}?n={n}&track=false")
    return told


def picture(told: Mapping[str, Any], now: float, *, most: int) -> Any:
    """Return the same for people, the newest `most` entries of the sequence."""
    from rich.console import Group
    from rich.table import Table

    parts: list[Any] = [_head(told, now), ""]
    sequence = told["sequence"]
    if sequence:
        rows = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("recent", "", "ago", "weight", "worth, half-life 1 h", "half-life 30 d"):
            rows.add_column(column, no_wrap=True, overflow="ellipsis")
        for entry in sequence[:most]:
            hour, month = (entry["decay"][half] for half in ("1h", "30d"))
            rows.add_row(
                escaped(entry["title"] or entry["item_id"] or entry["hash"]), entry["kind"],
                duration(now - entry["time"]), _weight(entry["weight"]), _bar(hour), _bar(month),
            )  # fmt: skip
        parts.append(rows)
        if len(sequence) > most:
            parts.append(f"[dim]{len(sequence) - most} older ones: --json has all that is kept[/]")
    parts += ["", *_slate(told["next"])]
    return Group(*parts)


def _head(told: Mapping[str, Any], now: float) -> str:
    name = f"[bold]{escaped(told['user_id'])}[/]"
    if told["problem"]:
        return f"{name}  [red]{escaped(told['problem'])}[/]"
    if not told["known"]:
        return f"{name}  is not known: no event of this id was applied; what follows is for a newcomer."
    counts = "  ".join(f"{kind} {count:,}" for kind, count in told["counters"].items() if count)
    since, last = duration(now - told["first_time"]), duration(now - told["last_time"])
    return f"{name}  since {since}, last {last} ago  [dim]partition {told['partition']}[/]\n{counts}"


def _slate(slate: Mapping[str, Any] | None) -> list[Any]:
    from rich.table import Table

    if slate is None:
        return ["[red]no slate: the API does not answer[/]"]
    if not slate["items"]:
        return [f"no slate: {slate.get('reason', 'nothing is left')}"]
    rows = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("next slate", "score", "from", "why"):
        rows.add_column(column, no_wrap=True, overflow="ellipsis", justify="right" if column == "score" else "left")
    for item in slate["items"]:
        title = escaped(item.get("title") or item["item_id"])
        rows.add_row(title, f"{item['score']:.3f}", item["channel"], escaped(item.get("reason") or ""))
    note = " [red]degraded[/]" if slate.get("degraded") else ""
    return [rows, f"[dim]not counted as shown; weights of step {slate['model_step']:,}[/]{note}"]


def _weight(weight: float) -> str:
    return f"[red]{weight:+g}[/]" if weight < 0 else f"{weight:+g}"


def _bar(share: float) -> str:
    return f"{'#' * round(BAR * share):<{BAR}} {share:.2f}"
