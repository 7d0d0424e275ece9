"""The verb `dead-letters`: what it asks and shows in a terminal; the work is done in streaming/.

Knows nothing about folds. Imports what works lazily, for every process of ours reads the verbs.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.recovering import servers
from infra.settings import Settings
from infra.terminal import LOOK, Data, Json, console, fail, show_json

if TYPE_CHECKING:
    from rich.console import Console

    from streaming.dead_letters import Letter


def find_letters(settings: Settings, data: str) -> list[Letter]:
    """Return the dead letters."""
    from streaming.dead_letters import letters

    with servers(settings, data) as ready:
        return asyncio.run(letters(ready))


def show_letters(found: list[Letter], screen: Console) -> None:
    """Show dead letters as a table, newest last."""
    if not found:
        screen.print("No dead letters: every record so far could be folded.")
        return
    from rich.table import Table

    table = Table("position", "reason", "original", box=None, header_style="bold", pad_edge=False)
    for letter in found[-200:]:
        table.add_row(letter.name, letter.reason, letter.text()[:80])
    screen.print(table)
    screen.print(f"{len(found)} in all. [bold]freshet dead-letters show POSITION[/] shows one whole.")


def letter_as_dict(letter: Letter) -> dict[str, Any]:
    """Return a dead letter for `--json`."""
    return {"position": letter.name, "reason": letter.reason, "at": letter.at, "original": letter.text()}


# -- the verbs --------------------------------------------------------------------------------------------------------


dead_letters = typer.Typer(help="Read what could not be folded, with its reason.", no_args_is_help=True)


@dead_letters.command("list")
def dead_letters_list(data: Data = None, as_json: Json = False) -> None:
    """List every dead letter: where it came from, why, how it began."""
    chosen = Settings.load(data)
    found = find_letters(chosen, chosen.data)
    if as_json:
        show_json([letter_as_dict(letter) for letter in found])
    else:
        show_letters(found, console())


@dead_letters.command("show")
def dead_letters_show(
    position: Annotated[str, typer.Argument(help="topic:partition:offset, as `list` shows it.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Show one dead letter whole."""
    chosen = Settings.load(data)
    for letter in find_letters(chosen, chosen.data):
        if letter.name == position:
            shown = letter_as_dict(letter)
            if as_json:
                show_json(shown)
            else:
                console().print(*(f"[bold]{name}[/] {value}" for name, value in shown.items()), sep="\n")
            return
    fail(f"no dead letter at {position}; `freshet dead-letters list` shows all.")


def add(app: typer.Typer) -> None:
    """Add these verbs to the console command."""
    app.add_typer(dead_letters, name="dead-letters", rich_help_panel=LOOK)
