"""What `freshet status` tells: read from `DATA/stack.json`, the processes' own figures and the API's open routes.

Knows no Redis keys and opens no Kafka consumer; what a part knows of itself, the part is asked.
"""

from __future__ import annotations

import contextlib
import json
import urllib.request
from typing import Any

import psutil

from infra.kafka import kafka_answers
from infra.settings import Settings, read_stack
from infra.stack import folder_bytes
from infra.store import redis_answers

ROUTES = {"state": "/-/state", "topics": "/-/topics", "models": "/-/models"}


def collect(settings: Settings) -> dict[str, Any]:
    """Everything there is to tell, as plain values; parts that do not answer are None."""
    stack = read_stack(settings.data) or {}
    api = str(stack.get("api") or f"http://{settings.host}:{settings.port}")
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
        "api": {"address": api, "ready": ask(api + "/health/ready", settings.admin_key) is not None},
    }
    for name, route in ROUTES.items():
        answer[name] = ask(api + route, settings.admin_key) if answer["api"]["ready"] else None
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


def ask(url: str, key: str) -> Any:
    """The JSON that a route of the API answers; None where it does not answer, or refuses."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return json.loads(answer.read() or b"{}")
    except (OSError, ValueError):  # URLError is an OSError; a body that is no JSON tells nothing
        return None


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
    if isinstance(told["state"], dict) and (count := told["state"].get("dead_letters")) is not None:
        said = f"[yellow]{count:,} records[/]; `freshet dead-letters list` tells why" if count else "none"
        head.add_row("[bold]dead letters[/]", said)
    rows = Table(box=None, header_style="bold")
    for column in ("process", "pid", "memory MB", "CPU s"):
        rows.add_column(column, justify="left" if column == "process" else "right")
    for name, process in told["processes"].items():
        if process is None:
            rows.add_row(name, "[red]gone[/]", "", "")
        else:
            rows.add_row(name, str(process["pid"]), f"{process['rss_mb']:.0f}", f"{process['cpu_s']:.1f}")
    parts: list[Any] = [head]
    parts += [rows] if told["processes"] else ["No stack runs in this folder: `freshet up` starts one."]
    for name in ROUTES:
        if isinstance(told[name], dict):
            shown = {key: value for key, value in told[name].items() if key != "memory"}
            parts.append(facts(name, shown))
            if memory := told[name].get("memory"):
                parts.append(facts("memory", {**memory["redis"], "processes_mb": memory["process_mb"]}))
    return Group(*parts)


def facts(title: str, values: dict[str, Any]) -> Any:
    """Names and values as a table for people."""
    from rich.table import Table

    rows = Table(box=None, show_header=False, title=title, title_justify="left", title_style="bold")
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        rows.add_row(name, text if len(text) < 300 else text[:300] + " ...")
    return rows
