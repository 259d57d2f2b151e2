"""The recipe: its schema, and how a YAML file with `section.key=value` overrides becomes one.

The classes below are the whole list of what can be set: names, defaults, units, types and ranges stand here and
nowhere else.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lorasft.errors import LorasftError, RecipeError, Several
from lorasft.recipe_faults import across_faults, nearest, plain_faults, printable, shows_secret, value_at
from lorasft.strict_yaml import MOST_DEPTH, Document, KeyPath, dump_yaml, parse_yaml, read_yaml

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=0.5)]
# Of a path that need not be there yet; the system's calls end a text at a NUL.
PathText = Annotated[str, Field(pattern=r"^[^\x00]*$")]
Beta = Annotated[float, Field(ge=0, lt=1)]
Scalar = str | int | float | bool | None
Format = Literal["auto", "chat", "sharegpt", "alpaca", "prompt-completion", "text"]


class _Section(BaseModel):
    # strict: a quoted number is no number, and 1 is not true.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSettings(_Section):
    base: str = Field(min_length=1, description="folder or hub id of the base model")
    revision: str | None = Field(default=None, description="branch, tag or commit of the base on the hub")
    quantization: Literal["nf4", "none"] = Field(default="nf4", description="nf4: the base in 4 bit (QLoRA)")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="what the base computes in"
    )


class AdapterSettings(_Section):
    rank: int = Field(default=16, ge=1, le=1024, description="rank of A and B")
    alpha: float = Field(default=32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout before A; above 0 turns prefix sharing off")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="names of linears to adapt"
    )
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank)")
    dora: bool = Field(default=False, description="weight-decomposed LoRA")
    modules_to_save: tuple[str, ...] = Field(default=(), description="modules trained and saved in full")
    start: str | None = Field(default=None, description="folder of an adapter or of a run to begin from")


class DataSource(_Section):
    path: str = Field(min_length=1, description="file, folder or hub id")
    split: str = Field(default="train", description="split of a hub data set")
    config: str | None = Field(default=None, description="configuration of a hub data set")
    format: Format | None = Field(default=None, description="null: data.format")
    columns: dict[str, str] | None = Field(default=None, description="null: data.columns")
    share: float = Field(default=1.0, gt=0, le=1, description="share of the rows to use")

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class DataSettings(_Section):
    train: tuple[DataSource, ...] = Field(min_length=1, description="a source or a list of sources")
    eval: Share | Annotated[tuple[DataSource, ...], Field(min_length=1)] | None = Field(
        default=0.02, description="held out: a share of the training data, a source or a list of sources, or null"
    )
    format: Format = Field(default="auto", description="shape of the rows")
    columns: dict[str, str] | None = Field(
        default=None, description="field of the format -> name of the column in the data"
    )
    max_length: int = Field(default=4096, ge=8, description="tokens of the longest sequence")
    overlong: Literal["drop", "truncate", "split", "error"] = Field(
        default="drop", description="what longer sequences meet"
    )
    on_bad_row: Literal["error", "drop"] = Field(default="error", description="what unreadable rows meet")
    max_dropped: float = Field(default=0.05, ge=0, le=1, description="largest share of the rows that may be dropped")

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _one_source_is_a_list(cls, value: Any) -> Any:
        sources = [value] if isinstance(value, (str, dict, DataSource)) else value
        return tuple(sources) if isinstance(sources, list) else sources


class ChatSettings(_Section):
    template: PathText | None = Field(
        default=None, description="null: the tokenizer's own; or plain, chatml, none, or a file"
    )
    template_options: dict[str, Scalar] = Field(
        default={}, description="variables of the template, as a server would set"
    )
    template_date: Annotated[str, Field(json_schema_extra={"format": "date"})] | None = Field(
        default="2024-07-26", description="what a template that asks for today's date gets; null: the day's own"
    )
    system: str | None = Field(default=None, description="system message for conversations without one")
    supervise: Literal["all", "last", "flagged", "everything"] = Field(
        default="all", description="which messages are learned"
    )
    thinking: Literal["follow_template", "mask", "drop", "error"] = Field(
        default="follow_template", description="reasoning: learned as rendered, context, taken out, never to be lost"
    )
    control_tokens: Literal["error", "as_text"] = Field(
        default="error", description="control tokens written in the data"
    )

    @field_validator("template_date")
    @classmethod
    def _is_a_date(cls, value: str | None) -> str | None:
        if value is not None:
            datetime.date.fromisoformat(value)
        return value


class TrainSettings(_Section):
    epochs: float = Field(default=2.0, gt=0, description="passes over the data")
    steps: PositiveInt | None = Field(default=None, description="optimizer steps, instead of epochs")
    batch_size: int = Field(default=32, ge=1, description="examples per optimizer step")
    loss: Literal["token", "example"] = Field(
        default="token", description="mean over supervised tokens, or over examples"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="L2 norm to clip at; null: never"
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="seed of order, initial adapter and dropout")


class OptimizerSettings(_Section):
    name: Literal["adamw", "adamw8bit"] = Field(default="adamw", description="adamw8bit keeps its state in 8 bit")
    learning_rate: float = Field(default=2e-4, gt=0, le=0.01, description="peak of the schedule")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled, times the learning rate")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="decay of the first and second moment")


class ScheduleSettings(_Section):
    name: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="shape after the warm-up")
    warmup: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.03, description="whole number: steps; fraction: share of all steps"
    )
    min_ratio: float = Field(default=0.1, ge=0, le=1, description="last learning rate / peak")


class RunSettings(_Section):
    output: PathText = Field(
        default="runs/recipe", min_length=1, description="run folder; default: runs/ and the recipe's name"
    )
    log_every: int = Field(default=1, ge=1, description="steps")
    eval_every: PositiveInt | None = Field(default=100, description="steps; null: only at the end")
    save_every: PositiveInt | None = Field(default=100, description="steps; null: by the clock and at the end")
    save_minutes: Annotated[float, Field(gt=0)] | None = Field(default=20.0, description="minutes between checkpoints")
    keep: int = Field(default=2, ge=1, description="checkpoints to keep")
    keep_best: bool = Field(default=False, description="adapter/ holds the best by held-out loss, not the last")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        default=(), description="also log there"
    )


class MachineSettings(_Section):
    micro_batch_tokens: Literal["auto"] | PositiveInt = Field(default="auto", description="tokens per micro-batch")
    activation_checkpointing: Literal["auto"] | bool = Field(
        default="auto", description="recompute layers going backwards; auto: as few as the memory needs"
    )
    share_prefixes: Literal["auto"] | bool = Field(default="auto", description="compute common beginnings once")
    attention: Literal["auto", "segments", "sdpa", "eager"] = Field(default="auto", description="attention backend")
    kernels: Literal["torch", "liger"] = Field(
        default="torch", description="liger: its kernels for norms, gated layers and positions, on CUDA"
    )
    cache_base: Literal["auto"] | bool = Field(
        default="auto", description="keep the 4-bit base for the next start; auto: from 64 MB"
    )


class Recipe(_Section):
    """One training run. Everything but `run` and `machine` is mathematics."""

    model: ModelSettings
    adapter: AdapterSettings = AdapterSettings()
    data: DataSettings
    chat: ChatSettings = ChatSettings()
    train: TrainSettings = TrainSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    run: RunSettings = RunSettings()
    machine: MachineSettings = MachineSettings()


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file or of a shipped name, with `section.key=value` overrides.

    Paths in the file are looked up beside it, then in the working directory; those of overrides in the working
    directory only. What exists becomes absolute. Raises RecipeError, UnsafeError, or Several for several faults.
    """
    path = _find_recipe(source)
    document = read_yaml(path)
    raw = document.value
    if not isinstance(raw, dict):
        what = "the recipe is empty" if raw is None else "a recipe is a mapping of sections (model, data, ...)"
        hint = "model.base and data.train are needed; lorasft recipes show tiny"
        _raise(document.faults or [RecipeError(what, where=document.places.get((), str(path)), hint=hint)])
    _absolute_paths(raw, [path.parent, Path.cwd()])
    for override in overrides:
        _apply_override(override, document)
    _complete(raw, path.stem)
    recipe, faults = _validate(document)
    if recipe is None or faults:
        _raise(faults)
    return recipe


def read_source(path: str, columns: str | None) -> DataSource:
    """A file of rows that the command line names, with its columns as `{ours: theirs}` if they are given.

    Raises RecipeError when `columns` is no such mapping.
    """
    if columns is None:
        return DataSource(path=path)
    document = parse_yaml(columns, "--columns")
    with contextlib.suppress(ValidationError):
        if not document.faults and isinstance(document.value, dict):
            return DataSource(path=path, format="auto", columns=document.value)
    raise RecipeError("not a mapping", where=f"--columns {columns}", hint="--columns '{prompt: question}'")


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; `load_recipe` reads an equal one back."""
    return dump_yaml(recipe.model_dump(mode="json"))


def mathematics(recipe: Recipe) -> dict[str, Any]:
    """What decides the result: everything but `run` and `machine`, as JSON values."""
    return recipe.model_dump(mode="json", exclude={"run", "machine"})


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of recipe files, for editors: with the short forms of sources, and without required data."""
    schema = Recipe.model_json_schema()
    data = schema["$defs"]["DataSettings"]
    source = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/DataSource"}]}
    sources = [source, {"type": "array", "items": source, "minItems": 1}]
    held_out = data["properties"]["eval"]
    held_out["anyOf"] = [held_out["anyOf"][0], *sources, {"type": "null"}]
    train = data["properties"]["train"]
    data["properties"]["train"] = {"anyOf": sources, "title": train["title"], "description": train["description"]}
    del data["required"]  # the command line may give it
    schema["required"].remove("data")
    return schema


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes inside the installed package, or of the checkout that the package stands in."""
    package = Path(__file__).parent
    inside = package / "recipes"
    folder = inside if inside.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*/*.yaml"))}


def portable_text(path: Path) -> str:
    """The YAML of a recipe file for another folder: where it names paths beside itself, these become absolute."""
    text = path.read_text(encoding="utf-8")
    document = parse_yaml(text, str(path))
    raw = parse_yaml(text, str(path)).value
    _absolute_paths(raw, [path.parent])
    for place, where in document.places.items():
        old, new = value_at(place, document.value), value_at(place, raw)
        if isinstance(old, str) and isinstance(new, str) and old != new:
            text = _with_value(text, place, line=int(where.rpartition(":")[2]), old=old, new=new)
    return text if parse_yaml(text, str(path)).value == raw else dump_yaml(raw)


def _with_value(text: str, place: KeyPath, *, line: int, old: str, new: str) -> str:
    """The YAML `text` with the value at `place`, which stands in `line`, as `new`; else as it is."""
    lines = text.splitlines(keepends=True)
    for found in re.finditer(rf"(?<![\w./-]){re.escape(old)}(?![\w./-])", lines[line - 1]):
        changed = lines[line - 1][: found.start()] + json.dumps(new) + lines[line - 1][found.end() :]
        tried = "".join([*lines[: line - 1], changed, *lines[line:]])
        if value_at(place, parse_yaml(tried, "").value) == new:
            return tried
    return text


def _raise(faults: list[LorasftError]) -> NoReturn:
    faults = sorted(faults, key=lambda fault: -fault.exit_code)  # what is unsafe decides the exit code
    raise faults[0] if len(faults) == 1 else Several(faults)


def _find_recipe(source: str) -> Path:
    path = Path(source)
    shipped = shipped_recipes()
    if path.is_file():
        return path
    if source in shipped:
        return shipped[source]
    if path.exists():
        return path
    beside = [str(other) for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    close = nearest(source, [*shipped, *beside])
    hint = f"did you mean {close}?" if close else "lorasft recipes list"
    raise RecipeError(f"no recipe {printable(source)}: neither a file nor a shipped recipe", hint=hint)


def _absolute_paths(raw: dict[str, Any], folders: list[Path]) -> None:
    """Make the paths of `raw` absolute, in place, where they exist in one of `folders`."""
    for section, key in (("model", "base"), ("adapter", "start"), ("chat", "template")):
        settings = raw.get(section)
        if isinstance(settings, dict) and isinstance(text := settings.get(key), str):
            built_in = key == "template" and not ("/" in text or Path(text).suffix)
            settings[key] = text if built_in else _existing(text, folders)
    data = raw.get("data")
    for key in ("train", "eval"):
        if isinstance(data, dict) and key in data:
            data[key] = _absolute_source(data[key], folders)


def _absolute_source(value: Any, folders: list[Path]) -> Any:
    if isinstance(value, list):
        return [_absolute_source(item, folders) for item in value]
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return {**value, "path": _existing(value["path"], folders)}
    return _existing(value, folders) if isinstance(value, str) else value


def _existing(text: str, folders: list[Path]) -> str:
    try:
        candidates = [folder / Path(text).expanduser() for folder in folders]
        return next((str(path.absolute()) for path in candidates if text and path.exists()), text)
    except (OSError, ValueError, RuntimeError):  # no name that a file could have
        return text


def _apply_override(override: str, document: Document) -> None:
    """Put the value of `section.key=value` into the document; its place becomes the command line."""
    name, equals, text = override.partition("=")
    place = f"command line: {name}=..." if shows_secret(override) else f"command line: {printable(override)}"
    keys = tuple(name.split("."))
    if not equals or not all(keys) or len(keys) > MOST_DEPTH or name in Recipe.model_fields:
        hint = "for example train.batch_size=16"
        document.faults.append(RecipeError("not of the form section.key=value", where=place, hint=hint))
        return
    given, faults = _parse_override(text)
    document.faults.extend(type(fault)(fault.what, where=place, hint=fault.hint) for fault in faults)
    fresh: dict[str, Any] = {}
    _put(fresh, keys, given)
    _absolute_paths(fresh, [Path.cwd()])
    _put(document.value, keys, value_at(keys, fresh))
    for path in [path for path in document.places if path[: len(keys)] == keys]:
        del document.places[path]
    for end in range(1, len(keys) + 1):
        document.places.setdefault(keys[:end], place)


def _parse_override(text: str) -> tuple[Any, list[LorasftError]]:
    try:
        given = parse_yaml(text, "command line")
    except LorasftError as fault:
        return None, [fault]
    return given.value, given.faults


def _put(mapping: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(mapping.get(key), dict):
            mapping[key] = {}
        mapping = mapping[key]
    mapping[keys[-1]] = value


def _complete(raw: dict[str, Any], stem: str) -> None:
    """Fill in, in place, the two defaults that rest on something else than their own key."""
    for section in Recipe.model_fields:
        if raw.get(section) is None:  # missing, or a heading with nothing under it
            raw[section] = {}
    run, data = raw["run"], raw["data"]
    if isinstance(run, dict):
        run.setdefault("output", f"runs/{stem}")
        if isinstance(run["output"], str) and run["output"].startswith("~/"):
            run["output"] = str(Path(run["output"]).expanduser())
        if isinstance(data, dict) and "eval" in data and data["eval"] is None:
            run.setdefault("eval_every", None)


def _validate(document: Document) -> tuple[Recipe | None, list[LorasftError]]:
    try:
        # As JSON: strict Python validation would refuse lists for tuples.
        recipe = Recipe.model_validate_json(json.dumps(document.value))
    except ValidationError as fault:
        return None, document.faults + plain_faults(fault, document, recipe_schema())
    return recipe, document.faults + across_faults(recipe.model_dump(), document)
