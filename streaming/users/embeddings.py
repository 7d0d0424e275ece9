"""A live copy of the learner's vectors in the worker, and the cached user embeddings made from it.

A cache, never the truth of a user: stamped with the model step, no part of bit-identity (DESIGN section 3, rule 7).
Knows nothing about events.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.factors import ROW, sound
from models.model import STATE_FORM, STATE_ROW, Model
from models.profile import Profiles
from models.rows import Rows
from streaming.state import Delta, Keys, ModelStore, StoreUnavailable, feed_top, read_feed

log = logging.getLogger(__name__)

STEP: Final = struct.Struct("<q")


class LiveEmbeddings:
    """Follows the model's feed and computes decayed embeddings from the vectors it holds."""

    def __init__(self, client: Any, keys: Keys) -> None:
        self._client, self._keys = client, keys
        self._model = Model(rows=Rows())
        self._position = 0
        self.step = 0

    def embed(self, profiles: Profiles, picked: NDArray[np.int64]) -> list[bytes]:
        """Return step i64 and f16[2, 64] for each picked profile, at its own last event time."""
        found = self._model.factors.decayed_embeddings(
            profiles.item, profiles.time, profiles.n, profiles.times[:, 1], picked
        )
        stamp = STEP.pack(self.step)
        return [stamp + one.tobytes() for one in found]

    async def follow(self) -> None:
        """Load the model's rows from its feed and keep them current, for ever; Redis may come and go."""
        last = ""
        while True:
            try:
                last = last or await self._load()
                for entry_id, delta in await read_feed(self._client, self._keys.model_feed, last, block_ms=2000):
                    last = entry_id
                    if not self._apply(delta):
                        last = ""
                        break
            except StoreUnavailable as error:
                log.warning("model feed: Redis does not answer (%s)", error)
                last = ""
                await asyncio.sleep(1.0)

    def _apply(self, delta: Delta) -> bool:
        """Write a delta in place; False at a hole: the feed was trimmed, everything is to be loaded again."""
        if delta.kind == "vectors":
            keys, values, _ = sound(delta.keys, delta.values, ROW, form=1)
            self._model.load_rows(np.array(keys, np.uint64), values)
        elif delta.kind == "step":
            if delta.first > self._position:
                return False
            self._model.remove(np.array(delta.gone, np.uint64))
            self._position, self.step = max(self._position, delta.next), delta.step
        return True

    async def _load(self) -> str:
        """Load what Redis holds to be served, rows that cannot be read left out: serving tells of them."""
        top = await feed_top(self._client, self._keys.model_feed)
        head, rows, pinned = await ModelStore(self._client, self._keys).load_served([])
        dtype, form = (ROW, 1) if pinned else (STATE_ROW, STATE_FORM)
        keys, values, _ = sound([key for key, _ in rows], [value for _, value in rows], dtype, form=form)
        self._model = Model(rows=Rows())
        self._model.load_rows(np.array(keys, np.uint64), values)
        self._position = int(head.get("next", 0))
        return top
