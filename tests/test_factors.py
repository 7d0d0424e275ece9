"""Item vectors and encoder: the hand-written gradients against torch's own, cost of a step, cached user embeddings."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from models.encoder import FEW, NEGATIVES, Encoder, _columns
from models.examples import CodecError
from models.factors import DIM, POSITIONS, Factors, pack_named, unpack_named
from models.rows import Rows


def made(items: int, seed: int = 0) -> tuple[Rows, Encoder]:
    rows = Rows(capacity=16)
    rows.add(np.random.default_rng(seed).integers(1, 2**63, items).astype(np.uint64))
    return rows, Encoder(factors=Factors(rows=rows))


def batch(items: int, b: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    history = rng.integers(0, items, (b, POSITIONS))
    for i, length in enumerate(rng.integers(0, POSITIONS + 1, b)):
        history[i, length:] = -1
    return rng.integers(0, items, b), history


def reference_loss(
    factors: Factors, targets: np.ndarray, history: np.ndarray, rows: np.ndarray, counts: np.ndarray
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss written as the equations say, in float64 with torch's own gradients."""
    p = {
        "E": torch.tensor(factors.vectors[: factors.rows.n], dtype=torch.float64, requires_grad=True),
        "b": torch.tensor(factors.bias[: factors.rows.n], dtype=torch.float64, requires_grad=True),
        "positions": torch.tensor(factors.positions, dtype=torch.float64, requires_grad=True),
        "start": torch.tensor(factors.start[0], dtype=torch.float64, requires_grad=True),
        "both": torch.tensor(factors.both, dtype=torch.float64, requires_grad=True),
    }
    loss = torch.zeros((), dtype=torch.float64)
    for target, past in zip(targets, history, strict=True):
        known = [int(row) for row in past if row >= 0]
        places = [*range(len(known)), POSITIONS]
        share = torch.softmax(p["positions"][places], 0)
        stack = torch.cat((p["E"][known], p["start"][None]))
        pooled = share @ stack
        newest = p["E"][known[0]] if known else torch.zeros(DIM, dtype=torch.float64)
        q = p["both"] @ torch.cat((pooled, newest))
        scores = p["E"][rows] @ q + p["b"][rows]
        copies = torch.tensor(np.where(rows == target, 1.0, counts))
        total = (copies * torch.exp(scores)).sum()
        loss = loss - torch.log(torch.exp(scores[list(rows).index(target)]) / total)
    return loss, p


@pytest.mark.parametrize("b", [1, 5, FEW + 3])
def test_gradients_are_those_of_the_equations(b: int) -> None:
    rows, encoder = made(40)
    for seed in range(6):
        encoder.step(*batch(40, 4, seed), seed)
    encoder.factors.start += 0.1
    targets, history = batch(40, b, 99)
    before = {
        "E": encoder.factors.vectors[: rows.n].copy(), "b": encoder.factors.bias[: rows.n].copy(),
        "start": encoder.factors.start.copy(), "positions": encoder.factors.positions.copy(),
    }  # fmt: skip
    dense_before = encoder.gradient.copy()
    used, counts = np.empty(2000, np.int64), np.empty(2000, np.float32)
    n = _columns(
        targets, history, encoder.ring, encoder.pushed, NEGATIVES, np.uint64(5),
        np.full(rows.capacity, -1, np.int32), used, counts, np.empty(b, np.int64),
    )  # fmt: skip
    expected, p = reference_loss(encoder.factors, targets, history, used[:n], counts[:n])
    expected.backward()  # type: ignore[no-untyped-call]
    loss, changed = encoder.step(targets, history, 5)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    assert set(changed.tolist()) == set(used[:n].tolist())
    gradient = {name: value.grad.numpy() for name, value in p.items() if value.grad is not None}
    rate = 0.2 / np.sqrt(encoder.squares[: rows.n])[:, None]
    np.testing.assert_allclose(before["E"] - encoder.factors.vectors[: rows.n], rate * gradient["E"], atol=2e-5)
    rate = 0.02 / np.sqrt(encoder.bias_squares[: rows.n])
    np.testing.assert_allclose(before["b"] - encoder.factors.bias[: rows.n], rate * gradient["b"], atol=2e-6)
    rate = 0.02 / np.sqrt(encoder.position_squares)
    moved = before["positions"] - encoder.factors.positions
    np.testing.assert_allclose(moved, rate * gradient["positions"], atol=2e-6)
    moved = before["start"][0] - encoder.factors.start[0]
    np.testing.assert_allclose(moved, 0.2 / np.sqrt(encoder.start_square) * gradient["start"], atol=2e-5)
    np.testing.assert_allclose(encoder.gradient - dense_before, gradient["both"], atol=2e-5)


def test_the_dense_weights_move_every_64_events() -> None:
    _, encoder = made(40)
    before = encoder.factors.both.copy()
    for seed in range(63):
        encoder.step(*batch(40, 1, seed), seed)
    assert (encoder.factors.both == before).all()
    encoder.step(*batch(40, 1, 63), 63)
    assert (encoder.adam_steps, encoder.pending) == (1, 0)
    assert 5e-4 < np.abs(encoder.factors.both - before).max() < 1.1e-3
    assert not encoder.gradient.any()


def test_a_vector_is_born_from_its_hash_alone() -> None:
    one, other = Rows(), Rows()
    keys = np.random.default_rng(0).integers(1, 2**63, 2000).astype(np.uint64)
    one.add(keys)
    other.add(keys[::-1].copy())
    mine, theirs = Factors(rows=one), Factors(rows=other)
    np.testing.assert_array_equal(mine.vectors[:2000], theirs.vectors[:2000][::-1])
    assert mine.vectors[:2000].std() == pytest.approx(0.05, rel=0.02)
    assert abs(mine.vectors[:2000].mean()) < 1e-3


def test_encode_without_a_history_is_the_start_token() -> None:
    factors = Factors(rows=Rows())
    expected = factors.both[:, :DIM] @ factors.start[0]
    np.testing.assert_allclose(factors.encode(np.empty(0, np.int64)), expected, atol=1e-6)
    np.testing.assert_allclose(factors.encode(np.full(3, -1)), expected, atol=1e-6)


def test_rows_round_trip_in_half_precision() -> None:
    rows, encoder = made(10)
    encoder.step(*batch(10, 5, 0), 1)
    keys = rows.keys[:10]
    other = Factors(rows=Rows())
    other.load_rows(keys, encoder.factors.pack_rows(np.arange(10)))
    np.testing.assert_allclose(other.vectors[:10], encoder.factors.vectors[:10], atol=1e-3)
    assert [len(blob) for blob in other.pack_rows(np.arange(2))] == [136, 136]
    with pytest.raises(CodecError, match="version 1 or 2, form 1"):
        other.load_rows(keys[:1], [b"\x02" * 136])


def test_named_values_round_trip() -> None:
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": 3, "c": ["x"], "d": b"\x00"}
    back = unpack_named(pack_named(values))
    np.testing.assert_array_equal(back.pop("a"), values["a"])
    assert back == {"b": 3, "c": ["x"], "d": b"\x00"}
    with pytest.raises(CodecError):
        unpack_named(b"\xe7\x02")


def test_decayed_embeddings() -> None:
    factors = Factors(rows=Rows())
    now, none = np.array([1e9, 1e9, 9e10, 1e9, 5.0]), np.zeros(0, np.int64)
    items = np.array([[7, 9, 1], [7, 7, 9], [7, 9, 8], [8, 8, 8], [9, 7, 8]], np.uint64)
    times = np.array([[1e9, 1e9 - 3600.0, 0.0]] * 4 + [[9.0, 9.0, 9.0]])
    users, lengths = np.array([4, 0, 1, 2, 3]), np.array([2, 2, 0, 3, 3])
    assert not factors.decayed_embeddings(items, times, lengths, now, users).any()
    rows = factors.rows.add(np.array([7, 9], np.uint64))
    factors.grow()
    factors.vectors[rows] = np.eye(2, DIM)
    out = factors.decayed_embeddings(items, times, lengths, now, users)
    assert out.shape == (5, 2, DIM)
    assert out.dtype == np.float16
    np.testing.assert_allclose(out[:2, 0, :2], [[0.5, 0.5], [2 / 3, 1 / 3]], atol=1e-3)
    np.testing.assert_allclose(out[:2, 1, :2], [[0.5, 0.5], [0.5, 0.5]], atol=1e-3)
    np.testing.assert_allclose(out[2].sum(-1), 1.0, atol=1e-3)
    assert not out[3:].any()
    assert factors.decayed_embeddings(items, times, lengths, now, none).shape == (0, 2, DIM)


def test_scoring_does_not_import_torch() -> None:
    code = (
        "import sys, models.recommend, models.learner, models.model, streaming.users.embeddings;"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_step_costs_little() -> None:
    """Generous bounds (a busy machine is no failure); measured alone: 20-30 us an event, for one as in 64."""
    _, encoder = made(4000)
    for b, bound_us in ((1, 500), (64, 500)):
        best = min(_timed(encoder, b, seed) for seed in range(20))
        assert best * 1e6 / b < bound_us


def _timed(encoder: Encoder, b: int, seed: int) -> float:
    targets, history = batch(4000, b, seed)
    started = time.perf_counter()
    encoder.step(targets, history, seed)
    return time.perf_counter() - started
