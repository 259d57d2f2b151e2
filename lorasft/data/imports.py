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
from lorasft.recipe.load import complete_recipe, find_path, find_peers
from lorasft.recipe.yaml_reader import Document, KeyPath, read_yaml


@dataclass
class Imported:
    """A config of another tool under our names."""

    tool: str
    file: Path
    table: dict[str, Any]  # of the tool, in imports.yaml
    said: dict[str, Any]  # by the config, or else by the tool's defaults
    settings: dict[str, dict[str, tuple[Any, str]]] = field(default_factory=dict)  # by section: value, their key
    places: dict[KeyPath, str] = field(default_factory=dict)  # of `settings`
    left: dict[str, str] = field(default_factory=dict)  # what a recipe does not say, or otherwise -> why

    def set(self, ours: str, value: Any, why: str) -> None:
        """Put `section.key` into the recipe, with the table's reason and note for it if there are any."""
        section, key = ours.split(".")
        self.settings.setdefault(section, {})[key] = value, self.table["reasons"].get(ours, why)
        self.places[section, key] = f"{self.file}: {why}"
        self.note(why.removesuffix(": default"))

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
        what = f"this could be a config of {'both Axolotl and' if fits else 'neither Axolotl nor'} LLaMA-Factory"
        raise RecipeError(what, where=file, hint="Axolotl's has base_model, LLaMA-Factory's model_name_or_path")
    table = tables[fits[0]]
    said = {**table["defaults"], **raw}
    said |= {key: 2 * said[other] for key, other in table["twice"].items() if key not in raw}
    wrong = {key: table["sft"] for key, allowed in table["only"].items() if said.get(key) not in allowed}
    wrong |= {key: "a number" for key in table["numbers"] if not isinstance(said.get(key, 0), (int, float))}
    wrong |= {key: "a number above 0" for key in table["positive"] if not said[key]}
    for key, hint in wrong.items():
        what = f"{key}: {said[key]} cannot be imported" if key in said else f"{key} is not said"
        raise RecipeError(what, where=document.places.get((key,), str(file)), hint=hint)
    found = Imported(fits[0], file.resolve(), table, said)
    known = {*table["read"], *table["batch"], *table["packing"], *table["sources"]}
    for ours, names in table["settings"].items():
        names = names if isinstance(names, dict) else {names: {"*": "*"}}
        known |= names.keys()
        _translate(found, ours, names, raw)
    sources = _axolotl_sources if found.tool == "Axolotl" else _factory_sources
    try:
        train, held_out = (list(sources(found, key)) for key in table["sources"])
    except (TypeError, ValueError, AttributeError, LookupError):
        raise RecipeError(f"data that {found.tool} cannot read", where=file, hint=table["described"]) from None
    found.set("data.train", train, table["sources"][0])
    _take_steps(found, [{key: value for key, value in source.items() if key != "share"} for source in held_out])
    value = {section: {key: said for key, (said, _) in keys.items()} for section, keys in found.settings.items()}
    complete_recipe(Document(value, {(): str(file)} | found.places), file)  # raises errors at their keys
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
                value = find_path(str(value), [Path.cwd(), found.file.parent])
            elif ours in ("adapter.targets", "adapter.modules_to_save"):
                value = as_names(value)
            found.set(ours, value if match[0] == "*" else match[0], theirs if theirs in raw else f"{theirs}: default")
            found.note(f"{theirs}: {text}")
            return
        if "else" in names[theirs]:
            found.left[f"{theirs}: {text}"] = names[theirs]["else"]


def _axolotl_sources(found: Imported, key: str) -> Iterator[dict[str, Any]]:
    """The sources in `datasets`, or in `test_datasets`, as `key` says."""
    prompts = set()  # of system, in the types that the sources define themselves
    for entry in found.said[key]:
        kind = entry.get("type") or "none"
        fields = kind if isinstance(kind, dict) else {}
        prompts.add(fields.get("system_prompt"))
        name = "user-defined" if fields else kind.partition(":")[0].partition(".")[0]
        role = (entry.get("message_property_mappings") or {}).get("role", "role")
        if not {"assistant", "gpt"}.issuperset(entry.get("roles_to_train") or ()):
            found.set("chat.supervise", "everything", "roles_to_train")
        for theirs, value in entry.items():
            found.note(f"{theirs}: {value}")
        reasons = found.table["unread"]
        unread = (entry.keys() - found.table["source"]) | (fields.keys() & reasons.keys())
        found.left |= {f"{key}: {theirs}": reasons.get(theirs, "a recipe does not say it") for theirs in sorted(unread)}
        files = entry.get("data_files") or entry["path"]
        said = {"field_messages": "messages" if name == "chat_template" else None} | entry | fields
        for path in files if isinstance(files, list) else [files]:
            yield _source(found, path, name if role == "role" else f"{name}, {role}", said)
    if len(prompts) == 1 and None not in prompts:
        found.set("chat.system", prompts.pop(), f"{key}: system_prompt")
        del found.left[f"{key}: system_prompt"]


def _factory_sources(found: Imported, key: str) -> Iterator[dict[str, Any]]:
    """The sources of `dataset`, or of `eval_dataset`, as the file dataset_info.json describes them."""
    names = as_names(found.said[key])
    info = Path(find_path(f"{found.said['dataset_dir']}/dataset_info.json", [Path.cwd(), *found.file.parents]))
    try:
        described = json.loads(info.read_bytes()) if names else {}
    except (OSError, ValueError):
        what, hint = f"cannot read what {', '.join(names)} is", "dataset_dir names the folder that holds it"
        raise DataError(what, where=info, hint=hint) from None
    if unknown := [name for name in names if name not in described]:
        what = f"{key}: {', '.join(unknown)} is not described"
        raise DataError(what, where=info, hint=f"described are {', '.join(described)}")
    for entry in [described[name] for name in names]:
        if entry.get("ranking"):
            raise RecipeError("dataset: pairs of a better and a worse answer", where=info, hint=found.table["sft"])
        path = str(info.parent / entry["file_name"]) if "file_name" in entry else entry["hf_hub_url"]
        source = _source(found, path, entry.get("formatting", "alpaca"), entry | entry.get("columns", {}))
        number, most = entry.get("num_samples"), found.said.get("max_samples")
        if number or most:
            found.note("max_samples")
            rows = len(_lengths(found, source))
            source |= {"share": min(number or rows, most or math.inf) / rows} if rows else {}
        yield source


def _source(found: Imported, path: str, kind: str, said: dict[str, Any]) -> dict[str, Any]:
    """A source whose keys and columns are `said` under their names. `kind`: what they call its format."""
    form = found.table["types"].get(kind, "auto")
    found.note(f"type: {kind}")
    if form == "auto":
        found.left[f"type: {kind}"] = "its rows are read by their columns, under the chat template"
    names = {ours: said.get(theirs) or ours for ours, theirs in found.table["columns"].items()}
    columns = {ours: name for ours, name in names.items() if name != ours and ours in READ.get(form, ())}
    source = {"path": find_path(path, [Path.cwd(), found.file.parent]), "format": form, "columns": columns}
    source |= {"split": said.get("split"), "config": said.get(found.table["config"])}
    source |= {"share": 1 / (said.get("shards") or 1)}
    return {key: value for key, value in source.items() if value not in (None, {}, "auto", 1)}


def _lengths(found: Imported, source: dict[str, Any]) -> list[int]:
    """About how many tokens each example has as it is trained on; nothing where the rows cannot be read here."""
    longest, overlong = (found.settings["data"][key][0] for key in ("max_length", "overlong"))
    try:
        data = DataSettings.model_validate_json(json.dumps({"train": source}))
        here = find_files(data.train[0])[0]
        lengths = survey_rows(data).lengths(found.settings["model"]["base"][0]) if here else []
    except (LorasftError, ValueError):
        return []
    return [min(length, longest) for length in lengths if length <= longest or overlong != "drop"]


def _take_steps(found: Imported, held_out: list[dict[str, Any]]) -> None:
    """Set what rests on the number of rows: examples of a step, held out, steps, when to evaluate and to save."""
    said, table, epochs = found.said, found.table, found.settings["train"]["epochs"][0]
    axolotl, sources = found.tool == "Axolotl", found.settings["data"]["train"][0]
    lengths = [(_lengths(found, source), source.get("share", 1)) for source in sources]
    rows = sum(len(own) for own, _ in lengths) if all(own for own, _ in lengths) else 0  # 0: they are not known
    taken = round(sum(share * len(own) for own, share in lengths)) if rows else 0
    found.note("" if rows else "rows that are not here")
    batch, why = math.prod(said[key] for key in table["batch"]), f"{' x '.join(table['batch'])}, on one process"
    if packed := any(said.get(key) for key in table["packing"]):
        longest, tokens = found.settings["data"]["max_length"][0], sum(share * sum(own) for own, share in lengths)
        why = f"{batch} packed rows of {longest} tokens"
        batch = max(batch, round(batch * longest * taken / tokens)) if taken else batch
        about = ", about as many" if taken else ": raise it"
        found.left[f"a step of {why}"] = f"{batch} examples here{about}{table['packed']}"
    found.set("train.batch_size", batch, why)
    size, given = said[table["held_out"]], said.get("warmup_steps")  # below 1 a share, as transformers 5 reads it
    count = 0 if held_out else math.ceil(size * taken) if size < 1 else int(size)
    share = count / max(rows, taken) if taken else size if size < 1 else 0.05
    found.set("data.eval", held_out or share or None, table["sources"][1] if held_out else table["held_out"])
    if taken != rows and share < 1:  # it is of all rows, a source's of those that are not held out
        for source in sources:
            source["share"] = source.get("share", 1) * (1 - count / taken) / (1 - share)
    each, most = math.ceil((taken - count) / batch) if taken else 0, max(0, said.get("max_steps", 0))
    at_once = axolotl and taken > 0 and not packed  # it rounds up once, transformers each epoch
    total = most or math.ceil((taken - count) * epochs / batch if at_once else epochs * each)
    if not most and (at_once or (taken != rows and not packed)):
        found.set("train.steps", total, f"{taken - count} rows x {epochs}, as {found.tool} rounds it")
    ratio = said.get("warmup_ratio", (given % 1) if given is not None else table["warmup_ratio"])
    exact = ratio * total  # transformers rounds it up, Axolotl down, to at most 100 if it is not asked for
    steps = math.ceil(exact) if not axolotl else int(exact if "warmup_ratio" in said else min(exact, 100))
    warmup = given if (given or 0) >= 1 else steps if total else ratio
    warmup = 0 if said[table["schedule"]] == "constant" else 2 if axolotl and warmup == 1 else warmup
    found.set("schedule.warmup", warmup, "warmup_steps, warmup_ratio")
    found.set("optimizer.betas", [said["adam_beta1"], said["adam_beta2"]], "adam_beta1, adam_beta2")
    for what in ("save", "eval") if held_out or share else ("save",):
        strategy, steps, times = (said.get(f"{what}{end}") for end in ("_strategy", "_steps", "s_per_epoch"))
        part = steps if steps and steps < 1 else 1 / (times * epochs) if times and not steps else 0
        every = math.ceil(part * total) if part else steps or each * (what == "save")
        every = 0 if strategy == "no" else each if strategy == "epoch" else every
        found.set(f"run.{what}_every", every or None, f"{what}_steps, {what}_strategy, {what}s_per_epoch")
    if "patience" in found.settings["run"] and not found.settings["run"].get("eval_every", [None])[0]:
        found.left[found.settings["run"].pop("patience")[1]] = "nothing is evaluated on the way"
