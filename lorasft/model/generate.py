"""Answers, streamed or many at once, under transformers' own attention; what training runs under is restored after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList, TextStreamer

from lorasft.artifact import list_stops
from lorasft.errors import DataError
from lorasft.model.attention import default_attention, evaluating


def generate(
    causal: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stops: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    on_text: Callable[[str], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[tuple[list[int], bool]]:
    """Continue `prompts`, padded on the left, until a token of `stops` or of the model's own, or `max_new_tokens`, or
    until `stopped` says so; greedy at temperature 0, else from the likeliest tokens that have `top_p` together.

    Returns of each the new ids without the stop, and whether there was one. `on_text` gets the text of a single prompt
    as it grows, whole characters only. Raises DataError for a prompt that is too long.
    """
    length = max(map(len, prompts))
    positions = getattr(causal.config.get_text_config(), "max_position_embeddings", None) or length + max_new_tokens
    if length >= positions:
        what = f"the prompt has {length} tokens, the model {positions} positions"
        raise DataError(what, hint="a shorter prompt")
    stops = sorted({*stops, *list_stops(causal.generation_config.eos_token_id)})
    config = GenerationConfig(
        max_new_tokens=min(max_new_tokens, positions - length),
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0 if temperature > 0 else 50,
        top_p=top_p,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
        use_cache=True,
    )
    streamer = None
    if on_text:  # transformers' own, which holds back half characters, with the text handed on instead of printed
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = lambda text, stream_end=False: on_text(text + "\n" * stream_end)
    ended = StoppingCriteriaList([lambda ids, _, **__: torch.full((len(ids),), stopped(), device=ids.device)])
    rows = [[0] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    seen = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids, mask = torch.tensor(rows, device=causal.device), torch.tensor(seen, device=causal.device)
    with torch.no_grad(), evaluating(causal, default_attention(causal.config)):
        how = {"generation_config": config, "streamer": streamer, "stopping_criteria": ended}
        output = causal.generate(ids, attention_mask=mask, **how)
    new = [(list(takewhile(lambda token: token not in stops, row)), row) for row in output[:, length:].tolist()]
    return [(ids, len(ids) < len(row)) for ids, row in new]
