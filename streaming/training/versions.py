"""Versions: checkpoints of the learner in files, the last KEEP of them, and the list of them in Redis.

    a version  after 100,000 examples or 5 minutes, whichever comes first, where something was learnt
    its bytes  the packed rows, 368 or 400 B each, and the dense weights: 380 to 412 MB with a million items

Files, not Redis: eight of them would be 3 GB of its memory. `<data>/versions/<namespace>@<generation>/<number>.version`
lies in the learner's data folder; the number is that of the step. Redis holds the list, which everyone reads, and of a
version that is pinned a copy of what serving needs (136 or 168 B an item), which API processes on other machines load.
A file is whole or not there: written aside, flushed, renamed. Its digest is compared before anything is taken from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Final

import msgspec
import xxhash

from infra.settings import Settings
from models.examples import CodecError
from streaming.state import Keys, ModelStore
from streaming.training.guard import unsound

KEEP: Final = 8
"""Versions kept in files, the newest; one that is pinned stays beyond that."""
REFUSED: Final = 8
"""Refused ones that are told of."""
EVERY_EXAMPLES: Final = 100_000
EVERY_S: Final = 300.0
ASIDE: Final = ".aside"
PIECE: Final = 1 << 16
"""Rows copied at once."""
_MAGIC: Final = b"FRV\x01"
_LENGTHS: Final = struct.Struct("<IQQQ")
"""Bytes of the description, number of rows, bytes of all of them, bytes of the dense weights."""


class VersionError(RuntimeError):
    """No such version, or not one that can be used; the message names the next step."""


class Version(msgspec.Struct, kw_only=True):
    """What is known of a version, for people and for going back to it.

    `version` is the number of its step, `identity` that step's; `parent` the version that was learnt on from, 0 the
    beginning; `next` the offset in `examples`; `made` s since the epoch; `learnt` examples since the parent; `metrics`
    the mean prequential losses since then, where enough was seen; `refused` why it was not published, "" where it was.
    """

    version: int
    identity: int
    parent: int
    next: int
    made: float
    learnt: int
    items: int
    generation: int
    metrics: dict[str, float] = {}
    bytes: int = 0
    refused: str = ""


@dataclass(slots=True)
class Checkpoint:
    """A version with its state: hashes and packed rows, in pieces, and the learner's dense state."""

    about: Version
    keys: list[int]
    rows: list[bytes]
    dense: bytes


def home(settings: Settings, keys: Keys) -> Path:
    """Return the folder of a generation's versions."""
    return settings.data_path / "versions" / keys.prefix


def _name(version: int) -> str:
    return f"{version}.version"


def write(folder: Path, checkpoint: Checkpoint) -> int:
    """Write a version's file and return its bytes; raises OSError."""
    about = msgspec.msgpack.encode(checkpoint.about)
    digest, size = xxhash.xxh3_128(), 0
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / _name(checkpoint.about.version)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        for piece in _pieces(checkpoint, about):
            digest.update(piece)
            size += file.write(piece)
        size += file.write(digest.digest())
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    return size


def _pieces(checkpoint: Checkpoint, about: bytes) -> Iterator[bytes]:
    rows, keys, dense = checkpoint.rows, checkpoint.keys, checkpoint.dense
    yield _MAGIC + _LENGTHS.pack(len(about), len(rows), sum(map(len, rows)), len(dense)) + about
    for kind, values in (("Q", keys), ("I", list(map(len, rows)))):
        for first in range(0, len(rows), PIECE):
            piece = values[first : first + PIECE]
            yield struct.pack(f"<{len(piece)}{kind}", *piece)
    for first in range(0, len(rows), PIECE):
        yield b"".join(rows[first : first + PIECE])
    yield dense


def read(path: Path) -> Checkpoint:
    """Read a version's file whole; raises VersionError where it is not there or not what was written."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise VersionError(f"{path}: {error.strerror}") from error
    try:
        body, (about, count, size, dense) = memoryview(data)[:-16], _LENGTHS.unpack_from(data, len(_MAGIC))
        if data[: len(_MAGIC)] != _MAGIC or xxhash.xxh3_128_digest(body) != data[-16:]:
            raise ValueError("its digest is another")
        at = len(_MAGIC) + _LENGTHS.size
        told = msgspec.msgpack.decode(body[at : at + about], type=Version)
        at += about
        keys, at = list(struct.unpack_from(f"<{count}Q", body, at)), at + 8 * count
        ends, at = list(accumulate(struct.unpack_from(f"<{count}I", body, at), initial=at + 4 * count)), at + 4 * count
        rows = [bytes(body[i:j]) for i, j in pairwise(ends)]
        return Checkpoint(told, keys, rows, bytes(body[at + size : at + size + dense]))
    except (ValueError, struct.error, msgspec.MsgspecError) as error:
        raise VersionError(f"{path}: damaged, it is not what was written ({error})") from error


def _fit(path: Path) -> Checkpoint:
    """Read a version that this build can take over; raises VersionError."""
    found = read(path)
    try:
        wrong = unsound(found.rows, found.dense)
    except CodecError as error:
        raise VersionError(f"{path}: of another build ({error})") from error
    if wrong:
        raise VersionError(f"{path}: {wrong}")
    return found


def described(path: Path) -> Version | None:
    """Return what a file says of itself, without reading the rest; None where it says nothing."""
    with contextlib.suppress(OSError, struct.error, msgspec.MsgspecError), path.open("rb") as file:
        head = file.read(len(_MAGIC) + _LENGTHS.size)
        if head[: len(_MAGIC)] == _MAGIC:
            about = msgspec.msgpack.decode(file.read(_LENGTHS.unpack_from(head, len(_MAGIC))[0]), type=Version)
            about.bytes = path.stat().st_size
            return about
    return None


def found_by_identity(settings: Settings, identity: int) -> Checkpoint | None:
    """Return a version of any generation by the identity of its step, where a whole file of it is kept here."""
    for path in sorted((settings.data_path / "versions").glob(f"{settings.namespace}@*/*")):
        about = described(path)
        if about is not None and about.identity == identity:
            with contextlib.suppress(VersionError):
                return read(path)
    return None


def carry(settings: Settings, old: Keys, new: Keys, line: Collection[int]) -> None:
    """Keep one generation's versions in another too, where the steps they were made of are on its line."""
    for path in sorted(home(settings, old).glob("*.version")):
        about = described(path)
        if about is not None and about.identity in line:
            home(settings, new).mkdir(parents=True, exist_ok=True, mode=0o700)
            with contextlib.suppress(FileExistsError):
                os.link(path, home(settings, new) / path.name)


class Versions:
    """The versions of one generation: files in a folder, their list and the pinned copy in the store."""

    def __init__(self, folder: Path, store: ModelStore) -> None:
        self.folder, self._store = folder, store
        self.known: dict[int, Version] = {}

    @property
    def kept(self) -> list[Version]:
        """The published ones, oldest first."""
        return [about for _, about in sorted(self.known.items()) if not about.refused]

    async def load(self, step: int, pin: int) -> None:
        """Take stock at the start, when the learner stands at `step`: the files decide, and the list is written anew.

        A file of a later step is not of this line any more: Redis lost the end of what was committed, or all of it.
        It is laid aside, the last KEEP of them: a rebuild along the logged steps may still want it.
        """
        told = {about.version: about for about in await read_list(self._store)}
        self.known = {number: about for number, about in told.items() if about.refused and number <= step}
        for path in sorted(self.folder.glob("*")):
            about = described(path)
            if about is None or path.suffix == ".part":
                path.unlink(missing_ok=True)
            elif about.version > step and path.suffix == ".version":
                path.rename(path.with_suffix(ASIDE))
            elif path.suffix == ".version":
                self.known[about.version] = about
        for path in sorted(self.folder.glob(f"*{ASIDE}"), key=lambda path: path.stat().st_mtime)[:-KEEP]:
            path.unlink()
        for number in told.keys() - self.known.keys():
            await self._unlist(number)
        for about in self.known.values():
            await self._list(about)
        for number in (told.keys() | self.known.keys()) - {pin}:  # killed before it deleted one
            await self._store.pinned(number).wipe()

    async def publish(self, checkpoint: Checkpoint, pin: Callable[[], int]) -> Version:
        """Write a version unless its values are not finite, list it, let the oldest go; return it as it is listed."""
        about = checkpoint.about
        try:
            about.refused = about.refused or await asyncio.to_thread(unsound, checkpoint.rows, checkpoint.dense)
            if not about.refused:
                about.bytes = await asyncio.to_thread(write, self.folder, checkpoint)
        except (OSError, CodecError) as error:
            about.refused = f"not written: {error}"
        self.known[about.version] = about
        await self._list(about)
        refused = [number for number, other in sorted(self.known.items()) if other.refused]
        for number in [other.version for other in self.kept[:-KEEP]] + refused[:-REFUSED]:
            if number != pin():
                await self.forget(number)
        return about

    async def forget(self, number: int) -> None:
        """Delete a version."""
        self.known.pop(number, None)
        await self._unlist(number)
        (self.folder / _name(number)).unlink(missing_ok=True)

    async def _list(self, about: Version) -> None:
        await self._store.client.hset(self._store.keys.model_versions, str(about.version), msgspec.json.encode(about))

    async def _unlist(self, number: int) -> None:
        await self._store.client.hdel(self._store.keys.model_versions, str(number))

    async def read(self, number: int, identity: int = 0) -> Checkpoint:
        """Return a published version; raises VersionError."""
        about = self.known.get(number)
        if about is None or about.refused:
            kept = ", ".join(str(other.version) for other in self.kept) or "none"
            raise VersionError(f"no version {number}, only {kept}")
        if identity not in (0, about.identity):
            raise VersionError(f"version {number} is another one than was meant: it was made again since")
        return await asyncio.to_thread(_fit, self.folder / _name(number))

    async def serve_copy(self, number: int, rows: Mapping[int, bytes], dense: bytes) -> None:
        """Write what serving needs of a version where every API process can load it."""
        copy, names = self._store.pinned(number), list(rows)
        await copy.wipe()
        for first in range(0, max(1, len(names)), 1000):
            chunk, last = names[first : first + 1000], first + 1000 >= len(names)
            head = {"next": "1", "dense": dense} if last else {"next": "0"}
            await copy.commit(expected=0, head=head, keys=chunk, values=[rows[key] for key in chunk])

    async def served_copy(self, number: int) -> dict[int, bytes]:
        """Return the rows of the copy; empty where there is none."""
        return dict((await self._store.pinned(number).load([]))[1])

    async def drop_copy(self, number: int) -> None:
        """Delete the copy of a version that is not pinned any more."""
        await self._store.pinned(number).wipe()


async def read_list(store: ModelStore) -> Sequence[Version]:
    """Return every version that is listed, oldest first; raises what Redis raises."""
    found = [msgspec.json.decode(value, type=Version) for value in await store.versions()]
    return sorted(found, key=lambda about: about.version)
