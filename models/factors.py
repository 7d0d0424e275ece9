"""Item vectors and the user encoder: what an item is, given what it follows. Knows nothing about popularity.

    q = W sum_p a_p E[h_p] + W2 E[h0],   a = softmax(position logits) over the last 20 items and a start token
    logit(y) = q . E[y] + b_y            (trained by sampled softmax; scoring adds the log prior)

With negatives drawn from the recent targets, and no logQ correction, q.E + b learns log P(y | history) - log P(y).
A new item's vector is N(0, .05) drawn from its hash: every process gives it the same one. The training step is in
`models/encoder.py`; scoring needs numpy and numba only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.decay import grown
from models.examples import CodecError
from models.rows import LEARNT, Rows, find_row

DIM: Final = 64
POSITIONS: Final = 20
SCALE: Final = 0.05
HALF_LIVES: Final = (3600.0, 30 * 86400.0)
"""Half-lives of the cached user embeddings, s."""

F32 = NDArray[np.float32]
F16 = NDArray[np.float16]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

ROW: Final = np.dtype([("version", "u1"), ("form", "u1"), ("zero", "u2"), ("bias", "<f4"), ("vector", "<f2", (DIM,))])
"""A row as serving reads it, 136 B: version 1, form 1."""
STATS: Final = 8
"""Statistics of an item's outcomes (models/values.py), f32, behind either form of a row that has any: version 2."""


@njit(cache=True)
def mix64(x):  # type: ignore[no-untyped-def]
    """Return the splitmix64 scramble of a u64: the counter-based random bits of this package."""
    x = np.uint64(x) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True, fastmath={"reassoc", "contract"})
def dot(a, b):  # type: ignore[no-untyped-def]
    """Return the dot product of two f32 vectors, as vector code (10 x faster), summed in an order of the processor's.

    For scores and learning steps; never in the fold of a profile or an item row.
    """
    s = np.float32(0.0)
    for j in range(len(a)):
        s += a[j] * b[j]
    return s


@njit(cache=True)
def _born(keys, rows, vectors):  # type: ignore[no-untyped-def]
    for row in rows:
        state = mix64(keys[row])
        for j in range(0, vectors.shape[1], 2):
            state = mix64(state)
            u = (np.float64(state >> np.uint64(11)) + 0.5) / 9007199254740992.0
            state = mix64(state)
            v = np.float64(state >> np.uint64(11)) / 9007199254740992.0
            radius = 0.05 * math.sqrt(-2.0 * math.log(u))
            vectors[row, j] = radius * math.cos(2.0 * math.pi * v)
            vectors[row, j + 1] = radius * math.sin(2.0 * math.pi * v)


@njit(cache=True)
def _encode(history, vectors, positions, start, both):  # type: ignore[no-untyped-def]
    d = vectors.shape[1]
    k = min(len(history), 20)
    top = positions[20]
    for p in range(k):
        if history[p] >= 0:
            top = max(top, positions[p])
    total = math.exp(positions[20] - top)
    pooled = np.empty(d, np.float32)
    for j in range(d):
        pooled[j] = total * start[j]
    for p in range(k):
        if history[p] >= 0:
            a = math.exp(positions[p] - top)
            total += a
            for j in range(d):
                pooled[j] += a * vectors[history[p], j]
    q = np.zeros(d, np.float32)
    newest = k > 0 and history[0] >= 0
    for i in range(d):
        s = np.float32(0.0)
        for j in range(d):
            s += both[i, j] * pooled[j]
        s /= total
        if newest:
            for j in range(d):
                s += both[i, d + j] * vectors[history[0], j]
        q[i] = s
    return q


@njit(cache=True)
def _decayed(items, times, lengths, now, picked, half_lives, table, keys, vectors, out):  # type: ignore[no-untyped-def]
    for i in range(len(picked)):
        u = picked[i]
        least = np.inf
        for h in range(lengths[u]):
            least = min(least, max(now[u] - times[u, h], 0.0))
        totals = np.zeros(len(half_lives))
        for h in range(lengths[u]):
            row = find_row(table, keys, items[u, h])
            if row < 0:
                continue
            age = max(now[u] - times[u, h], 0.0) - least
            for k in range(len(half_lives)):
                weight = math.exp(-math.log(2.0) * min(age / half_lives[k], 60.0))
                totals[k] += weight
                for j in range(vectors.shape[1]):
                    out[i, k, j] += np.float32(weight) * vectors[row, j]
        for k in range(len(half_lives)):
            if totals[k] > 0.0:
                for j in range(vectors.shape[1]):
                    out[i, k, j] /= np.float32(totals[k])


class Factors:
    """Vectors f32[capacity, 64] and biases f32[capacity] of all items, aligned to shared rows, and the user encoder.

    positions f32[21] (20 places and the start token's), start f32[1, 64], both f32[64, 128]: W beside W2.
    """

    def __init__(self, *, rows: Rows) -> None:
        self.rows = rows
        self.births = 0
        self.vectors: F32 = np.zeros((0, DIM), np.float32)
        self.bias: F32 = np.zeros(0, np.float32)
        self.positions: F32 = (-0.15 * np.arange(POSITIONS + 1)).astype(np.float32)
        self.start: F32 = np.zeros((1, DIM), np.float32)
        _born(np.ones(1, np.uint64), np.zeros(1, np.int64), self.start)
        self.both: F32 = np.concatenate((np.eye(DIM), 0.5 * np.eye(DIM)), 1).astype(np.float32)
        self.grow()

    def grow(self) -> bool:
        """Follow the shared rows; new ones get the vector of their hash. Returns whether the arrays were replaced."""
        replaced = len(self.vectors) < self.rows.capacity
        if replaced:
            self.vectors = grown(self.vectors, self.rows.capacity)
            self.bias = grown(self.bias, self.rows.capacity)
        if self.births < self.rows.births:
            self.forget(self.rows.born_since(self.births))
            self.births = self.rows.births
        return replaced

    def forget(self, rows: I64) -> None:
        """Set these rows to what new ones are."""
        _born(self.rows.keys, rows, self.vectors)
        self.bias[rows] = 0.0

    def encode(self, history: I64) -> F32:
        """Return q f32[64] for the rows of a history, newest first, -1 for an item without a row."""
        out: F32 = _encode(history, self.vectors, self.positions, self.start[0], self.both)
        return out

    def decayed_embeddings(self, items: U64, times: F64, lengths: I64, now: F64, picked: I64) -> F16:
        """Return f16[k, 2, 64] of the users `picked` i64[k]: means of their items' vectors, the older the lighter.

        Weights 2^-(age / H), H = 1 h and 30 d, with ages counted from the user's newest entry. items u64[u, h] and
        times f64[u, h] (s), of which the first lengths i64[u] count; now f64[u]. Items without a row count nothing;
        zeros where none has one. A cache, never the truth.
        """
        out = np.zeros((len(picked), len(HALF_LIVES), DIM), np.float32)
        if self.rows.n:
            halves = np.array(HALF_LIVES)
            _decayed(items, times, lengths, now, picked, halves, self.rows.table, self.rows.keys, self.vectors, out)
        return out.astype(np.float16)

    def pack_rows(self, rows: I64) -> list[bytes]:
        """Return what scoring needs of these rows: bias f32, vector f16[64]."""
        out = np.zeros(len(rows), ROW)
        out["version"], out["form"] = 1, 1
        out["bias"], out["vector"] = self.bias[rows], self.vectors[rows]
        return cut(out)

    def load_rows(self, keys: U64, blobs: list[bytes]) -> I64:
        """Set the rows of `keys` u64[k] from `pack_rows` and return them."""
        values = read_rows(blobs, ROW, form=1)
        rows = self.rows.add(keys)
        self.rows.hold(rows, LEARNT)
        self.grow()
        self.bias[rows], self.vectors[rows] = values["bias"], values["vector"]
        return rows


def cut(values: NDArray[Any]) -> list[bytes]:
    """Return the bytes of each record of a structured array."""
    data, width = values.tobytes(), values.dtype.itemsize
    return [data[at : at + width] for at in range(0, len(data), width)]


def read_rows(blobs: list[bytes], dtype: np.dtype[Any], *, form: int) -> NDArray[Any]:
    """Return packed rows as a structured array, with `stats` f32[8]; raises CodecError on another size or form."""
    tail = bytes(4 * STATS)
    for blob in blobs:
        if not _is_row(blob, dtype, form):
            expected = f"version 1 or 2, form {form}, {dtype.itemsize} B and {len(tail)} from 2 on"
            raise CodecError(f"model row: expected {expected}; got {blob[:2].hex()}, {len(blob)} B")
    data = b"".join(blob if blob[0] == 2 else blob + tail for blob in blobs)
    return np.frombuffer(data, np.dtype([*dtype.descr, ("stats", "<f4", (STATS,))]))


def _is_row(blob: bytes, dtype: np.dtype[Any], form: int) -> bool:
    size = dtype.itemsize
    return len(blob) > 1 and blob[1] == form and (blob[0], len(blob)) in ((1, size), (2, size + 4 * STATS))


def with_stats(blobs: list[bytes], stats: F32) -> list[bytes]:
    """Return packed rows with the statistics f32[k, 8] behind them; those that have none stay of version 1."""
    some: list[bool] = np.any(stats, axis=1).tolist()
    tails = np.ascontiguousarray(stats, "<f4")
    return [b"\x02" + a[1:] + tails[i].tobytes() if some[i] else a for i, a in enumerate(blobs)]


def sound(
    keys: Sequence[int], blobs: Sequence[bytes], dtype: np.dtype[Any], *, form: int
) -> tuple[list[int], list[bytes], list[str]]:
    """Return the rows that `read_rows` reads, and what is wrong with each of the others."""
    good: list[int] = []
    values: list[bytes] = []
    bad: list[str] = []
    for key, blob in zip(keys, blobs, strict=True):
        if _is_row(blob, dtype, form):
            good.append(key)
            values.append(blob)
        else:
            expected = f"expected version 1 or 2, form {form}, {dtype.itemsize} bytes and {4 * STATS} from 2 on"
            bad.append(f"model row {key:016x}: {expected}, got {blob[:2].hex() or 'nothing'}, {len(blob)} bytes")
    return good, values, bad


def pack_named(values: dict[str, Any]) -> bytes:
    """Return named numpy arrays and plain values as versioned MessagePack; arrays keep dtype and shape."""
    plain = {
        k: {"t": v.dtype.str, "s": list(v.shape), "b": v.tobytes()} if isinstance(v, np.ndarray) else v
        for k, v in values.items()
    }
    return b"\xe7\x01" + msgspec.msgpack.encode(plain)


def unpack_named(data: bytes) -> dict[str, Any]:
    """Read `pack_named`; raises CodecError on another magic or version, and on what is no such map."""
    if data[:2] != b"\xe7\x01":
        raise CodecError(f"dense weights: expected version 1, got {data[:2].hex() or 'nothing'}")
    try:
        plain = msgspec.msgpack.decode(data[2:], type=dict[str, Any])
        return {k: _array(v) if isinstance(v, dict) and "t" in v else v for k, v in plain.items()}
    except (msgspec.MsgspecError, RecursionError, KeyError, TypeError, ValueError) as error:
        raise CodecError(
            f"dense weights: expected a map of named arrays, got {type(error).__name__}: {error}"
        ) from error


def _array(value: dict[str, Any]) -> NDArray[Any]:
    if not re.fullmatch(r"[<|][fiu][1248]", value["t"]):
        raise ValueError(f"an array of type {value['t'][:20]!r}")
    return np.frombuffer(value["b"], value["t"]).reshape(value["s"]).copy()


def fitted(values: dict[str, Any], name: str, like: NDArray[Any]) -> NDArray[Any]:
    """Return a named array as one of the shape and type of `like`, finite; raises CodecError."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is not finite, which is asked below
            array: NDArray[Any] = np.asarray(values[name], like.dtype)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CodecError(
            f"dense weights: {name}: expected {like.dtype}, got {type(error).__name__}: {error}"
        ) from error
    if array.shape != like.shape or not np.isfinite(array).all():
        raise CodecError(f"dense weights: {name}: expected finite {like.shape}, got {array.shape}")
    return array


def whole(values: dict[str, Any], name: str) -> int:
    """Return a named whole number; raises CodecError."""
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CodecError(f"dense weights: {name}: expected a whole number, got {value!r:.80}")
    return value
