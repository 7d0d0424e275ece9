"""The application: wires the parts, owns their lifetimes, runs the server. Nothing connects at import or creation.

Knows nothing about what the routes do.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable

import numpy as np
import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from infra.settings import Settings
from infra.telemetry import EXIT_FOR_GOOD, IMPRESSIONS, SNAPSHOT_RELOADS, Telemetry, configure_logging, mark_ready
from models.bandit import explored
from models.examples import item_hash
from models.items import CatalogueItem
from models.profile import Profiles, unpack
from models.recommend import History, popular, recommend, similar
from models.recommend import Request as Ask
from serving.api import doors
from serving.dashboard import files
from serving.dashboard.live import live_of, stream
from serving.doors import mount
from serving.guard import SECURITY_HEADERS, BindingError, Guard, check_binding
from serving.introspect import not_ready, posterior
from serving.keys import KeyRing, KeysError
from serving.messages import Problem, problem_response
from serving.metrics import watch_degraded
from serving.overload import Overload
from serving.parts import Parts
from serving.slates import Impressions
from serving.snapshot import Live, Snapshot
from streaming.state import connect
from streaming.topics import Ends, Log, LogError, TopicsError, preflight, topics_of

LOOKUP_TIMEOUT_S = 0.5
PING_S = 2.0
ENDS_S = 5.0
CONNECT_S = 10.0
MAX_CONNECTIONS = 2048
_STARTUP_FAILED = 3  # uvicorn's exit code for a lifespan that raised
log = logging.getLogger("freshet.serving")


def create_app(settings: Settings) -> FastAPI:
    """Return the application for these settings; its lifespan opens and closes every resource.

    Raises BindingError where it would listen beyond this machine without any key, KeysError where their file is bad.
    """
    parts = create_parts(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with opened(parts):
            yield

    app = FastAPI(
        title="Freshet", version=importlib.metadata.version("freshet"), lifespan=lifespan,
        docs_url=None, redoc_url=None, description="A recommender that learns from every event as it happens.",
    )  # fmt: skip
    app.state.parts = parts
    mount(app, doors(parts, app))
    app.router.routes.extend([*files.routes(), stream(live_of(parts))])
    app.add_exception_handler(Exception, _failed)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_middleware(Guard, host=settings.host, ring=parts.ring, origins=settings.origins)
    return app


def create_parts(settings: Settings) -> Parts:
    """Return the parts of one API process, not yet connected; raises BindingError, KeysError."""
    ring = KeyRing(settings.keys_path, settings.admin_key, must_exist=bool(settings.keys))
    check_binding(settings.host, has_key=bool(settings.admin_key or ring.keys), admin_key=settings.admin_key)
    topics = topics_of(settings)
    telemetry, producer = Telemetry(), Log(settings.kafka)
    counted = {"appended": 0, "dropped": 0, "failed": 0}

    def tell(impressions: Impressions) -> None:
        for status, before in counted.items():
            now: int = getattr(impressions, status)
            if now > before:
                telemetry.count(IMPRESSIONS, now - before, status=status)
                counted[status] = now

    snapshot = Snapshot(
        connect(settings.redis, timeout=LOOKUP_TIMEOUT_S), connect(settings.redis),
        namespace=settings.namespace, require_catalogue=settings.require_catalogue,
        on_reload=lambda: telemetry.count(SNAPSHOT_RELOADS, feed="all"),
    )  # fmt: skip
    return Parts(
        settings=settings,
        topics=topics,
        log=producer,
        telemetry=telemetry,
        ring=ring,
        overload=Overload(telemetry, snapshot.read_lag),
        snapshot=snapshot,
        impressions=Impressions(
            append=lambda records: producer.append(topics.events, records),
            limit=settings.impression_buffer, on_change=tell,
        ),
    )  # fmt: skip


@contextlib.asynccontextmanager
async def opened(parts: Parts) -> AsyncIterator[None]:
    """Connect the parts and keep them connected; on leaving, log what waits and disconnect."""
    await _check_topics(parts)
    logging.getLogger().addHandler(parts.news)
    parts.snapshot.start()
    parts.impressions.start()
    always: dict[str, Callable[[], Awaitable[None]]] = {
        "log": lambda: keep_log(parts), "ends": lambda: watch_ends(parts), "delay": parts.overload.watch_loop,
        "lag": parts.overload.watch_lag, "degraded": lambda: watch_degraded(parts),
    }  # fmt: skip
    tasks = [asyncio.create_task(_always(name, work), name=name) for name, work in always.items()]
    tasks += [asyncio.create_task(_warm(parts), name="warm"), asyncio.create_task(_tell_ready(parts), name="ready")]
    tasks.append(asyncio.create_task(_always("quality", parts.quality.watch), name="quality"))
    try:
        yield
    finally:
        logging.getLogger().removeHandler(parts.news)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await parts.impressions.stop()
        await parts.snapshot.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await parts.log.stop()


async def _check_topics(parts: Parts) -> None:
    """Raise TopicsError where Kafka answers and topics are not as expected; one that is away is waited for later."""
    with contextlib.suppress(LogError, OSError, TimeoutError):
        async with asyncio.timeout(5.0):
            try:
                await preflight(parts.settings.kafka, parts.topics)
            except TopicsError as error:
                log.critical("%s", error)
                raise


async def keep_log(parts: Parts) -> None:
    """Connect to Kafka, again and again until it answers; then watch whether it still does."""
    started = silent = False
    while True:
        try:
            if not started:
                async with asyncio.timeout(CONNECT_S):
                    await preflight(parts.settings.kafka, parts.topics)
                    await parts.log.start()
                started = True
            async with asyncio.timeout(2 * PING_S):
                await parts.log.ping()
            parts.log_problem = ""
        except (LogError, TopicsError, OSError, TimeoutError, RuntimeError) as error:
            # RuntimeError: uvloop's word for a connection that was reset since it was last used
            parts.log_problem = f"{type(error).__name__}: {error}"
            silent = started and isinstance(error, TimeoutError)  # its client waits 30 s for what never comes
        if started and (silent or parts.log.broken):
            log.warning("Kafka: the producer %s; making a new one", "gets no answer" if silent else "failed for good")
            started = silent = False
            await _dropped(parts.log)
        await asyncio.sleep(PING_S if started else 0.5)


async def watch_ends(parts: Parts) -> None:
    """Ask every few seconds where `events` and `dead-letters` end; what was last told stays while Kafka is away."""
    ask, dead, events = Ends(parts.settings.kafka), (parts.topics.dead_letters, 0), parts.topics.events
    away = (LogError, OSError, TimeoutError, RuntimeError)
    try:
        while True:
            if not parts.log_problem:
                noted = dict(parts.overload.ends)
                try:
                    async with asyncio.timeout(2 * ENDS_S):  # twice what a request of it may take
                        found = await ask([dead, *((events, p) for p in range(parts.topics.partitions))])
                    parts.dead_letters = found.pop(dead)
                    parts.ends = {partition: end for (_, partition), end in found.items()}
                    parts.overload.at_most(parts.ends, noted)
                except away as error:
                    log.debug("ends: %s: %s", type(error).__name__, error)
                    with contextlib.suppress(*away):  # the next time over a new connection, whatever this one waits for
                        await ask.stop()
            await asyncio.sleep(ENDS_S if parts.dead_letters is not None else 0.5)
    finally:
        with contextlib.suppress(*away):
            await ask.stop()


async def _dropped(producer: Log) -> None:
    """Give a producer up, however that goes: what it held is refused, and sent again by its clients.

    In a task of its own: aiokafka cancels its sender and waits for it, and that cancellation would end the waiting task
    as if somebody had told it to end.
    """
    task = asyncio.create_task(producer.drop(), name="drop")
    await asyncio.wait({task}, timeout=PING_S)
    task.cancel()
    task.add_done_callback(lambda done: done.cancelled() or done.exception())


async def _always(name: str, work: Callable[[], Awaitable[None]]) -> None:
    """Run what must run as long as the process does: begin again where it ended without having been told to."""
    while True:
        try:
            await work()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            log.error("%s was cancelled by a library; it begins again", name)
        except Exception:
            log.exception("%s failed; it begins again", name)
        await asyncio.sleep(0.5)


async def _warm(parts: Parts) -> None:
    """Compile (or load) the scoring code before the first request needs it; a stop does not wait for it."""
    thread = threading.Thread(target=warm, name="warm", daemon=True)
    thread.start()
    while thread.is_alive():
        await asyncio.sleep(0.02)
    parts.warm = True


def warm() -> None:
    """Score once over two made-up items: compiles every kernel that a lookup, a load or a delta calls."""
    live = Live.empty()
    rows = np.array([live.items.set_item(item_hash(name), name, CatalogueItem()) for name in ("a", "b")])
    hashes = live.items.rows.keys[rows]
    live.items.load(hashes, live.items.pack(rows))
    live.model.load_rows(hashes, live.model.pack_rows(rows))
    live.items.load_totals(live.items.pack_totals())
    blank = Profiles([None], [None]).pack(np.zeros(1, np.int64))[0]
    unpack(blank, None)
    seen = History(items=hashes, times=np.zeros(2), kinds=np.ones(2, np.uint8), seen=hashes.astype(np.uint32))
    for now in (0.0, 1.0):
        recommend(live.items, live.model, seen, Ask(slate_id="warm", now=now, seen="include"))
        recommend(live.items, live.model, seen, Ask(slate_id="warm", now=now, exclude=hashes))
    popular(live.items, live.model, 2, hashes[:1], 1.0)
    similar(live.items, live.model, int(hashes[0]), 1)
    explored(np.zeros(1, np.float32), np.zeros(2, np.float32))
    posterior(live, int(rows[0]))


async def _tell_ready(parts: Parts) -> None:
    while not_ready(parts):
        await asyncio.sleep(0.05)
    parts.overload.watching = True  # not before: compiling holds the loop up, and nobody is late for that
    log.info("ready")
    mark_ready()


async def _no_route(request: Request, error: Exception) -> Response:
    """Answer for the framework, in the one error shape: no such path, or not by this method."""
    status = getattr(error, "status_code", 404)
    if status != 405:
        return problem_response(Problem(status, "path", "a path of /openapi.json", repr(request.url.path[:80])))
    matching = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
    allowed = ", ".join(sorted({method for route in matching for method in getattr(route, "methods", None) or ()}))
    return problem_response(Problem(405, "method", f"one of {allowed}", request.method, headers={"Allow": allowed}))


async def _failed(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    name = type(error).__name__  # this answer is made outside of the guard, which would add the headers
    return problem_response(
        Problem(500, "this server", "an answer", name, do="see the server's log", headers=SECURITY_HEADERS)
    )


def run(settings: Settings) -> None:
    """Serve until told to stop; SIGTERM and SIGINT end it in order within about 5 s.

    Ends with EXIT_FOR_GOOD where Kafka answers and its topics are not those expected.
    """
    configure_logging(settings.log_level)
    try:
        app = create_app(settings)
    except (BindingError, KeysError) as error:
        log.critical("%s", error)
        raise SystemExit(EXIT_FOR_GOOD) from None
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, loop="uvloop", http="httptools", ws="none",
        access_log=False, log_config=None, timeout_graceful_shutdown=3, server_header=False, date_header=False,
        backlog=1024, limit_concurrency=MAX_CONNECTIONS,
    )  # fmt: skip
    try:
        uvicorn.Server(config).run()
    except SystemExit as end:
        raise SystemExit(EXIT_FOR_GOOD if end.code == _STARTUP_FAILED else end.code) from None
