"""Which files a source's path names. Of a folder, or of what a pattern matches, those of one split: as the README of a
snapshot of the hub says, else by whole words in the names of files, and of folders below the given one."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

from lorasft.errors import DataError, RecipeError, UnsafeError
from lorasft.hub import is_hub_id
from lorasft.recipe import DataSettings, DataSource
from lorasft.recipe.yaml_reader import parse_yaml, read_yaml

_NAMES: dict[str, Any] = read_yaml(Path(__file__).with_name("folders.yaml")).value
KINDS, COMPRESSED, HELD_OUT = (tuple(_NAMES[name]) for name in ("kinds", "compressed", "held_out"))
SPLITS = {word: split for split, words in _NAMES["splits"].items() for word in words}
DEEPEST = 3  # folders below the given one: config/train/0000.parquet

Files = tuple[Path, ...]


def find_files(source: DataSource) -> tuple[Files, Files]:
    """The files of a source, sorted, and those beside them that are of other splits; none of a hub id. Raises DataError
    where there are none, or where names do not say which are meant."""
    here = Path(source.path)
    if here.is_dir() and (found := _from_readme(here, source.config) or _by_names(here)):
        return _choose(source, found)
    some = [here] if here.is_file() else map(Path, glob.glob(source.path, recursive=True))  # noqa: PTH207
    above = Path(re.split(r"[^/]*[*?[]", source.path)[0])
    found = {file: split_of(file.relative_to(above)) for file in some if file.is_file()}
    if "train" in found.values() and not set(HELD_OUT).isdisjoint(found.values()):
        return _choose(source, found)
    named = is_hub_id(source.path) or re.fullmatch(r"\w[\w.-]*", source.path)
    if not found and (not named or here.is_dir() or kind_of(here) in KINDS):
        where = here.absolute() if here.is_dir() else here.absolute().parent
        what = f"there is no such file, or no {', '.join(KINDS)} in this folder"
        raise DataError(what, where=source.path, hint=f"looked in {where}")
    return tuple(sorted(found)), ()


def held_out_source(source: DataSource) -> DataSource:
    """The source as evaluation reads it: of several files those that are held out, unless it names a split."""
    is_one = not Path(source.path).is_dir() and not glob.has_magic(source.path)
    return source if is_one or source.split != "train" else source.model_copy(update={"split": HELD_OUT[0]})


def list_sources(data: DataSettings) -> list[DataSource]:
    """All sources of the recipe: those to train on, then those that are held out."""
    return [*data.train, *map(held_out_source, data.eval if isinstance(data.eval, tuple) else ())]


def kind_of(path: Path) -> str:
    """The suffix that says what is in a file, without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join([suffix for suffix in suffixes if suffix not in COMPRESSED][-1:])


def split_of(path: Path) -> str:
    """The split that the name of a file gives, or else that of a folder above it; empty where none or two are named."""
    for name in reversed(path.parts):
        words = map(str.lower, re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name))
        if named := {SPLITS[word] for word in words if word in SPLITS}:
            return named.pop() if len(named) == 1 else ""
    return ""


def _by_names(folder: Path) -> dict[Path, str]:
    """The files in a folder, or else in those below it, each with the split that names give it."""
    for depth in range(DEEPEST + 1):
        files = {file for file in folder.glob("*/" * depth + "*") if kind_of(file) in KINDS and file.is_file()}
        found = {
            file: split_of(file.relative_to(folder))
            for file in files
            if file.name not in _NAMES["about_rows"]
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)
            and not (file.suffix in COMPRESSED and file.with_suffix("") in files)
        }
        if found and (depth == 0 or any(found.values()) or len({file.parent for file in found}) == 1):
            return found
    return {}


def _from_readme(folder: Path, config: str | None) -> dict[Path, str]:
    """The files that a snapshot's README gives for a configuration, each with its split; none where it gives none."""
    try:
        front = (folder / "README.md").read_text(encoding="utf-8-sig").split("---\n")[1]
        configs = {str(one["config_name"]): one for one in parse_yaml(front, "README.md").value["configs"]}
        marked = [name for name, one in configs.items() if one.get("default")]
        name = config or [*marked, *(configs if len(configs) == 1 else ["default"])][0]
        if configs and name not in configs:
            hint = f"'data.train={{path: {folder}, config: {min(configs)}}}'"
            raise DataError(f"configurations in its README: {', '.join(configs)}", where=folder, hint=hint)
        if "data_files" not in configs[name] and ".." not in (below := str(configs[name]["data_dir"])):
            return _by_names(folder / below)
        from datasets.data_files import sanitize_patterns

        by_split = sanitize_patterns(configs[name]["data_files"]).items()
        files = [(file, split) for split, some in by_split for pattern in some for file in folder.glob(pattern)]
        return {file: split for file, split in files if kind_of(file) in KINDS and ".." not in file.parts}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError, RecipeError, UnsafeError):
        return {}


def _choose(source: DataSource, found: dict[Path, str]) -> tuple[Files, Files]:
    """The files of the source's split, or those without one, and the rest. `found`: the split of each."""
    groups: dict[str, list[Path]] = {}
    for file, split in sorted(found.items()):
        groups.setdefault(split if source.split in found.values() else split_of(Path(split)), []).append(file)
    wanted = HELD_OUT if source.split == HELD_OUT[0] else (source.split,)
    chosen = next((groups[split] for split in wanted if split in groups), [])
    plain = groups.get("", []) if source.split in ("train", HELD_OUT[0]) else []
    unclear = bool(plain) and "train" in groups and (source.split == "train" or not chosen)
    chosen = chosen or plain
    if unclear or len({found[file] for file in chosen}) != 1:
        first = {split or "no split": file for file, split in sorted(found.items(), reverse=True)}
        names = "; ".join(f"{split}: {file.name}" for split, file in sorted(first.items()))
        other = f"'data.train={{path: {source.path}, split: NAME}}'"
        hint = f"name the files themselves, as {min(chosen or found)}, or a split: {other}"
        raise DataError(f"which files are meant for {source.split}? {names}", where=source.path, hint=hint)
    return tuple(chosen), tuple(sorted(found.keys() - set(chosen)))
