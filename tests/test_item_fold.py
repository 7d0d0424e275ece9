"""Items that leave: any cut and any restart give the bytes of the uninterrupted fold; what left begins blank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.examples import IMPRESSION, Entries
from models.items import Folded, ItemFold, Items, PoisonError
from models.items import folding as item_fold
from models.rows import BEHAVIOUR, Rows
from tests.entries import KEYS, NAMES, Walk, cuts, entry

MOST = 20


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the number of items every 8 records instead of 1,024."""
    monkeypatch.setattr(item_fold, "SWEEP", 8)


def records(seed: int, n: int = 240) -> list[bytes]:
    """Records of one to five entries, over 60 items, three times what may stay."""
    rng = np.random.default_rng(seed)
    places = np.cumsum(rng.integers(1, 6, n)).tolist()
    return [part.to_bytes() for part in cuts(Walk(seed=seed, n=n, users=5).entries(), places)]


class Store:
    """What Redis would hold: rows as they are committed, with the rules of the item agent."""

    def __init__(self) -> None:
        self.rows: dict[int, bytes] = {}
        self.totals, self.next, self.marks = b"", 0, dict[int, int]()

    def commit(self, fold: ItemFold, steps: list[Folded]) -> None:
        items = fold.items
        for gone in {key for step in steps for key in step.gone.tolist()}:
            self.rows.pop(gone, None)
        changed = {row for step in steps for row in (*step.changed.tolist(), *step.moved.tolist())}
        rows = np.array(sorted(row for row in changed if items.rows.held[row] & BEHAVIOUR), np.int64)
        self.rows.update(zip(items.rows.keys[rows].tolist(), items.pack(rows), strict=True))
        self.totals, self.next, self.marks = items.pack_totals(), fold.next, dict(fold.marks)

    def restart(self) -> ItemFold:
        fold = ItemFold(most=MOST)
        if self.rows:
            fold.items.load(np.array([*self.rows], np.uint64), [*self.rows.values()])
            fold.items.load_totals(self.totals)
        fold.next, fold.marks = self.next, dict(self.marks)
        return fold


def state(fold: ItemFold) -> dict[int, bytes]:
    rows = fold.items.behaving
    return dict(zip(fold.items.rows.keys[rows].tolist(), fold.items.pack(rows), strict=True))


@settings(max_examples=40)
@given(st.integers(0, 50), st.lists(st.integers(0, 80), max_size=12), st.lists(st.booleans(), max_size=12))
def test_any_cut_and_any_restart_end_in_the_same_bytes(seed: int, commits: list[int], dies: list[bool]) -> None:
    log, straight = records(seed), ItemFold(most=MOST)
    for value in log:
        straight.fold(value)
    store, fold, steps = Store(), ItemFold(most=MOST), list[Folded]()
    ends = dict(zip(sorted(commits), dies, strict=False))
    while fold.next < len(log):
        steps.append(fold.fold(log[fold.next]))
        dead = ends.pop(fold.next, None)
        if dead is None:
            continue
        if dead:  # killed before the commit
            fold = store.restart()
        else:
            store.commit(fold, steps)
        steps = []
    store.commit(fold, steps)
    assert store.rows == state(straight) == state(fold)
    assert store.totals == straight.items.pack_totals()
    assert state(store.restart()) == store.rows


@given(st.integers(0, 50))
@settings(max_examples=15)
def test_a_reader_that_removes_in_place_holds_the_writers_bytes(seed: int) -> None:
    """As serving does: rows of a delta replaced, those gone forgotten, nothing reloaded; its arrays stop growing."""
    fold, reader = ItemFold(most=MOST), Items(rows=Rows(capacity=16))
    for value in records(seed):
        step = fold.fold(value)
        reader.remove(step.gone)
        rows = step.changed[(fold.items.rows.held[step.changed] & BEHAVIOUR) != 0]
        reader.load(fold.items.rows.keys[rows], fold.items.pack(rows))
        mine = reader.behaving
        assert dict(zip(reader.rows.keys[mine].tolist(), reader.pack(mine), strict=True)) == state(fold)
    assert reader.rows.known <= MOST + 8 * 5
    assert reader.n <= MOST + 8 * 5 * 2


def test_the_least_recently_seen_leave_and_begin_blank() -> None:
    fold = ItemFold(most=16)
    values = [entry(i, 1.7e9 + i, offset=i, history=[i - 1] if i else []).to_bytes() for i in range(24)]
    gone = [key for value in values for key in fold.fold(value).gone.tolist()]
    assert gone == KEYS[:8].tolist()
    items = fold.items
    assert items.rows.find(KEYS[:8]).tolist() == [-1] * 8
    eight = int(items.rows.find(KEYS[[8]])[0])
    assert items.b_items[eight, :2].tolist() == [int(items.rows.find(KEYS[[9]])[0]), -1]  # 7 left its list
    fold.fold(entry(3, 1.7e9 + 99, offset=24).to_bytes())
    row = int(items.rows.find(KEYS[[3]])[0])
    assert row < 24  # a row that was free
    fresh = Items(rows=Rows())
    fresh.fold(entry(3, 1.7e9 + 99))
    assert items.pack(np.array([row])) == fresh.pack(np.array([0]))
    assert items.ids[row] == NAMES[3]
    assert items.eligible[row]


def test_catalogue_entries_stay_where_behaviour_leaves() -> None:
    from models.items import CatalogueItem

    fold = ItemFold(most=16)
    fold.items.set_item(int(KEYS[0]), NAMES[0], CatalogueItem(title="Zero", categories=["a"]))
    row = int(fold.items.rows.find(KEYS[[0]])[0])
    for i in range(24):
        fold.fold(entry(i, 1.7e9 + i, offset=i).to_bytes())
    assert int(fold.items.rows.find(KEYS[[0]])[0]) == row
    assert (fold.items.title(row), fold.items.by_category["a"], fold.items.hidden[row]) == ("Zero", {row}, 0)
    assert row not in fold.items.behaving


def test_a_record_that_raises_is_told_and_skipped() -> None:
    """Its marks count as folded, so that what follows is no hole."""
    fold = ItemFold(most=MOST)
    bad = entry(1, 1.7e9, offset=1)
    data = bytearray(bad.to_bytes())
    brittle = fold.items

    class Brittle(Items):
        def fold(self, entries: Entries) -> np.ndarray:  # a defect in the fold, of the kind that no codec sees
            if entries.offset[0] == 1:
                raise IndexError("out of bounds")
            return super().fold(entries)

    brittle.__class__ = Brittle
    fold.fold(entry(0, 1.7e9, offset=0).to_bytes())
    with pytest.raises(PoisonError, match="examples@1: IndexError: out of bounds"):
        fold.fold(bytes(data))
    fold.skip.add(1)
    assert fold.fold(bytes(data)).changed.tolist() == []
    changed = fold.fold(entry(2, 1.7e9, offset=2).to_bytes()).changed
    assert [row for row in changed.tolist() if not fold.items.contexts[row]] == fold.items.rows.find(KEYS[[2]]).tolist()
    assert fold.items.rows.find(KEYS[[1]])[0] == -1


def test_an_unreadable_impression_is_set_aside_and_the_rest_folded() -> None:
    fold = ItemFold(most=MOST)
    bad = entry(-1, 1.7e9, offset=0, flags=0, kind=IMPRESSION, extra=b"\xe5\x07 not a payload")
    done = fold.fold(bad.to_bytes())
    assert done.unread == ""
    ((partition, offset, reason, original),) = done.aside
    assert (partition, offset, original) == (0, 0, b"\xe5\x07 not a payload")
    assert "impression payload: expected version 1" in reason
