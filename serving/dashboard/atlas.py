"""The map of items: a projection of their learnt vectors onto two axes that stays where it is, and users on it.

    point(y) = (v_y - mean) A,   A f32[64, 2]: the axes of greatest variance, scaled so that most points are in [-1, 1]

It is made once the learner has taken STEPS steps, and again where twice as many were taken or twice as many items are
learnt; each is turned so that the points stay as near as can be to where they were. It is kept in Redis (the curve
`map`), so that a restart and another process show the same map. Knows nothing about how vectors are learnt.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Mapping
from typing import Annotated, Any, Final, NamedTuple

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from models.examples import KIND_NAMES, CodecError
from models.factors import DIM, HALF_LIVES
from models.profile import ProfileView, unpack
from models.rows import LEARNT
from serving.dashboard.served import named
from serving.lookup import user_id
from serving.messages import Problem, json_response, read_query
from serving.parts import Parts
from serving.snapshot import Live
from streaming.state import StoreError, StoreUnavailable
from streaming.topics import partition_of

STEPS: Final = 5
LEAST: Final = 10
"""Learnt items without which there is no map."""
FITTED: Final = 20_000
"""Vectors that the axes are fitted to; of more, every so many-th."""
ENTRIES: Final = 20
CURVE: Final = "map"

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class Basis(NamedTuple):
    """A projection: mean f32[64] and axes f32[64, 2]; made at this step of so many rows, `explained` of variance."""

    step: int
    rows: int
    explained: float
    mean: F32
    axes: F32

    def place(self, vectors: NDArray[Any]) -> F64:
        """Return the points f64[n, 2] of vectors f32[n, 64]."""
        points: F64 = ((vectors.astype(np.float32) - self.mean) @ self.axes).astype(np.float64)
        return points

    def to_fields(self) -> dict[str, Any]:
        """Return it as a point of a curve."""
        weights = base64.b64encode(np.concatenate((self.mean[:, None], self.axes), 1).astype("<f4").tobytes())
        return {"step": self.step, "rows": self.rows, "explained": self.explained, "weights": weights.decode()}

    @classmethod
    def from_fields(cls, fields: Mapping[str, str]) -> Basis | None:
        """Read `to_fields`; None where these are others."""
        try:
            data = np.frombuffer(base64.b64decode(fields["weights"], validate=True), "<f4").reshape(DIM, 3)
            found = cls(
                int(fields["step"]), int(fields["rows"]), float(fields["explained"]), data[:, 0].copy(),
                data[:, 1:].copy(),
            )  # fmt: skip
        except (KeyError, ValueError):
            return None
        return found if np.isfinite(data).all() and np.isfinite(found.explained) else None


def fit(vectors: F32, step: int, rows: int, before: Basis | None = None) -> Basis:
    """Return the projection of vectors f32[n, 64], turned towards where an earlier one has them."""
    mean = vectors.mean(0)
    centred = (vectors - mean).astype(np.float64)
    values, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    two = axes[:, [-1, -2]]
    two = two * np.sign(two[np.abs(two).argmax(0), [0, 1]])  # an eigenvector's sign is nobody's: fix it
    points = centred @ two
    two = two / max(float(np.quantile(np.abs(points), 0.98)), 1e-9)
    if before is not None:
        turn, _, other = np.linalg.svd((centred @ two).T @ before.place(vectors))
        two = two @ turn @ other
    explained = float(values[-2:].sum() / max(float(values.sum()), 1e-12))
    return Basis(step, rows, round(explained, 5), mean.astype(np.float32), two.astype(np.float32))


class MapQuery(Struct, forbid_unknown_fields=True):
    """What `/-/map` may be asked for."""

    limit: Annotated[int, Meta(ge=1, le=2000, description="How many items, those shown most first.")] = 600


class Atlas:
    """The projection of one process, and the pages that use it."""

    def __init__(self) -> None:
        self._basis: Basis | None = None
        self._of = ""
        self._turn = asyncio.Lock()

    async def items(self, parts: Parts, request: Request) -> Response:
        """GET /-/map."""
        query, basis = read_query(request, MapQuery), await self.basis(parts)
        if basis is None:
            return json_response({"basis": None, "items": []})
        live = parts.snapshot.live
        rows = learnt_rows(live)
        rows = rows[live.items.eligible[rows]]
        rows = rows[np.argsort(-live.items.shown[rows], kind="stable")[: query.limit]]
        points = np.round(basis.place(live.model.factors.vectors[rows]), 4).tolist()
        shown = live.items.shown[rows].tolist()
        told = [
            {**named(live, row), "x": x, "y": y, "shown": count}
            for row, (x, y), count in zip(rows.tolist(), points, shown, strict=True)
        ]
        about = {"step": basis.step, "rows": basis.rows, "explained": basis.explained}
        return json_response({"basis": about, "items": told})

    async def user(self, parts: Parts, request: Request) -> Response:
        """GET /-/map/users/{user_id}: their decayed embeddings and the newest items of their sequence, as points."""
        user, basis, live = user_id(request), await self.basis(parts), parts.snapshot.live
        read = await parts.snapshot.read_user(partition_of(user, parts.settings.partitions), user)
        if read is None:
            raise Problem(503, "Redis", "an answer", parts.snapshot.reason or "none", headers={"Retry-After": "1"})
        try:
            view = unpack(read.profiles[0], read.seen[0])
        except CodecError as error:
            parts.cannot_read(user, error)
            view = unpack(None, None)
        hour, month = _decayed(live, view, basis)
        return json_response(
            {
                "user_id": user, "known": view.known, "hour": hour, "month": month,
                "entries": _entries(live, view, basis, parts.clock()),
            }
        )  # fmt: skip

    async def basis(self, parts: Parts) -> Basis | None:
        """Return the projection, made anew where it is time for it; None while too little is learnt."""
        async with self._turn:
            live, snapshot = parts.snapshot.live, parts.snapshot
            generation = snapshot.keys.metrics(CURVE)
            with contextlib.suppress(StoreError, *StoreUnavailable):
                if self._basis is None or self._of != generation:
                    points = await snapshot.read_metrics(CURVE, "-", 1)
                    self._basis, self._of = (Basis.from_fields(points[-1][1]) if points else None), generation
            rows, known = learnt_rows(live), self._basis
            step = live.model.step
            if step < STEPS or len(rows) < LEAST:
                return known
            if known is not None and step < 2 * known.step and len(rows) < 2 * known.rows:
                return known
            some = rows[:: 1 + len(rows) // FITTED]
            self._basis = await asyncio.to_thread(fit, live.model.factors.vectors[some], step, len(rows), known)
            with contextlib.suppress(StoreError, *StoreUnavailable):
                await snapshot.note(CURVE, self._basis.to_fields())
            return self._basis


def learnt_rows(live: Live) -> I64:
    """Return the rows whose vectors were learnt."""
    live.model.grow()
    return live.model.rows.held_by(LEARNT)


def _decayed(live: Live, view: ProfileView, basis: Basis | None) -> list[dict[str, float] | None]:
    """Return the points of a user's decayed embeddings at the half-lives 1 h and 30 d; None without any."""
    h = len(view.items)
    rows = live.items.rows.find(view.items)
    if basis is None or not (rows >= 0).any():
        return [None] * len(HALF_LIVES)
    (vectors,) = live.model.factors.decayed_embeddings(
        view.items[None, :], np.asarray(view.times, np.float64)[None, :], np.array([h]), np.array([view.times.max()]),
        np.zeros(1, np.int64),
    )  # fmt: skip
    return [_point(at) for at in basis.place(vectors)]


def _point(at: F64) -> dict[str, float]:
    return {"x": round(float(at[0]), 4), "y": round(float(at[1]), 4)}


def _entries(live: Live, view: ProfileView, basis: Basis | None, now: float) -> list[dict[str, Any]]:
    live.model.grow()
    learnt, rows = live.model.rows.held, live.items.rows.find(view.items[:ENTRIES])
    told = []
    for row, at, kind in zip(rows.tolist(), view.times.tolist(), view.kinds.tolist(), strict=False):
        where: dict[str, float | None] = {"x": None, "y": None}
        if basis is not None and row >= 0 and learnt[row] & LEARNT:
            where.update(_point(basis.place(live.model.factors.vectors[row : row + 1])[0]))
        age = max(0.0, now - at)
        decay = {name: round(0.5 ** (age / half), 4) for name, half in zip(("1h", "30d"), HALF_LIVES, strict=True)}
        said = KIND_NAMES[kind] if kind < len(KIND_NAMES) else f"unknown ({kind})"
        told.append({**named(live, row), **where, "kind": said, "time": at, "decay": decay})
    return told
