"""The class that a config is built as: of a checkpoint that also sees or hears, all but its towers.

A tower lies beside the decoder and is not called for text: it stays in its file. Everything else keeps the names of the
whole class, which transformers, PEFT and vLLM expect.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModel

from lorasft.model.recompute import only_first


def model_class(config: Any) -> Any:
    """The class of transformers that `config` is loaded and built as; None where it is not a language model's."""
    whole = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if whole and config.get_text_config() is not config:
        return _without_towers(whole)
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


@cache
def _without_towers(whole: type[Any]) -> type[Any]:
    """`whole` under its own name, by which transformers knows its checkpoints; `left_out`: the paths of the towers."""

    def build(self: Any, config: Any) -> None:
        text, build_whole = config.get_text_config(), AutoModel.from_config

        def build_part(config: Any, **options: Any) -> Any:  # a tower may ask for a library of images
            return build_whole(config, **options) if config is text else nn.Identity()

        with patch.object(AutoModel, "from_config", build_part):
            whole.__init__(self, config)
        self.left_out = _drop_towers(self)

    def set_attention(self: Any, name: str, **options: Any) -> None:
        text = [key for key in self.config.sub_configs if getattr(self.config, key) is self.config.get_text_config()]
        whole.set_attn_implementation(self, dict.fromkeys(["", *text], name), **options)  # warns of the towers' configs

    own = {"__init__": build, "set_attn_implementation": set_attention, "__module__": whole.__module__}
    return type(whole.__name__, (whole,), own)


def _drop_towers(model: Any) -> list[str]:
    """Take out of `model` what lies beside its decoder and is not called for text. Returns the paths."""
    called: set[nn.Module] = set()
    hook = register_module_forward_pre_hook(lambda module, _: called.add(module))
    # It would read numbers, which are not there.
    unread = patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    with hook, only_first(model, 0), unread, torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    decoder, left_out = model.get_decoder(), []
    around = [(path, one) for path, one in model.named_modules() if one is not decoder and decoder in one.modules()]
    for path, one in around:
        for name, part in list(one.named_children()):
            if decoder not in part.modules() and called.isdisjoint(part.modules()):
                setattr(one, name, None)
                left_out.append(f"{path}.{name}".lstrip("."))
    return left_out
