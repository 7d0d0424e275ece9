"""How the command line speaks: options that verbs share, help panels, errors, JSON; knows nothing of any verb."""

from __future__ import annotations

import json
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
