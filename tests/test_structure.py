"""The floors: a file imports from its own folder or from a floor below; and `--help` imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lorasft"
FLOORS = [
    {
        "errors",
        "files",
        "hub",
        "weight_files",
        "recipe",
        "recipe_faults",
        "strict_yaml",
        "adapter_files",
        "terminal",
        "",
    },
    {"data"},
    {"model"},
    {"train", "merge", "export"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
# Where a third-party library may be imported. `accelerate` gives the device wherever a model is put on one.
ROOMS = {
    "datasets": {"data"},
    "pyarrow": {"data"},
    "peft": {"model", "merge"},
    "bitsandbytes": {"model", "merge", "train"},
    "accelerate": {"train", "merge", "commands"},
    "transformers": {"data", "model", "train", "merge", "export"},
    "gguf": {"export"},
    "yaml": {"strict_yaml"},
    "pydantic": {"recipe", "recipe_faults", "adapter_files"},
}
FORBIDDEN = {"pickle", "shelve", "marshal", "subprocess", "joblib"}


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem.replace("__init__", "")


def floor(name: str) -> int:
    return next(index for index, rooms in enumerate(FLOORS) if name in rooms)


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere, but for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_its_folder_or_below(path: Path) -> None:
    here = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "lorasft":
            there = parts[1] if len(parts) > 1 else ""
            assert there == here or floor(there) < floor(here) or floor(here) == 0 == floor(there), name
        assert here in ROOMS.get(parts[0], {here}), f"{name} does not belong in {here}"
        assert parts[0] not in FORBIDDEN, name


def test_no_file_is_too_long_to_read() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert max(lines.values()) <= 400, max(lines, key=lambda path: lines[path])


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["recipes"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from lorasft.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'bitsandbytes', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
