"""Control records: what a person tells the learner, appended to `examples`.

There they have one place in the one order: the learner acts at that offset and logs what it did, so a recomputation
along the log does the same at the same place. To every other reader of `examples` they say nothing: they cover no
events (no ranges) and name no item. Knows nothing of how the learner obeys.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np

from models.examples import CONTROL, Entries

VERBS: Final = ("save", "rollback", "pin", "unpin")


class Control(msgspec.Struct, omit_defaults=True):
    """What is to be done: save (make a version), unpin, or rollback or pin to this version; `at`, s, is for people."""

    do: str
    version: int = 0
    identity: int = 0
    at: float = 0.0

    @property
    def text(self) -> str:
        """What it asks for, in two words."""
        return f"{self.do} {self.version}" if self.version else self.do


def record_of(control: Control, *, codec: int = 3) -> bytes:
    """Return a control as a record of `examples`: one entry without target, history or source position.

    `codec` is the setting: below 3 the release before reads it too.
    """
    return Entries(
        ranges=[], partition=np.zeros(1, np.uint16), offset=np.zeros(1, np.int64), index=np.zeros(1, np.uint16),
        time=np.zeros(1), kind=np.full(1, CONTROL, np.uint8), flags=np.zeros(1, np.uint8),
        target=np.zeros(1, np.uint64), weight=np.zeros(1), value=np.zeros(1), slates=np.zeros((1, 4), np.uint64),
        history_start=np.zeros(2, np.int64), ids=[""], extra=[msgspec.json.encode(control)],
        version=2 if codec >= 3 else 1,
    ).to_bytes()  # fmt: skip


def control_in(entries: Entries) -> Control | None:
    """Return the control that a record holds; None for every other record. What cannot be read asks for nothing."""
    if len(entries) != 1 or int(entries.kind[0]) != CONTROL:
        return None
    try:
        return msgspec.json.decode(entries.extra[0], type=Control)
    except msgspec.MsgspecError:
        return Control("nothing that can be read")
