"""What `freshet status` tells: read from `DATA/stack.json`, the processes' own figures and the API's open routes.

Knows no Redis keys and opens no Kafka consumer; what a part knows of itself, the part is asked.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import psutil

from infra.kafka import kafka_answers
from infra.settings import Settings, read_stack
from infra.stack import folder_bytes
from infra.store import redis_answers
from infra.watching.asking import Api, Frames

if TYPE_CHECKING:
    from rich.console import Console

ROUTES: Final = {"state": "/-/state", "topics": "/-/topics", "models": "/-/models"}
STALE_S: Final = 5.0
"""Figures told longer ago are not shown as those of now, s."""
TYPES: Final = ("click", "dwell", "rating", "action", "view", "impression", "alias", "erasure")


def collect(settings: Settings) -> dict[str, Any]:
    """Everything there is to tell, as plain values; parts that do not answer are None."""
    stack, api = read_stack(settings.data) or {}, Api(settings)
    answer: dict[str, Any] = {
        "data": settings.data,
        "data_mb": round(folder_bytes(settings.data_path) / 1e6, 1),
        "namespace": settings.namespace,
        "supervisor": stack.get("supervisor") if psutil.pid_exists(int(stack.get("supervisor") or -1)) else None,
        "processes": {name: _process(pid) for name, pid in (stack.get("processes") or {}).items()},
        "kafka": {
            "address": _masked(settings, "kafka"),
            "answers": bool(settings.kafka) and kafka_answers(settings.kafka),
        },
        "redis": {"address": _masked(settings, "redis"), "answers": _redis_answers(settings)},
        "api": {"address": api.address, "ready": api.ask("/health/ready") is not None},
    }
    for name, route in ROUTES.items():
        answer[name] = api.ask(route) if answer["api"]["ready"] else None
    return answer


def _redis_answers(settings: Settings) -> bool:
    return bool(settings.redis) and redis_answers(settings.redis)


def _masked(settings: Settings, name: str) -> object:
    return next(row["value"] for row in settings.rows() if row["name"] == name)


def _process(pid: int) -> dict[str, Any] | None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        cpu = process.cpu_times()
        return {
            "pid": pid,
            "rss_mb": round(process.memory_info().rss / 1e6, 1),
            "cpu_s": round(cpu.user + cpu.system, 2),
            "started": process.create_time(),
        }
    return None


# -- once -------------------------------------------------------------------------------------------------------------


def table(told: dict[str, Any]) -> Any:
    """The same for people."""
    from rich.console import Group
    from rich.table import Table

    head = Table.grid(padding=(0, 2))
    yes = {True: "[green]answers[/]", False: "[red]does not answer[/]"}
    head.add_row("[bold]Kafka[/]", told["kafka"]["address"] or "-", yes[told["kafka"]["answers"]])
    head.add_row("[bold]Redis[/]", str(told["redis"]["address"]) or "-", yes[told["redis"]["answers"]])
    head.add_row(
        "[bold]API[/]", told["api"]["address"], "[green]ready[/]" if told["api"]["ready"] else "[red]not ready[/]"
    )
    head.add_row("[bold]data[/]", told["data"], f"{told['data_mb']} MB")
    rows = Table(box=None, header_style="bold")
    for column in ("process", "pid", "memory MB", "CPU s", "since"):
        rows.add_column(column, justify="left" if column == "process" else "right")
    for name, process in told["processes"].items():
        if process is None:
            rows.add_row(name, "[red]gone[/]", "", "", "")
        else:
            since = duration(time.time() - process["started"])
            rows.add_row(name, str(process["pid"]), f"{process['rss_mb']:.0f}", f"{process['cpu_s']:.1f}", since)
    parts: list[Any] = [head, ""]
    parts += [rows] if told["processes"] else ["No stack runs in this folder: `freshet up` starts one."]
    for name, shown in (("state", _state), ("topics", _topics), ("models", _models)):
        if isinstance(told[name], dict):
            parts += ["", facts(name, shown(told[name]))]
    if told["processes"]:
        parts += ["", "[dim]--watch follows it, --json has all of it; `freshet top` shows what is busy.[/]"]
    return Group(*parts)


def _state(state: Mapping[str, Any]) -> dict[str, Any]:
    snapshot, impressions = state["snapshot"], state["impressions"]
    kept, overload = state["memory"]["redis"], state["overload"]
    shed = sum(overload["shed"].values())
    letters = state["dead_letters"]
    degraded = f"[red]yes[/]: {snapshot['reason']}" if state["degraded"] else "no"
    shown = {
        "degraded": degraded,
        "dead letters": f"[yellow]{letters:,} records[/]; `freshet dead-letters list` tells why" if letters else "none",
        "behind": ", ".join(f"{fold} fold {count:,} events" for fold, count in overload["lag"].items()) or "nothing",
        "held here": f"{snapshot['items']['rows']:,} items, step {snapshot['model']['step']:,} of the weights",
        "slates logged": f"{impressions['appended']:,}; lost {impressions['dropped'] + impressions['failed']:,}",
        "refused (429)": f"{shed:,}" if shed else "none",
        "kept in Redis": f"{kept['users']:,} users, {kept['items']:,} items, {kept['learnt']:,} learnt items; "
        + ", ".join(f"{kind} {size:g} MB" for kind, size in kept["mb"].items()),
    }
    if state["unreadable_profiles"]:
        shown["unreadable"] = f"[red]{len(state['unreadable_profiles'])} profiles[/]; GET /-/state names them"
    return shown


def _topics(topics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        row["topic"]: f"{sum(row['end_offsets']):,} records"
        + (f" in {row['partitions']} partitions" if row["partitions"] > 1 else "")
        for row in topics["topics"]
    }


def _models(models: Mapping[str, Any]) -> dict[str, Any]:
    versions = [one for one in models["versions"] if not one["refused"]]
    newest = f"{versions[-1]['version']:,}, {duration(time.time() - versions[-1]['made'])} old" if versions else "none"
    pinned = models["pinned"]
    return {
        "served": f"step {models['step']:,}" + (f", of pinned version {pinned:,}" if pinned else ""),
        "learnt": f"step {models['learnt']['step']:,}, {models['vectors']['rows']:,} item vectors",
        "versions": f"{len(versions)} kept; newest {newest}; refused {models['refused']}",
        "policy": ", ".join(f"{policy} on {surface}" for surface, policy in models["policy"]),
    }


def facts(title: str, values: dict[str, Any]) -> Any:
    """Names and values as a table for people."""
    from rich.table import Table

    rows = Table(box=None, show_header=False, title=title, title_justify="left", title_style="bold")
    rows.add_column(style="dim")
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        rows.add_row(name, text if len(text) < 300 else text[:300] + " ...")
    return rows


def duration(seconds: float) -> str:
    """Return a length of time in the largest unit that leaves at least one of it."""
    for unit, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{max(0.0, seconds):.0f} s"


# -- watched ----------------------------------------------------------------------------------------------------------


class Watch:
    """The live figures of a stack, and of its processes as far as they run on this machine."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.api = settings, Api(settings)
        self.frames = Frames(self.api)
        self._cpu: dict[int, tuple[float, float]] = {}

    def start(self) -> None:
        """Begin to follow; waits up to two seconds for the first figures."""
        self.frames.start()
        self.frames.new.wait(2.0)

    def told(self) -> dict[str, Any]:
        """Return what is known now, as plain values."""
        processes = {name: self._process(pid) for name, pid in (self._stack().get("processes") or {}).items()}
        frames = self.frames
        parts = {name: frames.fresh(name, STALE_S) for name in ("users", "items", "api", "world")}
        return {
            "t": frames.second or None, "api": self.api.address, "problem": frames.problem or None,
            "figures": {**parts, "learner": frames.fresh("learner")}, "processes": processes,
            "broke": list(frames.news),
        }  # fmt: skip

    def _stack(self) -> dict[str, Any]:
        return read_stack(self.settings.data) or {}

    def _process(self, pid: int) -> dict[str, Any] | None:
        found = _process(pid)
        if found is None:
            return None
        now = time.monotonic()
        cpu, at = self._cpu.get(pid, (found["cpu_s"], now))
        self._cpu[pid] = (found["cpu_s"], now)
        return {**found, "cpu_share": round((found["cpu_s"] - cpu) / (now - at), 3) if now - at > 0.05 else None}

    def line(self) -> str:
        """Return what is known now as one plain line."""
        told = self.told()
        users, api, learner = (told["figures"][name] for name in ("users", "api", "learner"))
        clock = time.strftime("%H:%M:%S", time.localtime(told["t"] or time.time()))
        if told["problem"]:
            return f"{clock}  {self.api.address}: {told['problem']}"
        gone = [name for name, process in told["processes"].items() if process is None]
        says = [
            f"events {users.get('events', 0):g}/s", f"applied {_spread(users, 'applied', 'p50', 'p99')}",
            f"lag {users.get('lag', 0):g}", f"lookups {api.get('lookups_s', 0):g}/s",
            _spread(api, "lookup", "p50", "p99"), f"step {learner.get('step', api.get('step', 0)):g}",
        ]  # fmt: skip
        bad = ["DEGRADED"] * bool(api.get("degraded")) + [f"GONE {name}" for name in gone]
        return "  ".join([clock, *says, *bad])

    def picture(self, console: Console) -> Any:
        """Return the same for a terminal of this size."""
        from rich.console import Group
        from rich.table import Table

        told = self.told()
        users, items, api, world, learner = (
            told["figures"][name] for name in ("users", "items", "api", "world", "learner")
        )
        head = Table.grid(expand=True)
        head.add_column()
        head.add_column(justify="right")
        state = "[red]degraded[/]" if api.get("degraded") else "[green]ready[/]"
        if told["problem"]:
            state = f"[red]{told['problem']}[/]"
        clock = time.strftime("%H:%M:%S", time.localtime(told["t"] or time.time()))
        head.add_row(f"[bold]Freshet[/] {self.api.address}  {state}", f"{clock}  [dim]q ends[/]")
        rows = Table.grid(padding=(0, 2), expand=True)
        rows.add_column(style="bold", no_wrap=True)
        rows.add_column(no_wrap=True)
        rows.add_column(style="dim", ratio=1, no_wrap=True, overflow="ellipsis")
        for row in _figures(users, items, api, learner, world):
            rows.add_row(*row)
        processes = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("process", "pid", "CPU %", "memory MB", "up"):
            processes.add_column(column, justify="left" if column == "process" else "right")
        for name, process in told["processes"].items():
            if process is None:
                processes.add_row(name, "[red]gone[/]", "", "", "")
                continue
            share = process["cpu_share"]
            processes.add_row(
                name, str(process["pid"]), "" if share is None else f"{100 * share:.0f}",
                f"{process['rss_mb']:.0f}", duration(time.time() - process["started"]),
            )  # fmt: skip
        left = max(1, console.height - 14 - len(told["processes"]))
        news = [
            f"[dim]{time.strftime('%H:%M:%S', time.localtime(line['t']))}[/] {escaped(line['what'])}"
            for line in told["broke"][-left:]
        ]
        broke = Table.grid()
        broke.add_column(no_wrap=True, overflow="ellipsis")
        for line in reversed(news):
            broke.add_row(line)
        quiet = "[dim]nothing since this API process started[/]"
        return Group(head, "", rows, "", processes, "", "[bold]broke last[/]", broke if news else quiet)


def escaped(text: str) -> str:
    """Return a text that rich shows as it is."""
    from rich.markup import escape

    return escape(text)


def _figures(
    users: Mapping[str, Any], items: Mapping[str, Any], api: Mapping[str, Any], learner: Mapping[str, Any],
    world: Mapping[str, Any],
) -> list[tuple[str, str, str]]:  # fmt: skip
    """Return (what, figures, details) of each line."""
    kinds = [f"{kind} {users[f'events_{kind}']:g}" for kind in TYPES if users.get(f"events_{kind}")]
    lags = {name.removeprefix("lag_"): count for name, count in users.items() if name.startswith("lag_") and count}
    worst = sorted(lags.items(), key=lambda lag: -lag[1])[:4]
    stages = [f"{stage} {api[f'{stage}_p50_ms']:.1f}" for stage in ("profile", "recommend", "answer")
              if f"{stage}_p50_ms" in api]  # fmt: skip
    losses = [f"{name} {learner[f'{name}_loss']:.3f}" for name in ("encoder", "ranker", "click")
              if f"{name}_loss" in learner]  # fmt: skip
    refused = [f"{api[f'{name}_s']:g}/s {said}" for name, said in (("shed", "shed"), ("errors", "failed"))
               if api.get(f"{name}_s")]  # fmt: skip
    found = [
        ("events", f"{users.get('events', 0):g}/s", "  ".join(kinds) or "nobody does anything"),
        ("freshness", _spread(users, "applied", "p50", "p95", "p99"), "p50/p95/p99 from accepted to applied"),
        ("changed", _spread(api, "changed", "p50", "p95", "p99"), "the same to the answer that shows it (after=)"),
        ("lag", f"{users.get('lag', 0):g} events", "  ".join(f"partition {p}: {n:g}" for p, n in worst)
         or f"item agent {items.get('lag', 0):g}"),
        ("lookups", f"{api.get('lookups_s', 0):g}/s  {_spread(api, 'lookup', 'p50', 'p95', 'p99')}",
         "  ".join(stages + refused)),
        ("learner", f"step {learner.get('step', api.get('step', 0)):g}",
         "loss " + "  ".join(losses) if losses else "no step told yet"),
        ("items", f"{api.get('items', 0):,} may be served", f"event loop late by {api.get('loop_delay_ms', 0):.1f} ms"),
    ]  # fmt: skip
    if "ours" in world:
        clicks = (f"{name} {world[key]:.2f}" for name, key in (("popular", "popular"), ("best", "oracle")))
        found.append(("people", f"ours {world['ours']:.2f}", "clicks to expect of a slate; " + "  ".join(clicks)))
    return found


def _spread(part: Mapping[str, Any], name: str, *which: str) -> str:
    """Return percentiles of a part as `3.1/8.0/12 ms`, "-" where nothing was measured."""
    found = [part.get(f"{name}_{q}_ms") for q in which]
    if None in found:
        return "-"
    return "/".join(f"{ms:.3g}" if ms < 100 else f"{ms:.0f}" for ms in found if ms is not None) + " ms"
