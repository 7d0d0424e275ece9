"""The fold of `examples` records into items, one after another: what the item agent does live and a rebuild does again.

At every offset that is a multiple of SWEEP, and only there, the least recently seen items leave where more than `most`
have behaviour: what is left depends on the log and on `most` alone, not on micro-batches, commits or restarts. A record
in `skip` counts as folded and changes nothing: one whose fold raised three times. Knows nothing about Kafka or Redis.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.examples import CONTROL, CodecError, Entries, HoleError, accept
from models.items.state import Items
from models.rows import Rows

SWEEP: Final = 1024
"""Records between two looks at how many items there are: so many records' new items may stand above `most`."""

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]


class PoisonError(RuntimeError):
    """The fold of the record at `offset` raised: what is in memory may be half changed and must be thrown away."""

    def __init__(self, offset: int, cause: BaseException) -> None:
        self.offset = offset
        super().__init__(f"examples@{offset}: {type(cause).__name__}: {cause}")


def _no_rows() -> I64:
    return np.empty(0, np.int64)


def _no_hashes() -> U64:
    return np.empty(0, np.uint64)


@dataclass(slots=True)
class Folded:
    """What one record came to: new entries, rows changed i64; hashes gone u64 and the rows i64 that lost them.

    `aside` are (source partition, offset, reason, bytes) of entries not folded; `unread` says why no entry was.
    """

    entries: Entries | None = None
    changed: I64 = field(default_factory=_no_rows)
    gone: U64 = field(default_factory=_no_hashes)
    moved: I64 = field(default_factory=_no_rows)
    aside: list[tuple[int, int, str, bytes]] = field(default_factory=list)
    unread: str = ""


class ItemFold:
    """Items as of the offset `next` of `examples`, with the marks of the source partitions."""

    def __init__(self, *, most: int) -> None:
        self.most = most
        self.items = Items(rows=Rows())
        self.marks: dict[int, int] = {}
        self.next = 0
        self.skip: set[int] = set()

    def fold(self, value: bytes) -> Folded:
        """Fold the record at `next`; raises HoleError, and PoisonError where the fold itself fails."""
        out = Folded()
        try:
            entries = accept(Entries.from_bytes(value), self.marks)
            out.entries = entries.take(entries.kind != CONTROL)  # the learner's alone
            if self.next not in self.skip:
                out.changed = self.items.fold(out.entries)
                out.aside, self.items.aside = self.items.aside, []
        except CodecError as error:
            out.unread = str(error)
        except HoleError:
            raise
        except Exception as error:
            raise PoisonError(self.next, error) from error
        self.next += 1
        if self.next % SWEEP == 0:
            out.gone, out.moved = self.items.sweep(self.most)
        return out
