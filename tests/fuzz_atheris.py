"""The same doors under atheris, which looks for input that reaches new branches: python -m tests.fuzz_atheris RUNS

Runs where atheris installs (Linux, its own wheels); tests/test_fuzz.py calls it and is skipped with a reason elsewhere.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

MODULES = (
    "streaming.events",
    "serving.messages",
    "serving.ingest",
    "streaming.feeds",
    "streaming.replay.logs",
    "serving.keys",
)


def main(runs: int) -> None:
    """Bring `runs` inputs to the doors that read text or bytes, chosen by the first byte; a crash ends the process."""
    import atheris

    with atheris.instrument_imports(include=list(MODULES)):
        from tests import fuzz_doors

    logging.disable(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp(prefix="freshet-fuzz-"))
    inlets = ("clicks", "dwells", "ratings", "actions", "views")
    plain = {
        "HTTP events", "HTTP items", "HTTP lookups", "position tokens", "inlets", "log", "catalogue", "examples",
        "impressions", "keys file", "replay files",
    }  # fmt: skip
    doors = [door for door in fuzz_doors.doors(folder) if door.name in plain]
    names = list(fuzz_doors.LOGS)

    def given(name: str, data: bytes) -> Any:
        if name == "inlets":
            return inlets[data[0] % len(inlets) if data else 0], data[1:]
        if name == "replay files":
            form = names[data[0] % len(names) if data else 0]
            return form, fuzz_doors.LOGS[form][0], data[1:]
        return data

    def one(data: bytes) -> None:
        if data:
            door = doors[data[0] % len(doors)]
            door.knock(given(door.name, data[1:]))

    corpus = folder / "corpus"
    corpus.mkdir()
    r = random.Random(1)
    for number in range(40 * len(doors)):
        door = doors[number % len(doors)]
        made = door.make(r)
        data = made if isinstance(made, bytes) else bytes([0]) + made[-1]
        (corpus / str(number)).write_bytes(bytes([number % len(doors)]) + data)
    options = [f"-runs={runs}", "-max_len=4096", "-print_final_stats=1", f"-artifact_prefix={folder}/", "-seed=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(int(sys.argv[1]))
