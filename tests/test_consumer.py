"""What streaming/consumer.py relies on: private names of the pinned versions, and how chunks become micro-batches."""

from __future__ import annotations

import importlib
import inspect
from collections import deque
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from faust.streams import Stream
from faust.transport.conductor import Conductor
from faust.transport.drivers.aiokafka import Consumer
from hypothesis import given
from hypothesis import strategies as st

from streaming.consumer import TP, Bounds, Chunk, ChunkConsumer, MissingTopicsError, _take, create_app


def test_the_versions_whose_private_names_are_used() -> None:
    pinned = {"faust-streaming": "0.15.3", "mode-streaming": "0.7.1", "aiokafka": "0.14.0"}
    assert {name: version(name) for name in pinned} == pinned


def test_the_private_names_exist_with_their_arguments() -> None:
    """Each of these is overridden or read; a version that renames one must not pass unseen."""
    expected = {
        "_drain_messages": ["self", "fetcher"], "_wait_next_records": ["self", "timeout"], "perform_seek": ["self"],
        "_filter_tps_with_pending_acks": ["self", "topics"], "_new_offset": ["self", "tp"],
        "seek_wait": ["self", "partitions"], "_get_active_partitions": ["self"],
    }  # fmt: skip
    for name, arguments in expected.items():
        assert list(inspect.signature(getattr(Consumer, name)).parameters) == arguments, name
    source = inspect.getsource(importlib.import_module(Consumer.__mro__[1].__module__))
    for attribute in ("_read_offset", "_committed_offset", "flow_active", "consumer_stopped_errors"):
        assert attribute in source or hasattr(Consumer, attribute), attribute
    assert "_topic_name_index" in inspect.getsource(Conductor)
    assert hasattr(Stream, "maybe_start")
    assert ChunkConsumer.__mro__[2] is Consumer


def test_an_app_connects_to_nothing_and_declares_nothing() -> None:
    async def seek(assigned: Bounds, committed: dict[TP, int]) -> dict[TP, int]:
        return {}

    app = create_app(
        "ns-users",
        kafka="a:1,b:2",
        form="chunks",
        instance="users-3",
        seek=seek,
        on_crash=lambda name, error: None,
    )
    assert [str(url) for url in app.conf.broker] == ["kafka://a:1", "kafka://b:2"]
    assert app.conf.consumer_group_instance_id == "users-3"
    assert app.conf.topic_disable_leader
    assert not app.conf.topic_allow_declare
    assert not app.conf.web_enabled


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), max_size=12), st.integers(1, 50))
def test_micro_batches_keep_order_and_their_limit(chunks: list[tuple[int, int]], limit: int) -> None:
    """However fetches cut the partitions, micro-batches hold every record once, in order, at most `limit` each."""
    offsets = {0: 0, 1: 0, 2: 0}
    rest: deque[Chunk] = deque()
    for partition, size in chunks:
        first = offsets[partition]
        records = [SimpleNamespace(offset=first + i, timestamp=5, value=b"v") for i in range(size)]
        rest.append(Chunk(TP("t", partition), records, 1))
        offsets[partition] += size
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while rest:
        batch = _take(rest, limit, 1)
        assert 0 < sum(map(len, batch.values())) <= limit
        for tp, taken in batch.items():
            seen[tp.partition] += [record[0] for record in taken]
    assert seen == {partition: list(range(count)) for partition, count in offsets.items()}


def test_chunks_of_an_older_generation_are_left() -> None:
    """After a rebalance the partition may be another worker's; what was fetched before is dropped."""
    record = SimpleNamespace(offset=0, timestamp=5, value=None)
    rest = deque([Chunk(TP("t", 0), [record], 1), Chunk(TP("t", 1), [record], 2)])
    assert _take(rest, 10, 2) == {TP("t", 1): [(0, 5, b"")]}


def test_faust_makes_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def seek(assigned: Bounds, committed: dict[TP, int]) -> dict[TP, int]:
        return {}

    made = create_app("ns-x", kafka="a:1", form="chunks", instance="x-0", seek=seek, on_crash=lambda name, error: None)
    made._create_directories()
    assert list(tmp_path.iterdir()) == []


class Left(Exception):
    pass


def test_a_leader_whose_metadata_lacks_a_topic_assigns_nothing() -> None:
    """A broker that has just started may not know all its topics yet: nobody would read the one left out."""

    def leave(name: str, error: BaseException) -> None:
        assert isinstance(error, MissingTopicsError)
        raise Left(str(error))

    async def seek(assigned: Bounds, committed: dict[TP, int]) -> dict[TP, int]:
        return {}

    app = create_app("ns-users", kafka="a:1", form="chunks", instance="users-0", seek=seek, on_crash=leave)
    assignor = app.assignor
    topics = {"ns.events", "ns.clicks"}
    members = {"users-0": assignor.metadata(topics)}
    known = {"ns.events": {0, 1}, "ns.clicks": {0, 1}}
    assigned = assignor.assign(SimpleNamespace(partitions_for_topic=known.get), members)["users-0"]
    assert dict(assigned.assignment) == {topic: [0, 1] for topic in topics}
    del known["ns.clicks"]
    with pytest.raises(Left, match=r"no metadata of ns\.clicks"):
        assignor.assign(SimpleNamespace(partitions_for_topic=known.get), members)
