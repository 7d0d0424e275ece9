"""Compiled loops of the listwise models: f32, features along the first axis, so that inner loops run over candidates.

What scores is elementwise along the candidates (no sum is ever taken across them, no operation is reordered or fused),
so that a score is the same bits whichever other candidates stand beside it, and on every processor. What only learns
sums across a list and may do so as vector code does: the same bits on the same processor. Knows nothing about state.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numba import njit

LANES: Final = 16
"""Lists are padded to a multiple of this, so that vector loops have no remainder."""
LIMIT: Final = np.float32(5.0)
_LEAST_HALF: Final = np.float32(2.0**112)
"""The bits of a half, moved into those of a single, read as its value times 2**-112."""


@njit(cache=True)
def padded(m):  # type: ignore[no-untyped-def]
    """Return the least multiple of LANES that holds m candidates."""
    return -(-m // LANES) * LANES


@njit(cache=True)
def columns(x, out):  # type: ignore[no-untyped-def]
    """Fill out f32[F, M] with features f64[m, F] (or f32); what stands beyond m candidates becomes 0."""
    m, width = x.shape
    for f in range(width):
        column = out[f]
        for i in range(m):
            column[i] = x[i, f]
        column[m:] = 0.0


@njit(cache=True)
def columns_of_halves(x, out):  # type: ignore[no-untyped-def]
    """Fill out f32[F, M] with features given as the bits u16[m, F] of f16; returns whether all are finite."""
    m, width = x.shape
    bits = out.view(np.uint32)
    worst = np.uint32(0)
    for f in range(width):
        column, words = out[f], bits[f]
        for i in range(m):
            half = np.uint32(x[i, f])
            words[i] = (half & np.uint32(0x7FFF)) << np.uint32(13) | (half & np.uint32(0x8000)) << np.uint32(16)
            worst = max(worst, half & np.uint32(0x7C00))
        for i in range(m):
            column[i] *= _LEAST_HALF
        column[m:] = 0.0
    return worst < np.uint32(0x7C00)


@njit(cache=True, fastmath={"reassoc", "contract"})
def observe(x, m, rate, mean, variance):  # type: ignore[no-untyped-def]
    """Move the running mean and variance f64[F] towards those of one list, the first m columns of x f32[F, M]."""
    for f in range(len(x)):
        column, s = x[f], 0.0
        for i in range(m):
            s += column[i]
        centre = mean[f] + rate * (s / m - mean[f])
        v = 0.0
        for i in range(m):
            v += (column[i] - centre) * (column[i] - centre)
        mean[f] = centre
        variance[f] += rate * (v / m - variance[f])


@njit(cache=True)
def normalise(x, mean, variance):  # type: ignore[no-untyped-def]
    """Turn features x f32[F, M] into clip((x - mean) / sd, -5, 5), in place."""
    for f in range(len(x)):
        column, centre = x[f], np.float32(mean[f])
        inverse = np.float32(1.0 / math.sqrt(variance[f] + 1e-6))
        for i in range(x.shape[1]):
            column[i] = min(max((column[i] - centre) * inverse, -LIMIT), LIMIT)


@njit(cache=True)
def weighted(z, weights, out):  # type: ignore[no-untyped-def]
    """Add sum_f weights_f z_f to out f32[M]."""
    for f in range(len(z)):
        column, weight = z[f], weights[f]
        for i in range(len(out)):
            out[i] += weight * column[i]


@njit(cache=True)
def units(z, hidden, offset, active):  # type: ignore[no-untyped-def]
    """Fill active f32[U, M] with relu(offset_j + sum_f hidden_fj z_f); eight features a pass, the rest one by one."""
    width = len(z)
    whole = width - width % 8
    for j in range(len(active)):
        out = active[j]
        for i in range(len(out)):
            out[i] = offset[j]
        for f in range(0, whole, 8):
            z0, z1, z2, z3, z4, z5, z6, z7 = z[f], z[f + 1], z[f + 2], z[f + 3], z[f + 4], z[f + 5], z[f + 6], z[f + 7]
            h0, h1, h2, h3 = hidden[f, j], hidden[f + 1, j], hidden[f + 2, j], hidden[f + 3, j]
            h4, h5, h6, h7 = hidden[f + 4, j], hidden[f + 5, j], hidden[f + 6, j], hidden[f + 7, j]
            for i in range(len(out)):
                near = out[i] + h0 * z0[i] + h1 * z1[i] + h2 * z2[i] + h3 * z3[i]
                out[i] = near + h4 * z4[i] + h5 * z5[i] + h6 * z6[i] + h7 * z7[i]
        for f in range(whole, width):
            column, weight = z[f], hidden[f, j]
            for i in range(len(out)):
                out[i] += weight * column[i]
        for i in range(len(out)):
            out[i] = max(out[i], np.float32(0.0))


@njit(cache=True)
def softmax(scores, m, label, p):  # type: ignore[no-untyped-def]
    """Fill p f32[M] with the probabilities less 1 at the label (the gradient by scores); returns the loss."""
    top = scores[:m].max()
    total = 0.0
    for i in range(m):
        p[i] = math.exp(scores[i] - top)
        total += p[i]
    share = np.float32(1.0 / total)
    for i in range(m):
        p[i] *= share
    p[m:] = 0.0
    p[label] -= np.float32(1.0)
    return math.log(total) + top - scores[label]


@njit(cache=True, fastmath={"reassoc", "contract"})
def toward(z, p, out):  # type: ignore[no-untyped-def]
    """Fill out f32[k] with the sums over candidates of p z_k."""
    for f in range(len(z)):
        column, s = z[f], np.float32(0.0)
        for i in range(len(p)):
            s += p[i] * column[i]
        out[f] = s


@njit(cache=True, fastmath={"reassoc", "contract"})
def backward(z, active, p, output, by_hidden, by_offset, by_output):  # type: ignore[no-untyped-def]
    """Fill the gradients of units: by_hidden f32[F, U], by_offset and by_output f32[U]; `active` is used up."""
    width = len(z)
    whole = width - width % 4
    for j in range(len(active)):
        back, weight = active[j], output[j]
        s, total = np.float32(0.0), np.float32(0.0)
        for i in range(len(p)):
            s += p[i] * back[i]
            back[i] = p[i] * weight if back[i] > np.float32(0.0) else np.float32(0.0)
            total += back[i]
        by_output[j], by_offset[j] = s, total
        for f in range(0, whole, 4):
            z0, z1, z2, z3 = z[f], z[f + 1], z[f + 2], z[f + 3]
            s0 = s1 = s2 = s3 = np.float32(0.0)
            for i in range(len(p)):
                s0 += z0[i] * back[i]
                s1 += z1[i] * back[i]
                s2 += z2[i] * back[i]
                s3 += z3[i] * back[i]
            by_hidden[f, j], by_hidden[f + 1, j], by_hidden[f + 2, j], by_hidden[f + 3, j] = s0, s1, s2, s3
        for f in range(whole, width):
            column, s0 = z[f], np.float32(0.0)
            for i in range(len(p)):
                s0 += column[i] * back[i]
            by_hidden[f, j] = s0


@njit(cache=True)
def adagrad(weights, squares, gradient, rate):  # type: ignore[no-untyped-def]
    """Take one step of Adagrad on f32[k]."""
    for k in range(len(weights)):
        squares[k] += gradient[k] * gradient[k]
        weights[k] -= rate * gradient[k] / np.float32(math.sqrt(squares[k]))
