"""How the command line speaks: options that verbs share, help panels, errors, JSON; knows nothing of any verb."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

RUN, LEARN, LOOK, PROCESS = "Run", "Try and measure", "Look inside", "Single processes (what `up` runs)"
Data = Annotated[
    Path | None, typer.Option(help="Data folder of the stack; default .freshet.", metavar="DIR", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def fail(message: str, code: int = 1) -> NoReturn:
    """Say what is wrong and end."""
    typer.echo(typer.style("freshet: ", fg="red", bold=True, bg=None) + message, err=True)
    raise SystemExit(code)


def console(*, err: bool = False) -> Console:
    """Where people read."""
    from rich.console import Console

    return Console(stderr=err, highlight=False)


def show_json(value: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(value, indent=2, default=str))


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end like Ctrl-C."""
    import signal

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
