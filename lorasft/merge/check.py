"""Does the merge answer like the base with its adapter on it?"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor

from lorasft.errors import ModelError
from lorasft.merge.source import Source
from lorasft.model.attention import attention, default_attention
from lorasft.model.saved import find_saved, load_saved

_TOKENS, _LONGEST = 1024, 256  # tokens compared, and of one sequence
_ROUNDING = 1e-2  # nats: more than bf16 ever does to an answer
_TEXT = "The quick brown fox jumps over the lazy dog. What is the answer to the question? It is 42, because"


@dataclass(frozen=True)
class Check:
    """KL divergences from the base with the adapter on it, unmerged and in the base's own bits; nats a token."""

    merged: float  # of the merged weights: what the merge changed
    learned: float  # of the base without the adapter: the size of what was learned
    same_choice: float  # share of positions at which the likeliest token is the same
    tokens: int

    def __str__(self) -> str:
        return (
            f"check: {self.same_choice:.1%} of the likeliest tokens are the same over {self.tokens:,} tokens; "
            f"KL to the base with its adapter {self.merged:.1e}, where the adapter moves it by {self.learned:.1e}"
        )


def check_merge(source: Source, merged: Path) -> Check:
    """Compare the model in `merged` with base and adapter, on held-out rows where the run has some.

    The base is loaded in its own bits, not in 4: this asks whether the merge is right, not what quantization did.
    Raises ModelError when the merge is further away than rounding explains and than the base without its adapter is.
    """
    device = PartialState().device
    found = find_saved(str(source.adapter), base=source.base_name)
    trained = load_saved(replace(found, model=found.model.model_copy(update={"quantization": "none"})), device)
    sequences = _probes(source, trained.tokenizer)
    wanted = _log_probabilities(trained.network.causal, sequences)
    assert trained.peft is not None
    with trained.peft.disable_adapter():
        without = _log_probabilities(trained.network.causal, sequences)
    del trained
    gc.collect()
    got = _log_probabilities(load_saved(find_saved(str(merged)), device).network.causal, sequences)
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(wanted, got, strict=True)]).float().mean()
    check = Check(_divergence(wanted, got), _divergence(wanted, without), float(same), sum(map(len, wanted)))
    if check.merged > max(check.learned, _ROUNDING):
        raise ModelError(
            f"the merged model does not answer like the base with its adapter ({check})", where=str(merged)
        )
    return check


def _probes(source: Source, tokenizer: Any) -> list[NDArray[np.int32]]:
    """Held-out sequences of the run, else of its training set; a built-in text for an adapter without a run."""
    sequences: list[NDArray[np.int32]] = []
    if source.run:
        from lorasft.data.prepare import open_prepared

        for folder in sorted((source.run / "tokens").glob("*/prepared.json")):
            prepared = open_prepared(folder.parent)
            store = prepared.held_out if prepared.held_out else prepared.train
            for example in range(len(store)):
                if sum(map(len, sequences)) < _TOKENS:
                    sequences += [tokens.ids[:_LONGEST] for tokens in store.sequences(example)]
    return sequences or [np.array(tokenizer(_TEXT)["input_ids"], dtype=np.int32)]


def _log_probabilities(causal: Any, sequences: list[NDArray[np.int32]]) -> list[Tensor]:
    """(tokens, vocabulary) log-probabilities of each sequence, fp32 on the CPU, from the model's own logits."""
    device = causal.get_input_embeddings().weight.device
    with torch.no_grad(), attention(causal, default_attention(causal.config)):
        rows = (torch.as_tensor(ids.astype(np.int64), device=device).unsqueeze(0) for ids in sequences)
        return [causal(input_ids=row, use_cache=False).logits[0].float().log_softmax(-1).cpu() for row in rows]


def _divergence(wanted: list[Tensor], got: list[Tensor]) -> float:
    """Mean KL(wanted || got) over all positions, in nats."""
    sums = [(a.exp() * (a - b)).sum().double() for a, b in zip(wanted, got, strict=True)]
    return float(sum(sums)) / sum(map(len, wanted))
