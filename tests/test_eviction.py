"""Users beyond the cap leave, the least recently active first, at fixed offsets: any cut and both stores are equal."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from streaming import learn
from streaming.events import Click, Weights, encode
from streaming.learn import UserFold, decode_part, rounds, users_of
from streaming.state import Keys, MemoryUserStore, Redis, RedisUserStore, UserStore, connect
from streaming.users import memory
from tests.event_streams import T0, records

P, SWEEP, KEEP = 2, 16, 4
Record = tuple[int, int, bytes]


@pytest.fixture(autouse=True)
def short_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep every 16 events instead of 4,096."""
    monkeypatch.setattr(learn, "SWEEP", SWEEP)


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    found = connect(redis_url)
    yield found
    await found.aclose()


async def feed(store: UserStore, stream: Sequence[Record], cuts: Sequence[int], keep: int = KEEP) -> None:
    """Fold a stream into a store, cut into micro-batches at `cuts`."""
    fold = UserFold(Weights(), keep=keep)
    for first, last in itertools.pairwise(sorted({0, len(stream), *cuts})):
        for (part,) in rounds([decode_part("events", P, stream[first:last])]):
            outcome = fold.fold([part], await store.read(users_of([part])))
            assert await store.commit(outcome.writes) == [None]


def users(store: MemoryUserStore) -> set[str]:
    return {user for kind, _, user in store.values if kind == "profile"}


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1000), st.lists(st.integers(1, 199), max_size=6))
async def test_any_cut_gives_equal_bytes(seed: int, cuts: list[int]) -> None:
    stream = records(seed, 200, users=12)
    whole, pieces = MemoryUserStore(), MemoryUserStore()
    await feed(whole, stream, [])
    await feed(pieces, stream, cuts)
    assert pieces.values == whole.values
    assert pieces.active == whole.active
    assert pieces.applied == whole.applied
    assert pieces.left == whole.left


async def test_redis_and_memory_keep_the_same_users(client: Redis, namespace: str) -> None:
    stream, keys = records(4, 200, users=12), Keys(namespace)
    kept, stored = MemoryUserStore(), RedisUserStore(client, keys)
    await feed(kept, stream, [])
    await feed(stored, stream, np.random.default_rng(1).integers(1, 200, 12).tolist())
    found = {
        name.decode(): await client.get(name)
        for prefix in (keys.profile(P, ""), keys.seen(P, ""))
        for name in [found async for found in client.scan_iter(f"{prefix}*")]
    }
    expected = {getattr(keys, kind)(p, user): value for (kind, p, user), value in kept.values.items()}
    assert found == expected
    active = await client.zrange(keys.active(P), 0, -1, withscores=True)
    assert [(user.decode(), int(at)) for user, at in active] == list(kept.active[P].items())


async def test_the_least_recently_active_leave_at_the_sweep_and_not_before() -> None:
    clicks = [Click(user_id=f"u{i % 10}", item_id="a", ts=T0) for i in range(SWEEP + 1)]
    stream = [(i, round(T0 * 1000), encode(event)) for i, event in enumerate(clicks)]
    store = MemoryUserStore()
    await feed(store, stream[: SWEEP - 1], [])
    assert len(users(store)) == 10
    fresh = MemoryUserStore()
    await feed(fresh, stream, [])
    assert users(fresh) == {"u2", "u3", "u4", "u5", "u6"}  # the last four of 16 events, then u6 again
    assert not any(kind == "seen" and user == "u9" for kind, _, user in fresh.values)


async def test_who_left_is_a_new_user_and_without_a_cap_nobody_leaves() -> None:
    clicks = [Click(user_id=f"u{i % SWEEP}", item_id=f"i{i}", ts=T0) for i in range(SWEEP + 1)]
    stream = [(i, round(T0 * 1000), encode(event)) for i, event in enumerate(clicks)]
    capped, free = MemoryUserStore(), MemoryUserStore()
    await feed(capped, stream, [])
    await feed(free, stream, [], keep=0)
    assert users(capped) == {"u0", "u12", "u13", "u14", "u15"}
    assert len(users(free)) == SWEEP
    assert capped.values["profile", P, "u0"] != free.values["profile", P, "u0"]


async def test_a_lowered_cap_is_reached_in_bounded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LEAVING", 3)
    clicks = [Click(user_id=f"u{i % SWEEP}", item_id="a", ts=T0) for i in range(2 * SWEEP)]
    stream = [(i, round(T0 * 1000), encode(event)) for i, event in enumerate(clicks)]
    store = MemoryUserStore()
    await feed(store, stream[:SWEEP], [])
    assert len(users(store)) == SWEEP - 3


def test_a_part_over_a_sweep_is_refused() -> None:
    part = decode_part("events", P, records(1, SWEEP + 1))
    with pytest.raises(ValueError, match="reaches over a multiple of 16"):
        UserFold(Weights(), keep=1).fold([part], {P: MemoryUserStore().read_now(P, users_of([part])[P])})


def test_rounds_cut_each_part_at_its_own_sweeps() -> None:
    stream = records(1, 60)
    parts = [decode_part("events", 0, stream[10:40]), decode_part("events", 1, stream[16:20])]
    pieces = [[(part.partition, part.first, part.next) for part in piece] for piece in rounds(parts)]
    assert pieces == [[(0, 10, 16), (1, 16, 20)], [(0, 16, 32)], [(0, 32, 40)]]
    offsets = [offset for piece in rounds(parts[:1]) for part in piece for offset in part.offsets]
    assert offsets == parts[0].offsets
