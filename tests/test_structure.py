"""The floors: a file imports from its own folder or from a floor below; and `--help` imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lorasft"
FLOORS = [
    {
        "errors",
        "files",
        "hub",
        "tensors",
        "recipe",
        "adapter_files",
        "artifact",
        "report",
        "share",
        "machine",
        "signals",
        "terminal",
    },
    {"data"},
    {"model"},
    {"training", "merge", "export"},
    {"commands"},
    {"cli"},
    {"__main__", ""},  # the package itself: what Python calls, and a version, which every file may read
]
# Where a third-party library may be imported. `accelerate` gives the device wherever a model is put on one.
ROOMS = {
    "datasets": {"data"},
    "pyarrow": {"data"},
    "peft": {"model", "merge"},
    "bitsandbytes": {"model", "merge", "training"},
    "accelerate": {"training", "merge", "commands"},
    "transformers": {"data", "model", "training", "merge", "export", "commands"},
    "gguf": {"export"},
    "subprocess": {"export"},  # llama.cpp's quantizer
    "yaml": {"recipe"},
    "pydantic": {"recipe", "adapter_files", "training"},
}
FORBIDDEN = {"pickle", "shelve", "marshal", "joblib"}


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem.replace("__init__", "")


def floor(name: str) -> int:
    return next(index for index, rooms in enumerate(FLOORS) if name in rooms)


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere, also for types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names)


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_its_folder_or_below(path: Path) -> None:
    here = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "lorasft":
            there = parts[1] if len(parts) > 1 else ""
            assert there in (here, "") or floor(there) < floor(here) or floor(here) == 0 == floor(there), name
        assert here in ROOMS.get(parts[0], {here}), f"{name} does not belong in {here}"
        assert parts[0] not in FORBIDDEN, name


def test_no_file_imports_itself_by_way_of_others() -> None:
    below = {name: set(imports(path)) & MODULES.keys() for name, path in MODULES.items()}
    TopologicalSorter(below).prepare()  # raises CycleError, which names the circle


def test_files_and_functions_are_short_enough_to_read() -> None:
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {name: count for name, count in lines.items() if count > 400}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"  # type: ignore[operator]


ENTRIES = {"run", "add_arguments"}  # of every command


def test_a_public_name_is_there_once() -> None:
    names: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                names.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    twice = {name: places for name, places in names.items() if len(places) > 1 and name not in ENTRIES}
    assert not twice, twice


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["report", "-h"], ["recipes"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from lorasft.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'bitsandbytes', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# Every effect on the disk goes through files.py. What else writes: libraries, into a stage that files.py commits, or
# into a temporary folder that nobody keeps.
WRITERS = {
    "commands/preview.py": {"TemporaryDirectory"},  # the store that it shows
    "data/store.py": {"open"},  # the flat files of a store, in the stage of prepare
    "merge/merge.py": {"copytree", "rmtree", "save_pretrained"},  # in the stage of the merge
    "merge/sidecars.py": {"copyfile", "save_pretrained"},  # there, too
    "data/tokenizer.py": {"TemporaryDirectory", "mkdir", "symlink_to"},  # links to the files of one tokenizer
    "signals.py": {"write"},  # to stderr, from a signal's handler
    "model/scoring.py": {"TemporaryDirectory"},  # the store of the rows that it scores
    "model/cache.py": {"chmod", "save_pretrained"},  # in the stage of a kept base, whose folder is private
    "training/plan.py": {"TemporaryDirectory"},  # the data of a plan
    "training/run.py": {"save_pretrained"},  # tokenizer and generation config, in the stage of the adapter
}
EFFECTS = {"write_text", "write_bytes", "unlink", "rmtree", "rmdir", "mkdir", "makedirs", "touch", "truncate",
           "symlink", "symlink_to", "hardlink_to", "link", "chmod", "copyfile", "copytree", "copy2", "move",
           "save_file", "tofile", "save_pretrained", "save_model", "TemporaryDirectory", "mkstemp"}  # fmt: skip
OWNED = {("os", "write"), ("os", "pwrite"), ("os", "remove"), ("os", "replace"), ("os", "ftruncate"), ("torch", "save")}


def effects(path: Path) -> Iterator[str]:
    """The names of calls in a file that write to the disk, or delete from it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        values = [*node.args, *(word.value for word in node.keywords)]
        texts = [one.value for one in values if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        opened = name == "open" and any(set(text) <= set("rwxab+t") and set(text) & set("wxa+") for text in texts)
        # A path's `replace` takes one argument, that of a text two.
        renamed = method and owner != "files" and (name == "rename" or (name == "replace" and len(values) == 1))
        if name in EFFECTS or opened or renamed or (owner, name) in OWNED:
            yield name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_effect_on_the_disk_goes_through_files(path: Path) -> None:
    here = path.relative_to(PACKAGE).as_posix()
    if here != "files.py":
        found = set(effects(path))
        assert found <= WRITERS.get(here, set()), f"{found} in {here}: use lorasft/files.py"
        assert found >= WRITERS.get(here, set()), f"{here} does not do that any more"
