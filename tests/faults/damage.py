"""What campaigns do to the files of a run: checkpoints cut, swapped or changed under right hashes, and neighbours."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorasft.errors import LorasftError
from lorasft.files import MANIFEST, STAGE, sha256
from lorasft.training import run as runs
from lorasft.training.checkpoint import list_checkpoints, newest_checkpoint, read_state, restore_checkpoint

FILES = ("adapter_model.safetensors", "optimizer.safetensors", "state.json", "adapter_config.json", MANIFEST)


def seal(folder: Path) -> bytes:
    """The manifest that is right for the files of a folder."""
    paths = [path for path in folder.iterdir() if path.name != MANIFEST]
    return json.dumps({path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}).encode()


def change_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], None]:
    def harm(path: Path, other: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return harm


def flip(content: bytes) -> bytes:
    at = len(content) // 3
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def swap(path: Path, other: Path) -> None:
    beside = path.with_name("state.json" if path.name != "state.json" else MANIFEST)
    one, two = path.read_bytes(), beside.read_bytes()
    path.write_bytes(two)
    beside.write_bytes(one)


def take_other(path: Path, other: Path) -> None:
    content = other.read_bytes()
    path.write_bytes(content if content != path.read_bytes() else content + b" ")


HARMS: dict[str, Callable[[Path, Path], None]] = {
    "emptied": change_bytes(lambda content: b""),
    "cut to a byte": change_bytes(lambda content: content[:1]),
    "cut by half": change_bytes(lambda content: content[: len(content) // 2]),
    "cut by a byte": change_bytes(lambda content: content[:-1]),
    "flipped": change_bytes(flip),
    "zeroed": change_bytes(lambda content: bytes(len(content[:4096])) + content[4096:]),
    "swapped": swap,
    "deleted": lambda path, other: path.unlink(),
    "of another step": take_other,
}


def read_changed(recipe: Any, trace: Any, *, trials: int, seed: int, report: Path) -> None:
    faults = []
    with runs.open_run(recipe, resume=True) as (run, state):
        newest = list_checkpoints(run.checkpoints)[-1]
        place = run.folder.with_name("changed") / newest.name
        for number in range(trials):
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(newest, place)
            told = change_checkpoint(place, random.Random(f"{seed}-{number}"))
            try:
                newest_checkpoint(place.parent, run=state.run)
                restore_checkpoint(place, run)
            except LorasftError:
                pass
            except BaseException as fault:
                faults.append(f"{told}: {type(fault).__name__}: {fault}")
    report.write_text(json.dumps(faults), encoding="utf-8")


ODD: tuple[Any, ...] = (None, -1, 1e308, "", "x" * 10_000, [], {}, [[[]]], True, "../../x", 2**70, "F32", [0, 1])


def change_checkpoint(folder: Path, dice: random.Random) -> str:
    """Change one file of a checkpoint, in its JSON or its bytes, and make the manifest right again."""
    name = dice.choice(("adapter_model.safetensors", "optimizer.safetensors", "state.json", MANIFEST))
    path = folder / name
    content = path.read_bytes()
    start = 8 if name.endswith(".safetensors") else 0
    stop = start + int.from_bytes(content[:8], "little") if start else len(content)
    if dice.random() < 0.3:
        at = dice.randrange(stop)
        content = content[:at] + bytes([dice.randrange(256)]) + content[at + 1 :]
    else:
        document = json.loads(content[start:stop])
        for _ in range(dice.choice((1, 1, 3))):
            change_json(document, dice)
        header = json.dumps(document).encode()
        content = (len(header).to_bytes(8, "little") if start else b"") + header + content[stop:]
    path.write_bytes(content)
    if name != MANIFEST:
        (folder / MANIFEST).write_bytes(seal(folder))
    return f"{name} {content[start : start + 200]!r}"


def change_json(document: Any, dice: random.Random) -> None:
    """Replace, delete or double a value somewhere in `document`."""
    while isinstance(document, (dict, list)) and document:
        key = dice.choice(list(document) if isinstance(document, dict) else range(len(document)))
        if isinstance(document[key], (dict, list)) and document[key] and dice.random() < 0.8:
            document = document[key]
            continue
        if dice.random() < 0.3:
            del document[key]
        elif isinstance(document, dict) and dice.random() < 0.2:
            document[str(dice.choice(ODD))] = copy.deepcopy(document[key])
        else:
            document[key] = copy.deepcopy(dice.choice(ODD))
        return


def whole_checkpoints(folder: Path) -> list[Path]:
    """The run's own checkpoints that verify, oldest first."""
    whole = []
    for path in list_checkpoints(folder / "checkpoints"):
        with contextlib.suppress(LorasftError):
            whole += [path] if read_state(path, run=None).run != "other" else []
    return whole


def fingerprint_tree(path: Path) -> list[tuple[str, str]]:
    paths = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(one.relative_to(path).as_posix(), sha256(one) if one.is_file() else "") for one in paths]


def copy_to(newest: Path, name: str, *, other: bool = False) -> Path:
    """Copy a checkpoint beside itself; `other`: as one that verifies, of another run."""
    target = Path(shutil.copytree(newest, newest.with_name(name)))
    if other:
        state = json.loads((target / "state.json").read_bytes()) | {"run": "other", "step": int(name[5:])}
        (target / "state.json").write_text(json.dumps(state), encoding="utf-8")
        (target / MANIFEST).write_bytes(seal(target))
    return target


def crowd(newest: Path) -> list[Path]:
    """Copies under a higher number and by hand, other runs' checkpoints before and after, files of editors."""
    names = (".DS_Store", "notes.txt~", "step-000002.swp", f"{STAGE}mine")
    for name in names:
        (newest.parent / name).write_text("mine", encoding="utf-8")
    copies = [copy_to(newest, name) for name in ("step-000099", "step-000004 (1)")]
    copies += [copy_to(newest, name, other=True) for name in ("step-000098", "step-000001")]
    return [*copies, *(newest.parent / name for name in names)]


def link_to_stranger(newest: Path) -> list[Path]:
    """Links that are named like ours, and times that lie."""
    for number, path in enumerate(sorted(newest.parents[1].rglob("*"), reverse=True)):
        os.utime(path, (1e9 + number, 1e9 + number))
    outside = Path(shutil.copytree(newest, newest.parents[2] / "outside", dirs_exist_ok=True))
    for name in ("step-000090", f"{STAGE}step-000090-0123abcd"):
        (newest.parent / name).symlink_to(outside, target_is_directory=True)
    return [outside]


def link_output(newest: Path) -> list[Path]:
    folder = newest.parents[1]
    elsewhere = folder.with_name("elsewhere")
    shutil.rmtree(elsewhere, ignore_errors=True)
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere, target_is_directory=True)
    return []


def lose_record(newest: Path) -> list[Path]:
    (newest.parents[1] / "provenance.json").unlink(missing_ok=True)
    return []


NEIGHBOURS: dict[str, Callable[[Path], list[Path]]] = {
    "a lost record": lose_record,
    "copies, other runs and files of editors": crowd,
    "another run's checkpoint in the way": lambda newest: [copy_to(newest, "step-000010", other=True)],
    "links and other times": link_to_stranger,
    "a linked output": link_output,
}
