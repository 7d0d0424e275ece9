"""Records in files: key and value bytes with their lengths, one after the other; hashed while they are written.

A file's bytes depend on its records alone, so equal states make equal files. Knows nothing of what is kept.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

_LENGTHS: Final = struct.Struct("<II")
_PIECE: Final = 1 << 20


def write_records(path: Path, records: Iterable[tuple[bytes, bytes]]) -> dict[str, Any]:
    """Write records (key, value), flushed to the disk; return {name, bytes, records, sha256}."""
    digest, size, count, waiting = hashlib.sha256(), 0, 0, bytearray()
    with path.open("wb") as file:
        for key, value in records:
            waiting += _LENGTHS.pack(len(key), len(value))
            waiting += key
            waiting += value
            count += 1
            if len(waiting) >= _PIECE:
                digest.update(waiting)
                size += file.write(waiting)
                waiting.clear()
        digest.update(waiting)
        size += file.write(waiting)
        file.flush()
        os.fsync(file.fileno())
    return {"name": path.name, "bytes": size, "records": count, "sha256": digest.hexdigest()}


def read_records(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield the records of a file whose checksum was found right."""
    with path.open("rb") as file:
        while head := file.read(_LENGTHS.size):
            key, value = _LENGTHS.unpack(head)
            yield file.read(key), file.read(value)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hex; raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
