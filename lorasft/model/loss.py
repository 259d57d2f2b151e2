"""Negative log-likelihoods of (source, target) pairs, chunked: no tensor of size tokens x vocabulary exists.

The head is frozen, so the gradient with respect to the hidden states is known as soon as the logits of a chunk
are; it is formed in the forward pass and nothing of a chunk survives but it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorasft.data.packing import MicroBatch
from lorasft.data.prefixes import Sharing
from lorasft.model.attention import read_paths

# A chunk's fp32 logits stay near 32 MB: above that every allocation on a CPU is a fresh mmap whose pages fault in.
_CHUNK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class Head:
    """The output projection and what the model does to its logits: scaled, then capped."""

    weight: Tensor  # (vocabulary, hidden)
    bias: Tensor | None  # (vocabulary,)
    scale: float
    softcap: float | None


def read_head(model: Any) -> Head | None:
    """The head as the config states it, to be checked against the model's own logits.

    None if it is adapted or 4-bit, or if the model does not say what stands below it (Llama 4).
    """
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear or linear.weight.requires_grad or model.base_model is model:
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    return Head(linear.weight, linear.bias, float(scale), getattr(config, "final_logit_softcapping", None))


@dataclass(frozen=True)
class Network:
    """A causal language model and what was verified about it: how its losses may be computed."""

    causal: Any  # transformers' model, with adapters injected where there are any
    head: Head | None  # None: through the model's own `logits_to_keep`, the general and larger way
    segments: bool  # False: sequences go alone, under transformers' own attention
    share: Sharing = False  # whether what sequences begin with in common is computed once
    varlen: bool = False  # attention of all segments in one kernel
    horizon: int | None = None  # sequences up to this length never stand in a row with longer ones
    notices: tuple[str, ...] = ()  # what a person should know about a slower way that was taken

    @property
    def device(self) -> torch.device:
        device: torch.device = self.causal.get_input_embeddings().weight.device
        return device


def pair_losses(network: Network, batch: MicroBatch) -> Tensor:
    """-log p(target | what its source sees) for each pair of `batch`, in nats: (pairs,) fp32.

    The model must run under segment attention if the network can, else the batch holds one sequence.
    """
    model, device = network.causal, network.device
    sources = torch.as_tensor(batch.sources, device=device)
    targets = torch.as_tensor(batch.targets, device=device)
    inputs: dict[str, Any] = {"input_ids": torch.as_tensor(batch.ids, device=device).unsqueeze(0), "use_cache": False}
    if network.segments:
        paths = read_paths(batch.segments, varlen=network.varlen, device=device)
        positions = torch.as_tensor(batch.positions, device=device).unsqueeze(0)
        inputs |= {"position_ids": positions, "segments": paths}
    elif len(batch.segments) > 1:
        raise RuntimeError("several sequences in a row need segment attention")
    if network.head is None:
        logits = model(**inputs, logits_to_keep=sources).logits[0]  # (pairs, vocabulary)
        return F.cross_entropy(logits.float(), targets, reduction="none")
    hidden = model.base_model(**inputs).last_hidden_state[0]  # (tokens, hidden)
    losses: Tensor = ChunkedLoss.apply(hidden[sources], targets, network.head)  # type: ignore[no-untyped-call]
    return losses


class ChunkedLoss(torch.autograd.Function):
    """hidden (pairs, hidden), targets (pairs,), Head -> losses (pairs,) fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head) -> Tensor:
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = max(32, _CHUNK_ELEMENTS // len(head.weight))
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], head.weight, head.bias).float().mul_(head.scale)
            capped = logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap
            total = capped.logsumexp(dim=-1, keepdim=True)
            wanted = targets[part].unsqueeze(1)
            losses[part] = (total - capped.gather(1, wanted)).squeeze(1)
            if slopes is None:
                continue
            slope = capped.sub(total).exp_()  # the softmax, then minus 1 at the target
            slope.scatter_add_(1, wanted, torch.full_like(total, -1.0))
            if head.softcap is not None:
                slope *= 1 - (capped / head.softcap) ** 2
            slopes[part] = slope.mul_(head.scale).to(hidden.dtype) @ head.weight
        ctx.slopes = slopes
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.slopes * upstream[0].unsqueeze(1).to(ctx.slopes.dtype), None, None
