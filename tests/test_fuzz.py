"""Bad input at every door: over 100,000 of it made from good input, all refused with a reason or taken, no crash.

What was tried is printed (pytest -s) and recorded as a property of the test. The same seed makes the same input.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as rules
from hypothesis import strategies as st

from infra.settings import Settings
from models.profile import unpack
from serving.app import create_app, warm
from serving.parts import Parts
from streaming import events
from streaming.events import EventError, Weights
from streaming.learn import UserFold, decode_part, users_of
from streaming.state import MemoryUserStore
from tests import fuzz_doors
from tests.event_streams import T0
from tests.mutators import as_json, mutated, reshaped

ROOT = Path(__file__).parent.parent
SEED, TOTAL = 20261122, 105_000
Make = Callable[..., Awaitable[object]]


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
def test_a_hundred_thousand_bad_inputs_and_no_crash(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    began = time.perf_counter()
    found = fuzz_doors.run(tmp_path, TOTAL, SEED)
    tried = sum(counts["tried"] for counts in found.values())
    record_property("fuzzed", found)
    for name, counts in found.items():
        print(f"{name:24} {counts['tried']:7,} tried, {counts['refused']:7,} refused")
    print(f"{tried:,} in all, no crash, {time.perf_counter() - began:.1f} s")
    assert tried >= 100_000
    for name, counts in found.items():
        assert 0.3 * counts["tried"] < counts["refused"] < counts["tried"], name


def test_what_is_made_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for door in fuzz_doors.doors(tmp_path):
        made = [[door.make(r) for _ in range(5)] for r in (random.Random(7), random.Random(7))]
        assert made[0] == made[1]


LOADERS = """
import logging, random, sys
from pathlib import Path
import numpy as np
from numba import njit
from models.examples import CodecError
from models.items import Items
from models.profile import Profiles
from models.rows import Rows
from tests import fuzz_doors as doors
from tests.mutators import mutated
peek, one, tried = njit(lambda a, i: a[i]), np.zeros(1, np.int64), 0
try:
    peek(np.zeros(1), 5)
    raise SystemExit("indices are not checked here")
except IndexError:
    pass
given = Path(sys.argv[1])
rows, profiles, seen = ([p.read_bytes() for p in sorted(given.glob(k + "-*"))] for k in ("row", "profile", "seen"))
r = random.Random(1)
for number in range(6000):
    try:
        if number % 3 == 0:
            items = Items(rows=Rows())
            items.pack(items.load(doors.KEYS[:2], [mutated(r, rows), r.choice(rows)]))
        else:
            pair = (mutated(r, profiles), r.choice(seen)) if number % 3 == 1 else (r.choice(profiles), mutated(r, seen))
            made = Profiles([pair[0], None, profiles[0]], [pair[1], seen[0], None])
            made.rows["changed_by"], made.rows["seen_changed"] = 0, True
            made.pack(one), made.changes()
    except CodecError:
        pass
    tried += 1
print(tried)
"""


@pytest.mark.slow
def test_loaders_read_nothing_out_of_bounds(tmp_path: Path) -> None:
    """What reads lengths out of stored bytes, in a process whose kernels check every index (compiled for that once)."""
    found = {"row": fuzz_doors.row_values(), **{kind: fuzz_doors.stored(kind) for kind in ("profile", "seen")}}
    for kind, values in found.items():
        for number, value in enumerate(values):
            (tmp_path / f"{kind}-{number:03}").write_bytes(value)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "freshet" / "kernels-checked"
    env = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOADERS, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "6000"


# -- hypothesis -------------------------------------------------------------------------------------------------------

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
fields = st.fixed_dictionaries(
    {"type": st.sampled_from(["click", "dwell", "rating", "action", "view", "alias", "impression", "erase", "merge"])},
    optional={
        "user_id": st.text(max_size=300), "item_id": st.text(max_size=300), "ts": st.floats() | st.integers(),
        "seconds": st.floats(), "value": st.floats(), "scale": st.lists(st.floats(), max_size=3),
        "name": st.text(max_size=70), "event_id": st.none() | st.text(max_size=140), "position": st.integers(),
        "context": st.dictionaries(st.text(max_size=70), st.text(max_size=300), max_size=20),
        "source": plain, "anonymous_id": st.text(max_size=5), "shown": st.lists(st.text(max_size=5), max_size=3),
        "payload": st.binary(max_size=60), "v": st.integers(),
    },
)  # fmt: skip


@given(fields | plain)
@rules(max_examples=400)
def test_any_object_is_an_event_or_refused(value: Any) -> None:
    try:
        event = events.parse_object(value)
    except EventError as error:
        assert all((error.where, error.expected))  # noqa: PT017
        return
    assert events.decode(events.encode(event)) == event


_names = st.sampled_from(["ann", "bob"])
_times = st.floats(0, T0 + 299) | st.sampled_from([0.0, T0, T0 - 1e-9, 5e-324])
_items = st.sampled_from(["a", "b", "c", "d"])
_given = {"user_id": _names, "ts": _times, "event_id": st.none() | st.sampled_from(["e1", "e2", "e3"])}
valid = (
    st.builds(events.Click, item_id=_items, **_given)
    | st.builds(events.Dwell, item_id=_items, seconds=st.floats(0, 604800), **_given)
    | st.builds(events.Rating, item_id=_items, value=st.floats(1, 5), **_given)
    | st.builds(events.Action, item_id=_items, name=st.sampled_from(["like", "x"]), **_given)
    | st.builds(events.View, item_id=_items, slate_id=st.none() | _items, **_given)
)


@given(st.lists(valid, min_size=1, max_size=12), st.integers(0, 2**31), st.binary(max_size=30))
@rules(max_examples=150)
def test_any_stream_of_valid_events_folds_around_what_is_broken(
    stream: list[Any], seed: int, junk: bytes
) -> None:  # fmt: skip
    """Whatever lies between them, events that can be read are folded, and each that cannot has its dead letter."""
    r = random.Random(seed)
    values = [events.encode(event) for event in stream]
    values = [value for event in values for value in (event, junk, mutated(r, [event]))]
    part = decode_part("events", 0, [(i, round(T0 * 1000), value) for i, value in enumerate(values)])
    assert len(part.events) + len(part.dead) == len(values)
    store = MemoryUserStore()
    users = users_of([part])[0]
    outcome = UserFold(Weights()).fold([part], {0: store.read_now(0, users)})
    for write in outcome.writes:
        assert store.commit_now(write) is None
        assert write.next == len(values)
        for user, value in write.profiles.items():
            view = unpack(value, write.seen.get(user))
            assert np.isfinite(view.times).all()


# -- the application itself -------------------------------------------------------------------------------------------


def _requests(r: random.Random, count: int) -> list[tuple[str, str, bytes]]:
    """Return (method, path with query, body): bad bodies, queries and paths for every route."""
    paths = (b"/v1/events", b"/v1/recommendations/ann", b"/v1/items", b"/v1/items/a", b"/v1/popular", b"/v1/similar/i1",
             b"/v1/users/ann", b"/-/state/ann", b"/docs", b"/v1/nothing")  # fmt: skip
    made = []
    for _ in range(count):
        path = r.choice(paths)
        if r.random() < 0.2:
            path = b"/" + re.sub(rb"[^!-~]|[#?]", b"%ff", mutated(r, [path[1:]]))[:2000]
        query = mutated(r, fuzz_doors.TEXT_QUERIES) if r.random() < 0.4 else b""
        query = re.sub(rb"[^!-~]|#", b"%fe", query)[:2000]
        method = r.choice(("GET", "POST", "POST", "PUT", "DELETE"))
        objects: list[dict[str, Any]] = fuzz_doors.ITEMS if b"items" in path else fuzz_doors.OBJECTS
        body = as_json(r, [reshaped(r, r.choice(objects)), r.choice(objects)]) if method in ("POST", "PUT") else b""
        if body and r.random() < 0.4:
            body = mutated(r, [body])
        made.append((method, (path + (b"?" + query if query else b"")).decode(), body))
    return made


async def test_the_application_answers_whatever_comes(settings: Settings, topics: Make) -> None:
    """1,500 bad requests through the application on real servers: never a 500, each refusal in the one error shape."""
    await topics(2)
    warm()
    given = {name: getattr(settings, name) for name in ("kafka", "redis", "namespace")}
    app = create_app(Settings.load(settings.data, env={}, port=0, partitions=2, **given))
    parts: Parts = app.state.parts
    found: Counter[int] = Counter()
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as client,
    ):
        while parts.log_problem or parts.snapshot.degraded:
            await asyncio.sleep(0.01)
        for method, url, body in _requests(random.Random(SEED), 1500):
            answer = await client.request(method, url, content=body)
            found[answer.status_code] += 1
            what = (method, url, body[:500], answer.status_code, answer.text[:500])
            assert answer.status_code in (200, 202, 404, 405, 413, 422), what
            if answer.status_code >= 400:
                error = msgspec.json.decode(answer.content)["error"]
                assert error["where"], what
                assert error["expected"], what
                assert "got" in error, what
        assert (await client.get("/health/ready")).status_code in (200, 503)
        shown = json.dumps((await client.get("/-/state")).json())
    print(dict(found), len(shown))
    assert found[202] > 20
    assert found[422] > 100


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed: no wheel for here")
def test_atheris_finds_no_crash(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_atheris", "6000"], cwd=ROOT, capture_output=True, text=True, timeout=110,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"number_of_executed_units: *[6-9]\d{3}", done.stderr), done.stderr[-500:]
