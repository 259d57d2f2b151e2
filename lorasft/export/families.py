"""What a GGUF says of a model besides its tensors, and how llama.cpp wants these: by the tables of llama_cpp.yaml.

llama.cpp has some of a model's numbers in its source, not in the file (which layers of a Gemma look through a window,
how its attention is scaled). A model that differs there is refused by name: it would load and answer nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lorasft.errors import ModelError
from lorasft.files import read_objects
from lorasft.recipe.yaml_reader import read_yaml


def not_converted(what: str, model: Path) -> ModelError:
    """The error for what is not converted here. Of a run, what was merged is gone by the time that it is read."""
    usual = "llama.cpp's: python convert_hf_to_gguf.py DIR --outfile FILE, after lorasft merge RUN --out DIR"
    return ModelError(what, where=model, hint=usual)


@dataclass(frozen=True)
class Family:
    """An architecture of llama.cpp, and what it does differently from the checkpoints of transformers."""

    name: str
    paired: bool = False  # rotary positions turn neighbouring rows of q and k, not rows half a head apart
    norm_offset: float = 0.0  # added to norm weights: Gemma's are stored as w, used as 1 + w
    biases: bool = False
    full_every: int = 0  # every n-th layer sees everything, the others a window; 0: llama.cpp knows no windows here
    large: int = 0  # how many layers the size has whose attention is scaled by hidden size / heads
    rope: str = ""  # the kind of rotary positions that it has besides the default and the linear
    fields: Mapping[str, str] = field(default_factory=dict)  # of its GGUF alone, as in the table of those of all


TABLES = read_yaml(Path(__file__).with_name("llama_cpp.yaml")).value
FAMILIES = {kind: Family(**told) for kind, told in TABLES["families"].items()}


@dataclass(frozen=True)
class GgufLayout:
    """A model as GGUF describes it. `fields` lack the architecture's name in front; `extra`: tensors of its own."""

    family: Family
    config: Any  # of the text model
    fields: dict[str, Any]
    extra: dict[str, Any]

    def turned(self, name: str) -> int:
        """The rows of a head whose halves llama.cpp has in turns, row by row; 0 for other tensors."""
        return self.fields["attention.key_length"] if self.family.paired and re.search(r"attn_[qk]\.", name) else 0


def read_gguf_layout(model: Path) -> GgufLayout:
    """Describe the model in the folder `model`. Raises ModelError for what llama.cpp would not compute alike."""
    said = next(read_objects(model / "config.json"), {})
    kind = None if "text_config" in said else said.get("model_type")
    if kind in (None, *FAMILIES):  # else it is known without torch
        from lorasft.model.base import read_config

        config = read_config(str(model)).get_text_config()
        kind = config.model_type
    family = FAMILIES.get(str(kind))
    if not family:
        raise not_converted(f"no GGUF export for {kind} here", model)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if difference := _find_difference(config, family, head_size):
        raise ModelError(f"llama.cpp does not compute {difference}", where=model / "config.json")
    positions, extra = _positions(config, family, head_size, model)
    # llama.cpp has no window in llama: within it the model is the same, so a longer context is not promised.
    window = config.sliding_window if config.model_type == "mistral" else None
    known = config.to_dict() | {
        "context": min(config.max_position_embeddings, window or config.max_position_embeddings),
        "head_size": head_size,
        "window": getattr(config, "sliding_window", None) or 0,
    }
    known |= {key: float(known[key]) for key in TABLES["floats"] if known.get(key) is not None}
    fields = {name: known[key] for name, key in (TABLES["fields"] | family.fields).items()}
    return GgufLayout(family, config, fields | positions, extra)


def _find_difference(config: Any, family: Family, head_size: int) -> str | None:
    """What llama.cpp's source has otherwise than this config, in words; None when nothing is."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != ("gelu_pytorch_tanh" if family.norm_offset else "silu"):
        return f"the activation {activation} in {family.name}"
    layers = range(config.num_hidden_layers)
    every = family.full_every
    usual = ["full_attention" if not every or not (at + 1) % every else "sliding_attention" for at in layers]
    if list(getattr(config, "layer_types", None) or usual) != usual:
        return f"sliding windows on these layers of {family.name}"
    if not family.norm_offset:
        return None
    large = config.num_hidden_layers == family.large
    scale = config.hidden_size / config.num_attention_heads if large else head_size
    if config.query_pre_attn_scalar != scale:
        return f"query_pre_attn_scalar {config.query_pre_attn_scalar}: it takes {scale:g} here"
    caps = (config.attn_logit_softcapping, config.final_logit_softcapping)
    capped = any(caps) if family.name == "gemma3" else not all(caps)
    return f"soft caps {caps} in {family.name}" if capped else None


def _positions(config: Any, family: Family, head_size: int, model: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and tensors of the rotary positions. Raises ModelError for a kind that has no place in a GGUF."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    fields: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    if family.name == "gemma3":
        fields["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", family.rope):
        raise not_converted(f"rope type {kind} of {family.name} has no GGUF export here", model)
    turned = int(head_size * (rope.get("partial_rotary_factor") or 1.0))
    fields |= {"rope.dimension_count": turned, "rope.freq_base": float(rope["rope_theta"])}
    if kind == "linear":
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    elif kind == "llama3":
        slowed, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        usual = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, turned, 2) / turned)
        extra["rope_freqs.weight"] = (usual / slowed).numpy()  # by how much each frequency is slowed down
    elif kind == "longrope":
        _, attention = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        fields["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        fields["rope.scaling.attn_factor"] = float(attention)
        for name in ("long", "short"):
            extra[f"rope_factors_{name}.weight"] = np.array(rope[f"{name}_factor"], np.float32)
    return fields, extra
