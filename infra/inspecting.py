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

    table = Table("position", "reason", "original", "replayed", box=None, header_style="bold", pad_edge=False)
    for letter in found[-200:]:
        reason = letter.reason.partition("\n")[0]
        table.add_row(letter.name, reason, letter.text()[:80], "yes" if letter.replays else "")
    screen.print(table)
    screen.print(
        f"{len(found)} in all. [bold]freshet dead-letters show POSITION[/] shows one whole,"
        " [bold]replay[/] applies them once what was wrong is mended.",
    )


def letter_as_dict(letter: Letter) -> dict[str, Any]:
    """Return a dead letter for `--json`."""
    return {
        "position": letter.name, "reason": letter.reason, "at": letter.at, "original": letter.text(),
        "replayed": bool(letter.replays),
    }  # fmt: skip


# -- the verbs --------------------------------------------------------------------------------------------------------


dead_letters = typer.Typer(help="Read and replay what could not be folded, with its reason.", no_args_is_help=True)


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


@dead_letters.command("replay")
def dead_letters_replay(
    reason: Annotated[str, typer.Option(help="Only letters whose reason holds this text.")] = "",
    position: Annotated[str, typer.Option(help="Only the letter of this topic:partition:offset.")] = "",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Append the originals of dead letters to the log again: after a fix, each is applied once, however often called.

    freshet dead-letters replay --reason "stored profile"     only those
    """
    from streaming.dead_letters import replay

    chosen = Settings.load(data)
    with servers(chosen, chosen.data) as ready:
        outcome = asyncio.run(replay(ready, reason=reason, position=position))
    if as_json:
        show_json({"appended": outcome.appended, "before": outcome.before, "bad": outcome.bad})
        return
    screen = console()
    screen.print(f"{len(outcome.appended)} appended to the log, {len(outcome.before)} were replayed before.")
    for name, why in outcome.bad.items():
        screen.print(f"  {name} still cannot be read: {why}", highlight=False)


def add(app: typer.Typer) -> None:
    """Add these verbs to the console command."""
    app.add_typer(dead_letters, name="dead-letters", rich_help_panel=LOOK)
