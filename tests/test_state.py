"""One conformance suite on both user stores; the row stores and feeds on a real Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from streaming.state import (
    Delta,
    ItemStore,
    Keys,
    MemoryUserStore,
    ModelStore,
    Redis,
    RedisUserStore,
    RowStore,
    UserStore,
    UserWrite,
    append_metrics,
    connect,
    feed_top,
    live_keys,
    read_feed,
    read_metrics,
    read_user,
)


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    made = connect(redis_url)
    yield made
    await made.aclose()


@pytest.fixture(params=["memory", "redis"])
def store(request: pytest.FixtureRequest, client: Redis, namespace: str) -> UserStore:
    return MemoryUserStore() if request.param == "memory" else RedisUserStore(client, Keys(namespace))


async def test_nothing_is_read_as_nothing(store: UserStore) -> None:
    read = await read_user(store, 3, "u")
    assert (read.applied, read.marks, read.profiles, read.seen, read.cluster) == (0, {}, [None], [None], "")


async def test_a_commit_is_read_back_whole(store: UserStore) -> None:
    write = UserWrite(3, 0, 10, {"clicks:1": 7}, {"u": b"\x00p", "w": b"q"}, {"u": b"s"}, {"u": b"e"})
    assert await store.commit([write, UserWrite(4, 0, 2, {})], "cluster/8") == [None, None]
    reads = await store.read({3: ["w", "u", "x"], 4: [], 5: ["u"]})
    assert (reads[3].applied, reads[3].marks, reads[3].cluster) == (10, {"clicks:1": 7}, "cluster/8")
    assert reads[3].profiles == [b"q", b"\x00p", None]
    assert reads[3].seen == [None, b"s", None]
    assert reads[4].applied == 2
    assert reads[5].profiles == [None]


async def test_a_commit_onto_another_offset_is_refused_and_changes_nothing(store: UserStore) -> None:
    assert await store.commit([UserWrite(3, 0, 10, {}, {"u": b"first"})]) == [None]
    twin = [UserWrite(3, 5, 12, {"clicks:0": 1}, {"u": b"zombie"}), UserWrite(4, 0, 1, {}, {"v": b"mine"})]
    assert await store.commit(twin) == [10, None]
    read = await read_user(store, 3, "u")
    assert (read.applied, read.marks, read.profiles) == (10, {}, [b"first"])


async def test_scripts_survive_a_server_that_forgot_them(client: Redis, namespace: str) -> None:
    store = RedisUserStore(client, Keys(namespace))
    await store.commit([UserWrite(0, 0, 1, {})])
    await client.script_flush()
    assert await store.commit([UserWrite(0, 1, 2, {})]) == [None]
    await client.script_flush()
    assert (await read_user(store, 0, "u")).applied == 2


async def test_rows_commit_with_their_head_or_not_at_all(client: Redis, namespace: str) -> None:
    store: RowStore = ItemStore(client, Keys(namespace))
    rows = {key: f"row {key}".encode() for key in range(1, 9001)}
    assert (
        await store.commit(expected=0, head={"next": "5", "totals": b"t"}, keys=[*rows], values=[*rows.values()])
        is None
    )
    assert await store.commit(expected=4, head={"next": "9"}, keys=[1], values=[b"no"]) == 5
    head, found = await store.load()
    assert head == {"next": b"5", "totals": b"t"}
    assert dict(found) == rows


async def test_the_catalogue_is_apart_from_behaviour(client: Redis, namespace: str) -> None:
    store = ItemStore(client, Keys(namespace))
    await store.commit(expected=0, head={"next": "5"}, keys=[7], values=[b"row"])
    await store.commit_catalogue(3, [7, 8], [b"seven", b"eight"])
    assert dict(await store.load_catalogue()) == {7: b"seven", 8: b"eight"}
    head, rows = await store.load()
    assert (head, rows) == ({"next": b"5", "catalogue": b"3"}, [(7, b"row")])
    assert await store.commit_catalogue(4, [9], [b"nine"], expected=3) is None
    assert await store.commit_catalogue(4, [9], [b"nine"], expected=3) is None  # its answer was lost
    await client.hset(store.head_key, "catalogue", "2")  # Redis was rolled back
    assert await store.commit_catalogue(5, [10], [b"ten"], expected=4) == 2
    assert 10 not in dict(await store.load_catalogue())


async def test_feeds_carry_deltas_in_order(client: Redis, namespace: str) -> None:
    keys = Keys(namespace)
    store = ItemStore(client, keys)
    assert await feed_top(client, keys.item_feed) == "0-0"
    assert await read_feed(client, keys.item_feed, "0-0", block_ms=1) == []
    first, second = Delta("rows", 0, 4, (1, 2), [b"a", b""], b"totals"), Delta("catalogue", 0, 1, (9,), [b"c"])
    assert await store.publish(first)
    assert await store.publish(second)
    assert not await store.publish(Delta("rows", 0, 3, (1,), (b"late",)))  # behind: a rollback or a twin
    entries = await read_feed(client, keys.item_feed, "0-0", block_ms=1)
    assert [delta for _, delta in entries] == [first, second]
    assert [i for i, _ in entries] == ["4-0", "4-1"]
    assert await feed_top(client, keys.item_feed) == "4-1"


async def test_feeds_are_bounded_in_bytes(client: Redis, namespace: str) -> None:
    keys = Keys(namespace)
    store = ItemStore(client, keys, feed_bytes=1 << 20)
    for i in range(1, 101):
        await store.publish(Delta("rows", i - 1, i, (1,), (bytes(50_000),)))
    assert await client.memory_usage(keys.item_feed, samples=0) < 1.2 * (1 << 20)
    (_, newest), *_ = (await read_feed(client, keys.item_feed, "99-0", block_ms=1))[-1:]
    assert newest.next == 100


async def test_a_model_step_ends_with_its_marker(client: Redis, namespace: str) -> None:
    keys = Keys(namespace)
    vectors = [bytes(400_000)] * 5
    await ModelStore(client, keys).publish_step(
        step=3, first=10, following=20, keys=[1, 2, 3, 4, 5], vectors=vectors, dense=b"w"
    )
    deltas = [delta for _, delta in await read_feed(client, keys.model_feed, "0-0", block_ms=1)]
    assert [delta.kind for delta in deltas] == ["vectors", "vectors", "vectors", "step"]
    assert [key for delta in deltas for key in delta.keys] == [1, 2, 3, 4, 5]
    assert (deltas[-1].dense, deltas[-1].step, deltas[-1].first, deltas[-1].next) == (b"w", 3, 10, 20)


async def test_the_generation_pointer_names_the_keys(client: Redis, namespace: str) -> None:
    assert await live_keys(client, namespace) == Keys(namespace, 1)
    await client.set(Keys(namespace).pointer, 4)
    assert (await live_keys(client, namespace)).profile(2, "u") == f"{namespace}@4:{{u2}}:profile:u"


async def test_learning_curves_are_read_on_from_an_id(client: Redis, namespace: str) -> None:
    key = Keys(namespace).metrics("users")
    for i in range(5):
        await append_metrics(client, key, {"events": i})
    points = await read_metrics(client, key, count=3)
    assert [fields["events"] for _, fields in points] == ["2", "3", "4"]
    assert await read_metrics(client, key, after=points[1][0]) == points[2:]
