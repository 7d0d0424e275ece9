"""Results kept in a folder, so that a run that was killed goes on and references are computed once.

The name of a result says what it depends on: the events and how they are judged, the parameters, and the code that made
it (its syntax tree: comments, docstrings, layout do not count). Who changes a method computes it anew, no other.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import zipfile
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

ROOT: Final = Path(__file__).parents[3]


@cache
def code_of(*paths: str) -> str:
    """Return a name of the code in these files and folders, given relative to the packages."""
    told = hashlib.sha256()
    for path in paths:
        place = ROOT / path
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            told.update(f"{file.relative_to(ROOT)} {_meaning(file.read_text())}".encode())
    return told.hexdigest()[:16]


def _meaning(source: str) -> str:
    """Return the syntax tree of some code without its docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            body.pop(0)
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


class Cache:
    """A folder of results by name and dependencies; without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.found = self.made = 0

    def load(self, name: str, on: dict[str, Any]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
        """Return (arrays, facts) of a result, None where it is not there or damaged."""
        if self._folder is None:
            return None
        try:
            with self._path(name, on).open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = {key: stored[key] for key in stored.files if key != "facts"}
                facts = json.loads(stored["facts"].tobytes())
        except (OSError, ValueError, KeyError, EOFError, json.JSONDecodeError, zipfile.BadZipFile):
            return None
        self.found += 1
        return arrays, facts

    def save(self, name: str, on: dict[str, Any], arrays: dict[str, NDArray[Any]], facts: dict[str, Any]) -> None:
        """Keep a result; whole or not at all."""
        self.made += 1
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name, on)
        fresh = path.with_suffix(f".{os.getpid()}.part")
        told = np.frombuffer(json.dumps({**facts, "on": on}, default=str).encode(), np.uint8)
        with fresh.open("wb") as file:
            np.savez_compressed(file, facts=told, **arrays)  # type: ignore[arg-type]
        fresh.replace(path)

    def _path(self, name: str, on: dict[str, Any]) -> Path:
        assert self._folder is not None
        key = hashlib.sha256(json.dumps(on, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return self._folder / f"{name}-{key}.npz"
