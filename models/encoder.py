"""The training step of item vectors and user encoder: sampled softmax over recent targets, gradients by hand.

    loss = -log softmax(q . E[c] + b[c])[target] over the target, the batch's other targets and 512 of the last 4,096

Row-wise Adagrad .2 for vectors and the start token (squares start at 1e-3), Adagrad .02 for biases and position logits
(1e-2), Adam 1e-3 for W and W2 on the sums of 64 events. Gradients of a micro-batch are summed. The tensors share memory
with the numpy arrays of `Factors`, which scoring reads. The only file of `models/` that imports torch, and lazily.
Duchi, Hazan, Singer: Adaptive Subgradient Methods (JMLR 2011); Jean et al.: sampled softmax (ACL 2015).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.decay import grown
from models.factors import DIM, POSITIONS, Factors, dot, mix64

NEGATIVES: Final = 512
RECENT: Final = 4096
FEW: Final = 8
"""Events up to which a step is compiled code alone: a matrix library takes 80 us of calls, and pays from here on."""
RATE: Final = 0.2
SMALL_RATE: Final = 0.02
ADAM_RATE: Final = 1e-3
ADAM_EVENTS: Final = 64
SQUARE: Final = 1e-3
SMALL_SQUARE: Final = 1e-2

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@njit(cache=True)
def _columns(targets, history, ring, filled, draws, seed, local, rows, counts, target_at):  # type: ignore[no-untyped-def]
    """Collect the distinct rows of a step; returns how many. `local` i32[capacity], -1 before, becomes their places.

    counts f32: how often each row stands as a negative (drawn copies, and once per target of the batch).
    """
    n = 0
    for i in range(len(targets)):
        row = targets[i]
        if local[row] < 0:
            local[row] = n
            rows[n] = row
            counts[n] = 0.0
            n += 1
        counts[local[row]] += 1.0
        target_at[i] = local[row]
    for k in range(draws if filled > 0 else 0):
        drawn = mix64(np.uint64(seed) + np.uint64(k))
        # A full ring's length is a power of two, and a mask is many times faster than a division.
        row = ring[np.int64(drawn & np.uint64(RECENT - 1) if filled == RECENT else drawn % np.uint64(filled))]
        if local[row] < 0:
            local[row] = n
            rows[n] = row
            counts[n] = 0.0
            n += 1
        counts[local[row]] += 1.0
    for i in range(history.shape[0]):
        for p in range(history.shape[1]):
            row = history[i, p]
            if row >= 0 and local[row] < 0:
                local[row] = n
                rows[n] = row
                counts[n] = 0.0
                n += 1
    return n


@njit(cache=True)
def _push(ring, pushed, targets):  # type: ignore[no-untyped-def]
    """Lay targets i64[b] into the ring, after `pushed` that came before."""
    for i in range(len(targets)):
        ring[(pushed + i) % len(ring)] = targets[i]


@njit(cache=True)
def _log(count):  # type: ignore[no-untyped-def]
    if count == 1.0:
        return 0.0
    return math.log(count) if count > 0.0 else -np.inf


@njit(cache=True)
def _forward(rows, counts, target_at, history, vectors, bias, positions, start, share, user, g):  # type: ignore[no-untyped-def]
    """Fill share f32[b, 21] (attention), user f32[b, 2d] (pooled, newest) and g f32[b, n] with b_c + log count_c."""
    d = len(start)
    for c in range(len(rows)):
        g[0, c] = bias[rows[c]] + _log(counts[c])
    for i in range(1, len(history)):
        g[i] = g[0]
    for i in range(len(history)):
        top = positions[20]
        for p in range(20):
            if history[i, p] >= 0:
                top = max(top, positions[p])
        total = np.float32(0.0)
        for p in range(21):
            share[i, p] = math.exp(positions[p] - top) if p == 20 or history[i, p] >= 0 else 0.0
            total += share[i, p]
        share[i, 20] /= total
        for j in range(d):
            user[i, j] = share[i, 20] * start[j]
            user[i, d + j] = vectors[history[i, 0], j] if history[i, 0] >= 0 else 0.0
        for p in range(20):
            if history[i, p] >= 0:
                share[i, p] /= total
                for j in range(d):
                    user[i, j] += share[i, p] * vectors[history[i, p], j]
        g[i, target_at[i]] = bias[rows[target_at[i]]]


@njit(cache=True)
def _toward(target_at, g):  # type: ignore[no-untyped-def]
    """Turn softmax probabilities into gradients of the loss, in place; returns the summed loss."""
    loss = 0.0
    for i in range(len(target_at)):
        loss -= math.log(max(g[i, target_at[i]], 1e-30))
        g[i, target_at[i]] -= 1.0
    return loss


@njit(cache=True)
def _softmax(g):  # type: ignore[no-untyped-def]
    """Turn logits f32[b, n] into probabilities, in place."""
    for i in range(len(g)):
        top = g[i].max()
        total = np.float32(0.0)
        for c in range(g.shape[1]):
            g[i, c] = math.exp(g[i, c] - top)
            total += g[i, c]
        total = np.float32(1.0) / total
        for c in range(g.shape[1]):
            g[i, c] *= total


@njit(cache=True)
def _few(rows, counts, target_at, history, local, vectors, bias, positions, start, both, squares, bias_squares, position_squares, start_square, dense):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    """One descent for few events, without a matrix library, whose calls cost more than their sums; returns the loss."""
    b, n, d = len(history), len(rows), len(start)
    share, user, g = np.empty((b, 21), np.float32), np.empty((b, 2 * d), np.float32), np.empty((b, n), np.float32)
    _forward(rows, counts, target_at, history, vectors, bias, positions, start, share, user, g)
    q, d_q, d_user = np.zeros((b, d), np.float32), np.zeros((b, d), np.float32), np.zeros((b, 2 * d), np.float32)
    gradient = np.zeros((n, d), np.float32)
    for i in range(b):
        for k in range(d):
            q[i, k] = dot(both[k], user[i])
    for c in range(n):
        for i in range(b):
            g[i, c] += dot(q[i], vectors[rows[c]])
    _softmax(g)
    loss = _toward(target_at, g)
    for c in range(n):
        vector = vectors[rows[c]]
        for i in range(b):
            weight = g[i, c]
            for j in range(d):
                d_q[i, j] += weight * vector[j]
                gradient[c, j] += weight * q[i, j]
    for i in range(b):
        for k in range(d):
            for j in range(2 * d):
                d_user[i, j] += d_q[i, k] * both[k, j]
                dense[k, j] += d_q[i, k] * user[i, j]
    _backward(
        rows, g, gradient, history, share, d_user, local, vectors, bias, positions, start, squares, bias_squares,
        position_squares, start_square,
    )  # fmt: skip
    return loss


@njit(cache=True)
def _backward(rows, g, gradient, history, share, d_user, local, vectors, bias, positions, start, squares, bias_squares, position_squares, start_square):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    """Add the histories' part to gradient f32[n, d], then take the Adagrad steps of rows, biases, positions, start.

    local i32[capacity] holds the places of rows, as `_columns` left it, and is -1 everywhere afterwards.
    """
    n, d = gradient.shape
    d_positions, d_start = np.zeros(21, np.float32), np.zeros(d, np.float32)
    d_share = np.zeros(21, np.float32)
    for i in range(len(history)):
        mean = np.float32(0.0)
        for p in range(21):
            d_share[p] = 0.0
            if p == 20:
                d_share[p] = dot(d_user[i, :d], start)
                for j in range(d):
                    d_start[j] += share[i, p] * d_user[i, j]
            elif history[i, p] >= 0:
                row, c = history[i, p], local[history[i, p]]
                d_share[p] = dot(d_user[i, :d], vectors[row])
                for j in range(d):
                    gradient[c, j] += share[i, p] * d_user[i, j]
            mean += share[i, p] * d_share[p]
        for p in range(21):
            d_positions[p] += share[i, p] * (d_share[p] - mean)
        if history[i, 0] >= 0:
            c = local[history[i, 0]]
            for j in range(d):
                gradient[c, j] += d_user[i, d + j]
    rates = np.empty(n, np.float32)  # all before the first is used: else each vector waits for its own root
    for c in range(n):
        row = rows[c]
        local[row] = -1
        rates[c] = _rate(gradient[c], squares, row)
        d_bias = np.float32(0.0)
        for i in range(len(g)):
            d_bias += g[i, c]
        if d_bias != 0.0:
            bias_squares[row] += d_bias * d_bias
            bias[row] -= SMALL_RATE * d_bias / math.sqrt(bias_squares[row])
    for c in range(n):
        _descend(vectors[rows[c]], gradient[c], rates[c])
    _descend(start, d_start, _rate(d_start, start_square, 0))
    for p in range(21):
        position_squares[p] += d_positions[p] * d_positions[p]
        positions[p] -= SMALL_RATE * d_positions[p] / math.sqrt(position_squares[p])


@njit(cache=True)
def _rate(gradient, squares, at):  # type: ignore[no-untyped-def]
    """Return the rate of row-wise Adagrad: .2 over the root of a row's accumulator of the mean squared gradient."""
    squares[at] += dot(gradient, gradient) / np.float32(len(gradient))
    return np.float32(RATE / math.sqrt(squares[at]))


@njit(cache=True)
def _descend(vector, gradient, rate):  # type: ignore[no-untyped-def]
    for j in range(len(gradient)):
        vector[j] -= rate * gradient[j]


@njit(cache=True)
def _adam(weights, gradient, moment, moment2, first, second):  # type: ignore[no-untyped-def]
    """Take an Adam step and set the gradient to zero; first, second: corrections of the moments' bias."""
    for k in range(weights.shape[0]):
        for j in range(weights.shape[1]):
            slope = gradient[k, j]
            gradient[k, j] = 0.0
            moment[k, j] = 0.9 * moment[k, j] + 0.1 * slope
            moment2[k, j] = 0.999 * moment2[k, j] + 0.001 * slope * slope
            weights[k, j] -= ADAM_RATE * (moment[k, j] / first) / (math.sqrt(moment2[k, j] / second) + 1e-8)


class Encoder:
    """The optimiser of one `Factors`, and the ring of recent targets that negatives are drawn from.

    squares f32[capacity], bias_squares f32[capacity]; ring i64[4096] rows; Adam moments f32[64, 128] for (W, W2).
    """

    def __init__(self, *, factors: Factors) -> None:
        self.factors = factors
        self.squares: F32 = np.zeros(0, np.float32)
        self.bias_squares: F32 = np.zeros(0, np.float32)
        self.start_square: F32 = np.full(1, SQUARE, np.float32)
        self.position_squares: F32 = np.full(POSITIONS + 1, SMALL_SQUARE, np.float32)
        self.ring: I64 = np.zeros(RECENT, np.int64)
        self.pushed = 0
        self.gradient: F32 = np.zeros((DIM, 2 * DIM), np.float32)
        self.moment: F32 = np.zeros((DIM, 2 * DIM), np.float32)
        self.moment2: F32 = np.zeros((DIM, 2 * DIM), np.float32)
        self.pending = 0
        self.adam_steps = 0
        self._local: NDArray[np.int32] = np.zeros(0, np.int32)
        self._tensors: dict[str, Any] = {}
        self.grow()

    def grow(self) -> None:
        """Follow the shared rows."""
        rows, capacity = self.factors.rows, self.factors.rows.capacity
        if self.factors.births == rows.births and len(self.squares) >= capacity:
            return
        if self.factors.grow() or len(self.squares) < capacity:
            self.squares = grown(self.squares, capacity, SQUARE)
            self.bias_squares = grown(self.bias_squares, capacity, SMALL_SQUARE)
            self._local = grown(self._local, capacity, -1)
            self._tensors = {}

    def forget(self, rows: I64) -> None:
        """Set these rows to what new ones are: vector, bias, squares."""
        self.factors.forget(rows)
        self.squares[rows], self.bias_squares[rows] = SQUARE, SMALL_SQUARE

    def step(self, targets: I64, history: I64, seed: int) -> tuple[float, I64]:
        """Take a step on target rows i64[b], histories i64[b, 20] (-1 = none); returns (summed loss, changed rows)."""
        self.grow()
        b = len(targets)
        rows = np.empty(b * (POSITIONS + 1) + NEGATIVES, np.int64)
        counts = np.empty(len(rows), np.float32)
        target_at = np.empty(b, np.int64)
        n = _columns(
            targets, history, self.ring, min(self.pushed, RECENT), NEGATIVES, np.uint64(seed), self._local, rows,
            counts, target_at,
        )  # fmt: skip
        rows, counts, factors = rows[:n], counts[:n], self.factors
        if b <= FEW:
            loss = _few(
                rows, counts, target_at, history, self._local, factors.vectors, factors.bias, factors.positions,
                factors.start[0], factors.both, self.squares, self.bias_squares, self.position_squares,
                self.start_square, self.gradient,
            )  # fmt: skip
        else:
            loss = self._many(rows, counts, target_at, history)
        self.pending += b
        if self.pending >= ADAM_EVENTS:
            self._adam()
        _push(self.ring, self.pushed, targets)
        self.pushed += b
        return float(loss), rows

    def _many(self, rows: I64, counts: F32, target_at: I64, history: I64) -> float:
        """Take the step where a matrix library pays."""
        import torch

        t = self._tensors or self._share(torch)
        factors, b = self.factors, len(target_at)
        share, user = np.empty((b, POSITIONS + 1), np.float32), np.empty((b, 2 * DIM), np.float32)
        g = np.empty((b, len(rows)), np.float32)
        _forward(
            rows, counts, target_at, history, factors.vectors, factors.bias, factors.positions, factors.start[0], share,
            user, g,
        )  # fmt: skip
        with torch.inference_mode():
            users = torch.from_numpy(user)  # [b, 2d]: pooled, newest
            vectors = t["vectors"].index_select(0, torch.from_numpy(rows))  # [n, d]
            q = users @ t["both"].T  # [b, d]
            probabilities = torch.softmax(torch.addmm(torch.from_numpy(g), q, vectors.T), 1)  # [b, n]
            g = probabilities.numpy()
            loss = _toward(target_at, g)
            dq = probabilities @ vectors
            d_user = dq @ t["both"]  # [b, 2d]
            gradient = probabilities.T @ q  # [n, d]
            t["gradient"].addmm_(dq.T, users)
        _backward(
            rows, g, gradient.numpy(), history, share, d_user.numpy(), self._local, factors.vectors, factors.bias,
            factors.positions, factors.start[0], self.squares, self.bias_squares, self.position_squares,
            self.start_square,
        )  # fmt: skip
        return float(loss)

    def _adam(self) -> None:
        self.pending = 0
        self.adam_steps += 1
        first, second = 1.0 - 0.9**self.adam_steps, 1.0 - 0.999**self.adam_steps
        _adam(self.factors.both, self.gradient, self.moment, self.moment2, first, second)

    def _share(self, torch: Any) -> dict[str, Any]:
        """Return tensors over the same memory as the arrays."""
        torch.set_num_threads(1)
        arrays = {"vectors": self.factors.vectors, "both": self.factors.both, "gradient": self.gradient}
        self._tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return self._tensors
