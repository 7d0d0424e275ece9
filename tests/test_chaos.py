"""Everything is broken at random times, nothing is lost or counted twice; the proxy and the stream that prove it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiokafka import AIOKafkaConsumer, TopicPartition
from typer.testing import CliRunner

from infra.cli import app as cli
from infra.proving.chaos import Report, run_chaos
from infra.proving.faults import FAULTS, drawn
from infra.proving.proxy import Proxy
from infra.proving.publisher import Stream
from infra.settings import Settings
from serving.app import create_parts, keep_log
from streaming.agents import attach
from streaming.consumer import create_app
from streaming.kafka.reading import Reading, SilenceError
from streaming.state import StoreUnavailable, connect
from streaming.topics import Ends, Log, LogError


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_minute_of_chaos_loses_nothing_and_counts_nothing_twice(tmp_path: Path) -> None:
    stages: set[str] = set()
    report = run_chaos(kills=9, seed=33, seconds=40, data=tmp_path, tell=lambda run: stages.add(run.stage))
    assert report.held, (report.differing, report.as_dict())
    assert (report.lost, report.applied_twice, report.rows_differing, report.unknown) == (0, 0, 0, 0)
    assert report.applied == report.accepted == report.published > 3000
    assert report.duplicates > 0
    assert sum(report.kills.values()) == 9
    assert len({FAULTS[kind].on for kind in report.kills}) >= 5
    assert report.unrecovered == 0
    assert report.recover_max_s is not None
    assert report.recover_max_s < 150  # its figure is for the report: beside other work all of it takes longer
    assert stages >= {"faults", "draining", "comparing"}
    assert {"chaos.log", "users-0.log", "api.log"} <= {path.name for path in (tmp_path / "logs").iterdir()}


def test_faults_are_those_of_the_seed() -> None:
    assert list(drawn(30, 5)) == list(drawn(30, 5)) != list(drawn(30, 6))
    deck = Counter({kind: fault.often for kind, fault in FAULTS.items()})
    assert Counter(drawn(deck.total(), 1)) == deck


def test_a_report_that_does_not_hold_says_so() -> None:
    assert Report().held
    for name in ("lost", "applied_twice", "rows_differing", "unknown", "dead_lettered"):
        assert not Report(**{name: 1}).held  # type: ignore[arg-type]


def test_the_verb_refuses_a_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    result = CliRunner().invoke(cli, ["chaos", "--kills", "1", "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "is not empty" in str(result.exception)
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_user_meets_an_item_once_and_every_event_has_an_id() -> None:
    stream = Stream(3)
    stream.slates["u1"] = ("slate", ["i1", "i2"])
    visits = [stream.visit() for _ in range(2000)]
    pairs = [(visit[0]["user_id"], visit[0]["item_id"]) for visit in visits]
    assert len(set(pairs)) == len(pairs)
    events = [event for visit in visits for event in visit]
    assert len({event["event_id"] for event in events}) == len(events)
    assert {event["type"] for event in events} == {"click", "view", "dwell", "rating", "action"}
    assert all(sum(event["type"] == "click" for event in visit) == 1 for visit in visits)
    assert all(event["ts"] < time.time() + 3 for event in events)


# -- the proxy --------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def echoing() -> AsyncIterator[Proxy]:
    """A proxy before a server that answers what it is told."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1024):
                writer.write(data)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = Proxy("echo", seed=1).start()
    proxy.lead_to(server.sockets[0].getsockname()[1])
    try:
        yield proxy
    finally:
        proxy.stop()
        server.close()
        assert "proxy-echo" not in {thread.name for thread in threading.enumerate()}


Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def ask(line: Line, seconds: float = 2.0) -> bytes:
    line[1].write(b"hello")
    return await asyncio.wait_for(line[0].read(1024), seconds)


async def ask_anew(port: int) -> bytes:
    line = await asyncio.open_connection("127.0.0.1", port)
    try:
        return await ask(line)
    finally:
        line[1].close()


async def test_a_proxy_carries_and_cuts() -> None:
    async with echoing() as proxy:
        line = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await ask(line) == b"hello"
        assert proxy.cut(seconds=0.3) == 1
        with pytest.raises(ConnectionResetError):
            await ask(line)
        with pytest.raises(ConnectionResetError):  # as it is made, on a busy machine, or as it is used
            await ask_anew(proxy.port)
        await asyncio.sleep(0.35)
        again = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await ask(again) == b"hello"
        for _, writer in (line, again):
            writer.close()


async def test_a_proxy_stalls_and_then_lets_everything_through() -> None:
    async with echoing() as proxy:
        line = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await ask(line) == b"hello"
        proxy.stall(seconds=0.3)
        began = time.monotonic()
        assert await ask(line) == b"hello"
        assert time.monotonic() - began > 0.2
        line[1].close()


async def test_a_half_closed_connection_ends_or_never_answers_again() -> None:
    async with echoing() as proxy:
        lines = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(20)]
        for line in lines:
            assert await ask(line) == b"hello"
        assert proxy.half_close(share=1.0) == 20
        ended = silent = 0
        for line in lines:
            try:
                assert await ask(line, 0.05) == b""
                ended += 1
            except TimeoutError:
                silent += 1
        assert ended > 3
        assert silent > 3
        fresh = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await ask(fresh) == b"hello"
        for _, writer in (*lines, fresh):
            writer.close()


# -- what chaos found -------------------------------------------------------------------------------------------------


def test_a_connection_that_was_reset_counts_as_redis_being_away(redis_url: str) -> None:
    """uvloop raises RuntimeError for it, redis-py lets that through: it ended processes instead of being retried."""

    async def reset_between_two_commands() -> None:
        client = connect(redis_url)
        connection = await client.connection_pool.get_connection()
        await connection.connect()
        connection._writer.transport.abort()
        await asyncio.sleep(0.01)
        with pytest.raises(StoreUnavailable):
            await connection.send_command("PING", check_health=False)
        await client.connection_pool.release(connection)
        assert await client.ping()
        await client.aclose()

    uvloop.run(reset_between_two_commands())


async def test_the_api_makes_a_new_producer_when_its_own_failed_for_good(settings: Settings, topics: Any) -> None:
    """An idempotent producer ends at an error that it cannot place; the API answered 503 until it was restarted."""
    await topics(settings.partitions)
    parts = create_parts(settings)
    task = asyncio.create_task(keep_log(parts))

    async def appended() -> bool:
        try:
            return bool(await asyncio.wait_for(parts.log.append(parts.topics.events, [(0, b"u", b"{}")]), 1.0))
        except (LogError, TimeoutError):
            return False

    try:
        await until(appended)
        failed = parts.log._producer
        assert failed is not None
        failed._sender.sender_task.cancel()
        await until(appended)
        assert parts.log._producer is not failed
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await parts.log.stop()


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end, f"not so within {seconds} s"
        await asyncio.sleep(0.05)


async def test_records_that_wait_and_do_not_come_end_the_reader(kafka: str, topics: Any) -> None:
    """aiokafka's fetching may end in silence, or wait 40 s on a dead connection: the learner stood still."""
    made = await topics(1)
    place, log = TopicPartition(made.examples, 0), Log(kafka)
    await log.start()
    consumer, ends = AIOKafkaConsumer(bootstrap_servers=kafka, group_id=None, auto_offset_reset="none"), Ends(kafka)
    await consumer.start()
    try:
        consumer.assign([place])
        consumer.seek(place, 0)
        reading = Reading(consumer, place, ends, silent_s=0.2)
        for _ in range(8):  # an empty topic is no silence
            assert await reading.get(0, timeout_ms=100) == []
        await log.append(made.examples, [(0, None, b"one")])
        while not (found := await reading.get(0, timeout_ms=100)):
            pass
        assert [record.value for record in found] == [b"one"]
        consumer._fetcher._fetch_task.cancel()
        await log.append(made.examples, [(0, None, b"two")])

        async def read_on() -> None:
            for _ in range(30):
                await reading.get(1, timeout_ms=100)

        with pytest.raises(SilenceError, match=r"examples\[0\]: 1 records wait from 1 on"):
            await read_on()
    finally:
        await consumer.stop()
        await ends.stop()
        await log.stop()


async def test_what_was_read_before_the_first_commit_is_read_again_after_a_rebalance(kafka: str, topics: Any) -> None:
    """Kafka's client seeks nowhere where nothing is committed: 469 events of a worker stopped early were never read."""
    made, got = await topics(1), list[bytes]()

    async def run(batches: AsyncIterator[Any]) -> None:
        async for batch in batches:
            got.extend(value for records in batch.values() for _, _, value in records)

    async def seek(assigned: Any, committed: Any) -> dict[Any, int]:
        return {}

    app = create_app(
        f"{made.namespace}-users", kafka=kafka, form="chunks", instance="users-0", seek=seek,
        on_crash=lambda name, error: None,
    )  # fmt: skip
    app.conf.broker_commit_interval = 60.0
    attach(app, made.inlet("clicks"), run)
    log = Log(kafka)
    await log.start()
    await log.append(made.inlet("clicks"), [(0, None, b"%d" % k) for k in range(3)])
    app.finalize()
    await app.start()
    try:
        await until(lambda: _is(len(got) == 3))
        await app.consumer.perform_seek()
        await until(lambda: _is(len(got) == 6))
        assert got == [b"0", b"1", b"2"] * 2
    finally:
        await app.stop()
        await log.stop()


async def _is(value: bool) -> bool:
    return value


async def test_who_asks_for_ends_gets_over_a_connection_that_never_answers(kafka: str, topics: Any) -> None:
    """It went on asking over the dead connection, so that the watchdog took the broker for away."""
    made, ends = await topics(1), Ends(kafka)
    place = TopicPartition(made.examples, 0)
    assert await ends([place]) == {place: 0}
    assert ends._consumer is not None
    for connection in ends._consumer._client._conns.values():
        connection._reader._transport.pause_reading()
    try:
        with pytest.raises(LogError):
            await ends([place])
        assert await ends([place]) == {place: 0}
    finally:
        await ends.stop()
