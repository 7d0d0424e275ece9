"""Snapshots: users, rows, catalogue, weights and offsets in a folder, checksummed, whole or not there.

`<data>/snapshots/<namespace>/<name>/` holds files of records and a manifest, which is written last, in a folder of
another name that is then renamed: what is interrupted leaves nothing that `list` or `restore` would see. A state is
folded in memory, from the newest snapshot on, to one cut of the logs: the live path is not touched, and it is
consistent by construction. The weights are those of a step that the learner committed. Files hold user ids.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from infra.settings import Settings
from streaming.recovery import cuts
from streaming.recovery.apart import Advance
from streaming.recovery.cuts import Cut
from streaming.recovery.files import checksum, read_records, write_records
from streaming.recovery.folding import folding, now
from streaming.recovery.generations import RecoveryError
from streaming.recovery.lineage import MemoryModel
from streaming.state import ModelStore, connect, live_keys
from streaming.topics import epoch, moved, preflight, topics_of

MANIFEST = "manifest.json"
NAMED = 20
"""Names that a diff gives of each kind."""


class Manifest(msgspec.Struct, kw_only=True):
    """What a snapshot holds; offsets are the next to fold. `seal` is the SHA-256 of all else, so it is checked too.

    `users`: partition -> {next, marks}; `rows`: {examples, items, marks, totals}; `steps`: where the records of later
    steps begin in topic `steps`; `weights`: {step, next, window}, the first offset that learning on needs.
    """

    name: str
    made: float
    namespace: str
    ground: str
    users: dict[str, Any]
    rows: dict[str, Any]
    steps: int
    weights: dict[str, int]
    counts: dict[str, int]
    fold: dict[str, Any]
    files: list[dict[str, Any]]
    base: str = ""
    version: int = 1
    seal: str = ""

    @property
    def events(self) -> int:
        """Events folded, all partitions together."""
        return sum(said["next"] for said in self.users.values())

    @property
    def bytes(self) -> int:
        """Bytes of its files."""
        return sum(file["bytes"] for file in self.files)

    def sealed(self) -> str:
        """Return what `seal` must be."""
        plain = msgspec.to_builtins(self) | {"seal": ""}
        return hashlib.sha256(msgspec.json.encode(plain, order="deterministic")).hexdigest()

    def covers(self, begin: Cut) -> bool:
        """Whether the logs still hold everything that comes after it."""
        return self.rows["examples"] >= begin.examples and all(
            self.users.get(str(p), {"next": 0})["next"] >= offset for p, offset in begin.events.items()
        )

    def within(self, cut: Cut) -> bool:
        """Whether it holds nothing that lies after a cut."""
        return self.rows["examples"] <= cut.examples and all(
            said["next"] <= cut.events.get(int(p), 0) for p, said in self.users.items()
        )


def home(settings: Settings) -> Path:
    """Return the folder of a namespace's snapshots."""
    return Path(settings.data) / "snapshots" / settings.namespace


def _fold_of(settings: Settings) -> dict[str, Any]:
    weights = [list(weight) for weight in settings.event_weights]
    return {"event_weights": weights, "max_users": settings.max_users, "max_items": settings.max_items}


def snapshots(settings: Settings) -> list[Manifest]:
    """Return the readable manifests of the snapshots there are, oldest first; files are not checked."""
    return told(settings)[0]


def told(settings: Settings) -> tuple[list[Manifest], dict[str, str]]:
    """Return those manifests, and of snapshots whose manifest cannot be read the name and why: one spoils no other."""
    found, damaged = list[Manifest](), dict[str, str]()
    for path in sorted(home(settings).glob(f"*/{MANIFEST}")):
        if path.parent.name.endswith(".part"):
            continue
        try:
            found.append(_read_manifest(path))
        except RecoveryError as error:
            damaged[path.parent.name] = str(error)
    return sorted(found, key=lambda manifest: manifest.made), damaged


def _read_manifest(path: Path) -> Manifest:
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise RecoveryError(f"{path}: no manifest of a snapshot ({error}). {_instead(path.parent)}") from error
    if manifest.version != 1:
        raise RecoveryError(f"{path}: version {manifest.version} is of a newer Freshet; this one reads version 1")
    if manifest.seal != manifest.sealed():
        raise RecoveryError(f"{path}: damaged, it is not what was written. {_instead(path.parent)}")
    return manifest


def _instead(folder: Path) -> str:
    return f"Nothing of it was used. Bring {folder.name} back from a copy, or delete {folder} and use another"


def find(settings: Settings, name: str) -> Manifest:
    """Return the manifest of a snapshot, "" for the newest that can be read; raises RecoveryError."""
    found, damaged = told(settings)
    if name in damaged or (damaged and not found):
        raise RecoveryError(damaged.get(name) or next(iter(damaged.values())))
    if not found:
        raise RecoveryError(f"no snapshot in {home(settings)}: `freshet snapshot save` makes one")
    for manifest in found[-1:] if not name else found:
        if name in ("", manifest.name):
            return manifest
    names = ", ".join(manifest.name for manifest in found)
    raise RecoveryError(f"no snapshot {name!r} in {home(settings)}, only {names}")


def check(settings: Settings, manifest: Manifest) -> Path:
    """Return a snapshot's folder once every file was found to be what was written; raises RecoveryError naming one."""
    folder = home(settings) / manifest.name
    for file in manifest.files:
        path = folder / file["name"]
        try:
            found = checksum(path)
        except OSError as error:
            raise RecoveryError(f"{path}: {error.strerror}. {_instead(folder)}") from error
        if found != file["sha256"]:
            raise RecoveryError(f"{path}: damaged, its checksum is not the manifest's. {_instead(folder)}")
    return folder


def base_for(settings: Settings, ground: str, begin: Cut, cut: Cut, *, eager: bool) -> Manifest | None:
    """Return the newest snapshot to begin from, to fold up to a cut; None for the beginning of the logs.

    Where the logs were trimmed one is needed; `eager` takes one also where it only saves time. Raises RecoveryError
    where none covers what is gone.
    """
    trimmed = begin.examples > 0 or any(begin.events.values())
    if not trimmed and not eager:
        return None
    for manifest in reversed(snapshots(settings)):
        same = manifest.fold == _fold_of(settings) or trimmed
        if not moved(manifest.ground, ground) and manifest.covers(begin) and manifest.within(cut) and same:
            return manifest
    if trimmed:
        damaged = "".join(f". {why}" for why in told(settings)[1].values())
        gone = ", ".join(f"events[{p}] begins at {offset}" for p, offset in begin.events.items() if offset)
        raise RecoveryError(
            f"the logs were trimmed ({gone or f'examples begins at {begin.examples}'}) and no snapshot in"
            f" {home(settings)} covers what is gone and is not too new: bring one back from a copy,"
            f" or name its data folder with --data{damaged}"
        )
    return None


async def save(settings: Settings, *, advance: Advance, name: str = "") -> Manifest:
    """Write a snapshot of everything folded so far and return its manifest; raises RecoveryError, TopicsError."""
    name = name or time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    if not name.replace("-", "").replace("_", "").isalnum():
        raise RecoveryError(f"snapshot name {name!r}: expected letters, digits, - and _")
    with _folder(settings, name) as folder:
        client = connect(settings.redis)
        try:
            await preflight(settings.kafka, topics_of(settings))
            ground = await epoch(settings.kafka, topics_of(settings))
            before = await cuts.ends(settings)  # before the weights: the steps after theirs lie behind it
            base = base_for(settings, ground, await cuts.begins(settings), before, eager=True)
            head, rows = await ModelStore(client, await live_keys(client, settings.namespace)).load()
            model = MemoryModel(head, dict(rows))
            cut, floor = await now(client, settings, ground)
            async with folding(settings, sum(cut.events.values()) - (base.events if base else 0), advance) as halves:
                if base is not None:
                    await halves.load(check(settings, base), msgspec.to_builtins(base))
                await halves.to_one_cut(cut, floor)
                files, heads = await halves.save(folder)
                counts = await _counts(halves, model)
        finally:
            await client.aclose()
        files.append(write_records(folder / "weights", _weights(model)))
        manifest = Manifest(
            name=name, made=time.time(), namespace=settings.namespace, ground=ground, steps=before.steps, files=files,
            weights={"step": model.step, "next": int(head.get("next", 0)), "window": model.window},
            counts=counts, fold=_fold_of(settings), base=base.name if base else "", **heads,
        )  # fmt: skip
        manifest.seal = manifest.sealed()
        _write(folder / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    return manifest


async def _counts(halves: Any, model: MemoryModel) -> dict[str, int]:
    rows, catalogue = await halves.items.call("count")
    return {"profiles": halves.users.count(), "rows": rows, "catalogue": catalogue, "learnt": len(model.rows)}


@contextlib.contextmanager
def _folder(settings: Settings, name: str) -> Iterator[Path]:
    """Yield a folder that gets its name, at once, when everything in it is written; nothing stays of a failure."""
    place = home(settings)
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (place / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecoveryError(f"another `freshet snapshot save` writes into {place}: wait until it ends") from None
        for left in place.glob("*.part"):
            shutil.rmtree(left)
        if (place / name).exists():
            raise RecoveryError(f"snapshot {name} is there already, in {place}: choose another name")
        part = place / f"{name}.part"
        part.mkdir(mode=0o700)
        try:
            yield part
            _sync(part)
            os.rename(part, place / name)
            _sync(place)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _weights(model: MemoryModel) -> list[tuple[bytes, bytes]]:
    head = [(b"head:" + name.encode(), value) for name, value in sorted(model.kept.items())]
    return head + [(b"row:" + key.to_bytes(8, "big"), value) for key, value in sorted(model.rows.items())]


def load_weights(folder: Path) -> MemoryModel:
    """Return the weights of a snapshot whose files were checked."""
    model = MemoryModel()
    for key, value in read_records(folder / "weights"):
        kind, _, rest = key.partition(b":")
        if kind == b"head":
            model.kept[rest.decode()] = value
        else:
            model.rows[int.from_bytes(rest, "big")] = value
    return model


# -- diff -------------------------------------------------------------------------------------------------------------


def diff(settings: Settings, a: str, b: str) -> dict[str, Any]:
    """Say what changed from one snapshot to another: users, rows, catalogue, weights, offsets; raises RecoveryError."""
    old, new = find(settings, a), find(settings, b)
    folders = check(settings, old), check(settings, new)
    users = _changes(_users(folders[0], old), _users(folders[1], new), str)
    found: dict[str, Any] = {"from": old.name, "to": new.name, "users": users}
    for kind, file in (("rows", "items"), ("catalogue", "catalogue"), ("weights", "weights")):
        before, after = ({key: _digest(v) for key, v in read_records(folder / file)} for folder in folders)
        found[kind] = _changes(before, after, _told)
    found["offsets"] = {
        f"events[{p}]": [old.users.get(p, {"next": 0})["next"], new.users.get(p, {"next": 0})["next"]]
        for p in sorted(old.users.keys() | new.users.keys(), key=int)
    } | {name: [old.rows[name], new.rows[name]] for name in ("examples", "items")}
    found["offsets"]["step"] = [old.weights["step"], new.weights["step"]]
    return found


def _users(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Return user -> digest of all that is kept of them."""
    kept: dict[str, list[tuple[str, bytes]]] = {}
    for partition in manifest.users:
        for key, value in read_records(folder / f"users-{partition}"):
            kind, _, user = key.decode().partition(":")
            if kind != "active":
                kept.setdefault(user, []).append((kind, value))
    return {user: _digest(repr(sorted(values)).encode()) for user, values in kept.items()}


def _digest(value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=16).digest()


def _told(key: bytes) -> str:
    kind, _, rest = key.partition(b":")
    return f"{rest.decode()}" if kind == b"head" else (rest if kind == b"row" else key).hex()


def _changes(a: Mapping[Any, bytes], b: Mapping[Any, bytes], told: Any) -> dict[str, Any]:
    named = {
        "added": sorted(b.keys() - a.keys()),
        "removed": sorted(a.keys() - b.keys()),
        "changed": sorted(key for key in a.keys() & b.keys() if a[key] != b[key]),
    }
    counted: dict[str, Any] = {kind: len(keys) for kind, keys in named.items()}
    counted["same"] = len(a.keys() & b.keys()) - counted["changed"]
    counted["names"] = {kind: [told(key) for key in keys[:NAMED]] for kind, keys in named.items() if keys}
    return counted
