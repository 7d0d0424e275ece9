"""One record of topic `steps`: what a recomputation of the weights needs beside `examples`. Knows no Kafka."""

from __future__ import annotations

import msgspec
import xxhash


class StepRecord(msgspec.Struct, array_like=True):
    """A step, as the learner committed it.

    Entries of the records first:next, duplicates dropped, were learnt in micro-batches of these sizes; `seed` is the
    negatives' seed of the first one (later ones follow from their own first positions). `before` is the identity of
    the parent, 0 at the beginning; `generation` is the one whose learner took the step (version 1 wrote neither).
    `gone` items left at its end; the records at the offsets `skipped` were not learnt, for that raised three times.

    A step without `sizes` learnt nothing: its records passed through the join window only. `back` is then the identity
    of the step whose weights and optimiser state it set, 0 or `before` where it left them as the parent had; `pin` is
    the version that serving stays on from here on, 0 for the newest weights, -1 as before; `note` says why, for people
    (version 3 wrote these).
    """

    step: int
    parent: int
    first: int
    next: int
    sizes: list[int]
    seed: int
    v: int = 1
    before: int = 0
    generation: int = 0
    gone: int = 0
    skipped: list[int] = []
    back: int = 0
    pin: int = -1
    note: str = ""

    @property
    def identity(self) -> int:
        """Name of the weights after this step, u64: it follows from the parent's and from this step's own cut."""
        cut: tuple[object, ...] = (
            self.before, self.step, self.first, self.next, self.sizes, self.seed, self.gone, self.skipped,
        )  # fmt: skip
        return xxhash.xxh3_64_intdigest(msgspec.msgpack.encode((*cut, self.back) if self.back else cut)) or 1

    @property
    def returns(self) -> bool:
        """Whether it set the weights of an earlier step, not the parent's."""
        return self.back not in (0, self.before)
