"""Codec N-1: bytes of versions 1 and 2 are read; rolling upgrade and rollback on real Redis; a future one is named."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from models.examples import TALLY, item_hash
from models.profile import FutureCodecError, ProfileView, canonical, unpack
from streaming.events import Action, Click, Dwell, Erase, Event, Rating, Weights, encode
from streaming.learn import UserFold, decode_part, users_of
from streaming.state import Keys, MemoryUserStore, Redis, RedisUserStore, connect, read_user
from tests.event_streams import T0, records

P = 3
STORED = {
    version: {name: bytes.fromhex(value) for name, value in json.loads(
        (Path(__file__).parent / f"profile_v{version}.json").read_text()).items()}
    for version in (1, 2)
}  # fmt: skip
"""Profiles and seen lists as the releases with these versions wrote them: those of records(1, 200)."""


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


def read_as(codec: int, store: MemoryUserStore) -> dict[tuple[str, int, str], bytes]:
    return {key: canonical([value], codec)[0] if key[0] == "profile" else value for key, value in store.values.items()}


@pytest.mark.parametrize("version", [1, 2])
def test_bytes_of_older_versions_are_read_and_written_as_they_were(version: int) -> None:
    stored = STORED[version]
    newest, oldest = folded([(200, 3)]), folded([(200, version)])
    assert {f"{kind}:{user}": value for (kind, _, user), value in oldest.values.items()} == stored
    for (kind, _, user), value in newest.values.items():
        if kind == "profile":
            old, new = unpack(stored[f"profile:{user}"], None), unpack(value, None)
            assert (value[0], stored[f"profile:{user}"][0]) == (3, version)
            assert canonical([value], version) == [stored[f"profile:{user}"]]
            assert old.counters == new.counters
            assert old.items.tolist() == new.items.tolist()
            assert not old.tally.any()
            assert len(old.averse) == 0
            assert new.tally[7] > 0


def test_what_was_pushed_away_and_the_tally() -> None:
    def told(*events: Event) -> ProfileView:
        stream = [(i, round((T0 + 99) * 1000), encode(event)) for i, event in enumerate(events)]
        part = decode_part("events", P, stream)
        write = UserFold(Weights()).fold([part], {P: MemoryUserStore().read_now(P, ["u"])}).writes[0]
        return unpack(write.profiles["u"], None)

    def make(kind: type, item: str, **more: object) -> Event:
        return kind(user_id="u", item_id=item, ts=T0, **more)  # type: ignore[no-any-return]

    many = [make(Action, f"i{i}", name="hide") for i in range(20)]
    assert told(*many).averse.tolist() == [item_hash(f"i{i}") for i in range(19, 3, -1)]
    view = told(
        make(Action, "a", name="skip"), make(Click, "b"), make(Dwell, "b", seconds=1.0), make(Action, "a", name="hide"),
        make(Rating, "c", value=1.0), make(Rating, "d", value=3.0), make(Dwell, "e", seconds=50.0),
        make(Action, "f", name="hide"), make(Action, "f", name="like"), make(Action, "g", name="tag"),
    )  # fmt: skip
    assert view.averse.tolist() == [item_hash("a"), item_hash("b")]  # "f" was liked later
    assert dict(zip(TALLY, view.tally.tolist(), strict=True)) == {
        "ratings": 2.0, "rating_sum": -1.0, "dwells": 2.0,
        "dwell_log_sum": pytest.approx(np.log(2.0) + np.log(51.0), abs=1e-6), "skips": 1.0, "hides": 2.0,
        "low_ratings": 1.0, "outcomes": 9.0,
    }  # fmt: skip


@hypothesis_settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 1000), st.lists(st.integers(1, 199), max_size=6), st.lists(st.sampled_from([1, 2, 3]), min_size=7)
)  # fmt: skip
def test_any_cut_by_workers_of_any_version_is_the_same_state(seed: int, cuts: list[int], codecs: list[int]) -> None:
    limits = sorted({*cuts, 200})
    pieces = folded(list(zip(limits, itertools.cycle(codecs), strict=False)), seed)
    # What an older version cannot hold is gone; the rest is equal, and nothing is gone where all write the newest.
    assert read_as(2, pieces) == folded([(200, 2)], seed).values
    newest = folded([(last, 3) for last in limits], seed)
    assert newest.values == folded([(200, 3)], seed).values


async def test_a_rolling_upgrade_and_a_rollback(client: Redis, namespace: str) -> None:
    """Workers with codec 2, 3, 2 one after the other, on partitions that move between them while both run."""
    store, keys, stream = RedisUserStore(client, Keys(namespace)), Keys(namespace), records(9, 240, users=8)
    whole = MemoryUserStore()
    versions = {p: set[int]() for p in (0, 1)}
    plan = {0: ((0, 80, 2), (80, 160, 3), (160, 240, 2)), 1: ((0, 120, 2), (120, 180, 3), (180, 240, 2))}
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
        whole.commit_now(UserFold(Weights(), codec=2).fold([part], {partition: read}).writes[0])
    assert versions == {0: {2, 3}, 1: {2, 3}}
    for (kind, partition, user), value in whole.values.items():
        if kind == "profile":
            stored = (await read_user(store, partition, user)).profiles[0]
            assert stored is not None
            assert canonical([stored], 2) == [value], user
            assert unpack(stored, None).counters == unpack(value, None).counters


@pytest.mark.parametrize(("codec", "written"), [(1, 2), (2, 2), (3, 3)])
def test_an_ended_profile_is_at_least_version_2(codec: int, written: int) -> None:
    erased = [(0, round(T0 * 1000), encode(Erase(user_id="u", ts=T0)))]
    part = decode_part("events", P, erased)
    write = UserFold(Weights(), codec=codec).fold([part], {P: MemoryUserStore().read_now(P, ["u"])}).writes[0]
    assert write.profiles["u"][0] == written


@pytest.mark.parametrize("version", [4, 15])
def test_a_profile_of_a_later_version_says_so(version: int) -> None:
    later = bytes([version]) + canonical([STORED[2]["profile:user-0"]])[0][1:] + b"more"
    with pytest.raises(FutureCodecError, match="a later version of Freshet wrote it"):
        unpack(later, None)
    part = decode_part("events", P, [(0, round(T0 * 1000), encode(Click(user_id="u", item_id="a", ts=T0)))])
    read = MemoryUserStore().read_now(P, ["u"])
    read.profiles[0] = later
    with pytest.raises(FutureCodecError):
        UserFold(Weights()).fold([part], {P: read})
