"""The system explains itself: health, settings, topics, models, state, and what is known of a user or an item.

Knows nothing about how a slate is made; it only reads.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from infra.telemetry import resident_mb
from models.bandit import FIRST
from models.bandit.posterior import alike_mean, normal_gamma
from models.decay import NAMES, STEPS
from models.examples import KIND_NAMES, CodecError
from models.features import FEATURES
from models.profile import ProfileView, unpack
from models.ranker import heads
from serving.lookup import row_of, unknown_item, user_id
from serving.messages import Problem, json_response
from serving.overload import MAX_APPENDING, MAX_BODIES, MAX_LISTS
from serving.parts import Parts
from serving.snapshot import MAX_PENDING, Live
from streaming.state import UserRead
from streaming.topics import describe, end_offsets, partition_of

WEIGHT_HALF_LIVES_S = {"1h": 3600.0, "30d": 30 * 86400.0}
"""Half-lives at which a sequence's decay is shown: those of the two cached embeddings."""


async def live(parts: Parts, request: Request) -> Response:
    """GET /health/live: this process answers."""
    return json_response({"status": "live"})


async def ready(parts: Parts, request: Request) -> Response:
    """GET /health/ready: 503 with reasons until the snapshot is loaded and Kafka and Redis are reachable."""
    reasons = not_ready(parts)
    return json_response({"status": "not ready" if reasons else "ready", "reasons": reasons}, 503 if reasons else 200)


def not_ready(parts: Parts) -> list[str]:
    """Return what stands in the way of full service, each with its reason."""
    reasons = []
    if not parts.warm:
        reasons.append("code: still compiling")
    if parts.snapshot.behind:
        reasons.append(f"Redis: {parts.snapshot.reason}")
    if parts.log_problem:
        reasons.append(f"Kafka: {parts.log_problem}")
    return reasons


async def settings(parts: Parts, request: Request) -> Response:
    """GET /-/settings: the table, secrets masked."""
    return json_response(parts.settings.rows())


async def topics(parts: Parts, request: Request) -> Response:
    """GET /-/topics: partitions, configuration and end offsets."""
    specs = parts.topics.specs()
    try:
        async with asyncio.timeout(5.0):
            cluster, found = await describe(parts.settings.kafka, list(specs))
            ends = await end_offsets(parts.settings.kafka, {name: found[name][0] for name in specs})
    except (TimeoutError, OSError, RuntimeError) as error:
        raise Problem(503, "Kafka", "an answer within 5 s", f"{type(error).__name__}: {error}") from error
    rows = [
        {"topic": name, "partitions": found[name][0], "expected": partitions, "config": config,
         "end_offsets": ends.get(name, [])}
        for name, (partitions, config) in specs.items()
    ]  # fmt: skip
    return json_response({"cluster": cluster, "topics": rows})


async def models(parts: Parts, request: Request) -> Response:
    """GET /-/models: what is served, the versions, what was refused, and the weights that a person can read."""
    model = parts.snapshot.live.model
    ranker = model.ranker
    return json_response(
        {
            "step": model.step,
            "position": parts.snapshot.live.model_position,
            **await parts.snapshot.versions(),
            "prior_mixture": dict(zip(NAMES, np.round(model.mixture, 5).tolist(), strict=True)),
            "ranker": {
                name: {"weight": round(w, 5), "mean": round(m, 5), "variance": round(v, 5)}
                for name, w, m, v in zip(
                    FEATURES, ranker.weights.tolist(), ranker.mean.tolist(), ranker.variance.tolist(), strict=True
                )
            },
            "scorer": ranker.scorer,
            "ranker_loss": dict(zip(("linear", "network"), np.round(ranker.losses, 5).tolist(), strict=True)),
            "calibration": dict(
                zip(
                    ("slates", "mean", "variance", "slope", "offset"),
                    np.round(model.calibration.numbers[:5], 5).tolist(),
                    strict=True,
                )
            ),
            "head_weights": dict(zip(heads.NAMES, parts.head_weights.tolist(), strict=True)),
            "last_layer": {
                "slates": model.last_layer.slates,
                "variance": round(float(model.last_layer.numbers[1]), 6),
                "norm": round(float(np.linalg.norm(model.last_layer.mean())), 5),
            },
            "vectors": {"rows": model.rows.known, "dim": int(model.factors.vectors.shape[1])},
            "policy": [list(row) for row in parts.settings.policy],
            "rewards": [list(row) for row in parts.settings.rewards],
            "first_share": parts.settings.first_share,
            "epsilon": parts.settings.epsilon,
        }
    )


async def state(parts: Parts, request: Request) -> Response:
    """GET /-/state: positions, feeds, buffers, what is degraded and why."""
    sizes, resident = await parts.snapshot.sizes(parts.settings.partitions)
    memory = {"process_mb": {**resident, "api": resident_mb()}, "redis": sizes.as_dict()}
    return json_response({**state_of(parts), "memory": memory})


def state_of(parts: Parts) -> dict[str, Any]:
    """Return this process's state for people to read."""
    impressions = parts.impressions
    return {
        "uptime_s": round(parts.clock() - parts.started, 1),
        "ready": not not_ready(parts),
        "reasons": not_ready(parts),
        "degraded": parts.snapshot.degraded,
        "dead_letters": parts.dead_letters,
        "snapshot": parts.snapshot.state(),
        "impressions": {
            "waiting": len(impressions), "limit": parts.settings.impression_buffer, "appended": impressions.appended,
            "dropped": impressions.dropped, "failed": impressions.failed,
        },
        "overload": parts.overload.state(),
        "buffers": buffers(parts),
        "keys": {"on": parts.ring.found, "known": len(parts.ring.keys), "problem": parts.ring.problem},
        "unreadable_profiles": dict(parts.unreadable),
    }  # fmt: skip


def buffers(parts: Parts) -> dict[str, dict[str, int]]:
    """Return what each buffer of this process holds, and may hold; the README says what happens when one is full."""
    held = {
        "bodies_bytes": (parts.overload.bodies, MAX_BODIES),
        "large_lists": (parts.overload.lists, MAX_LISTS),
        "appending_requests": (parts.overload.appending, MAX_APPENDING),
        "impressions": (len(parts.impressions), parts.settings.impression_buffer),
        "model_feed_parts": (len(parts.snapshot.model_feed.pending), MAX_PENDING),
    }
    return {name: {"used": used, "bound": bound} for name, (used, bound) in held.items()}


async def user_state(parts: Parts, request: Request) -> Response:
    """GET /-/state/{user_id}: where a user's state lies and how far it is folded."""
    user = user_id(request)
    read, partition = await _read(parts, user)
    profile, seen, keys = read.profiles[0], read.seen[0], parts.snapshot.keys
    return json_response(
        {
            "user_id": user, "partition": partition, "applied": read.applied, "marks": read.marks,
            "cluster": read.cluster, "generation": keys.generation,
            "keys": {"profile": keys.profile(partition, user), "seen": keys.seen(partition, user)},
            "profile_bytes": len(profile or b""), "seen_bytes": len(seen or b""), "known": profile is not None,
        }
    )  # fmt: skip


async def _read(parts: Parts, user: str) -> tuple[UserRead, int]:
    partition = partition_of(user, parts.settings.partitions)
    read = await parts.snapshot.read_user(partition, user)
    if read is None:
        raise Problem(
            503, "Redis", "an answer", parts.snapshot.reason or "none", do="try again", headers={"Retry-After": "1"}
        )
    return read, partition


async def get_user(parts: Parts, request: Request) -> Response:
    """GET /v1/users/{user_id}: what is known of a user, readable; an unknown user is known as nothing."""
    user = user_id(request)
    read, partition = await _read(parts, user)
    problem = None
    try:
        view = unpack(read.profiles[0], read.seen[0])
    except CodecError as error:
        parts.cannot_read(user, error)
        view, problem = unpack(None, None), f"{error}. Next: freshet rebuild --switch"
    return json_response(
        {
            "user_id": user,
            "known": view.known,
            "problem": problem,
            "partition": partition,
            "applied": read.applied,
            "counters": view.counters,
            "first_time": view.first_time or None,
            "last_time": view.last_time or None,
            "sequence": _sequence(parts.snapshot.live, view, parts.clock()),
            "seen": len(view.seen),
            "slates": [
                {"slate": f"{slate:016x}", "time": at, "shown": [_named_low(parts.snapshot.live, low) for low in shown]}
                for slate, at, shown in view.slates
            ],
        }
    )


def _sequence(live: Live, view: ProfileView, now: float) -> list[dict[str, Any]]:
    rows = live.items.rows.find(view.items)
    entries = []
    for row, key, at, kind, weight in zip(
        rows.tolist(), view.items.tolist(), view.times.tolist(), view.kinds.tolist(), view.weights.tolist(), strict=True
    ):
        age = max(0.0, now - at)
        entries.append(
            {
                **_named(live, row, key), "kind": _kind(kind), "time": at, "weight": round(weight, 4),
                "decay": {name: round(0.5 ** (age / half), 4) for name, half in WEIGHT_HALF_LIVES_S.items()},
            }
        )  # fmt: skip
    return entries


def _kind(kind: int) -> str:
    return KIND_NAMES[kind] if kind < len(KIND_NAMES) else f"unknown ({kind})"


def _named(live: Live, row: int, key: int) -> dict[str, Any]:
    item_id = live.items.ids[row] if row >= 0 else ""
    return {"item_id": item_id or None, "title": live.items.title(row) if item_id else None, "hash": f"{key:016x}"}


def _named_low(live: Live, low: Any) -> str:
    keys = live.items.rows.keys[: live.items.n]
    rows = np.flatnonzero((keys & np.uint64(0xFFFFFFFF)) == np.uint64(low))
    return (live.items.ids[int(rows[0])] if len(rows) else "") or f"{int(low):08x}"


async def get_item(parts: Parts, request: Request) -> Response:
    """GET /v1/items/{item_id}: catalogue fields, popularity by half-life, neighbours, exposure, posteriors."""
    item_id, live = request.path_params["item_id"], parts.snapshot.live
    row = row_of(live, item_id)
    if row < 0:
        raise unknown_item(item_id)
    items = live.items
    return json_response(
        {
            "item_id": item_id,
            "catalogue": items.catalogue.get(row),
            "eligible": not items.hidden[row],
            "first_time": _time(items.first[row]),
            "last_time": _time(items.last[row]),
            "shown": int(items.shown[row]),
            "outcomes": int(items.outcomes[row]),
            "still_exploring": bool(items.shown[row] < FIRST),
            "posterior": posterior(live, row),
            "decayed_counts": _counts(live, row, parts.clock()),
            "next": _neighbours(live, items.a_items[row], items.a_weights[row]),
            "together": _neighbours(live, items.b_items[row], items.b_weights[row]),
        }
    )


def posterior(live: Live, row: int) -> dict[str, Any]:
    """Say what exposures, dwells and ratings say of an item: means with 95 % intervals, and what they rest on."""
    items, rows = live.items, np.array([row])
    (alpha,), (beta,) = items.click_posteriors(rows)
    (low,), (high,) = items.click_interval(rows)
    sums, everybody = items.sums[row], items.sums[: items.n].sum(0)
    told = {
        "exposures": round(float(sums[0]), 3),
        "successes": round(float(sums[1]), 3),
        "click": {
            "mean": round(float(alpha / (alpha + beta)), 5), "low": round(float(low), 5), "high": round(float(high), 5),
            "alpha": round(float(alpha), 3), "beta": round(float(beta), 3),
        },
    }  # fmt: skip
    for name, at, prior in (("log_dwell", 2, 2.5), ("rating", 5, 0.5)):
        count, total = everybody[at : at + 2].tolist()
        said, summed, squares = sums[at : at + 3].tolist()
        alike = alike_mean(items.tokens, items.sums, items.n, row, at, total / count if count else prior)
        found = normal_gamma(said, summed, squares, alike)
        spread = 1.96 * found.deviation
        told[name] = {
            "mean": round(found.mean, 4), "low": round(found.mean - spread, 4), "high": round(found.mean + spread, 4),
            "observations": round(found.observations, 3),
        }  # fmt: skip
    return told


def _counts(live: Live, row: int, now: float) -> dict[str, float]:
    popularity = live.items.popularity
    cells, scale, _, _ = popularity.at(now)
    steps = STEPS[np.clip(cells.astype(np.int64) - popularity.cells[row], 0, len(STEPS) - 1)]
    return dict(zip(NAMES, np.round(popularity.weights[row] * steps * scale, 4).tolist(), strict=True))


def _time(value: float) -> float | None:
    return float(value) if np.isfinite(value) and value > 0 else None


def _neighbours(live: Live, rows: Any, weights: Any) -> list[dict[str, Any]]:
    best = sorted(((w, r) for w, r in zip(weights.tolist(), rows.tolist(), strict=True) if r >= 0), reverse=True)
    return [
        {"item_id": live.items.ids[r] or None, "title": live.items.title(r), "weight": round(w, 4)} for w, r in best
    ]
