"""What a path on the command line names: a run, an adapter or a model; and that, loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasft.adapter_files import CONFIG, read_adapter_config, refuse_remote
from lorasft.data.tokenizer import load_tokenizer
from lorasft.errors import ModelError
from lorasft.model.adapter import load_adapter
from lorasft.model.base import load_base
from lorasft.model.loss import Network
from lorasft.model.selfcheck import verify
from lorasft.recipe import ChatSettings, ModelSettings, Recipe, load_recipe


@dataclass(frozen=True)
class Saved:
    """A model with or without an adapter, where it lies, and how it was trained."""

    model: ModelSettings
    adapter: Path | None
    recipe: Recipe | None  # of the run that the adapter came from

    @property
    def chat(self) -> ChatSettings:
        """How prompts are made: the template was saved with the adapter; the system message and the date are left."""
        chat = self.recipe.chat if self.recipe else None
        return ChatSettings(system=chat.system if chat else None, template_date=chat.template_date if chat else None)


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer and to be scored. `peft` is None without an adapter."""

    peft: Any | None
    network: Network
    tokenizer: Any


def find_saved(name: str, *, base: str | None = None) -> Saved:
    """Resolve a run folder, an adapter folder, a model folder or a hub id. `base` replaces the adapter's base.

    Raises ModelError for a run that is not finished, UnsafeError for an adapter whose base is no plain name.
    """
    folder = Path(name)
    if (folder / "recipe.yaml").is_file() and not (folder / CONFIG).is_file():
        if not (folder / "adapter" / CONFIG).is_file():
            raise ModelError(
                "this run has no adapter yet", where=name, hint="finish it with lorasft train ... --resume"
            )
        folder = folder / "adapter"
    if not (folder / CONFIG).is_file():
        if folder.exists() and not (folder / "config.json").is_file():
            what = "this is no run, no adapter and no model"
            raise ModelError(what, where=name, hint="name a run folder, an adapter, a model folder or a hub id")
        return Saved(ModelSettings(base=name, quantization="none"), None, None)
    config = read_adapter_config(folder)
    places = [parent / "recipe.yaml" for parent in (folder, *folder.resolve().parents[:2])]
    recipe = next((load_recipe(str(path)) for path in places if path.is_file()), None)
    origin = config["base_model_name_or_path"]
    settings = recipe.model if recipe else ModelSettings(base=origin, revision=config.get("revision"))
    if base is None:
        for named in (settings.base, str(origin)):
            refuse_remote(named, folder)
    return Saved(settings.model_copy(update={"base": base, "revision": None}) if base else settings, folder, recipe)


def load_saved(saved: Saved, device: torch.device) -> Loaded:
    """Load base, adapter and tokenizer, in evaluation mode, and probe how losses are computed."""
    tokenizer = read_tokenizer(saved)
    model = load_model(saved, device)
    peft = model if saved.adapter else None
    return Loaded(peft, verify(peft.get_base_model() if peft is not None else model), tokenizer)


def read_tokenizer(saved: Saved) -> Any:
    """The tokenizer that was saved with the adapter, else the base's: another tool's adapter may have none."""
    own = saved.adapter is not None and (saved.adapter / "tokenizer.json").is_file()
    return load_tokenizer(str(saved.adapter) if own else saved.model.base)


def load_model(saved: Saved, device: torch.device, *, streamed: bool = False) -> Any:
    """The base, as a PEFT model when there is an adapter, in evaluation mode.

    `streamed`: weights stay in their files and are read a layer at a time, whenever it is computed.
    """
    keep = saved.recipe.machine.cache_base if saved.recipe else "auto"
    base = load_base(saved.model, device, streamed=streamed, keep=keep)
    return (load_adapter(base, saved.adapter) if saved.adapter else base).eval()
