"""Codec N-1: bytes of version 1 are read, a rolling upgrade and a rollback run on real Redis, a future one is named."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from models.profile import FutureCodecError, canonical, unpack
from streaming.events import Click, Erase, Weights, encode
from streaming.learn import UserFold, decode_part, users_of
from streaming.state import Keys, MemoryUserStore, Redis, RedisUserStore, connect, read_user
from tests.event_streams import T0, records

P = 3
STORED = {name: bytes.fromhex(value) for name, value in json.loads(
    (Path(__file__).parent / "profile_v1.json").read_text()).items()}  # fmt: skip
"""Profiles and seen lists as the release with version 1 wrote them: those of records(1, 200)."""


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[Redis]:
    found = connect(redis_url)
    yield found
    await found.aclose()


def folded(cuts: list[tuple[int, int]], seed: int = 1, n: int = 200) -> MemoryUserStore:
    """Fold a stream by workers one after the other: (until which record, the version it writes)."""
    store, first, stream = MemoryUserStore(), 0, records(seed, n)
    for last, codec in cuts:
        if last > first:
            part = decode_part("events", P, stream[first:last])
            outcome = UserFold(Weights(), codec=codec).fold([part], {P: store.read_now(P, users_of([part])[P])})
            assert store.commit_now(outcome.writes[0]) is None
            first = last
    return store


def read_as_newest(store: MemoryUserStore) -> dict[tuple[str, int, str], bytes]:
    return {key: canonical([value])[0] if key[0] == "profile" else value for key, value in store.values.items()}


def test_version_1_bytes_are_read_and_written_as_they_were() -> None:
    newest, oldest = folded([(200, 2)]), folded([(200, 1)])
    assert {f"{kind}:{user}": value for (kind, _, user), value in oldest.values.items()} == STORED
    for (kind, _, user), value in newest.values.items():
        if kind == "profile":
            old = STORED[f"profile:{user}"]
            assert (old[0], value[0], len(value)) == (1, 2, len(old) + 8)
            assert canonical([old]) == [value]
            assert unpack(old, None).counters == unpack(value, None).counters


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, 199), max_size=6), st.lists(st.sampled_from([1, 2]), min_size=7))
def test_any_cut_by_workers_of_any_version_is_the_same_state(seed: int, cuts: list[int], codecs: list[int]) -> None:
    limits = sorted({*cuts, 200})
    pieces = folded(list(zip(limits, itertools.cycle(codecs), strict=False)), seed)
    assert read_as_newest(pieces) == folded([(200, 2)], seed).values


async def test_a_rolling_upgrade_and_a_rollback(client: Redis, namespace: str) -> None:
    """Workers with codec 1, 2, 1 one after the other, on partitions that move between them while both run."""
    store, keys, stream = RedisUserStore(client, Keys(namespace)), Keys(namespace), records(9, 240, users=8)
    whole = MemoryUserStore()
    versions = {p: set[int]() for p in (0, 1)}
    plan = {0: ((0, 80, 1), (80, 160, 2), (160, 240, 1)), 1: ((0, 120, 1), (120, 180, 2), (180, 240, 1))}
    for partition, spans in plan.items():
        for first, last, codec in spans:
            worker = UserFold(Weights(), codec=codec)
            for at in range(first, last, 20):
                part = decode_part("events", partition, stream[at : at + 20])
                outcome = worker.fold([part], await store.read(users_of([part])))
                assert await store.commit(outcome.writes) == [None]
            for name in [found async for found in client.scan_iter(f"{keys.profile(partition, '')}*")]:
                versions[partition].add((await client.get(name))[0])
        part = decode_part("events", partition, stream)
        read = whole.read_now(partition, users_of([part])[partition])
        whole.commit_now(UserFold(Weights()).fold([part], {partition: read}).writes[0])
    assert versions == {0: {1, 2}, 1: {1, 2}}
    for (kind, partition, user), value in whole.values.items():
        if kind == "profile":
            stored = (await read_user(store, partition, user)).profiles[0]
            assert stored is not None
            assert canonical([stored]) == [value], user
            assert unpack(stored, None).counters == unpack(value, None).counters


def test_an_ended_profile_is_version_2_whatever_is_set() -> None:
    erased = [(0, round(T0 * 1000), encode(Erase(user_id="u", ts=T0)))]
    part = decode_part("events", P, erased)
    write = UserFold(Weights(), codec=1).fold([part], {P: MemoryUserStore().read_now(P, ["u"])}).writes[0]
    assert write.profiles["u"][0] == 2


@pytest.mark.parametrize("version", [3, 15])
def test_a_profile_of_a_later_version_says_so(version: int) -> None:
    later = bytes([version]) + canonical([STORED["profile:user-0"]])[0][1:] + b"more"
    with pytest.raises(FutureCodecError, match="a later version of Freshet wrote it"):
        unpack(later, None)
    part = decode_part("events", P, [(0, round(T0 * 1000), encode(Click(user_id="u", item_id="a", ts=T0)))])
    read = MemoryUserStore().read_now(P, ["u"])
    read.profiles[0] = later
    with pytest.raises(FutureCodecError):
        UserFold(Weights()).fold([part], {P: read})
