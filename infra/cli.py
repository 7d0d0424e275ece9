"""The console command `freshet`: the composition root; imports every other module lazily, inside its verbs."""

from __future__ import annotations

import typer

app = typer.Typer(name="freshet", no_args_is_help=True, add_completion=False)


@app.callback()
def root() -> None:
    """A recommender that learns from every event as it happens."""


def main() -> None:
    """Run the console command."""
    app()
