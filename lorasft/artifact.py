"""What a path names (a run, an adapter, a checkpoint, a model folder or a hub id), resolved once for every command."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lorasft.adapter_files import CONFIG, adapts_experts, list_adapted, open_adapter, read_adapter_config
from lorasft.errors import ModelError, RecipeError, UnsafeError, reading
from lorasft.files import LOCK, MANIFEST, refuse_overlap, verify_folder
from lorasft.hub import is_folder, loading
from lorasft.recipe import ChatSettings, DataSettings, DataSource, ModelSettings, Recipe, mathematics
from lorasft.recipe.load import compare, load_recipe, shipped_recipes
from lorasft.tensors import fingerprint
from lorasft.terminal import quote, say, train_command

_NAME_ONE = "name a run folder, an adapter, a model folder or a hub id"
MERGE_RECORD = "merge.json"
CHANGED, RESTORE = "the recipe is not the one that this run began with:", "restore it, or run.output=NEW_FOLDER"
_LEFT_BEHIND = {LOCK, "tokens", "memory.json", "checkpoints", "provenance.json"}  # by a start that failed
_NO_DATA = DataSettings(train=(DataSource(path="-"),))
GENERATION_CONFIG = "generation_config.json"
# What tells of a run in 4 bit: words in the name of its base, and in what other tools write beside an adapter.
_FOUR_BIT_NAME = re.compile(r"(?i)(?<![a-z0-9])(4[-_]?bit|nf4|fp4)(?![a-z0-9])")
_FOUR_BIT_RUN = re.compile(r"(?i)\b(load_in_4bit\W{1,5}true|quant(ization)?_bits?\W{1,5}4|adapter\W{1,5}qlora)\b")
# What names of quantized bases add to those of their originals: Qwen3-8B-AWQ, Qwen2.5-7B-Instruct-GPTQ-Int4.
_QUANTIZED_NAME = re.compile(r"(?i)[-_.](gptq|awq|int[48]|w\d+a\d+|fp8|nvfp4|quantized|hqq|[2-8]-?bit)([-_.].*)?$")
_RECORDS = ("README.md", "args.json", "*.yaml", "*.yml")
_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True)
class Artifact:
    """A model with or without an adapter, where its files are, and how it was trained. Files come when asked for."""

    name: str  # as it was given
    model: ModelSettings  # the base, and how it was loaded in training
    adapter: Path | None = None  # the folder
    adapter_config: Mapping[str, Any] = field(default_factory=dict)  # checked; PEFT's fields
    recipe: Recipe | None = None  # of the run that the adapter came from
    chat: ChatSettings = field(default_factory=ChatSettings)  # how prompts are made; the template came with the adapter
    data: DataSettings = _NO_DATA  # how rows are read

    @property
    def run(self) -> Path | None:
        """The run folder that the adapter lies in."""
        parents = self.adapter.resolve().parents[:2] if self.adapter else ()
        return next((parent for parent in parents if (parent / "provenance.json").is_file()), None)

    @cached_property
    def provenance(self) -> Mapping[str, Any]:
        """What the run recorded: `fingerprint` and `commit` of its base, and the `dtype` that it computed in; nothing
        where there is no run. Raises ModelError for a record that cannot be read."""
        if self.run is None:
            return {}
        path = self.run / "provenance.json"
        with reading("the run's record cannot be read", where=path, hint="name the adapter's folder alone"):
            record = json.loads(path.read_bytes())
            told = {**record["base"], "dtype": record["layout"]["dtype"]}
            if told["dtype"] not in ("bfloat16", "float16", "float32"):
                raise ValueError(f"dtype {told['dtype']}")
            return {name: told[name] for name in ("fingerprint", "commit", "dtype")}

    @cached_property
    def base(self) -> Path:
        """The folder of the base on this machine, downloaded if need be. Raises ModelError or DeviceError."""
        name, revision = self.model.base, self.model.revision
        if is_folder(name, hint="--base MODEL" if self.adapter else _NAME_ONE):
            return Path(name)
        from huggingface_hub import snapshot_download

        with loading("the base", name, hint="--base FOLDER"):
            return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES, ignore_patterns="*/*"))

    @cached_property
    def base_config(self) -> Mapping[str, Any]:
        """config.json of the base, for FP8 and MXFP4 as for 16 bits. Raises ModelError for another quantization."""
        path, hint = self.base / "config.json", "--base with the folder of a model"
        with reading("cannot read the base's config", where=path, hint=hint):
            config: dict[str, Any] = json.loads(path.read_bytes())
            if not isinstance(config.get("model_type"), str):
                raise TypeError("model_type is not text")
            for part in (config, config.get("text_config") or {}):
                if stored_as(part.get("quantization_config") or {}, self.model.base):
                    del part["quantization_config"]
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
        trained = self.provenance.get("fingerprint")
        if trained and not force_base and trained != fingerprint(self.base):
            what = "this base is not the one that the adapter was trained on"
            raise ModelError(what, where=self.base, hint="--base FOLDER with the files of training, or --force-base")


def check_run_folder(recipe: Recipe, *, resume: bool) -> None:
    """Raise RecipeError when the run folder is taken or holds other files, or when there is nothing to resume, or what
    decides the result differs from what the run began with, in a table old -> new."""
    folder = Path(recipe.run.output)
    refuse_overlap(folder, Path(recipe.model.base))
    is_run = (folder / "recipe.yaml").is_file()
    if resume and not is_run:
        raise RecipeError("there is no run to resume", where=folder, hint="leave out --resume to start one")
    if resume and (changes := [*compare(mathematics(load_recipe(str(folder / "recipe.yaml"))), mathematics(recipe))]):
        raise RecipeError("\n  ".join([CHANGED, *changes[:10]]), where=folder, hint=RESTORE)
    if is_run and not resume:
        hint = f"continue it: {train_command(folder)} --resume; or start another: {quote(f'run.output={folder}-2')}"
        raise RecipeError("this run folder exists", where=folder, hint=hint)
    present = {path.name for path in folder.glob("[!.]*")}
    strangers = sorted(present - _LEFT_BEHIND if LOCK in present else present)
    if strangers and not is_run:
        shown = ", ".join(strangers[:3]) + f" and {len(strangers) - 3:,} more" * (len(strangers) > 3)
        raise RecipeError(f"the folder holds what is not a run's: {shown}", where=folder, hint="run.output=NEW_FOLDER")


def find_artifact(name: str, *, base: str | None = None) -> Artifact:
    """Resolve a run folder, an adapter folder, a model folder, a hub id, or the name of a shipped recipe, which means
    its base. `base` replaces the adapter's base.

    Raises ModelError for a run without an adapter, and for one that is not LoRA; UnsafeError for one that names code.
    """
    folder = Path(name)
    is_run = (folder / "recipe.yaml").is_file() or (folder / "checkpoints").is_dir()
    if is_run and not (folder / CONFIG).is_file():
        folder = folder / "adapter"
    if not (folder / CONFIG).is_file():
        if is_run:
            hint = f"finish it: lorasft train {quote(name)} --resume"
            if saved := sorted(map(str, Path(name).glob("checkpoints/step-*[1-9]*"))):
                hint += f", or take its newest checkpoint: {quote(saved[-1])}"
            raise ModelError("this run has no adapter yet", where=name, hint=hint)
        if name in shipped_recipes() and not folder.exists():
            shipped = load_recipe(name, ["data.train='-'"])  # most have none
            say(f"{name} is a recipe: this is its base; what is trained by it goes to {quote(shipped.run.output)}")
            return Artifact(name, shipped.model, recipe=shipped, chat=shipped.chat, data=shipped.data)
        if folder.exists() and not (folder / "config.json").is_file():
            raise ModelError("this is not a run, an adapter or a model", where=name, hint=_NAME_ONE)
        return Artifact(name, ModelSettings(base=name, quantization="none"))
    config = read_adapter_config(folder)
    places = [parent / "recipe.yaml" for parent in (folder, *folder.resolve().parents[:2])]
    recipe = next((load_recipe(str(path)) for path in places if path.is_file()), None)
    config["target_modules"] = list_adapted(open_adapter(folder).specs, config)
    own = config.get("base_model_name_or_path") or base
    if not own:
        raise ModelError("the adapter's config names no base_model_name_or_path", where=name, hint="--base MODEL")
    trained = recipe.model if recipe else ModelSettings(base=own)
    for named in (trained.base, own) if base is None else ():
        if ":" in named or named.startswith(("//", "\\\\")):
            raise UnsafeError(f"the adapter names {named} as its base", where=folder / CONFIG, hint="--base MODEL")
    model = trained.model_copy(update={"base": base or own, "revision": None if base else config.get("revision")})
    if recipe:
        more = set() if (folder / "tokenizer.json").is_file() else {"template", "template_options"}  # a checkpoint
        chat = ChatSettings(**recipe.chat.model_dump(include={"system", "template_date", *more}))
        return Artifact(name, model, folder, config, recipe, chat, recipe.data)
    found = Artifact(name, model, folder, config)
    if _tells_of_4_bit(found, own) and not adapts_experts(config):
        return found
    return replace(found, model=model.model_copy(update={"quantization": "none"}))


def _tells_of_4_bit(artifact: Artifact, own_base: str) -> bool:
    """Whether anything says that another tool's adapter was trained in 4 bit: its base, or what that tool recorded."""
    if _FOUR_BIT_NAME.search(Path(own_base).name) and not re.search("(?i)mlx|gptq|awq", own_base):
        return True
    if Path(artifact.model.base).is_dir() and artifact.base_config.get("quantization_config"):
        return True
    found = (path for pattern in _RECORDS for path in artifact.require_adapter().glob(pattern) if path.is_file())
    return any(_FOUR_BIT_RUN.search(path.read_text(encoding="utf-8", errors="ignore")) for path in found)


def stored_as(scheme: Mapping[str, Any], base: str) -> str | None:
    """FP8 or MXFP4, if the config of a base says so, whose weights become numbers of 16 bits as they are read.

    Raises ModelError for another quantization than these and 4 bit by bitsandbytes.
    """
    method = scheme.get("quant_method", "an unknown method")
    if method in ("fp8", "mxfp4"):
        return str(method).upper()
    if scheme and not (scheme.get("load_in_4bit") or scheme.get("_load_in_4bit")):
        original = _QUANTIZED_NAME.sub("", Path(base).name)
        named = f", by its name {original}," if original != Path(base).name else ""
        hint = f"take its 16-bit original{named} as model.base or --base"
        raise ModelError(f"the base is quantized with {method}", where=base, hint=hint)
    return None


def read_stops(folder: Path) -> list[int]:
    """The tokens that end generation, by the generation config in `folder`, or by the model's where there is none."""
    path = next((path for path in (folder / GENERATION_CONFIG, folder / "config.json") if path.is_file()), None)
    with reading("this is not a config", where=path, hint="download it again"):
        return list_stops(json.loads(path.read_bytes()).get("eos_token_id") if path else None)


def list_stops(said: Any) -> list[int]:
    """What a config says as eos_token_id: a token, several or none."""
    return said if isinstance(said, list) else [] if said is None else [said]
