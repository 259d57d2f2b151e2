"""Answers, streamed, under transformers' own attention; what training runs under is restored after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from lorasft.errors import DataError
from lorasft.model.attention import default_attention, evaluating


def own_stops(causal: Any) -> list[int]:
    """The tokens at which generation with `causal` stops by its own config."""
    stops = causal.generation_config.eos_token_id
    return stops if isinstance(stops, list) else [] if stops is None else [stops]


def generate(
    causal: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stops: Sequence[int],
    temperature: float = 0.0,
    on_text: Callable[[str], None] | None = None,
) -> list[int]:
    """Continue `prompt` until a token of `stops` or of the model's own, or `max_new_tokens`; greedy at temperature 0.

    Returns the new ids without the stop. `on_text` gets the text as it grows, whole characters only.
    """
    own = getattr(causal.config.get_text_config(), "max_position_embeddings", None)
    positions = own or len(prompt) + max_new_tokens
    if len(prompt) >= positions:
        what = f"the prompt has {len(prompt)} tokens, the model {positions} positions"
        raise DataError(what, hint="a shorter prompt")
    stops = sorted({*stops, *own_stops(causal)})
    config = GenerationConfig(
        max_new_tokens=min(max_new_tokens, positions - len(prompt)),
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0 if temperature > 0 else 50,
        top_p=1.0,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
        use_cache=True,
    )
    streamer = None
    if on_text:  # transformers' own, which holds back half characters, with the text handed on instead of printed
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = lambda text, stream_end=False: on_text(text)
    ids = torch.tensor([list(prompt)], device=causal.device)
    with torch.no_grad(), evaluating(causal, default_attention(causal.config)):
        mask = torch.ones_like(ids)
        output = causal.generate(ids, attention_mask=mask, generation_config=config, streamer=streamer)
    new: list[int] = output[0, len(prompt) :].tolist()
    while new and new[-1] in stops:
        new.pop()
    return new
