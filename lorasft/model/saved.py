"""An artifact, loaded: a model that is ready to answer and to be scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lorasft.artifact import Artifact
from lorasft.data.tokenizer import load_tokenizer
from lorasft.model.adapter import load_adapter
from lorasft.model.base import load_base
from lorasft.model.loss import Network
from lorasft.model.selfcheck import verify


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer and to be scored. `peft` is None without an adapter."""

    peft: Any | None
    network: Network
    tokenizer: Any


def load_saved(artifact: Artifact, device: torch.device) -> Loaded:
    """Load base, adapter and tokenizer, in evaluation mode, and probe how losses are computed."""
    tokenizer = read_tokenizer(artifact)
    model = load_artifact(artifact, device)
    peft = model if artifact.adapter else None
    return Loaded(peft, verify(peft.get_base_model() if peft is not None else model), tokenizer)


def read_tokenizer(artifact: Artifact) -> Any:
    """The tokenizer that was saved with the adapter, else the base's: another tool's adapter may have none."""
    if artifact.adapter and (artifact.adapter / "tokenizer.json").is_file():
        return load_tokenizer(str(artifact.adapter))
    return load_tokenizer(artifact.model.base, artifact.model.revision)


def load_artifact(artifact: Artifact, device: torch.device, *, streamed: bool = False) -> Any:
    """The base, as a PEFT model when there is an adapter, in evaluation mode.

    `streamed`: weights stay in their files and are read a layer at a time, whenever it is computed.
    """
    keep = artifact.recipe.machine.cache_base if artifact.recipe else "auto"
    base = load_base(artifact.model, device, streamed=streamed, keep=keep)
    return (load_adapter(base, artifact) if artifact.adapter else base).eval()
