"""Settings in a TOML file: which ones a replay can see, checked by the parsers of infra/settings.py."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from infra.settings import Settings, SettingsError
from streaming.replay.prequential import Chosen

RANKING: Final = ("event_weights", "head_weights", "rewards", "feature_share", "first_share", "seed")
"""What changes how a replay learns and ranks."""
DRAWING: Final = ("policy", "epsilon")
"""What changes how slates are drawn, which a replay that ranks the whole catalogue never does."""


def read_candidate(
    path: Path, *, drawing: bool, present: Settings | None = None
) -> tuple[Settings, dict[str, Any]]:  # fmt: skip
    """Return the settings of a file and what it names; raises SettingsError.

    Others are those of `present`, without it those of the environment, then the defaults.

    drawing: whether slates are drawn, so that the settings of policies count.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file; expected settings as TOML, such as: epsilon = 0.1") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: expected settings as TOML, such as: epsilon = 0.1, got {error}") from None
    seen = (*RANKING, *DRAWING) if drawing else RANKING
    _refuse(path, list(given), seen)
    try:
        others = {} if present is None else {name: getattr(present, name) for name in seen}
        settings = Settings.load(running=False, **{**others, **given})
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
    return settings, {name: getattr(settings, name) for name in given}


def _refuse(path: Path, names: Sequence[str], seen: Sequence[str]) -> None:
    known = [item.name for item in fields(Settings)]
    for name in names:
        if name not in known:
            raise SettingsError(f"{path}: {name}: no such setting; expected some of {', '.join(seen)}")
        if name in DRAWING and name not in seen:
            raise SettingsError(
                f"{path}: {name}: a replay ranks and draws nothing, so it cannot see it; expected some of"
                f" {', '.join(seen)}. `freshet evaluate --log EXPORT --policy FILE` does"
            )
        if name not in seen:
            raise SettingsError(f"{path}: {name}: a replay cannot see it; expected some of {', '.join(seen)}")


def chosen(settings: Settings, names: Sequence[str] | None = None) -> Chosen:
    """Return what a replay takes of settings: all, or the named ones beside a replay's own defaults."""
    of_replay = [item.name for item in fields(Chosen)]
    taken = of_replay if names is None else [name for name in of_replay if name in names]
    return Chosen(**{name: getattr(settings, name) for name in taken})
