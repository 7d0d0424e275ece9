"""The contract of everything that learns in `models/`: one list of checks, run over every learner in `SUBJECTS`.

A subject wraps one learner in the same few verbs. An exemption is listed with its reason.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

import numpy as np

from models.decay import Popularity, add
from models.encoder import Encoder
from models.examples import Entries, concatenate
from models.factors import POSITIONS, Factors, mix64, pack_named, unpack_named
from models.features import F
from models.items import Items
from models.learner import Learner
from models.model import STATE_ROW, Model
from models.ranker import Ranker
from models.recommend import History, Request, popular, recommend, similar
from models.rows import Rows
from models.window import WINDOW_SLATES
from tests.entries import KEYS, Walk, entry


class Subject(ABC):
    """A learner under the contract: learn a stream, score, to and from bytes."""

    def __init__(self, seed: int = 1) -> None:
        self.seed = seed
        self.rows = Rows(capacity=16)

    @abstractmethod
    def learn(self, entries: Entries) -> None:
        """Learn a part of a stream."""

    @abstractmethod
    def score(self, keys: np.ndarray, now: float) -> np.ndarray:
        """Return finite numbers for any item hashes, known or not."""

    @abstractmethod
    def to_bytes(self) -> dict[int | str, bytes]:
        """Return the whole state, by item hash where it is an item's."""

    @abstractmethod
    def from_bytes(self, state: dict[int | str, bytes]) -> None:
        """Take over a state."""

    def _by_key(self, pack: Callable[[np.ndarray], list[bytes]]) -> dict[int | str, bytes]:
        rows = np.arange(self.rows.n)
        return dict(zip(self.rows.keys[rows].tolist(), pack(rows), strict=True))


class ItemsSubject(Subject):
    """The item state."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed)
        self.items = Items(rows=self.rows)

    def learn(self, entries: Entries) -> None:
        self.items.fold(entries)

    def score(self, keys: np.ndarray, now: float) -> np.ndarray:
        model = Model(rows=self.rows)
        return np.array([score for _, score in popular(self.items, model, 20, keys, now)])

    def to_bytes(self) -> dict[int | str, bytes]:
        return {**self._by_key(self.items.pack), "totals": self.items.pack_totals()}

    def from_bytes(self, state: dict[int | str, bytes]) -> None:
        keys = [key for key in state if isinstance(key, int)]
        self.items.load(np.array(keys, np.uint64), [state[key] for key in keys])
        self.items.load_totals(state["totals"])


class LearnerSubject(Subject):
    """The whole learner, with an item state beside it to score from."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed)
        self.items = Items(rows=self.rows)
        self.learner = Learner(rows=self.rows, seed=seed)

    def learn(self, entries: Entries) -> None:
        self.items.fold(entries)
        for first in range(0, len(entries), 16):
            self.learner.learn(entries.slice(first, min(first + 16, len(entries)), []))

    def score(self, keys: np.ndarray, now: float) -> np.ndarray:
        history = History(keys, np.full(len(keys), now), np.ones(len(keys), np.uint8))
        request = Request("slate", now, keep_candidates=True, seen="include")
        slate = recommend(self.items, self.learner.model, history, request)
        near = [score for key in keys.tolist() for _, score in similar(self.items, self.learner.model, key, 5)]
        return np.concatenate((slate.candidate_scores, slate.features.ravel(), slate.propensities, near))

    def to_bytes(self) -> dict[int | str, bytes]:
        rows = self._by_key(self.items.pack)
        packed = self._by_key(self.learner.pack_state)
        dense: dict[int | str, bytes] = {"dense": self.learner.dense_state(), "totals": self.items.pack_totals()}
        return {**dense, **{key: packed[key] + b"|" + rows[key] for key in packed}}

    def from_bytes(self, state: dict[int | str, bytes]) -> None:
        keys = [key for key in state if isinstance(key, int)]
        width = {key: STATE_ROW.itemsize + 32 * (state[key][0] == 2) for key in keys}
        self.learner.load_state(np.array(keys, np.uint64), [state[key][: width[key]] for key in keys])
        self.items.load(np.array(keys, np.uint64), [state[key][width[key] + 1 :] for key in keys])
        self.learner.load_dense(state["dense"])
        self.items.load_totals(state["totals"])


class RankerSubject(Subject):
    """The ranker alone, on features drawn from each entry's position."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed)
        self.ranker = Ranker()

    def learn(self, entries: Entries) -> None:
        for time in entries.time.tolist():
            rng = np.random.default_rng(int(mix64(np.uint64(abs(time)))) ^ self.seed)
            scale = 1e30 if abs(time) > 1e12 else 3.0
            self.ranker.learn(scale * rng.normal(size=(12, F)), int(rng.integers(12)))

    def score(self, keys: np.ndarray, now: float) -> np.ndarray:
        return self.ranker.score(np.random.default_rng(3).normal(size=(len(keys), F)))

    def to_bytes(self) -> dict[int | str, bytes]:
        return {"ranker": pack_named(self.ranker.state())}

    def from_bytes(self, state: dict[int | str, bytes]) -> None:
        self.ranker.set_state(self.ranker.read_state(unpack_named(state["ranker"])))


class EncoderSubject(Subject):
    """The encoder alone; its optimiser state round-trips with the learner's."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed)
        self.factors = Factors(rows=self.rows)
        self.encoder = Encoder(factors=self.factors)

    def learn(self, entries: Entries) -> None:
        targets = self.rows.add(entries.target[entries.target != 0])
        history = np.full((len(targets), POSITIONS), -1, np.int64)
        history[1:, 0] = targets[:-1]
        for at in range(0, len(targets), 8):
            self.encoder.step(targets[at : at + 8], history[at : at + 8], self.seed + at)

    def score(self, keys: np.ndarray, now: float) -> np.ndarray:
        return self.factors.encode(self.rows.find(keys))

    def to_bytes(self) -> dict[int | str, bytes]:
        factors = self.factors
        dense = factors.positions.tobytes() + factors.start.tobytes() + factors.both.tobytes()
        return {"dense": dense, **self._by_key(factors.pack_rows)}

    def from_bytes(self, state: dict[int | str, bytes]) -> None:
        raise NotImplementedError


class PopularitySubject(Subject):
    """The decayed counts alone."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed)
        self.popularity = Popularity()

    def learn(self, entries: Entries) -> None:
        rows = self.rows.add(entries.target)
        self.popularity.grow(self.rows.capacity)
        for row, time in zip(rows.tolist(), entries.time.tolist(), strict=True):
            add(self.popularity.weights[row], self.popularity.cells[row], time)
            add(self.popularity.totals, self.popularity.total_cells, time)
            self.popularity.last[0] = max(self.popularity.last[0], time)

    def score(self, keys: np.ndarray, now: float) -> np.ndarray:
        return self.popularity.at(now)[2]

    def to_bytes(self) -> dict[int | str, bytes]:
        weights, cells = self.popularity.weights, self.popularity.cells
        rows = self._by_key(lambda rows: [weights[row].tobytes() + cells[row].tobytes() for row in rows])
        return {**rows, "totals": self.popularity.pack_totals()}

    def from_bytes(self, state: dict[int | str, bytes]) -> None:
        raise NotImplementedError


SUBJECTS: Final[tuple[type[Subject], ...]] = (
    ItemsSubject, LearnerSubject, RankerSubject, EncoderSubject, PopularitySubject,
)  # fmt: skip
EXEMPT: Final = {
    ("round_trip", EncoderSubject): "its state is a part of the learner's, whose round trip covers it",
    ("round_trip", PopularitySubject): "its rows are packed by the items and the learner, its totals in test_decay",
}


def _stream(seed: int = 0, n: int = 120) -> Entries:
    return Walk(seed=seed, n=n, width=F, pace=60.0).entries()


def round_trip(kind: type[Subject]) -> None:
    """Bytes, loaded into a new one, are the same bytes; and both go on to the same bytes."""
    first, second = kind(), kind()
    first.learn(_stream())
    second.from_bytes(first.to_bytes())
    assert second.to_bytes() == first.to_bytes()
    more = entry(5, 1.8e9, offset=500, history=[4, 3])
    for subject in (first, second):
        subject.learn(more)
    assert second.to_bytes() == first.to_bytes()


def score_leaves_the_bytes_unchanged(kind: type[Subject]) -> None:
    """Scoring known and unknown items changes no state."""
    subject = kind()
    subject.learn(_stream())
    before, rows = subject.to_bytes(), subject.rows.n
    subject.score(np.concatenate((KEYS[:10], np.array([12345], np.uint64))), 1.8e9)
    assert subject.to_bytes() == before
    assert subject.rows.n == rows


def same_seed_same_result(kind: type[Subject]) -> None:
    """Two learners with one seed and stream end in the same bytes and scores."""
    first, second = kind(), kind()
    for subject in (first, second):
        subject.learn(_stream())
    assert first.to_bytes() == second.to_bytes()
    np.testing.assert_array_equal(first.score(KEYS[:5], 1.8e9), second.score(KEYS[:5], 1.8e9))


def unseen_ids_are_fine(kind: type[Subject]) -> None:
    """Before and after learning, unknown items and an empty list score as finite numbers."""
    subject = kind()
    for _ in range(2):
        for keys in (np.empty(0, np.uint64), np.array([3, 2**64 - 1], np.uint64), KEYS[:3]):
            assert np.isfinite(subject.score(keys, 1.8e9)).all()
        subject.learn(_stream(n=40))


def extreme_input_gives_no_nan(kind: type[Subject]) -> None:
    """Times at both ends, the same item for ever, huge features: all scores stay finite."""
    subject = kind()
    times = [0.0, 9.9e10, 1.6e9, 1e18, -1e18] + [1.7e9] * 60
    subject.learn(concatenate([entry(7, t, offset=i, history=[7] * min(i, 20)) for i, t in enumerate(times)]))
    for now in (0.0, 1.7e9, 9.9e10):
        assert np.isfinite(subject.score(KEYS[:10], now)).all()


def memory_is_bounded(kind: type[Subject]) -> None:
    """Learning the same items for longer does not grow the state, but for the ring of recent targets."""
    subject = kind()
    subject.learn(_stream(n=400))
    size = sum(map(len, subject.to_bytes().values()))
    subject.learn(_stream(seed=1, n=400))
    assert sum(map(len, subject.to_bytes().values())) <= size + 400 * 12 + 60 * 60 * 16
    if isinstance(subject, LearnerSubject):
        assert len(subject.learner.window) <= WINDOW_SLATES


CHECKS: Final = (
    round_trip, score_leaves_the_bytes_unchanged, same_seed_same_result, unseen_ids_are_fine,
    extreme_input_gives_no_nan, memory_is_bounded,
)  # fmt: skip
