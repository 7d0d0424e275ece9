"""The verbs `status`, `top` and `user`: what they ask and how they end; what they show is drawn beside."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.settings import Settings
from infra.terminal import LOOK, Data, Json, console, fail, show_json

if TYPE_CHECKING:
    from infra.watching.top import By

Interval = Annotated[float, typer.Option(help="Seconds from one look to the next.", min=0.2, max=3600.0)]


def status(
    data: Data = None,
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Live, until q or Ctrl-C.")] = False,
    interval: Interval = 1.0,
) -> None:
    """What runs, how far behind, how big: processes, servers, topics, arrays; --watch follows it live.

    Watched: events by type, freshness, lag, lookups, learning, processes, and what broke last. Where the output is no
    terminal it is a line a look, with --json an object a line.

      freshet status
      freshet status --watch
      freshet status --watch --interval 10 >> figures.log
    """  # fmt: skip
    from infra.watching.screen import follow, lines
    from infra.watching.status import Watch, collect, table

    settings, screen = Settings.load(data), console()
    if not watch:
        if as_json:
            show_json(collect(settings))
        else:
            screen.print(table(collect(settings)))
        return
    watched = Watch(settings)
    watched.start()
    if as_json:
        lines(lambda: json.dumps(watched.told()), interval)
    elif screen.is_terminal:
        follow(screen, lambda key: watched.picture(screen), interval)
    else:
        lines(watched.line, interval)


def top(
    by: Annotated[
        str, typer.Option(help="rising, shown, arms, topics or stages; in a terminal also the keys r s a t g.")
    ] = "rising",
    data: Data = None,
    as_json: Json = False,
    interval: Interval = 2.0,
    most: Annotated[int, typer.Option("-n", "--most", help="Rows, where the output is no terminal.", min=1)] = 20,
) -> None:
    """What is busy: rising items, items shown most, best arms, busiest topics, slowest stages; live until q.

    rising: share of the last quarter of an hour against that of the day. arms: click posterior with its 95 %. stages:
    routes, stages of a slate and folds by the time they took in all. Where the output is no terminal, and with --json,
    it looks twice, --interval apart, and ends.

      freshet top
      freshet top --by stages
      freshet top --by topics --json
    """  # fmt: skip
    from infra.watching.asking import Api
    from infra.watching.screen import follow
    from infra.watching.top import KEYS, VIEWS, Top, picture, table

    if by not in VIEWS:
        fail(f"--by: expected {', '.join(VIEWS)}, got {by!r}", 2)
    settings, screen = Settings.load(data), console()
    looked = Top(Api(settings))
    chosen: By = by
    if as_json or not screen.is_terminal:
        if chosen in ("topics", "stages"):  # rates need two looks
            looked.look(chosen, most)
            time.sleep(interval)
        rows = looked.look(chosen, most)
        if rows is None:
            fail(looked.api.why_not())
        if as_json:
            show_json(rows)
        else:
            screen.print(table(chosen, rows))
        return

    def draw(key: str) -> Any:
        nonlocal chosen
        chosen = KEYS.get(key, chosen)
        return picture(looked, chosen, screen)

    follow(screen, draw, interval)


def user(
    user_id: Annotated[str, typer.Argument(help="Id of the user.", metavar="ID")],
    data: Data = None,
    as_json: Json = False,
    n: Annotated[int, typer.Option("-n", help="Items of the next slate.", min=1, max=100)] = 8,
    most: Annotated[int, typer.Option(help="Entries of the sequence that are shown, newest first.", min=1)] = 12,
) -> None:
    """What is known of one user: recent sequence with its decaying weights, counters, and the slate they would get now.

    Asks the API of the running stack and changes nothing: the slate is not counted as shown.

      freshet user ann
      freshet user ann --json
    """  # fmt: skip
    from infra.watching.asking import Api
    from infra.watching.user import collect, picture

    api = Api(Settings.load(data))
    told = collect(api, user_id, n=n)
    if told is None:
        fail(api.why_not())
    if as_json:
        show_json(told)
    else:
        console().print(picture(told, time.time(), most=most))


def add(app: typer.Typer) -> None:
    """Add these verbs to the console command."""
    for verb in (status, top, user):
        app.command(rich_help_panel=LOOK)(verb)
