"""API keys: the file they lie in, who a given key is, what its scopes open, and how fast it may ask.

A key is 256 random bits, made here and shown once; at rest there is its SHA-256 alone. A slow, salted hash protects
secrets that can be guessed; nobody guesses 256 bits, so a fast one is right, and it costs a request 1 us. Knows nothing
about HTTP.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import logging
import math
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

ScopeName = Literal["publish", "read", "admin"]
SCOPES: Final = ("publish", "read", "admin")
LOOK_AGAIN_S: Final = 1.0
"""How often the file is asked whether it changed, s."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

log = logging.getLogger("freshet.serving")


class KeysError(ValueError):
    """A file of keys that cannot be used, or a change to it that makes no sense: where, expected, got."""


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One key as it lies in the file; `rate` in objects a second (a lookup is one, so is an event), 0: no limit."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[ScopeName, ...], Meta(min_length=1)]
    rate: Annotated[float, Meta(ge=0, le=1e9)] = 0.0

    def opens(self, scope: str) -> bool:
        """Say whether it may do what `scope` may; admin may do everything."""
        return scope in self.scopes or "admin" in self.scopes


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[Key]


def hashed(key: str) -> str:
    """Return what lies in the file instead of the key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read a file of keys; raises KeysError that says where, expected and got."""
    try:
        keys = msgspec.json.decode(path.read_bytes(), type=_File).keys
    except FileNotFoundError:
        raise KeysError(f"{path}: no such file; `freshet keys add NAME --scope read` makes it") from None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise KeysError(f"{path}: expected the JSON that `freshet keys add` writes, got: {error}") from None
    names = [key.name for key in keys]
    if len(set(names)) < len(names):
        raise KeysError(f"{path}: expected each name once, got {max(names, key=names.count)!r} more than once")
    return tuple(keys)


def write_keys(path: Path, keys: Sequence[Key]) -> None:
    """Write a file of keys, whole or not at all, readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, made = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(_File(list(keys))), indent=2) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, path)
    except BaseException:
        Path(made).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Hold the lock beside the file, so that of two changes at once neither is lost; waits for the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # the lock goes with it; the file stays, for one that is made again is another lock


def add_key(path: Path, name: str, scopes: Sequence[str], rate: float = 0.0) -> str:
    """Add a key to the file and return its text, which is nowhere else; raises KeysError."""
    if not _NAME.fullmatch(name):
        raise KeysError(f"name: expected 1 to 64 letters, digits, dots, dashes or underscores, got {name[:80]!r}")
    if not scopes or set(scopes) - set(SCOPES):
        raise KeysError(f"--scope: expected one or more of {', '.join(SCOPES)}, got {', '.join(scopes) or 'none'}")
    if not (math.isfinite(rate) and 0 <= rate <= 1e9):
        raise KeysError(f"--rate: expected objects a second from 0 (no limit) to 1e9, got {rate:g}")
    text = "fr_" + secrets.token_urlsafe(32)
    made = Key(name, hashed(text), tuple(s for s in SCOPES if s in scopes), rate)  # type: ignore[misc]
    with _changing(path):
        keys = read_keys(path) if path.exists() else ()
        if any(key.name == name for key in keys):
            raise KeysError(
                f"{path}: expected a new name, got {name!r}, which is there; revoke it first, or take another"
            )
        write_keys(path, (*keys, made))
    return text


def revoke_key(path: Path, name: str) -> None:
    """Take a key out of the file; raises KeysError where it is not there."""
    if not path.exists():
        read_keys(path)  # raises, naming the next step; a folder and a lock are not made for it
    with _changing(path):
        keys = read_keys(path)
        left = tuple(key for key in keys if key.name != name)
        if len(left) == len(keys):
            raise KeysError(f"{path}: expected one of {', '.join(key.name for key in keys) or 'none'}, got {name!r}")
        write_keys(path, left)


@dataclass(slots=True)
class Bucket:
    """A token bucket that holds one second's worth; it may go into debt, and then refuses until that is paid."""

    rate: float
    tokens: float
    at: float

    def wait(self, now: float) -> float:
        """Take one token; return 0, or how many seconds to wait for it, taking none."""
        self.tokens = min(max(self.rate, 1.0), self.tokens + (now - self.at) * self.rate)
        self.at = now
        if self.tokens >= 1.0:
            self.tokens -= 1.0
            return 0.0
        return (1.0 - self.tokens) / self.rate


@dataclass(slots=True)
class KeyRing:
    """The keys of one API process: the file, read again when it changed, and the administrator's key of the settings.

    Rates are counted in this process alone: M API processes let a key do M times its rate. A file that becomes
    unreadable changes nothing (what was known stays, and is told in `problem`); it is never read as "no keys".
    """

    path: Path
    admin_key: str = ""
    must_exist: bool = False
    clock: Callable[[], float] = time.monotonic
    keys: tuple[Key, ...] = ()
    found: bool = False
    problem: str = ""
    _admin: Key | None = None
    _seen: tuple[int, ...] = ()
    _looked: float = -math.inf
    _buckets: dict[str, Bucket] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.admin_key:
            self._admin = Key("admin_key", hashed(self.admin_key), ("admin",))
        self.admin_key = ""  # from here on there is its hash alone
        if self.must_exist or self.path.exists():
            self._seen = self._stat()  # before it is read: a change meanwhile is then seen
            self.keys, self.found = read_keys(self.path), True

    def _stat(self) -> tuple[int, ...]:
        try:
            told = self.path.stat()
        except OSError:
            return ()
        return told.st_mtime_ns, told.st_size, told.st_ino

    def refresh(self) -> None:
        """Read the file again where it changed, at most once a second."""
        now = self.clock()
        if now - self._looked < LOOK_AGAIN_S:
            return
        self._looked = now
        seen = self._stat()
        if seen == self._seen:
            return
        self._seen = seen
        if not seen and not self.found:
            return
        try:
            self.keys, self.found, self.problem = read_keys(self.path), True, ""
        except KeysError as error:
            self.found = True  # a file that is there and cannot be read opens nothing, also where it is the first
            self.problem = f"{error}; the {len(self.keys)} keys read before stay"
            log.error("keys: %s", self.problem)
        else:
            self._buckets.clear()
            log.info("keys: %d read", len(self.keys))

    def known(self, given: str) -> Key | None:
        """Return whose key this is, comparing with every key in constant time; None for nobody's."""
        digest, found = hashed(given), None
        for key in (*self.keys, *((self._admin,) if self._admin else ())):
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found if given else None

    def wait(self, key: Key) -> float:
        """Count one request of a key; return 0, or the seconds that it should wait first."""
        if not key.rate:
            return 0.0
        now = self.clock()
        bucket = self._buckets.setdefault(key.name, Bucket(key.rate, max(key.rate, 1.0), now))
        return bucket.wait(now)

    def charge(self, key: Key | None, objects: int) -> None:
        """Count what a request held beyond its first object; the debt delays the key's next requests."""
        if key is not None and key.name in self._buckets:
            self._buckets[key.name].tokens -= objects
