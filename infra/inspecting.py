"""The verbs `dead-letters` and `models`: what they ask and show in a terminal; the work is done in streaming/.

Knows nothing about folds, nor how the learner obeys: `models` appends a control record to `examples` and reads from
Redis what came of it. Imports what works lazily, for every process of ours reads the verbs.
"""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from infra.recovering import servers
from infra.settings import Settings
from infra.terminal import LOOK, Data, Json, console, fail, show_json

if TYPE_CHECKING:
    from rich.console import Console

    from streaming.dead_letters import Letter
    from streaming.state import ModelStore
    from streaming.training.controls import Control

T = TypeVar("T")


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


# -- versions of what is learnt ----------------------------------------------------------------------------------------


models = typer.Typer(
    help="Versions of what is learnt: list, go back, stay on one.", no_args_is_help=True, rich_markup_mode="rich"
)
Number = Annotated[int, typer.Argument(help="As `freshet models list` shows it.", metavar="VERSION", min=1)]
Wait = Annotated[float, typer.Option(help="How long to wait for the learner, s.", min=0)]


def _on_model(data: Any, work: Callable[[Settings, ModelStore], Awaitable[T]]) -> T:
    """Run work on the served generation's model."""
    from streaming.state import ModelStore, connect, live_keys

    async def run(ready: Settings) -> T:
        client = connect(ready.redis)
        try:
            return await work(ready, ModelStore(client, await live_keys(client, ready.namespace)))
        finally:
            await client.aclose()

    settings = Settings.load(data)
    with servers(settings, settings.data) as ready:
        return asyncio.run(run(ready))


async def _told(settings: Settings, store: ModelStore) -> dict[str, Any]:
    from serving.snapshot import told_versions

    return await told_versions(store)


def _when(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


@models.command("list")
def models_list(data: Data = None, as_json: Json = False) -> None:
    """List the versions that are kept, oldest first, which one is pinned, and what the guard refused.

    A version is a checkpoint of all that is learnt: one every 100,000 examples or 5 minutes. Its number is that of the
    step it was made of; losses are prequential means since the one before: less is better.
    """
    from rich.table import Table

    told = _on_model(data, _told)
    if as_json:
        show_json(told)
        return
    screen = console()
    table = Table(
        "version", "from", "at (UTC)", "examples", "items", "encoder loss", "ranker loss", "MB", "", box=None,
        header_style="bold",
    )  # fmt: skip
    for one in told["versions"]:
        losses = [f"{one['metrics'][name]:.3f}" if name in one["metrics"] else "" for name in
                  ("encoder_loss", "ranker_loss")]  # fmt: skip
        state = f"[red]refused[/]: {one['refused']}" if one["refused"] else ""
        table.add_row(
            str(one["version"]), str(one["parent"] or "the beginning"), _when(one["made"]), f"{one['learnt']:,}",
            f"{one['items']:,}", *losses, f"{one['bytes'] / 1e6:,.1f}",
            "[green]pinned[/]" if one["version"] == told["pinned"] else state,
        )  # fmt: skip
    if told["versions"]:
        screen.print(table)
    else:
        screen.print("No version yet: the first comes 5 minutes after the learner's start, or after 100,000 examples.")
    served = f"version {told['pinned']}, which is pinned" if told["pinned"] else "the newest weights"
    screen.print(f"The learner stands at step {told['learnt']['step']:,}; served: {served}.")
    for note in told["notes"]:
        screen.print(f"  step {note['step']}, examples@{note['first']}: {note['note']}", highlight=False)


@models.command("show")
def models_show(number: Number, data: Data = None, as_json: Json = False) -> None:
    """Show one version whole, with the versions it goes back to."""
    told = _on_model(data, _told)
    found = {one["version"]: one for one in told["versions"]}
    if number not in found:
        fail(_no_such(number, [one for one in found if not found[one]["refused"]]))
    line, at = [number], found[number]["parent"]
    while at and at not in line:
        line.append(at)
        at = found[at]["parent"] if at in found else 0
    shown = {**found[number], "line": line, "pinned": number == told["pinned"]}
    if as_json:
        show_json(shown)
        return
    shown |= {"made": _when(shown["made"]) + " UTC", "line": " <- ".join(map(str, line))}
    from infra.watching.status import facts

    console().print(facts(f"version {number}", shown))


def _no_such(number: int, kept: list[int]) -> str:
    names = ", ".join(map(str, kept)) or "none yet"
    return f"no version {number}: kept are {names}. `freshet models list` shows them."


@models.command("save")
def models_save(wait: Wait = 20.0, data: Data = None, as_json: Json = False) -> None:
    """Make a version now, before something that you may want to take back."""
    _control("save", 0, wait, data, as_json, "A version is made of what is learnt up to here.")


@models.command("rollback")
def models_rollback(number: Number, wait: Wait = 20.0, data: Data = None, as_json: Json = False) -> None:
    """Set weights and optimiser back to a version; learning goes on from there, and serving follows at once.

    What was learnt since is given up, not learnt again: the way out when something bad was learnt. User state and
    item counts are not touched. A record in the log, so that `freshet rebuild` does the same at the same place.

      freshet models list
      freshet models rollback 4123
    """  # fmt: skip
    _control("rollback", number, wait, data, as_json, f"Weights are those of version {number} again; learning goes on.")


@models.command("pin")
def models_pin(number: Number, wait: Wait = 20.0, data: Data = None, as_json: Json = False) -> None:
    """Serve one version while learning goes on, until `unpin`: to look into a doubt without losing what comes in.

    Every API process follows within 2 s, on other machines too. User state and item counts stay live.

      freshet models pin 4123
      freshet models unpin
    """  # fmt: skip
    text = f"Version {number} is served from now on, learning goes on; [bold]freshet models unpin[/] ends it."
    _control("pin", number, wait, data, as_json, text)


@models.command("unpin")
def models_unpin(wait: Wait = 20.0, data: Data = None, as_json: Json = False) -> None:
    """Serve the newest weights again."""
    _control("unpin", 0, wait, data, as_json, "The newest weights are served again.")


def _control(do: str, number: int, wait: float, data: Any, as_json: bool, text: str) -> None:
    from streaming.training.controls import Control
    from streaming.training.versions import read_list

    async def work(settings: Settings, store: ModelStore) -> dict[str, Any]:
        kept = {about.version: about for about in await read_list(store) if not about.refused}
        if number and number not in kept:
            return {"error": _no_such(number, list(kept))}
        control = Control(do, number, kept[number].identity if number else 0, time.time())
        return await _append(settings, store, control, wait)

    done = _on_model(data, work)
    if "error" in done:
        fail(done["error"])
    if as_json:
        show_json(done)
    else:
        console().print(text, f"(examples@{done['offset']}, step {done['step']})")


async def _append(settings: Settings, store: ModelStore, control: Control, wait: float) -> dict[str, Any]:
    """Append a control and wait for what the learner says of it: {offset, step, note}, or {error}."""
    from streaming.topics import Log, topics_of
    from streaming.training.controls import record_of

    log, topics = Log(settings.kafka), topics_of(settings)
    await log.start()
    try:
        offset = (await log.append(topics.examples, [(0, None, record_of(control, codec=settings.codec))]))[0]
    finally:
        await log.stop()
    until = time.monotonic() + wait
    while True:
        told = await _told(settings, store)
        for note in told["notes"]:
            if note["first"] == offset:
                error = {"error": f"{note['note']}."} if "not done" in note["note"] else {}
                return {"offset": offset, "step": note["step"], "note": note["note"], **error}
        if time.monotonic() > until:
            at = told["learnt"]["next"]
            return {
                "error": f"{control.text} stands in the log at examples@{offset}, but in {wait:g} s the learner did not"
                f" come to it: it is at {at}. It is away (`freshet status`; `freshet up` starts it) or behind, and"
                " will obey when it gets there; `freshet models list` shows it then."
            }
        await asyncio.sleep(0.05)


def add(app: typer.Typer) -> None:
    """Add these verbs to the console command."""
    app.add_typer(dead_letters, name="dead-letters", rich_help_panel=LOOK)
    app.add_typer(models, name="models", rich_help_panel=LOOK)
