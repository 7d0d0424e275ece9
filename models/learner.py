"""The fold over `examples` that moves the model: prior mixture, item vectors and encoder, ranker, last layer.

One call learns one micro-batch, in order: impressions enter the join window, and the last layer counts what they show;
an outcome joins the newest of its slates whose logged candidates hold the item, trains the ranker on that list and, the
first time that it says so of a shown item, brings its reward to the last layer; every new entry of a user's sequence
moves the prior mixture (online EM, rate .002, read before the item is counted), the decayed counts, and the encoder.
State is a function of the entries, their micro-batches, what was let go when, and the constructor's seed. Where more
items are learnt than may be, those whose two-minute count is least leave, which is to say: the least recently counted.
Knows nothing about Kafka or Redis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import xxhash
from numba import njit
from numpy.typing import NDArray

from models.bandit import POLICIES, Rewards, RewardTable, examination
from models.decay import Popularity, add, at_time, grown, popularities
from models.encoder import RECENT, Encoder
from models.examples import ACTION, ENTERS, RATING, CodecError, Entries
from models.factors import POSITIONS, cut, fitted, mix64, pack_named, read_rows, unpack_named, whole, with_stats
from models.model import STATE_FORM, STATE_ROW, Model
from models.ranker import drift
from models.rows import LEARNT, Rows
from models.window import START, Held, Origin, Reward, Window, places_of

MIXTURE_RATE: Final = 0.002
CALIBRATED: Final = 0.25
"""Share of slates, by hash, that the calibration learns: two numbers need no more, and the others cost nothing."""
WATCHED: Final = ("linear", "network", "encoder", "values")
"""Models whose prequential losses are watched for drift; of the values, the squared errors of ratings."""
LOOSER: Final = 0.1
"""At an alarm of either model the ranker's sums of squares x this: it learns faster until they have grown again."""
ROOM: Final = 32
"""Where items are too many, one in so many of the cap leaves beside those above it: not every step finds some."""
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U16 = NDArray[np.uint16]
U64 = NDArray[np.uint64]


class Sums(dict[str, float]):
    """Sums by name, which add up name by name."""

    def put(self, name: str, amount: float = 1.0) -> None:
        """Add to one of them."""
        self[name] = self.get(name, 0.0) + amount

    def __add__(self, more: Sums) -> Sums:
        out = Sums(self)
        for name, amount in more.items():
            out.put(name, amount)
        return out


@dataclass(slots=True)
class Learned:
    """What one micro-batch did: events learnt, outcomes joined to a slate, lists the ranker learnt, losses, alarms.

    rated: ratings; rating_error: the sum of their squared errors before each was learnt, of values from -1 to 1.
    calibrated: of each slate that the calibration learnt, (probabilities before f64[k], what was chosen f64[k]): at its
    first outcome that one alone; chosen_since: what was chosen later of slates that it learnt before.
    sums: by policy the slates that came, hits (a slate of which something shown was chosen, once), their NDCG, that is
    1 / log2(place + 2), and rewards, as `slates_<policy>`, `hits_`, `ndcg_`, `reward_`; alarms as `alarm_<watch>`.
    """

    entered: int = 0
    joined: int = 0
    lists: int = 0
    encoder_loss: float = 0.0
    ranker_loss: float = 0.0
    rated: int = 0
    rating_error: float = 0.0
    alarms: int = 0
    calibrated: list[tuple[F64, F64]] = field(default_factory=list)
    chosen_since: int = 0
    sums: Sums = field(default_factory=Sums)


class Learner:
    """Owner of a `Model` under training: optimiser state, own popularity, join window.

    rows: the shared rows; seed: of the negatives, mixed with each micro-batch's first source position; rewards: rows of
    (surface, kind, weight), see `models.bandit.rewards`.
    """

    def __init__(self, *, rows: Rows, seed: int = 1, rewards: RewardTable = ()) -> None:
        self.rows = rows
        self.seed = seed
        self.rewards = Rewards(rewards)
        self.model = Model(rows=rows)
        self.encoder = Encoder(factors=self.model.factors)
        self.popularity = Popularity()
        self.window = Window()
        self.learnt = 0
        self.collided = 0
        self.watches = {name: drift.Watch() for name in WATCHED}
        self._touched: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._checks: U16 = np.zeros(0, np.uint16)
        self.grow()

    def grow(self) -> None:
        """Follow the shared rows."""
        self.encoder.grow()
        if len(self._checks) < self.rows.capacity:
            self.model.values.grow()
            self.popularity.grow(self.rows.capacity)
            self._touched = grown(self._touched, self.rows.capacity)
            self._checks = grown(self._checks, self.rows.capacity)

    def learn(self, entries: Entries, origin: Origin = START) -> Learned:
        """Learn one micro-batch of entries, which came with the record that began at `origin`."""
        out = Learned()
        entries, checks = self._apart(entries)
        joined = self.window.join(entries, origin, self.rewards)
        for slate in joined.left:
            self._calibrate(slate, None, True, out)
        for held in joined.came:
            self._expose(held)
            out.sums.put(f"slates_{_policy(held)}")
        for held, place in joined.hits:
            out.sums.put(f"hits_{_policy(held)}")
            out.sums.put(f"ndcg_{_policy(held)}", 1.0 / math.log2(place + 2.0))
        for reward in joined.rewards:
            self._reward(reward)
            out.sums.put(f"reward_{_policy(reward.held)}", reward.earned)
        for slate, target, place, first, again in joined.pairs:
            out.joined += 1
            if not again:  # a dwell after other clicks comes as an outcome of its own: that was chosen once
                self._calibrate(slate, target, first, out)
            self._rank(slate, target, place, out)
        judged, entering = _roles(entries.kind, entries.flags, entries.target)
        if len(judged) and entries.version > 1:  # before that an entry does not say how its user rates
            self._value(entries, judged, out)
        if len(entering):
            self._enter(entries, entering, checks[entering], out)
        return out

    def refill(self, entries: Entries, origin: Origin) -> None:
        """Let entries pass through the join window only: what a restart does before it goes on learning."""
        self.window.join(self._apart(entries)[0], origin, self.rewards)

    def take_over(self, other: Learner) -> None:
        """Go on with another's join window and stream time, which follow from the log alone: weights went back."""
        self.window = other.window

    def _apart(self, entries: Entries) -> tuple[Entries, U16]:
        """Leave out entries whose id is not that of the row their hash names: the item agent dead-letters them.

        Returns the others and the checks of their ids, u16[n], 0 where there is none.
        """
        named, collided, checks = dict[int, int](), list[int](), list[int]()
        rows = self.rows.find(entries.target).tolist()
        for i, (key, row, text) in enumerate(zip(entries.target.tolist(), rows, entries.ids, strict=True)):
            check = _check(text) if text else 0
            checks.append(check)
            if check:
                owner = (int(self._checks[row]) if row >= 0 else 0) or named.setdefault(key, check)
                if owner != check:
                    collided.append(i)
        if not collided:
            return entries, np.array(checks, np.uint16)
        self.collided += len(collided)
        keep = np.ones(len(entries), np.bool_)
        keep[collided] = False
        return entries.take(keep), np.array(checks, np.uint16)[keep]

    def excess(self, most: int) -> int:
        """Return how many learnt items are to leave where at most `most` may stay: a few more than are above it."""
        learnt = len(self.rows.held_by(LEARNT))
        return learnt - most + most // ROOM if learnt > most else 0

    def let_go(self, count: int) -> U64:
        """Forget the `count` items whose two-minute count is least, ties by hash; return the hashes of those that left.

        Items among the last 4,096 targets stay: negatives are drawn from them.
        """
        may = self.rows.held_by(LEARNT)
        may = may[~np.isin(may, self.encoder.ring[: min(self.encoder.pushed, RECENT)])]
        # With a half-life of two minutes a count of a later cell (1.4 h) is the greater one: no exponential is needed.
        counts, cells = self.popularity.weights[may, 0], self.popularity.cells[may, 0]
        rows = may[np.lexsort((self.rows.keys[may], counts, cells))[: max(0, count)]]
        keys = self.rows.keys[rows]
        self.popularity.weights[rows], self.popularity.cells[rows] = 0.0, 0
        self.encoder.forget(rows)
        self.model.values.forget(rows)
        self._checks[rows], self._touched[rows] = 0, False
        self.rows.release(rows, LEARNT)
        return keys

    def window_origin(self) -> Origin | None:
        """Return where the oldest held slate's record begins: what a restart must read again; None if none is held."""
        return self.window.origin()

    @property
    def stream_time(self) -> float:
        """The latest time of an entry, s."""
        return self.window.stream_time

    @stream_time.setter
    def stream_time(self, time: float) -> None:
        self.window.stream_time = time

    def take_changed(self) -> I64:
        """Return the rows changed since the last call, sorted."""
        changed = np.flatnonzero(self._touched)
        self._touched[changed] = False
        return changed

    def _expose(self, held: Held) -> None:
        """Let the last layer count what a slate shows, with the examination that is usual at each position."""
        phi, expected = self._seen(held, slice(None))
        self.model.last_layer.expose(phi, expected, examination(len(phi)))

    def _reward(self, reward: Reward) -> None:
        phi, expected = self._seen(reward.held, slice(reward.place, reward.place + 1))
        if len(phi):
            examined = examination(reward.place + 1)[-1]
            self.model.last_layer.succeed(phi[0], float(expected[0]), examined, reward.earned, first=reward.first)

    def _seen(self, held: Held, part: slice) -> tuple[F64, F64]:
        """Return the last hidden features and calibrated probabilities of shown items, by the model as it is now.

        Not as it was then: a restart, which reads the window's slates again, goes on with the same numbers.
        """
        places = places_of(held.shown.candidates, held.shown.items[part])
        x = held.shown.features[places].astype(np.float64)
        phi, scores = self.model.ranker.seen(x)
        return phi, self.model.calibration.probability(scores)

    def _calibrate(self, held: Held, target: int | None, first: bool, out: Learned) -> None:
        """Learn how probable what was shown was, at a slate's first outcome or as it leaves; correct it at a later one.

        Scores are those before the ranker learns from the slate, so what is learnt here is prequential.
        """
        shown = held.shown
        if float(mix64(np.uint64(shown.slate))) >= CALIBRATED * 2.0**64 or not len(shown.items):
            return
        model, items = self.model, shown.items if first else np.array([target], np.uint64)
        places = places_of(shown.candidates, items)
        if not len(places):
            return
        scores = model.ranker.score(shown.features[places].astype(np.float64))
        if first:
            chosen = (items == (target or 0)).astype(np.float64)
            before = model.calibration.learn(scores, chosen)
            out.calibrated.append((before, chosen[: len(before)]))
        elif (shown.items == items).any():
            model.calibration.correct(float(scores[0]))
            out.chosen_since += 1

    def _rank(self, held: Held, target: int, place: int, out: Learned) -> None:
        """One listwise step; without logged candidates, against what was viewed or stands above one below a choice."""
        x = held.shown.features
        if not held.listed:
            items = held.shown.items.tolist()
            reach = 1 + max(i for i, item in enumerate(items) if item in held.chosen)
            examined = [
                i
                for i, item in enumerate(items)
                if item == target or (item not in held.chosen and (i <= reach or item in held.viewed))
            ]
            x, place = x[examined], examined.index(place)
        ranker = self.model.ranker
        out.ranker_loss += ranker.learn(x, place)
        out.lists += 1
        for name, loss in zip(("linear", "network"), ranker.latest, strict=True):
            if loss > 0.0 and self._alarm(name, loss, 1, out):
                ranker.loosen(LOOSER)

    def _value(self, entries: Entries, judged: I64, out: Learned) -> None:
        """Learn what the outcomes at `judged` i64[k] were worth, each after it was predicted."""
        targets = self.rows.add(entries.target[judged])
        self.grow()
        said = self.model.values.learn(entries, judged, targets, self.model.factors.vectors)
        _mark(targets, self._touched, self.rows.held)
        errors = _errors(judged, entries.kind, entries.value, said)
        if len(errors):
            error = float(errors.sum())
            out.rated += len(errors)
            out.rating_error += error
            self._alarm("values", error, len(errors), out)

    def _enter(self, entries: Entries, entering: I64, checks: U16, out: Learned) -> None:
        """Count the entries at `entering` i64[k] and take a step on them; checks u16[k] of their ids."""
        k = len(entering)
        start, keys = _keys(entries.target, entries.history_start, entries.history_item, entering)
        rows = self.rows.add(keys)
        targets, history = rows[:k], np.empty((k, POSITIONS), np.int64)
        self.grow()
        popularity = self.popularity
        _place(start, rows, history, checks, self._checks)
        _count(
            targets, entering, entries.flags, entries.time, popularity.weights, popularity.cells, popularity.totals,
            popularity.total_cells, popularity.last, self.model.mixture, float(self.rows.known),
        )  # fmt: skip
        loss, changed = self.encoder.step(targets, history, self.step_seed(entries))
        _mark(changed, self._touched, self.rows.held)
        self.learnt += k
        out.entered += k
        out.encoder_loss += loss
        self._alarm("encoder", loss, k, out)

    def _alarm(self, name: str, loss: float, count: int, out: Learned) -> bool:
        """Let a watch take the summed loss of `count` examples; returns whether that is an alarm, and counts it."""
        risen = self.watches[name].learn(loss, count)
        if risen:
            out.alarms += 1
            out.sums.put(f"alarm_{name}")
        return risen

    def step_seed(self, entries: Entries) -> int:
        """Return the negatives' seed of a micro-batch, from its first source position and the learner's seed."""
        return int(_seed(np.uint64(self.seed), entries.partition, entries.offset, entries.index))

    def pack_state(self, rows: I64) -> list[bytes]:
        """Return these rows with optimiser state and counts, 368 B each, 400 B where an item has statistics.

        `Model.load_rows` reads them too.
        """
        out = np.zeros(len(rows), STATE_ROW)
        factors = self.model.factors
        out["version"], out["form"], out["check"] = 1, STATE_FORM, self._checks[rows]
        out["bias"], out["vector"] = factors.bias[rows], factors.vectors[rows]
        out["square"], out["bias_square"] = self.encoder.squares[rows], self.encoder.bias_squares[rows]
        out["weights"], out["cells"] = self.popularity.weights[rows], self.popularity.cells[rows]
        return with_stats(cut(out), self.model.values.stats[rows])

    def load_state(self, keys: U64, blobs: list[bytes]) -> I64:
        """Set rows of `keys` u64[k] from `pack_state` and return them; raises CodecError."""
        values = read_rows(blobs, STATE_ROW, form=STATE_FORM)
        rows = self.rows.add(keys)
        self.rows.hold(rows, LEARNT)
        self.grow()
        self._checks[rows] = values["check"]
        self.model.values.stats[rows] = values["stats"]
        factors = self.model.factors
        factors.bias[rows], factors.vectors[rows] = values["bias"], values["vector"]
        self.encoder.squares[rows], self.encoder.bias_squares[rows] = values["square"], values["bias_square"]
        self.popularity.weights[rows], self.popularity.cells[rows] = values["weights"], values["cells"]
        return rows

    def dense_state(self) -> bytes:
        """Return everything that is not per item: dense weights, optimiser, totals, ring of recent targets.

        Every array of floats in it, as in the rows, is finite: the guard refuses a step that holds another.
        """
        encoder = self.encoder
        return pack_named(
            {
                **self.model.dense(),
                "seed": self.seed, "learnt": self.learnt, "stream_time": float(self.stream_time),
                "totals": self.popularity.pack_totals(), "known": self.rows.known,
                "ring": self.rows.keys[encoder.ring[: encoder.pushed]], "pushed": encoder.pushed,
                "start_square": encoder.start_square, "position_squares": encoder.position_squares,
                "gradient": encoder.gradient, "moment": encoder.moment, "moment2": encoder.moment2,
                "pending": encoder.pending, "adam_steps": encoder.adam_steps,
                **{f"watch_{name}": watch.state() for name, watch in self.watches.items()},
            }
        )  # fmt: skip

    def load_dense(self, data: bytes) -> None:
        """Read `dense_state`; the join window is refilled from `examples`, see `refill`. Raises CodecError."""
        values: dict[str, Any] = unpack_named(data)
        encoder = self.encoder
        numbers = {name: whole(values, name) for name in ("seed", "learnt", "pushed", "pending", "adam_steps")}
        names = ("start_square", "position_squares", "gradient", "moment", "moment2")
        arrays = {name: fitted(values, name, getattr(encoder, name)) for name in names}
        watches = {name: drift.read_state(values, f"watch_{name}") for name in WATCHED}
        stream_time, totals = values.get("stream_time"), values.get("totals")
        if not isinstance(stream_time, float) or not isinstance(totals, bytes):
            raise CodecError(f"dense state: expected stream_time and totals, got {stream_time!r:.40}, {totals!r:.40}")
        ring = fitted(values, "ring", np.empty(max(0, min(numbers["pushed"], len(encoder.ring))), np.uint64))
        self.model.set_dense(values)
        self.popularity.load_totals(totals)
        self.seed, self.learnt, self.stream_time = numbers["seed"], numbers["learnt"], stream_time
        rows = self.rows.add(ring)
        self.grow()
        encoder.ring[: len(rows)] = rows
        encoder.pushed, encoder.pending = numbers["pushed"], numbers["pending"]
        encoder.adam_steps = numbers["adam_steps"]
        for name, array in arrays.items():
            getattr(encoder, name)[...] = array
        for name, stored in watches.items():
            if stored is not None:
                self.watches[name].set_state(stored)


def _policy(held: Held) -> str:
    """Return the name of the policy that drew a slate, "other" for one that is none of ours."""
    name = held.shown.policy.partition("/")[0]
    return name if name in POLICIES else "other"


def _check(text: str) -> int:
    """Return 16 bits of an id beside its 64-bit name, never 0: what tells two ids with one name apart."""
    return xxhash.xxh32_intdigest(text.encode()) & 0xFFFF or 1


@njit(cache=True)
def _seed(seed, partition, offset, index):  # type: ignore[no-untyped-def]
    first = np.uint64(partition[0]) << np.uint64(48) ^ np.uint64(offset[0]) << np.uint64(8) ^ np.uint64(index[0])
    return mix64(mix64(seed) ^ first)


@njit(cache=True)
def _roles(kind, flags, target):  # type: ignore[no-untyped-def]
    """Return the places of entries that are outcomes, i64[j], and of those that enter a sequence, i64[k]."""
    judged, entering = np.empty(len(kind), np.int64), np.empty(len(kind), np.int64)
    j, k = 0, 0
    for i in range(len(kind)):
        if target[i] == 0:
            continue
        if kind[i] <= ACTION:
            judged[j] = i
            j += 1
        if flags[i] & ENTERS != 0:
            entering[k] = i
            k += 1
    return judged[:j], entering[:k]


@njit(cache=True)
def _errors(judged, kind, value, said):  # type: ignore[no-untyped-def]
    """Return the squared errors f64[r] of the ratings among outcomes at `judged` i64[k], of which `said` f64[k, 5]."""
    out = np.empty(len(judged))
    r = 0
    for i in range(len(judged)):
        if kind[judged[i]] == RATING:
            out[r] = (said[i, 0] - value[judged[i]]) ** 2
            r += 1
    return out[:r]


@njit(cache=True)
def _keys(target, history_start, history_item, entering):  # type: ignore[no-untyped-def]
    """Return (start i64[k + 1], keys): the k targets, then the newest 20 of each entry's history, from start[i] on."""
    k = len(entering)
    start = np.empty(k + 1, np.int64)
    start[0] = k
    for i in range(k):
        e = entering[i]
        start[i + 1] = start[i] + min(history_start[e + 1] - history_start[e], 20)
    keys = np.empty(start[k], np.uint64)
    for i in range(k):
        keys[i] = target[entering[i]]
        for j in range(start[i + 1] - start[i]):
            keys[start[i] + j] = history_item[history_start[entering[i]] + j]
    return start, keys


@njit(cache=True)
def _place(start, rows, history, checks, known_checks):  # type: ignore[no-untyped-def]
    """Fill history i64[k, 20] (-1 = none) from the rows of `_keys`, and note the checks of the targets' ids."""
    history[:] = -1
    for i in range(len(history)):
        known_checks[rows[i]] = max(known_checks[rows[i]], checks[i])
        for j in range(start[i + 1] - start[i]):
            history[i, j] = rows[start[i] + j]


@njit(cache=True)
def _mark(rows, touched, held):  # type: ignore[no-untyped-def]
    """Say of rows that they are touched and held by what is learnt."""
    for i in range(len(rows)):
        touched[rows[i]] = True
        held[rows[i]] |= LEARNT


@njit(cache=True)
def _count(targets, entering, flags, time, weights, cells, totals, total_cells, latest, mixture, known):  # type: ignore[no-untyped-def]  # fmt: skip
    """Entry by entry: one EM step of the mixture on the popularities before it, then count it."""
    cells_now, scale, p = np.empty(8, np.int32), np.empty(8), np.empty(8)
    for i in range(len(targets)):
        row, e = targets[i], entering[i]
        decayed = at_time(max(time[e], latest[0]), totals, total_cells, cells_now, scale)
        if weights[row, 7] > 0.0:
            popularities(weights[row], cells[row], cells_now, scale, decayed, known, p)
            total = 0.0
            for h in range(8):
                total += mixture[h] * p[h]
            for h in range(8):
                mixture[h] += 0.002 * (mixture[h] * p[h] / total - mixture[h])
        if flags[e] & 2:
            add(weights[row], cells[row], time[e])
            add(totals, total_cells, time[e])
            latest[0] = max(latest[0], time[e])
