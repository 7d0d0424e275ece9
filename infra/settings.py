"""The one frozen table of settings: name, default, help, environment variable; knows nothing of what they steer.

Precedence: argument, then environment (`FRESHET_<NAME>`), then `DATA/stack.json` (servers and namespace of a running
stack), then the default. Algorithm constants are no settings: they live beside their equation.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

PREFIX = "FRESHET_"
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
MASK = "********"


class SettingsError(ValueError):
    """A setting has a value that cannot be used; the message says which, from where, expected, got."""


class Weight(NamedTuple):
    """One row of the table of event weights: the first row of the kind whose condition holds gives the weight.

    Conditions: `` (always), `seconds >= X`, `seconds < X`, `name = X`, and `scaled` (the weight is multiplied by the
    rating, scaled to [-1, 1] around the middle of its scale).
    """

    kind: str
    condition: str
    weight: float

    @property
    def terms(self) -> tuple[str, str | float]:
        """The condition taken apart: (`always`|`scaled`, 0), (`>=`|`<`, seconds) or (`=`, name)."""
        if self.condition in ("", "scaled"):
            return self.condition or "always", 0.0
        _, operator, operand = self.condition.split(" ", 2)
        return operator, operand if operator == "=" else float(operand)


EVENT_WEIGHTS = (
    Weight("click", "", 1.0),
    Weight("dwell", "seconds >= 30", 0.5),
    Weight("dwell", "seconds < 3", -0.6),
    Weight("rating", "scaled", 1.0),
    Weight("action", "name = like", 0.8),
    Weight("action", "name = save", 0.8),
    Weight("action", "name = share", 1.0),
    Weight("action", "name = purchase", 2.0),
    Weight("action", "name = skip", -0.6),
    Weight("action", "name = hide", -1.0),
)
_CONDITIONS = {
    "click": r"",
    "dwell": r"(seconds (>=|<) \d+(\.\d+)?)?",
    "rating": r"scaled",
    "action": r"name = [^\s=]+",
}


def _text(value: object) -> str:
    return str(value)


def _bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    try:
        return known[str(value).strip().lower()]
    except KeyError:
        raise ValueError("true or false") from None


def _int(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        expected = f"a whole number from {low} to {high}"
        try:
            number = int(str(value))
        except ValueError:
            raise ValueError(expected) from None
        if isinstance(value, bool) or not low <= number <= high:
            raise ValueError(expected)
        return number

    return parse


def _float(low: float, high: float) -> Callable[[object], float]:
    def parse(value: object) -> float:
        expected = f"a number from {low:g} to {high:g}"
        try:
            number = float(str(value))
        except ValueError:
            raise ValueError(expected) from None
        if not math.isfinite(number) or not low <= number <= high:
            raise ValueError(expected)
        return number

    return parse


def _one_of(*names: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if str(value) not in names:
            raise ValueError("one of " + ", ".join(names))
        return str(value)

    return parse


def _matching(pattern: str, expected: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if not re.fullmatch(pattern, str(value)):
            raise ValueError(expected)
        return str(value)

    return parse


def _weights(value: object) -> tuple[Weight, ...]:
    expected = 'a JSON list of [kind, condition, weight], such as [["click", "", 1], ["dwell", "seconds >= 30", 0.5]]'
    try:
        rows: Any = json.loads(value) if isinstance(value, str) else value
        table = tuple(Weight(str(k), str(c), float(w)) for k, c, w in rows)
    except (ValueError, TypeError):
        raise ValueError(expected) from None
    for row in table:
        if row.kind not in _CONDITIONS:
            raise ValueError(f"{expected}; kind one of {', '.join(_CONDITIONS)}, not {row.kind!r}")
        if not re.fullmatch(_CONDITIONS[row.kind], row.condition):
            raise ValueError(f"{expected}; a condition that kind {row.kind} has, not {row.condition!r}")
        if not math.isfinite(row.weight) or abs(row.weight) > 100:
            raise ValueError(f"{expected}; a weight from -100 to 100, not {row.weight}")
    return table


HEADS = ("click", "dwell", "rating", "skip", "hide", "low_rating")
"""What `head_weights` may name: the heads of models/ranker/heads.py, which also has their defaults."""


def _heads(value: object) -> tuple[tuple[str, float], ...]:
    expected = 'a JSON list of [head, weight], such as [["hide", -2], ["dwell", 0.5]]'
    try:
        rows: Any = json.loads(value) if isinstance(value, str) else value
        table = tuple((str(head), float(weight)) for head, weight in rows)
    except (ValueError, TypeError):
        raise ValueError(expected) from None
    for head, weight in table:
        if head not in HEADS:
            raise ValueError(f"{expected}; head one of {', '.join(HEADS)}, not {head!r}")
        if not math.isfinite(weight) or abs(weight) > 100:
            raise ValueError(f"{expected}; a weight from -100 to 100, not {weight}")
    return table


POLICIES = ("greedy", "epsilon", "softmax", "ucb", "thompson", "thompson-item")
"""What `policy` may name: the policies of models/bandit/policy.py."""
REWARDED = ("click", "dwell", "rating", "action")
"""What `rewards` may name: the kinds of events that close a loop."""


def _surface(value: object) -> str:
    name = str(value)
    if not 0 < len(name) <= 64:
        raise ValueError
    return name


def _policies(value: object) -> tuple[tuple[str, str], ...]:
    expected = f'one of {", ".join(POLICIES)}, or a JSON list of [surface, policy], such as [["home", "thompson"]]'
    if isinstance(value, str) and not value.lstrip().startswith("["):
        value = [["*", value]]
    try:
        rows: Any = json.loads(value) if isinstance(value, str) else value
        table = tuple((_surface(surface), str(policy)) for surface, policy in rows)
    except (ValueError, TypeError):
        raise ValueError(expected) from None
    if not table or any(policy not in POLICIES for _, policy in table):
        raise ValueError(expected)
    return table


def _rewards(value: object) -> tuple[tuple[str, str, float], ...]:
    expected = 'a JSON list of [surface, kind, weight], such as [["*", "click", 1], ["home", "dwell", 0.5]]'
    try:
        rows: Any = json.loads(value) if isinstance(value, str) else value
        table = tuple((_surface(surface), str(kind), float(weight)) for surface, kind, weight in rows)
    except (ValueError, TypeError):
        raise ValueError(expected) from None
    for _, kind, weight in table:
        if kind not in REWARDED:
            raise ValueError(f"{expected}; kind one of {', '.join(REWARDED)}, not {kind!r}")
        if not 0.0 <= weight <= 100.0:
            raise ValueError(f"{expected}; a weight from 0 to 100, not {weight}")
    return table


def _setting(default: Any, parse: Callable[[object], Any], text: str, *, secret: bool = False) -> Any:
    return field(default=default, metadata={"help": text, "parse": parse, "secret": secret})


_ORIGINS = r"|https?://[^\s,/]+(,https?://[^\s,/]+)*"
_SERVERS = r"[^\s:/@,]+:\d{1,5}(,[^\s:/@,]+:\d{1,5})*"
_KAFKA = rf"|{_SERVERS}|ssl://{_SERVERS}/?(\?\S+)?|sasl_(ssl|plaintext)://[^\s:/@]+:[^\s:/@]+@{_SERVERS}/?(\?\S+)?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting of a deployment; build it with `Settings.load`, which checks each value."""

    namespace: str = _setting(
        "fr",
        _matching(r"[a-z][a-z0-9_-]{0,39}", "a letter, then up to 39 of a-z 0-9 _ -"),
        "Names one deployment: prefix of its topics, keys and consumer groups.",
    )
    kafka: str = _setting(
        "",
        _matching(_KAFKA, "host:port, several separated by commas, before it ssl:// or sasl_ssl://user:password@"),
        "Existing Kafka as host:port, or with TLS and login; empty: the stack starts its own broker.",
    )
    redis: str = _setting(
        "",
        _matching(r"|(rediss?|unix)://\S+", "redis://host:port/db"),
        "Existing Redis as redis://host:port/db; empty: the stack starts its own server.",
    )
    data: str = _setting(".freshet", _text, "Data folder of the local stack: log, state, logs, stack.json.")
    cache: str = _setting(
        "", _text, "Folder of the broker's jars and archive, shared by all stacks; empty: freshet in the user's cache."
    )
    host: str = _setting("127.0.0.1", _text, "Address the API binds; anything but loopback needs a key.")
    port: int = _setting(8000, _int(0, 65535), "Port of the API; `up` takes the next free one. 0: any.")
    admin_key: str = _setting(
        "", _text, "A key with every scope, without a file; off loopback one is needed.", secret=True
    )
    keys: str = _setting(
        "", _text, "File of API keys that `freshet keys` writes; empty: keys.json of the data folder, once it is there."
    )
    cors: str = _setting(
        "",
        _matching(_ORIGINS, "origins such as https://shop.example, several separated by commas"),
        "Origins of web pages that may call the API from a browser, separated by commas; empty: none.",
    )
    partitions: int = _setting(8, _int(1, 1024), "Partitions of the inlets and of `events`; fixed for a namespace.")
    workers: int = _setting(1, _int(1, 64), "Worker processes that `up` starts for the user agents.")
    worker_slot: int = _setting(0, _int(0, 65535), "Slot of this worker: its static group membership.")
    consumer: str = _setting(
        "chunks", _one_of("chunks", "stock"), "Form of the agents' consumer: chunks (fast) or stock Faust."
    )
    policy: tuple[tuple[str, str], ...] = _setting(
        (("*", "epsilon"),), _policies,
        "How slates are drawn: greedy, epsilon, softmax, ucb, thompson or thompson-item; or as JSON [surface, policy].",
    )  # fmt: skip
    epsilon: float = _setting(
        0.05, _float(0, 1), "Share of slots that policy epsilon draws uniformly over the eligible items."
    )
    first_share: float = _setting(
        0.05, _float(0, 0.5), "At most this share of slots goes to first impressions of new items; 0: none."
    )
    rewards: tuple[tuple[str, str, float], ...] = _setting(
        (("*", "click", 1.0),), _rewards,
        "Table of (surface, kind, weight): what posteriors learn a shown item earned, as JSON.",
    )  # fmt: skip
    feature_share: float = _setting(
        0.1, _float(0, 1), "Share of slates logged with all candidates' features, to train the ranker."
    )
    require_catalogue: bool = _setting(False, _bool, "Serve only items that have a catalogue entry.")
    event_weights: tuple[Weight, ...] = _setting(
        EVENT_WEIGHTS, _weights, "Table of (kind, condition, weight): what an event says of an item, as JSON."
    )
    head_weights: tuple[tuple[str, float], ...] = _setting(
        (), _heads, "Table of (head, weight) of the sum that orders items, as JSON; heads not named keep their default."
    )
    max_users: int = _setting(
        1_000_000, _int(1, 10**9), "Users kept, all partitions together; the least recently active leave first."
    )
    codec: int = _setting(
        3, _int(1, 3), "Version of profiles and `examples` written; older are read too. 2: the release before reads it."
    )
    retention_inlets_days: int = _setting(7, _int(1, 3650), "Days that the inlet topics keep their records.")
    retention_days: int = _setting(
        0,
        _int(0, 36500),
        "Days that `events`, `examples` and `steps` keep their records once a snapshot holds them; 0: all.",
    )
    disk_cap_gb: float = _setting(20.0, _float(0.1, 1e6), "Size of the data folder above which `up` warns.")
    token_wait_ms: int = _setting(250, _int(0, 2000), "How long a lookup with `after` waits when it does not say.")
    feed_mb: int = _setting(64, _int(1, 4096), "Cap of each feed in Redis, in MB.")
    max_items: int = _setting(
        1_000_000, _int(16, 100_000_000),
        "Items with behaviour, and learnt items, that are kept; the least recently seen leave. The same everywhere.",
    )  # fmt: skip
    impression_buffer: int = _setting(10_000, _int(1, 10_000_000), "Slates that wait to be logged before drops count.")
    seed: int = _setting(1, _int(0, 2**63 - 1), "Seed of the learner's initial values and of the simulated world.")
    log_level: str = _setting(
        "info", _one_of("debug", "info", "warning", "error"), "How much the processes write to their logs."
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, _parsed(item, getattr(self, item.name), "argument"))

    @classmethod
    def load(
        cls,
        data: str | Path | None = None,
        *,
        env: Mapping[str, str] | None = None,
        running: bool = True,
        **overrides: object,
    ) -> Settings:
        """The settings of this process; overrides that are None count as not given.

        `running=False` leaves out what `DATA/stack.json` says: who starts a stack does not ask the last one.

        Raises SettingsError naming the setting, where it came from, what was expected and what was got.
        """
        known = {item.name: item for item in fields(cls)}
        given = {name: value for name, value in overrides.items() if value is not None}
        if data is not None:
            given["data"] = str(data)
        if unknown := sorted(given.keys() - known.keys()):
            raise SettingsError(f"setting {unknown[0]}: no such setting; known: {', '.join(known)}")
        environ = os.environ if env is None else env
        values = {name: _parsed(known[name], value, "argument") for name, value in given.items()}
        for name, item in known.items():
            raw = environ.get(PREFIX + name.upper())
            if name not in values and raw is not None and (raw != "" or item.default == ""):
                values[name] = _parsed(item, raw, f"environment {PREFIX}{name.upper()}")
        path = Path(values.get("data", known["data"].default))
        for name, value in (_running(path) if running else {}).items():
            if not values.get(name):
                values[name] = _parsed(known[name], value, str(path / "stack.json"))
        return cls(**values)

    def policy_of(self, surface: str) -> str:
        """The policy of a surface: its own row, else that of `*`, else the default."""
        table = dict(self.policy)
        return table.get(surface) or table.get("*") or "epsilon"

    @property
    def loopback(self) -> bool:
        """Whether the API is reachable from this machine only."""
        return self.host in LOOPBACK

    @property
    def data_path(self) -> Path:
        """The data folder."""
        return Path(self.data)

    @property
    def keys_path(self) -> Path:
        """The file of API keys."""
        return Path(self.keys) if self.keys else self.data_path / "keys.json"

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins of `cors`."""
        return tuple(self.cors.split(",")) if self.cors else ()

    @property
    def cache_path(self) -> Path:
        """Per-user folder of the broker's jars."""
        if self.cache:
            return Path(self.cache).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "freshet"

    def environment(self) -> dict[str, str]:
        """These settings as environment variables, for a child process."""
        return {PREFIX + item.name.upper(): _raw(getattr(self, item.name)) for item in fields(self)}

    def rows(self) -> list[dict[str, object]]:
        """The table for people and for `/-/settings`: name, value (secrets masked), default, environment, help."""
        return [
            {
                "name": item.name,
                "value": _masked(item, getattr(self, item.name)),
                "default": _masked(item, item.default),
                "environment": PREFIX + item.name.upper(),
                "help": item.metadata["help"],
            }
            for item in fields(self)
        ]


def _parsed(item: Field[Any], value: object, source: str) -> Any:
    try:
        return item.metadata["parse"](value)
    except ValueError as error:
        shown = MASK if item.metadata["secret"] or "@" in str(value) else value
        raise SettingsError(f"setting {item.name} ({source}): expected {error}, got {shown!r}") from None


def _masked(item: Field[Any], value: object) -> object:
    if item.metadata["secret"]:
        return MASK if value else ""
    if isinstance(value, tuple):
        return [list(row) for row in value]
    if isinstance(value, str):
        return re.sub(r"(://[^:/@]*:)\S*@", rf"\g<1>{MASK}@", value)
    return value


def _raw(value: object) -> str:
    if isinstance(value, tuple):
        return json.dumps([list(row) for row in value])
    return str(value).lower() if isinstance(value, bool) else str(value)


def _running(data: Path) -> dict[str, str]:
    stack = read_stack(data) or {}
    return {name: str(stack[name]) for name in ("kafka", "redis", "namespace", "partitions") if stack.get(name)}


def read_stack(data: str | Path) -> dict[str, Any] | None:
    """What `DATA/stack.json` says of a stack, running or last run; None where there is none."""
    path = Path(data) / "stack.json"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: expected the JSON that `freshet up` writes, got {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
