"""Configs of Axolotl and LLaMA-Factory as recipes of the same mathematics; imports.yaml says what they call what."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lorasft.data.folders import find_files
from lorasft.data.keys import READ
from lorasft.data.survey import survey_rows
from lorasft.errors import DataError, LorasftError, RecipeError
from lorasft.recipe import DataSettings, as_names
from lorasft.recipe.load import find_path, find_peers
from lorasft.recipe.yaml_reader import read_yaml

_SFT = "lorasft trains LoRA adapters on answers (SFT), and that alone"


@dataclass
class Imported:
    """A config of another tool under our names."""

    tool: str
    file: Path
    table: dict[str, Any]  # of the tool, in imports.yaml
    said: dict[str, Any]  # by the config, or else by the tool's defaults
    settings: dict[str, dict[str, tuple[Any, str]]] = field(default_factory=dict)  # by section: value, their key
    left: dict[str, str] = field(default_factory=dict)  # what a recipe does not say, or otherwise -> why

    def set(self, ours: str, value: Any, why: str) -> None:
        """Put `section.key` into the recipe."""
        section, key = ours.split(".")
        self.settings.setdefault(section, {})[key] = value, why

    def find(self, name: str) -> str:
        """A path of the config, looked up here and beside it; a hub id as it is."""
        return find_path(name, [Path.cwd(), self.file.parent])

    def note(self, what: str) -> None:
        """Say what is otherwise there than here, if the table does."""
        self.left |= {what: self.table["notes"][what]} if what in self.table["notes"] else {}


def import_config(file: Path) -> Imported:
    """The config `file` as settings of a recipe. Raises RecipeError for what is not one of either tool, or trains
    otherwise than a recipe can, DataError where the rows are not described."""
    document, tables = read_yaml(file), read_yaml(Path(__file__).with_name("imports.yaml")).value
    value = document.value if isinstance(document.value, dict) else {}
    raw = {key: said for key, said in value.items() if said not in (None, "", [], {})}
    fits = [tool for tool in tables if tables[tool]["base"] in raw]
    if len(fits) != 1:
        what = f"this could be a config of {'both' if fits else 'neither'} Axolotl and LLaMA-Factory"
        raise RecipeError(what, where=file, hint="Axolotl's has base_model, LLaMA-Factory's model_name_or_path")
    table = tables[fits[0]]
    said = {**table["defaults"], **raw}
    said |= {key: 2 * said[other] for key, other in table["twice"].items() if key not in raw}
    for key, allowed in table["only"].items():
        if said.get(key) not in allowed:
            what, where = f"{key}: {said.get(key)} cannot be imported", document.places.get((key,), str(file))
            raise RecipeError(what, where=where, hint=_SFT)
    found = Imported(fits[0], file.resolve(), table, said)
    known = {*table["read"], *table["batch"], *table["packing"]}
    for ours, names in table["settings"].items():
        names = names if isinstance(names, dict) else {names: {"*": "*"}}
        known |= names.keys()
        _translate(found, ours, names, raw)
    sources = _axolotl_sources if found.tool == "Axolotl" else _factory_sources
    try:
        found.set("data.train", list(sources(found, held_out=False)), "datasets")
        _take_steps(found, list(sources(found, held_out=True)))
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        what = f"this is not as {found.tool} reads it: {str(error).splitlines()[0]}"
        raise RecipeError(what, where=file, hint="datasets are needed, and numbers as numbers") from None
    for key in [key for key in raw if key not in known and raw[key] not in (False, "none")]:
        names = [f"here it is {name}".replace("here it is nothing: ", "") for name in find_peers(key)]
        found.left.setdefault(key, " or ".join(names) or "there is nothing like it here")
    return found


def _translate(found: Imported, ours: str, names: dict[str, dict[str, Any]], raw: dict[str, Any]) -> None:
    """Set `ours` by the first of their keys with a value that there is here."""
    for theirs in [theirs for theirs in names if theirs in found.said]:
        value, text = found.said[theirs], str(found.said[theirs]).lower()
        match = [kept for pattern, kept in names[theirs].items() if pattern != "else" and fnmatch(text, pattern)]
        if match:
            if ours in ("model.base", "adapter.start"):
                value = found.find(value)
            elif ours in ("adapter.targets", "adapter.modules_to_save"):
                value = as_names(value)
            found.set(ours, value if match[0] == "*" else match[0], theirs if theirs in raw else f"{theirs}: default")
            found.note(theirs)
            found.note(f"{theirs}: {text}")
            return
        if "else" in names[theirs]:
            found.left[f"{theirs}: {text}"] = names[theirs]["else"]


def _axolotl_sources(found: Imported, *, held_out: bool) -> Iterator[dict[str, Any]]:
    """The sources in `datasets`, or in `test_datasets`."""
    for entry in found.said.get("test_datasets" if held_out else "datasets", ()):
        kind = entry.get("type") or "none"
        fields = kind if isinstance(kind, dict) else {}
        name = "alpaca" if fields else kind.partition(":")[0].partition(".")[0]
        form = found.table["types"].get(name, "auto")
        mapping = entry.get("message_property_mappings") or {}
        form = "sharegpt" if form == "chat" and mapping.get("role", "role") != "role" else form
        columns = {ours: fields.get(theirs) for theirs, ours in found.table["columns"].items()}
        turns = entry.get("field_messages") or ("messages" if name == "chat_template" else None)
        columns |= {"text": entry.get("field"), "messages": turns, "conversations": turns}
        if not fields:
            found.note(name)
        if form == "auto":
            found.left[f"type: {name}"] = "its rows are read by their columns, under the chat template"
        if not {"assistant", "gpt"}.issuperset(entry.get("roles_to_train") or ()):
            found.set("chat.supervise", "everything", "roles_to_train")
        unread = (entry.keys() - found.table["source"]) | (fields.keys() & found.table["unread"])
        found.left |= dict.fromkeys((f"datasets: {key}" for key in sorted(unread)), "a recipe does not say it")
        files = entry.get("data_files") or entry["path"]
        for path in files if isinstance(files, list) else [files]:
            yield _source(found, path, form, columns | {"split": entry.get("split"), "config": entry.get("name")})


def _factory_sources(found: Imported, *, held_out: bool) -> Iterator[dict[str, Any]]:
    """The sources of `dataset`, or of `eval_dataset`, as the file dataset_info.json describes them."""
    names = as_names(found.said.get("eval_dataset" if held_out else "dataset", []))
    info = Path(find_path(f"{found.said['dataset_dir']}/dataset_info.json", [Path.cwd(), *found.file.parents]))
    try:
        described = json.loads(info.read_bytes()) if names else {}
        entries = [described[name] for name in names]
    except (OSError, ValueError, KeyError) as error:
        what = f"cannot find what {', '.join(map(str, names))} is: {error!r}"
        hint = "dataset_dir names the folder that holds it"
        raise DataError(what, where=info, hint=hint) from None
    for entry in entries:
        kind = entry.get("formatting", "alpaca")
        form = found.table["types"].get(kind, "auto")
        if entry.get("ranking"):
            raise RecipeError("dataset: pairs of a better and a worse answer", where=found.file, hint=_SFT)
        columns = {found.table["columns"].get(key, key): name for key, name in entry.get("columns", {}).items()}
        columns |= {"conversations": columns.get("messages")}
        columns |= {"split": entry.get("split"), "config": entry.get("subset")}
        found.note(kind)
        path = str(info.parent / entry["file_name"]) if "file_name" in entry else entry["hf_hub_url"]
        yield _source(found, path, form, columns, most=entry.get("num_samples") or found.said.get("max_samples"))


def _source(found: Imported, path: str, form: str, said: dict[str, Any], *, most: int | None = None) -> dict[str, Any]:
    """A source, of which is `said` its split, config and columns, ours: theirs. `most`: rows that are taken."""
    columns = {key: name for key, name in said.items() if name and name != key and key in READ.get(form, ())}
    source = {"path": found.find(path), "format": form, "columns": columns, "split": said["split"]}
    source = {key: value for key, value in (source | {"config": said["config"]}).items() if value and value != "auto"}
    if rows := len(_lengths(found, [source])) if most else 0:
        source["share"] = min(1.0, (most or 0) / rows)
    elif most:
        found.left["max_samples"] = "a share of the rows here, which is not known while they are not at hand"
    return source


def _lengths(found: Imported, sources: list[dict[str, Any]]) -> list[int]:
    """About how many tokens each example has; nothing where the rows are not here, or cannot be read."""
    try:
        data = DataSettings.model_validate_json(json.dumps({"train": sources}))
        here = all(find_files(source)[0] for source in data.train)
        return survey_rows(data).lengths(found.settings["model"]["base"][0]) if here else []
    except LorasftError:
        return []


def _take_steps(found: Imported, held_out: list[dict[str, Any]]) -> None:
    """Set what rests on the number of rows: examples of a step, held out, warm-up, when to evaluate and to save."""
    said, table, epochs = found.said, found.table, found.settings["train"]["epochs"][0]
    lengths, longest = _lengths(found, found.settings["data"]["train"][0]), found.settings["data"]["max_length"][0]
    batch, why = math.prod(said[key] for key in table["batch"]), f"{' x '.join(table['batch'])}, on one process"
    if any(said.get(key) for key in table["packing"]):
        why = f"{batch} packed rows of {longest} tokens"
        batch = max(1, round(batch * longest * len(lengths) / sum(lengths))) if lengths else batch
        found.left[f"a step of {why}"] = f"{batch} examples here" + (", about as many" if lengths else ": raise it")
    found.set("train.batch_size", batch, why)
    size = said[table["held_out"]]
    count = 0 if held_out else math.ceil(size * len(lengths)) if size < 1 else int(size)
    share = count / len(lengths) if lengths else size if size < 1 else 0.05
    found.set("data.eval", held_out or (share or None), f"{table['held_out']}: {size}")
    each = math.ceil((len(lengths) - count) / batch) if lengths else 0
    total = said.get("max_steps") or math.ceil(epochs * each)
    ratio = float(said.get("warmup_ratio") or table["warmup_ratio"])
    exact = ratio * total  # transformers rounds it up, Axolotl down, to at most 100 if it is not asked for
    steps = math.ceil(exact) if found.tool != "Axolotl" else int(exact if said.get("warmup_ratio") else min(exact, 100))
    steps = 2 if found.tool == "Axolotl" and steps == 1 else steps
    warmup = said.get("warmup_steps") or (steps if total else ratio)
    warmup = 0 if said[table["schedule"]] == "constant" else warmup
    found.set("schedule.warmup", warmup, "warmup_steps, warmup_ratio")
    found.set("schedule.delay", 1, "the first step of transformers has the rate 0 of a warm-up")
    found.set("schedule.min_ratio", said.get("cosine_min_lr_ratio", 0), "transformers' schedules end at 0")
    found.set("optimizer.betas", [said["adam_beta1"], said["adam_beta2"]], "adam_beta1, adam_beta2")
    for what in ("save", "eval") if held_out or share else ("save",):
        strategy, steps, times = (said.get(f"{what}{end}") for end in ("_strategy", "_steps", "s_per_epoch"))
        part = steps if steps and steps < 1 else 1 / (times * epochs) if times and not steps else 0
        every = math.ceil(part * total) or steps or each * (what == "save")
        every = 0 if strategy == "no" else each if strategy == "epoch" else every
        found.set(f"run.{what}_every", every or None, f"{what}_steps, {what}_strategy, {what}s_per_epoch")
