"""`freshet replay --live`: the same log through Kafka, Faust, Redis and HTTP, on a private stack in a temporary folder.

Each event: wait until every partition is folded as far as its last token, ask for a slate with the event's time as
`now`, note the item's place in it, publish the event. Item state follows within a tenth of a second and weights within
a second or two, so figures differ a little from replay in process, where both are there at once.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any, Final

import httpx
import msgspec
import numpy as np

from infra.settings import Settings
from infra.stack import Stack
from models import metrics
from streaming.replay.catalogue import Catalogue
from streaming.replay.logs import TARGET, ReplayError, ReplayLog, roles
from streaming.replay.prequential import Exclusion, run
from streaming.topics import decode_token, encode_token

N: Final = 10
WAIT_MS: Final = 2000
IMPRESSION_S: Final = 5.0
PATIENCE_S: Final = 60.0
"""How long a request that a loaded API refuses is sent again."""
Tell = Callable[[int], None]


class LiveReplay:
    """A client of one stack that replays a log in order, one event at a time."""

    def __init__(self, client: httpx.Client, exclusion: Exclusion, catalogue: Catalogue) -> None:
        self._client, self._exclusion = client, exclusion
        self._untold = dict(catalogue.items)
        self._offsets: dict[int, int] = {}
        self._known: set[str] = set()
        self._baskets: dict[str, list[str]] = {}
        self._slates = 0
        self.ranks: list[float] = []
        self.late = 0

    def step(self, event: Any, basket: str) -> None:
        """Rank the event's item in a slate for its user, then publish the event as that slate's outcome."""
        slate = self._slate(event, basket)
        ids = [item["item_id"] for item in slate["items"]]
        if event.item_id in self._known:
            self.ranks.append(float(ids.index(event.item_id)) if event.item_id in ids else np.inf)
        else:
            self.ranks.append(np.nan)
        self._known.add(event.item_id)
        if basket:
            self._baskets.setdefault(basket, []).append(event.item_id)
        self._await_impression()
        event.slate_id = slate["slate_id"]
        self.publish(event)

    def publish(self, event: Any) -> None:
        """Publish an event, and remember where it lies."""
        answer = self._call("POST", "/v1/events", json=[msgspec.to_builtins(event)])
        for partition, offset in decode_token(answer["token"]).events.items():
            self._offsets[partition] = max(offset, self._offsets.get(partition, -1))
        item = self._untold.pop(event.item_id, None)
        if item is not None:  # after its first event, as in process: no slate holds what nobody chose yet
            self._call("POST", "/v1/items", json=[msgspec.to_builtins(item)])

    def _slate(self, event: Any, basket: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "n": N, "policy": "greedy", "now": event.ts, "wait_ms": WAIT_MS,
            "seen": "exclude" if self._exclusion == "seen" else "include",
        }  # fmt: skip
        if event.context:
            body["context"] = event.context
        if self._exclusion == "invoice":
            body["exclude"] = self._baskets.get(basket, [])
        if self._offsets:
            body["after"] = encode_token(self._offsets)
        slate = self._call("POST", f"/v1/recommendations/{event.user_id}", json=body)
        self.late += slate.get("applied") is False
        self._slates += bool(slate["items"])  # an empty slate is no impression
        return slate

    def _await_impression(self) -> None:
        """The slate must lie in the log before its outcome does; a person is never quicker than that, a replay is."""
        deadline = time.monotonic() + IMPRESSION_S
        while time.monotonic() < deadline:
            told = self._call("GET", "/-/state")["impressions"]
            if told["appended"] + told["dropped"] + told["failed"] >= self._slates:
                return
            time.sleep(0.002)

    def _call(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            answer = self._client.request(method, path, **request)
            if answer.status_code not in (429, 503) or time.monotonic() >= deadline:
                break
            time.sleep(float(answer.headers.get("Retry-After", "1")))  # refused whole: nothing of it was taken
        if answer.status_code >= 400:
            raise ReplayError(f"--live: {method} {path} answered {answer.status_code}: {answer.text[:300]}")
        found: dict[str, Any] = answer.json()
        return found


def run_live(log: ReplayLog, *, exclusion: Exclusion, seed: int, tell: Tell = lambda done: None) -> dict[str, Any]:
    """Replay a log live, then in process; return both figures, their difference and how long live took."""
    with tempfile.TemporaryDirectory(prefix="freshet-replay-") as folder:
        settings = Settings.load(
            folder,
            running=False,
            kafka="",
            redis="",
            feature_share=1.0,
            policy="greedy",
            first_share=0,
            seed=seed,
            port=0,
        )
        with Stack(settings) as stack, httpx.Client(base_url=stack.api, timeout=30) as client:
            live, began = LiveReplay(client, exclusion, log.catalogue), time.monotonic()
            rows = zip(log.events, log.baskets, roles(log.events), strict=True)
            for done, (event, basket, role) in enumerate(rows, 1):
                if role == TARGET:
                    live.step(event, basket)
                else:
                    live.publish(event)
                tell(done)
            seconds = time.monotonic() - began
    ranks = np.array(live.ranks)
    figures = metrics.summary(ranks[~np.isnan(ranks)])
    for event in log.events:
        event.slate_id = None
    report = run(log, exclusion=exclusion, seed=seed)
    difference = abs(figures["ndcg@10"] - report["metrics"]["ndcg@10"])
    bound = max(0.1 * report["metrics"]["ndcg@10"], 0.003)
    return {
        **report, "metrics": figures,
        "live": {
            "seconds": round(seconds, 1), "events_per_s": round(len(log.events) / seconds, 1),
            "late_lookups": live.late, "in_process": report["metrics"], "ndcg_difference": difference,
            "allowed": bound, "within": difference <= bound,
        },
    }  # fmt: skip
