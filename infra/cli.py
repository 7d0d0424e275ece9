"""The console command `freshet`: the composition root; imports every other module lazily, inside its verbs.

Knows how to ask and how to answer a person; what a verb does lies in the module that it calls.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infra.settings import Settings, SettingsError, read_stack
from infra.terminal import LEARN, LOOK, PROCESS, RUN, Data, Json, console, ended_by_signals, fail, show_json

if TYPE_CHECKING:
    from rich.console import Console

ABOUT = """A recommender that learns from every event as it happens.

The next request already knows the last click.

[bold]Begin with[/]

  freshet demo      everything at once, with simulated users: open the page
  freshet up        Kafka, Redis, agents, learner and API on this machine
  freshet status    what runs, how far behind, how big; --watch follows it

[bold]Then, in another terminal[/]

  curl localhost:8000/v1/events --json '{"type": "click", "user_id": "ann", "item_id": "film-1", "ts": 1795000000}'
  curl localhost:8000/v1/recommendations/ann
  freshet replay ratings.csv --format csv --columns user=u,item=i,ts=t

Every setting is an environment variable too: see [bold]freshet settings[/].
"""
app = typer.Typer(
    name="freshet",
    help=ABOUT,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Namespace = Annotated[str | None, typer.Option(help="Names the deployment; default fr.", show_default=False)]
Kafka = Annotated[
    str | None, typer.Option(help="Use this Kafka instead of an own one.", metavar="HOST:PORT", show_default=False)
]
Redis = Annotated[
    str | None, typer.Option(help="Use this Redis instead of an own one.", metavar="redis://...", show_default=False)
]


def main() -> None:
    """Run the console command; an error a person can mend is told in a line or two, without a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(0) from None
    except Exception as error:
        if not _explains_itself(error):
            raise
        fail(str(error))


def _explains_itself(error: Exception) -> bool:
    """Errors of our own that say where, expected, got and what next; looked up only among what was imported."""
    if isinstance(error, SettingsError):
        return True
    known = (("infra.stack", "StackError"), ("infra.kafka", "KafkaError"), ("infra.store", "StoreError"),
             ("streaming.topics", "TopicsError"), ("streaming.topics", "LogError"), ("streaming.events", "EventError"),
             ("streaming.replay.logs", "ReplayError"), ("streaming.recovery.generations", "RecoveryError"),
             ("infra.proving.bench", "BenchError"), ("infra.proving.chaos", "ChaosError"),
             ("infra.proving.browser", "BrowserError"),
             ("serving.keys", "KeysError"), ("streaming.state", "StoredBytesError"),
             ("streaming.kafka.address", "AddressError"), ("models.ope", "OpeError"),
             ("infra.evaluating.open_bandit", "BanditLogError"),
             ("streaming.replay.exports", "ExportError"))  # fmt: skip
    kinds = [getattr(sys.modules[module], name, None) for module, name in known if module in sys.modules]
    return isinstance(error, tuple(kind for kind in kinds if isinstance(kind, type)))


# -- run --------------------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=RUN)
def up(
    data: Data = None,
    namespace: Namespace = None,
    kafka: Kafka = None,
    redis: Redis = None,
    host: Annotated[str | None, typer.Option(help="Address of the API; default loopback.", show_default=False)] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the API; default 8000, or the next free one.", show_default=False)
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; default 1.", show_default=False)] = None,
    partitions: Annotated[
        int | None, typer.Option(help="Partitions of the log; fixed for a namespace; default 8.", show_default=False)
    ] = None,
) -> None:
    """Start Kafka, Redis, the agents, the learner and the API; Ctrl-C ends them all, state stays.

    No Docker, Java, Kafka or Redis need be installed. The first start fetches Kafka (44 MB, once per user).

      freshet up                        data in .freshet, API on port 8000
      freshet up --data try --port 9000
      freshet up --kafka kafka:9092 --redis redis://redis:6379/0
    """
    from infra.stack import Stack
    from infra.telemetry import configure_logging

    settings = Settings.load(
        data, running=False, namespace=namespace, kafka=kafka, redis=redis, host=host, port=port, workers=workers,
        partitions=partitions,
    )  # fmt: skip
    configure_logging(settings.log_level)
    screen = console(err=True)
    with ended_by_signals(), screen.status("starting") as status:
        stack = Stack(settings, quiet=not screen.is_terminal, say=lambda text: status.update(text + " ..."))
        try:
            stack.start()
            stack.wait_ready()
            status.stop()
            _welcome(screen, stack)
            _sleep_until_interrupted()
        except KeyboardInterrupt:
            status.start()
        finally:
            status.update("ending all processes ...")
            stack.stop()
    screen.print("All ended; the state is in", str(stack.data))


def _sleep_until_interrupted() -> None:
    import threading

    threading.Event().wait()


def _welcome(screen: Console, stack: Any) -> None:
    from rich.table import Table

    rows = Table.grid(padding=(0, 2))
    for name, value in (
        ("page", stack.api + "/"),
        ("API", stack.api + "/docs"),
        ("Kafka", stack.kafka),
        ("Redis", stack.redis),
        ("data", str(stack.data)),
        ("logs", str(stack.data / "logs")),
    ):
        rows.add_row(f"[bold]{name}[/]", value)
    screen.print(rows)
    screen.print("Ctrl-C ends all; `freshet status` shows more.")


# -- try and measure --------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=LEARN)
def replay(
    path: Annotated[Path, typer.Argument(help="A log: file or folder, .gz too.")],
    form: Annotated[
        str, typer.Option("--format", help="movielens, movietweetings, online-retail, kuairand, freshet (an export).")
    ] = "csv",
    columns: Annotated[
        str,
        typer.Option(
            help="Of a csv: user=..,item=,ts=[,rating=,dwell=,kind=,basket=,context:X=,title=,categories=,tags=,text=]."
        ),
    ] = "",
    exclude: Annotated[
        str | None,
        typer.Option(help="seen, invoice or none; default seen for movies, invoice for retail.", show_default=False),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="line: rank each row, then learn it; basket: rank a whole basket before it begins.")
    ] = "line",
    limit: Annotated[int | None, typer.Option(help="Only the first N events.", min=1, show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the learner.")] = 1,
    plot: Annotated[
        Path | None, typer.Option(help="Draw NDCG over time into this picture.", show_default=False)
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Through Kafka, Redis and HTTP, on a private stack.")] = False,
    as_json: Json = False,
) -> None:
    """Replay a real log through the live code: rank each event's item, then learn it; report the figures.

    freshet replay ml-latest-small --format movielens
    freshet replay clicks.csv.gz --columns user=uid,item=sku,ts=when --exclude none --json
    """
    from infra.replaying import replay as run_replay

    screen = None if as_json else console(err=True)
    result = run_replay(path, form, columns, exclude, limit, seed, screen, protocol=protocol, live=live)
    if plot is not None:
        from streaming.replay.report import plot as draw

        draw(result, str(plot))
    if as_json:
        show_json(result)
    else:
        from infra.replaying import show

        show(result, console())


@app.command(rich_help_panel=RUN)
def demo(
    seconds: Annotated[
        float | None, typer.Option(help="End by itself after this long; default: Ctrl-C.", min=1, show_default=False)
    ] = None,
    as_json: Json = False,
    users: Annotated[int, typer.Option(help="Simulated people.", min=1, max=100_000)] = 200,
    items: Annotated[int, typer.Option(help="Titled items at the start.", min=10, max=100_000)] = 2000,
    rate: Annotated[float, typer.Option(help="Slates asked for per second.", min=0.1, max=1000)] = 25.0,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the world; default: the held-out one.", min=0, show_default=False)
    ] = None,
    data: Annotated[Path, typer.Option(help="Data folder of the demo; wiped at the start.", metavar="DIR")] = Path(
        ".freshet-demo"
    ),
    port: Annotated[
        int | None, typer.Option(help="Port of the page; default 8000, or the next free one.", show_default=False)
    ] = None,
) -> None:
    """Everything at once, with simulated people: watch it learn, then click on the page yourself.

    People with known, drifting tastes ask for slates and click; the world knows how many clicks to expect of each
    slate, of plain popularity and of the best slate there is. It runs in a folder of its own, wiped at the start.

      freshet demo                               until Ctrl-C; the table names the page
      freshet demo --seconds 120 --json          two minutes, then expected clicks and the lead as JSON
    """
    from infra.demo import DEMO_SEED, run_demo

    settings = Settings.load(data, running=False, port=port)
    screen = console(err=as_json)
    if not as_json:
        screen.print("Starting Kafka, Redis, the agents, the learner and the API; people come when all are ready.")
    report = run_demo(
        settings, users=users, items=items, rate=rate, seed=DEMO_SEED if seed is None else seed,
        seconds=float("inf") if seconds is None else seconds, console=screen,
    )  # fmt: skip
    if as_json:
        show_json(report)
    else:
        screen.print("All ended. Next: [bold]freshet up[/] starts your own stack; the README shows what to send it.")


def _bench_and_chaos() -> None:
    from infra.proving.verbs import add

    add(app)


_bench_and_chaos()


def _evaluate() -> None:
    from infra.evaluating.verb import add

    add(app)


_evaluate()


@app.command(rich_help_panel=LEARN)
def simulate(
    seconds: Annotated[
        float | None, typer.Option(help="End by itself after this long; default: Ctrl-C.", min=1, show_default=False)
    ] = None,
    as_json: Json = False,
    users: Annotated[int, typer.Option(help="Simulated people.", min=1, max=100_000)] = 200,
    items: Annotated[int, typer.Option(help="Titled items at the start.", min=10, max=100_000)] = 2000,
    rate: Annotated[float, typer.Option(help="Slates asked for per second.", min=0.1, max=1000)] = 25.0,
    seed: Annotated[int, typer.Option(help="Seed of the world.", min=0)] = 1,
    data: Data = None,
) -> None:
    """Send simulated people to a stack that runs (`freshet up`): they ask, click, rate, and keep score.

    freshet simulate --users 500 --rate 50     until Ctrl-C
    freshet simulate --seconds 60 --json       a minute, then the score as JSON
    """
    from infra.demo import run_simulate

    settings = Settings.load(data)
    stack = read_stack(settings.data) or {}
    if not stack.get("api"):
        fail(f"no running stack: {settings.data}/stack.json names no API. Start one: freshet up")
    report = run_simulate(
        settings, str(stack["api"]), users=users, items=items, rate=rate, seed=seed,
        seconds=float("inf") if seconds is None else seconds, console=console(err=as_json),
    )  # fmt: skip
    if as_json:
        show_json(report)


# -- single processes -------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=PROCESS)
def worker(
    role: Annotated[str, typer.Option(help="users: inlets and profiles; items: popularity and neighbours.")] = "users",
    slot: Annotated[
        str | None,
        typer.Option(
            help="Number of this worker, its static membership; auto: from the host name.", show_default=False
        ),
    ] = None,
    data: Data = None,
) -> None:
    """Run one worker process of Faust agents, until SIGTERM.

      freshet worker --role users --slot 0
      freshet worker --role items
    """  # fmt: skip
    if role not in ("users", "items"):
        fail(f"--role: expected users or items, got {role!r}", 2)
    settings = _process_settings(data, worker_slot=_slot_of_host() if slot == "auto" else slot)
    from streaming.worker import run

    run(settings, role, settings.worker_slot)  # type: ignore[arg-type]


@app.command(rich_help_panel=PROCESS)
def learner(data: Data = None) -> None:
    """Run the learner: the one process that trains, on one torch thread, until SIGTERM."""
    settings = _process_settings(data)
    from streaming.training.process import run

    run(settings)


def _slot_of_host() -> int:
    """A container keeps its host name when it is restarted, so its membership stays its own."""
    import socket
    import zlib

    return zlib.crc32(socket.gethostname().encode()) & 0xFFFF


@app.command(rich_help_panel=PROCESS)
def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind.", show_default=False)] = None,
    data: Data = None,
) -> None:
    """Run one API process, until SIGTERM."""
    settings = _process_settings(data, host=host, port=port)
    from serving.app import run

    run(settings)


def _process_settings(data: Path | None, **overrides: object) -> Settings:
    """Settings of one process of a deployment; says which servers are missing."""
    from infra.telemetry import EXIT_FOR_GOOD, configure_logging
    from streaming.kafka.address import AddressError, client_options

    try:
        settings = Settings.load(data, **overrides)  # type: ignore[arg-type]
    except SettingsError as error:
        fail(str(error), EXIT_FOR_GOOD)
    for name in ("kafka", "redis"):
        if not getattr(settings, name):
            fail(
                f"no {name.capitalize()}: FRESHET_{name.upper()} is not set and {settings.data}/stack.json names none. "
                "Run `freshet up`, or set the variable.",
                EXIT_FOR_GOOD,
            )
    configure_logging(settings.log_level)
    try:
        client_options(settings.kafka)
    except AddressError as error:
        fail(str(error), EXIT_FOR_GOOD)
    return settings


@app.command(rich_help_panel=PROCESS)
def topics(
    create: Annotated[bool, typer.Option("--create", help="Create the topics that are missing.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Check the namespace's topics on your Kafka, or create them; `up` does this itself."""
    from infra.kafka import run_blocking
    from infra.stack import make_topics
    from streaming.topics import Topics, preflight

    settings = Settings.load(data)
    if not settings.kafka:
        fail("no Kafka: set FRESHET_KAFKA=host:port, or run `freshet up`.")
    wanted = Topics(settings.namespace, settings.partitions, settings.retention_inlets_days)
    if create:
        make_topics(settings)
    run_blocking(lambda: preflight(settings.kafka, wanted))
    rows = {name: {"partitions": count, **configuration} for name, (count, configuration) in wanted.specs().items()}
    if as_json:
        show_json(rows)
    else:
        for name, row in rows.items():
            typer.echo(f"{name:24} " + "  ".join(f"{key}={value}" for key, value in row.items()))


# -- look inside ------------------------------------------------------------------------------------------------------


def _watching() -> None:
    from infra.watching.verbs import add

    add(app)


_watching()


def _rebuild_and_dead_letters() -> None:
    from infra import inspecting, recovering

    recovering.add(app)
    inspecting.add(app)


_rebuild_and_dead_letters()


def _keys() -> None:
    from infra.access import add

    add(app)


_keys()


@app.command(rich_help_panel=LOOK)
def settings(data: Data = None, as_json: Json = False) -> None:
    """Every setting: its value here, its default, its environment variable, what it is for."""
    rows = Settings.load(data).rows()
    if as_json:
        show_json(rows)
        return
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in ("environment", "value", "default", "help"):
        table.add_column(column, overflow="fold")
    for row in rows:
        same = row["value"] == row["default"]
        value = "(table)" if isinstance(row["value"], list) else str(row["value"])
        default = "(table)" if isinstance(row["default"], list) else str(row["default"])
        table.add_row(str(row["environment"]), value if same else f"[bold]{value}[/]", default, str(row["help"]))
    console().print(table)


if __name__ == "__main__":
    main()
