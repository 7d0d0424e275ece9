"""Item state: any cut gives equal bytes, scoring leaves them unchanged, rows round-trip; neighbour lists by example."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.examples import ENTERS, IMPRESSION, SHOWN, VOICE, CodecError, Entries, accept, concatenate
from models.items import CatalogueItem, Items, context_keys, cosine
from models.items import state as items_state
from models.items.transitions import K_LONG, MOST_A, MOST_B, MOST_C, K, bump
from models.rows import Rows
from tests.entries import KEYS, NAMES, Walk, cuts, entry, shown

GOLDEN_1 = (
    "01010100060000005b12612469dc0d41fbc089a04e1ffc40135309fbf42314410d0ff068162b4842f5e4d7431fb04440"
    "06f7b31d98e9b140c03fc39602ee6540000000000000f03f61b3040073a000000e140000ab0100003d0000000f000000"
    "01000000000000000000000084d7d7410000000084d7d74100000000000000000100000000000000000000000000f03f"
    "000000000000f03f2c8e2c3ff13852ce000000000000f03f2c8e2c3ff13852ce000000000000f03f6974656d2d31"
)
"""What version 0.1 wrote."""
ONE, LISTS = "000000000000f03f", 3 * "2c8e2c3ff13852ce000000000000f03f" + GOLDEN_1[-12:]
GOLDEN_2 = "02010101" + GOLDEN_1[8 : 16 * 19] + ONE + LISTS
"""What version 0.2 wrote."""
GOLDEN = "03010101" + GOLDEN_1[8 : 16 * 19] + ONE + 16 * "0" + ONE + 6 * 16 * "0" + LISTS


def folded(parts: list, items: Items | None = None) -> Items:  # type: ignore[type-arg]
    items = items or Items(rows=Rows(capacity=16))
    for part in parts:
        items.fold(part)
    return items


def state(items: Items) -> tuple[dict[int, bytes], bytes]:
    rows = np.arange(items.n)
    return dict(zip(items.rows.keys[rows].tolist(), items.pack(rows), strict=True)), items.pack_totals()


@settings(max_examples=40)
@given(st.integers(0, 50), st.lists(st.integers(1, 199), max_size=30))
def test_any_cut_gives_equal_bytes(seed: int, places: list[int]) -> None:
    entries = Walk(seed=seed).entries()
    assert state(folded(cuts(entries, places))) == state(folded([entries]))


@settings(max_examples=20)
@given(st.integers(0, 50), st.integers(1, 199), st.integers(1, 199))
def test_a_reload_and_repeats_change_nothing(seed: int, place: int, repeat: int) -> None:
    entries = Walk(seed=seed).entries()
    first, second = folded(cuts(entries, [place])[:1]), Items(rows=Rows(capacity=16))
    marks = {0: 0}
    packed, totals = state(first)
    shuffled = sorted(packed, key=lambda key: key % 97)
    second.load(np.array(shuffled, np.uint64), [packed[key] for key in shuffled])
    second.load_totals(totals)
    accept(cuts(entries, [place])[0], marks)
    for part in cuts(entries, [place, repeat])[1:]:
        second.fold(accept(part, marks))
        second.fold(accept(part, marks))  # delivered again
    if place <= repeat:
        assert state(second) == state(folded([entries]))


def under(entries: Entries, seed: int) -> Entries:
    """Give the entries contexts: a device always, a campaign of many now and then, and bytes that are none."""
    rng = np.random.default_rng(seed)
    for i in range(len(entries)):
        if entries.kind[i] != IMPRESSION:
            context = {"device": "tv" if rng.random() < 0.5 else "phone"}
            if rng.random() < 0.3:
                context["campaign"] = str(int(rng.integers(1000)))
            entries.extra[i] = msgspec.msgpack.encode(context) if rng.random() < 0.95 else b"odd"
    return entries


@settings(max_examples=30)
@given(st.integers(0, 50), st.lists(st.integers(1, 199), max_size=30), st.integers(1, 199))
def test_any_cut_and_any_restart_give_equal_bytes_with_contexts(seed: int, places: list[int], reload: int) -> None:
    """Few contexts, so that there is no room for some: which are taken in is decided event by event."""
    with pytest.MonkeyPatch.context() as few:
        few.setattr(items_state, "CONTEXTS", 12)
        entries = under(Walk(seed=seed).entries(), seed)
        straight = folded([entries])
        assert state(folded(cuts(entries, places))) == state(straight)
        assert int(straight.contexts.sum()) == 12
        assert straight.hidden[np.flatnonzero(straight.contexts)].all()
        first, rest = cuts(entries, [reload])
        packed, totals = state(folded([first]))
        again = Items(rows=Rows(capacity=16))
        again.load(np.array([*packed], np.uint64), [*packed.values()])
        again.load_totals(totals)
        assert state(folded([rest], again)) == state(straight)


def test_contexts_are_few_and_let_no_item_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items_state, "CONTEXTS", 16)
    items = Items(rows=Rows())
    for i in range(40):
        one = entry(i % 5, 1.6e9 + i, offset=i)
        one.extra[0] = msgspec.msgpack.encode({"campaign": str(i)})
        items.fold(one)
    assert int(items.contexts.sum()) == 16
    gone, _ = items.sweep(5)
    left = {int(k) for k in items.rows.keys[items.behaving]}
    assert set(KEYS[:5].tolist()) <= left  # five items, and contexts do not count
    assert len(gone) == 4  # above 14, and two more
    assert set(gone.tolist()) == {context_keys({"campaign": str(i)})[0] for i in range(4)}
    assert int(items.contexts.sum()) == 12
    assert items.context_rows(context_keys({"campaign": "0"})).tolist() == []
    assert len(items.context_rows(context_keys({"campaign": "7", "device": "tv"}))) == 1


def test_changed_rows_are_the_ones_whose_bytes_changed() -> None:
    items, before = Items(rows=Rows()), dict[int, bytes]()
    for part in cuts(Walk(seed=3).entries(), list(range(1, 200))):
        changed = set(items.rows.keys[items.fold(part)].tolist())
        now = state(items)[0]
        assert {key for key in now if now[key] != before.get(key)} <= changed
        assert (np.diff(sorted(changed)) > 0).all()
        before = now


def test_golden_bytes() -> None:
    """Version 3 of a row; a change here needs a new version, and readers for both."""
    items = Items(rows=Rows())
    items.fold(entry(1, 1.6e9, flags=ENTERS | VOICE | SHOWN))
    items.fold(entry(2, 1.6e9 + 60.0, offset=1, history=[1]))
    blob = items.pack(items.rows.find(KEYS[[1]]))[0]
    assert len(blob) == 8 * (28 + 6) + len("item-1")
    assert blob.hex() == GOLDEN


def test_version_1_is_read() -> None:
    """What version 1 wrote is loaded without a list C, packed as version 3, and folded on."""
    items, blob = Items(rows=Rows()), bytes.fromhex(GOLDEN_1)
    row = int(items.load(KEYS[[1]], [blob])[0])
    assert (items.ids[row], items.b_weights[row, 0], items.c_items[row, 0], items.c_sums[row]) == ("item-1", 1.0, -1, 0)
    again = items.pack(np.array([row]))[0]
    assert (again[0], again[8 : 8 * 19]) == (3, blob[8 : 8 * 19])
    items.fold(entry(2, 1.6e9 + 90.0, history=[1]))
    assert items.c_weights[row, 0] == 1.0


def test_version_2_is_read() -> None:
    """What version 2 wrote is loaded as never exposed, packed as version 3, and folded on."""
    items, blob = Items(rows=Rows()), bytes.fromhex(GOLDEN_2)
    row = int(items.load(KEYS[[1]], [blob])[0])
    assert (items.ids[row], items.c_weights[row, 0], items.outcomes[row]) == ("item-1", 1.0, 1)
    assert not items.sums[row].any()
    again = items.pack(np.array([row]))[0]
    assert (again[0], again[8 : 8 * 20], again[8 * 28 :]) == (3, blob[8 : 8 * 20], blob[8 * 20 :])
    items.fold(entry(1, 1.6e9 + 90.0, offset=3, flags=ENTERS | VOICE | SHOWN))
    assert items.sums[row, 1] == 1.0


def test_rows_are_bounded() -> None:
    """Whatever comes, a row holds K, K and K_LONG neighbours, and its sums stay below their bounds."""
    items = Items(rows=Rows())
    many = 1 + int(MOST_A) * 2
    for at in range(0, many, 100):
        items.fold(concatenate([entry(1 + i % 50, 1.6e9 + i, offset=i, history=[0, 55]) for i in range(at, at + 100)]))
    row = items.rows.find(KEYS[[0]])
    assert MOST_A / 2 <= items.a_sums[row[0]] <= MOST_A
    assert items.a_weights[row[0]].sum() <= items.a_sums[row[0]] + 1e-6
    largest = 8 * (28 + 2 * (2 * K + K_LONG)) + len("item-55")
    assert max(map(len, items.pack(np.arange(items.n)))) <= largest
    for sums, most in ((items.a_sums, MOST_A), (items.b_sums, MOST_B), (items.c_sums, MOST_C)):
        assert sums.max() <= most


def test_foreign_rows_raise() -> None:
    items = Items(rows=Rows())
    items.fold(entry(1, 1.6e9))
    blob = items.pack(np.array([0]))[0]
    for bad in (b"", blob[:-1], b"\x07" + blob[1:], blob[:1] + b"\xff" + blob[2:]):
        with pytest.raises(CodecError):
            Items(rows=Rows()).load(KEYS[[1]], [bad])


def test_long_co_visitation_by_example() -> None:
    items = Items(rows=Rows())
    items.fold(entry(30, 1.6e9, history=[*range(20)]))
    last, twentieth = (int(items.rows.find(KEYS[[i]])[0]) for i in (30, 19))
    assert (items.c_items[twentieth, 0], items.b_items[twentieth, 0]) == (last, -1)
    assert items.c_weights[twentieth, 0] == pytest.approx(0.95**19)
    assert items.c_weights[last, :20] == pytest.approx([0.5 * 0.95**p for p in range(20)])
    assert cosine(2.0, 6.0, 15.0) == pytest.approx(2.0 / 20.0)


def test_neighbours_by_example() -> None:
    items = Items(rows=Rows())
    items.fold(entry(3, 1.6e9, history=[2, 1, 3]))
    one, two, three = (int(items.rows.find(KEYS[[i]])[0]) for i in (1, 2, 3))
    assert items.a_items[two, :2].tolist() == [three, -1]  # A: the newest only
    assert items.a_items[one, 0] == -1
    assert items.b_items[one, 0] == three
    assert items.b_weights[one, 0] == pytest.approx(0.8)
    assert dict(zip(items.b_items[three, :2].tolist(), items.b_weights[three, :2], strict=True)) == pytest.approx(
        {two: 0.3, one: 0.24}
    )
    assert items.b_items[three, 2] == -1  # no self-transition
    assert items.b_sums[three] == pytest.approx(0.54)


def test_a_full_list_replaces_its_smallest_weight() -> None:
    lists, weights, sums = np.full((1, K), -1, np.int32), np.zeros((1, K)), np.zeros(1)
    for item in range(K):
        bump(lists, weights, sums, 0, item, 1.0 + item, 1e9)
    bump(lists, weights, sums, 0, 77, 0.5, 1e9)
    assert lists[0, 0] == 77
    assert weights[0, 0] == 0.5
    assert sums[0] == pytest.approx(sum(range(1, K + 1)) + 0.5)


def test_a_row_is_halved_where_its_sum_passes_the_bound() -> None:
    lists, weights, sums = np.full((1, K), -1, np.int32), np.zeros((1, K)), np.zeros(1)
    for item in (1, 1, 1, 2):
        bump(lists, weights, sums, 0, item, 1.0, 4.0)
    bump(lists, weights, sums, 0, 3, 1.0, 4.0)
    assert weights[0, :3].tolist() == [1.5, 0.5, 1.0]
    assert sums[0] == 2.5


def test_exposure_outcomes_and_voice() -> None:
    items = Items(rows=Rows())
    payload = shown(5, [1, 2], [1, 2, 3], np.zeros((3, 1)))
    items.fold(entry(-1, 1.6e9, flags=0, kind=IMPRESSION, extra=payload))
    items.fold(entry(1, 1.6e9, flags=ENTERS | SHOWN))
    row = int(items.rows.find(KEYS[[1]])[0])
    assert (items.shown[row], items.outcomes[row], items.popularity.weights[row, 7]) == (1, 1, 0.0)
    assert items.rows.find(KEYS[[3]])[0] == -1  # a candidate that was not shown is nothing to count


def test_catalogue_and_behaviour_are_disjoint() -> None:
    items = Items(rows=Rows())
    items.fold(entry(1, 1.6e9))
    row = int(items.rows.find(KEYS[[1]])[0])
    before = items.pack(np.array([row]))
    items.set_item(int(KEYS[1]), NAMES[1], CatalogueItem(title="One", categories=["a", "b"]))
    assert items.pack(np.array([row])) == before
    assert (items.title(row), items.by_category["a"]) == ("One", {row})
    items.set_item(int(KEYS[1]), NAMES[1], CatalogueItem(deleted=True))
    assert not items.eligible[row]
    assert items.by_category["a"] == set()
    items.set_item(int(KEYS[1]), NAMES[1], CatalogueItem(categories=["b"]))
    assert items.eligible[row]


def test_only_catalogued_items_where_the_catalogue_is_required() -> None:
    items = Items(rows=Rows(), require_catalogue=True)
    items.fold(entry(1, 1.6e9))
    row = int(items.rows.find(KEYS[[1]])[0])
    assert not items.eligible.any()
    items.set_item(int(KEYS[1]), NAMES[1], CatalogueItem())
    assert np.flatnonzero(items.eligible).tolist() == [row]


def test_rows_grow_and_find_by_low_half() -> None:
    from models.rows import mark_low

    rows = Rows(capacity=16)
    keys = np.random.default_rng(0).integers(1, 2**63, 5000).astype(np.uint64)
    twin = (keys[7] & np.uint64(0xFFFFFFFF)) | (np.uint64(9) << np.uint64(32))
    assert rows.add(keys).tolist() == list(range(5000))
    assert rows.add(np.array([twin])).tolist() == [5000]
    assert rows.find(keys[::-1]).tolist() == list(range(4999, -1, -1))
    marks = np.zeros(rows.n, np.uint8)
    mark_low(rows.table, rows.keys, np.array([twin & np.uint64(0xFFFFFFFF)], np.uint32), marks, 1)
    assert np.flatnonzero(marks).tolist() == [7, 5000]


def test_two_ids_with_one_hash_are_set_aside() -> None:
    """The row stays the first one's; the other id is named with its source position, for the dead letters."""
    items = folded([entry(1, 1.7e9)])
    before = state(items)
    other = entry(1, 1.7e9 + 1, offset=7)
    other.ids = ["another-id"]
    assert len(items.fold(other)) == 0
    reason = f"item id 'another-id' has the hash of {NAMES[1]!r}: rename one"
    assert items.aside == [(0, 7, reason, b"another-id")]
    assert state(items) == before


def test_what_only_the_catalogue_told_is_no_behaviour() -> None:
    """`items` and `examples` have no common order, so row bytes must not depend on which came first."""
    early, late = Items(rows=Rows(capacity=16)), Items(rows=Rows(capacity=16))
    payload = shown(9, [1, 2], [], np.zeros((0, 0)))
    impression_of_two = entry(-1, 1.7e9, kind=IMPRESSION, flags=0, extra=payload)
    early.set_item(int(KEYS[1]), NAMES[1], CatalogueItem(title="one"))
    for items in (early, late):
        items.fold(impression_of_two)
    late.set_item(int(KEYS[1]), NAMES[1], CatalogueItem(title="one"))
    assert state(early) == state(late)
