"""The codec of `examples`: round trips, golden bytes, refusal of foreign bytes, marks, and the byte cap."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.examples import CodecError, Entries, HoleError, Shown, accept, concatenate, item_hash, split
from streaming.events import Weights
from streaming.learn import UserFold, decode_part, users_of
from streaming.state import MemoryUserStore
from tests.event_streams import records, shown_payload


def entries_of(seed: int, n: int, codec: int = 3) -> Entries:
    store, part = MemoryUserStore(), decode_part("fr.events", 3, records(seed, n))
    read = store.read_now(3, users_of([part])[3])
    return concatenate(UserFold(Weights(), codec=codec).fold([part], {3: read}).records)


@given(st.integers(0, 50), st.integers(1, 60), st.sampled_from([2, 3]))
def test_round_trip(seed: int, n: int, codec: int) -> None:
    entries = entries_of(seed, n, codec)
    data = entries.to_bytes()
    assert data[1] == entries.version == codec - 1
    assert len(data) == entries.size()
    assert Entries.from_bytes(data).to_bytes() == data
    halves = [entries.slice(0, n // 2, []), entries.slice(n // 2, len(entries), [])]
    joined = concatenate([*halves, entries.take(np.zeros(len(entries), bool))])
    joined.ranges = entries.ranges
    assert joined.to_bytes() == data


def test_what_version_1_lacks_is_read_as_nothing() -> None:
    old, new = Entries.from_bytes(entries_of(7, 300, 2).to_bytes()), Entries.from_bytes(entries_of(7, 300).to_bytes())
    assert new.tally.any()
    assert len(new.averse) > 0
    assert (new.history_weight != 1).any()
    assert not old.tally.any()
    assert (len(old.averse), old.averse_start[-1]) == (0, 0)
    assert (old.history_weight == 1).all()
    for name in ("offset", "time", "target", "weight", "slates", "history_item", "history_kind", "ids", "extra"):
        assert np.array_equal(getattr(old, name), getattr(new, name)), name


def test_golden_bytes() -> None:
    """The layout is a contract with every record already written: change it only with a new version."""
    assert hashlib.sha256(entries_of(1, 40).to_bytes()).hexdigest() == (
        "864fa82b7d1cacb45d7ac8f3e830db6ae97e0d1ad7a3094a7f93e7a78acd2d3b"
    )
    assert hashlib.sha256(entries_of(1, 40, 2).to_bytes()).hexdigest() == (
        "3f50148fe390646219f619c93bb914a0778c9be93aaf04eace9bba4c06452690"
    )
    assert hashlib.sha256(shown_payload("s", ["a", "b"], candidates=3)).hexdigest() == (
        "c1c7861e3ac4a0e5616f2e46a4fb7f1c5f0e739353111f649bd78b4a6fed6872"
    )


@pytest.mark.parametrize("damage", [b"", b"\xe1", b"\xe1\x03" + bytes(40), b"{}", bytes(16)])
def test_foreign_bytes_are_refused(damage: bytes) -> None:
    with pytest.raises(CodecError, match="expected"):
        Entries.from_bytes(damage)
    with pytest.raises(CodecError, match="expected"):
        Shown.from_bytes(damage)


@given(st.integers(0, 10_000))
def test_truncated_bytes_are_refused(cut: int) -> None:
    data = entries_of(2, 30).to_bytes()
    with pytest.raises(CodecError):
        Entries.from_bytes(data[: cut % len(data)])


def test_shown_round_trip() -> None:
    shown = Shown.from_bytes(shown_payload("s", ["a", "b"], candidates=3))
    assert shown.slate == item_hash("s")
    assert shown.features.shape == (3, 3)
    assert shown.items.tolist() == [item_hash("a"), item_hash("b")]
    assert (shown.surface, shown.policy) == ("home", "epsilon")


@given(st.integers(0, 20), st.lists(st.integers(0, 59), max_size=4), st.integers(0, 59))
def test_repeated_records_change_nothing(seed: int, cuts: list[int], again_from: int) -> None:
    """However records are cut and from wherever they are delivered again, each entry is accepted once."""
    whole, limits = entries_of(seed, 60), sorted({0, 60, *cuts})
    parts = []
    for first, last in itertools.pairwise(limits):
        chosen = whole.take((whole.offset >= first) & (whole.offset < last))
        parts.append(Entries.from_bytes(Entries.to_bytes(_ranged(chosen, first, last))))
    delivered = parts + [part for part in parts if part.ranges[0][1] >= again_from] + parts
    marks: dict[int, int] = {}
    taken = [accept(part, marks) for part in delivered]
    assert np.concatenate([part.offset for part in taken]).tolist() == whole.offset.tolist()
    assert marks == {3: 60}


def _ranged(entries: Entries, first: int, last: int) -> Entries:
    entries = entries.slice(0, len(entries), [(3, first, last)])
    return entries


def test_a_hole_is_an_error() -> None:
    whole = entries_of(1, 20)
    with pytest.raises(HoleError, match=r"events\[3\] from offset 5"):
        accept(_ranged(whole, 6, 20), {3: 5})


@given(st.integers(400, 4000))
def test_split_keeps_entries_order_and_ranges(limit: int) -> None:
    whole = entries_of(4, 60)
    parts = split(whole, limit)
    assert np.concatenate([part.offset for part in parts]).tolist() == whole.offset.tolist()
    assert all(len(part) == 1 or part.size() <= limit for part in parts)
    marks: dict[int, int] = {}
    assert sum(len(accept(part, marks)) for part in parts) == len(whole)
    assert marks == {3: 60}
