"""What a path names (a run, an adapter, a checkpoint, a model folder or a hub id), resolved once for every command.

An adapter's files are a stranger's: they are checked here before anything is made of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import Required, TypedDict

from lorasft.errors import ModelError, UnsafeError, in_words
from lorasft.files import MANIFEST, verify_folder
from lorasft.hub import find_hub, is_hub_id, refuse_offline
from lorasft.recipe import ChatSettings, ModelSettings, Recipe
from lorasft.recipe.load import load_recipe
from lorasft.tensors import fingerprint, open_tensors

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_NAME_ONE = "name a run folder, an adapter, a model folder or a hub id"
_FETCH_AGAIN = "fetch the adapter again"
_LARGEST = 16 << 20  # bytes of a config
# What names code, other files, or places that PEFT would read or write; a text of targets is a pattern.
_CODE = (
    "auto_mapping auto_map megatron_config loftq_config eva_config corda_config lora_ga_config trust_remote_code "
    "tokenizer_kwargs model_kwargs target_modules exclude_modules"
)
# Of no effect on a trained adapter.
_IDLE = "task_type peft_version inference_mode init_lora_weights megatron_core runtime_config qalora_group_size"
MERGE_RECORD = "merge.json"
GENERATION_CONFIG = "generation_config.json"
_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


def _check_pattern(pattern: str) -> str:
    """Refuse what might run for ever: PEFT's own patterns are paths, those of people say `.*` or `layers.[0-7].`."""
    repeated = re.findall(r"[*+?{]", pattern)
    if len(pattern) > 200 or len(repeated) > 2 or pattern.count("(") > 2 or re.search(r"\)[*+?{]", pattern):
        raise ValueError("a pattern that might run for ever")
    return pattern


_Names = list[str]
_Pattern = Annotated[str, AfterValidator(_check_pattern)]
_Rank = Annotated[int, Field(ge=1, le=1024)]
_Positive = Annotated[float, Field(gt=0)]
_Index = Annotated[int, Field(ge=0)]


# Forbidden: what is not known may compute something else, as variants of LoRA do, or take any amount of memory.
@with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class _Fields(TypedDict, total=False):
    """The fields that are read."""

    peft_type: Required[Literal["LORA"]]
    base_model_name_or_path: Required[Annotated[str, Field(min_length=1)]]
    revision: str
    r: Required[_Rank]
    lora_alpha: Required[_Positive]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: _Names
    exclude_modules: _Names
    target_parameters: _Names
    modules_to_save: _Names
    layers_to_transform: _Index | list[_Index]
    layers_pattern: _Pattern | list[_Pattern]
    rank_pattern: dict[_Pattern, _Rank]
    alpha_pattern: dict[_Pattern, _Positive]
    trainable_token_indices: list[_Index] | dict[str, list[_Index]]
    bias: Literal["none", "all", "lora_only"]
    fan_in_fan_out: bool
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    ensure_weight_tying: bool


@dataclass(frozen=True)
class Provenance:
    """What a run recorded of how it was made."""

    fingerprint: str  # of the base's files
    commit: str | None  # of the base on the hub
    dtype: str  # of the computation, such as bfloat16


@dataclass(frozen=True)
class Artifact:
    """A model with or without an adapter, where its files are, and how it was trained. Files come when asked for."""

    name: str  # as it was given
    model: ModelSettings  # the base, and how it was loaded in training
    adapter: Path | None = None  # the folder
    adapter_config: Mapping[str, Any] = field(default_factory=dict)  # checked; PEFT's fields
    recipe: Recipe | None = None  # of the run that the adapter came from

    @property
    def chat(self) -> ChatSettings:
        """How prompts are made: the template was saved with the adapter; the system message and the date are left."""
        chat = self.recipe.chat if self.recipe else ChatSettings()
        return ChatSettings(system=chat.system, template_date=chat.template_date)

    @property
    def run(self) -> Path | None:
        """The run folder that the adapter lies in."""
        parents = self.adapter.resolve().parents[:2] if self.adapter else ()
        return next((parent for parent in parents if (parent / "provenance.json").is_file()), None)

    @cached_property
    def provenance(self) -> Provenance | None:
        """What the run recorded, where there is a run. Raises ModelError for a record that cannot be read."""
        if self.run is None:
            return None
        path = self.run / "provenance.json"
        try:
            record = json.loads(path.read_bytes())
            base, dtype = record["base"], record["layout"]["dtype"]
            if dtype not in ("bfloat16", "float16", "float32"):
                raise ValueError(f"dtype {dtype}")
            return Provenance(base["fingerprint"], base["commit"], dtype)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"the run's record cannot be read: {error}"
            raise ModelError(what, where=str(path), hint="name the adapter's folder alone") from None

    @cached_property
    def base(self) -> Path:
        """The folder of the base on this machine, downloaded if need be. Raises ModelError or DeviceError."""
        name = self.model.base
        if Path(name).is_dir():
            return Path(name)
        if not is_hub_id(name):
            hint = "--base MODEL" if self.adapter else _NAME_ONE
            raise ModelError("there is no such folder of a model", where=name, hint=hint)
        find_hub()
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, revision=self.model.revision, allow_patterns=_FILES))
        except Exception as error:  # the hub raises a dozen kinds
            refuse_offline(error, name)
            raise ModelError(f"cannot get the base: {str(error)[:200]}", where=name, hint="--base FOLDER") from None

    @cached_property
    def base_config(self) -> Mapping[str, Any]:
        """config.json of the base. Raises ModelError for one that is quantized by another than bitsandbytes."""
        path = self.base / "config.json"
        try:
            config: dict[str, Any] = json.loads(path.read_bytes())
            if not isinstance(config["model_type"], str):
                raise TypeError("model_type is not text")
            refuse_quantized(config.get("quantization_config") or {}, str(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"cannot read the base's config: {error!r}"
            raise ModelError(what, where=str(path), hint="--base with the folder of a model") from None
        return config

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the base has, where its config says so."""
        return {**self.base_config, **(self.base_config.get("text_config") or {})}.get("vocab_size")

    def require_adapter(self) -> Path:
        """The adapter's folder. Raises ModelError when there is no adapter."""
        if self.adapter is not None:
            return self.adapter
        what = "this is a model: there is no adapter in it" if Path(self.name).exists() else "there is no such folder"
        raise ModelError(what, where=self.name, hint="name a run, or an adapter's folder")

    def verify(self, *, force_base: bool = False) -> None:
        """Raise ModelError for an adapter changed after its run, or, but for `force_base`, for another base."""
        adapter = self.require_adapter()
        if (adapter / MANIFEST).is_file():
            verify_folder(adapter)
        trained = self.provenance
        if trained and trained.fingerprint and not force_base and trained.fingerprint != fingerprint(self.base):
            what = "this base is not the one that the adapter was trained on"
            hint = "--base FOLDER with the files of training, or --force-base"
            raise ModelError(what, where=str(self.base), hint=hint)


def find_artifact(name: str, *, base: str | None = None) -> Artifact:
    """Resolve a run folder, an adapter folder, a model folder or a hub id. `base` replaces the adapter's base.

    Raises ModelError for a run without an adapter, and for one that is not LoRA; UnsafeError for one that names code.
    """
    folder = Path(name)
    is_run = (folder / "recipe.yaml").is_file() or (folder / "checkpoints").is_dir()
    if is_run and not (folder / CONFIG).is_file():
        folder = folder / "adapter"
    if not (folder / CONFIG).is_file():
        if is_run:
            hint = "finish it with lorasft train ... --resume"
            raise ModelError("this run has no adapter yet", where=name, hint=hint)
        if folder.exists() and not (folder / "config.json").is_file():
            what = "this is not a run, an adapter or a model"
            raise ModelError(what, where=name, hint=_NAME_ONE)
        return Artifact(name, ModelSettings(base=name, quantization="none"))
    config = read_adapter_config(folder)
    places = [parent / "recipe.yaml" for parent in (folder, *folder.resolve().parents[:2])]
    recipe = next((load_recipe(str(path)) for path in places if path.is_file()), None)
    trained = recipe.model if recipe else ModelSettings(base=config["base_model_name_or_path"])
    for named in (trained.base, config["base_model_name_or_path"]) if base is None else ():
        if ":" in named or named.startswith(("//", "\\\\")):
            raise UnsafeError(f"the adapter names {named} as its base", where=str(folder / CONFIG), hint="--base MODEL")
    where = {"base": config["base_model_name_or_path"], "revision": config.get("revision")}
    model = trained.model_copy(update={"base": base, "revision": None} if base else where)
    return Artifact(name, model, folder, config, recipe)


def refuse_quantized(scheme: Mapping[str, Any], where: str) -> None:
    """Raise ModelError for a base whose config tells of a quantization other than 4 bit by bitsandbytes."""
    if scheme and not (scheme.get("load_in_4bit") or scheme.get("_load_in_4bit")):
        what = f"the base is quantized with {scheme.get('quant_method', 'an unknown method')}"
        raise ModelError(what, where=where, hint="take its 16-bit original, as model.base or --base")


def read_stops(folder: Path) -> list[int]:
    """The tokens that end generation, by the generation config in `folder`, where there is one."""
    path = folder / GENERATION_CONFIG
    stops = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
    return stops if isinstance(stops, list) else [] if stops is None else [stops]


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says, in PEFT's fields, checked; fields that are null or of no effect are left out.

    Raises ModelError for what is not a LoRA or not known, UnsafeError for what names code.
    """
    path = folder / CONFIG
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("too large")
        config = json.loads(path.read_bytes())
        known = {key: value for key, value in config.items() if value or key in _Fields.__annotations__}
    except (ValueError, OSError, AttributeError, RecursionError) as error:
        raise ModelError(f"cannot read the adapter's config: {error}", where=str(path), hint=_FETCH_AGAIN) from None
    fields = {key: value for key, value in known.items() if value is not None and key not in _IDLE.split()}
    try:
        TypeAdapter(_Fields).validate_python(fields)
    except ValidationError as error:
        found = error.errors()
        code = [one for one in found if one["type"] == "value_error" or one["loc"][-1] in _CODE.split()]
        if code:
            what = f"the adapter's config names code or a pattern: {in_words(code[:1])}"
            raise UnsafeError(what, where=str(path), hint="take it out if the adapter is of use without it") from None
        hint = "lorasft takes LoRA, rslora and DoRA adapters as PEFT writes them"
        raise ModelError(in_words(found[:1]), where=str(path), hint=hint) from None
    return fields


def read_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by their names on disk, all finite.

    Raises ModelError when there are none, or none that an adapter could have; UnsafeError when they are a pickle.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            what = "the adapter is a pickle, which could run code when it is read"
            raise UnsafeError(what, where=str(folder), hint=f"convert it to {WEIGHTS}")
        raise ModelError(f"no {WEIGHTS}", where=str(folder), hint=_FETCH_AGAIN)
    file = open_tensors(path)
    tensors = {}
    for name, spec in file.specs.items():
        if spec.dtype not in ("F32", "F16", "BF16"):
            raise ModelError(f"{name} is {spec.dtype}", where=str(path), hint="save it in 16 or 32 bits")
        tensors[name] = file.read(name)
        if not tensors[name].isfinite().all():
            raise ModelError(f"{name} is not finite", where=str(path), hint="train it again, or take an earlier one")
    return tensors
