"""Negative log-likelihoods of (source, target) pairs, chunked: no tensor of size tokens x vocabulary exists.

The head is frozen, so the gradient with respect to the hidden states is known as soon as the logits of a chunk
are; it is formed in the forward pass and nothing of a chunk survives but it, and the columns of trained rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lorasft.data.packing import MicroBatch
from lorasft.data.prefixes import Sharing
from lorasft.model.attention import Paths, Shape
from lorasft.model.linear import trained_rows

# Pairs of a chunk, whose logits exist at a time: on a CPU few; on a GPU whole tiles of the product, up to 1,024, as far
# as their logits take no more than a 64th of its memory.
_CHUNK_PAIRS, _TILE, _MOST_PAIRS, _MEMORY_SHARE = 192, 128, 1024, 64
# On a CPU oneDNN compiles a kernel of 16 bits for each number of rows: up to a fifth of a step (8 rows of Alpaca, 56
# million parameters). Rounded up to multiples of so many, the numbers come again, and what they cost is less.
_ROUND = 64


@dataclass(frozen=True)
class Head:
    """The output projection and what the model does to its logits: scaled, then capped."""

    weight: Tensor  # (vocabulary, hidden)
    bias: Tensor | None  # (vocabulary,)
    scale: float
    softcap: float | None
    chunk: int = _CHUNK_PAIRS  # pairs whose logits exist at a time
    fp32_logits: int = 1 << 20  # that exist at a time: on a CPU what its caches hold, on a GPU enough to keep it busy


def read_head(model: Any, device: torch.device | None = None) -> Head | None:
    """The head as the config states it, to be checked against the model's own logits.

    `device`: where it is used, if not where it is.
    None if it is adapted or 4-bit, or if the model does not say what is below it (Llama 4).
    """
    module = model.get_output_embeddings()
    linear = module.original_module if hasattr(module, "tokens") else module
    if type(linear).forward is not nn.Linear.forward or linear.weight.requires_grad or model.base_model is model:
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    softcap = getattr(config, "logits_soft_cap", getattr(config, "final_logit_softcapping", None))  # RecurrentGemma
    head = Head(linear.weight, linear.bias, float(scale), softcap)
    if (device or linear.weight.device).type != "cuda":
        return head
    share = torch.cuda.get_device_properties(device).total_memory // _MEMORY_SHARE
    chunk = min(max(1, share // (2 * len(linear.weight)) // _TILE) * _TILE, _MOST_PAIRS)
    return replace(head, chunk=chunk, fp32_logits=1 << 24)


@dataclass(frozen=True)
class Network:
    """A causal language model and what was verified about it: how its losses may be computed."""

    causal: Any  # transformers' model, with adapters injected where there are any
    head: Head | None  # None: through the model's own `logits_to_keep`, the general and larger way
    segments: bool  # False: sequences go alone, under transformers' own attention
    share: Sharing = False  # whether what sequences begin with in common is computed once
    mixer: type[nn.Module] | None = None  # the kind of module that is called for each segment of a row
    told: bool = False  # its mixers are told where segments begin: kernels of fla and causal-conv1d ask for that
    lean: bool = False  # norms, MLPs and rotary embeddings that keep less
    kernel: Callable[[Shape], bool] | None = None  # whether one computes attention over all segments, by layer
    rope_switch_length: int | None = None  # sequences up to this length are never in a row with longer ones
    notices: tuple[str, ...] = ()  # what a person should know about a slower way that was taken
    planned: torch.device | None = None  # where a model on the meta device would run

    @property
    def device(self) -> torch.device:
        device: torch.device = self.causal.device
        return device

    @property
    def runs_on(self) -> torch.device:
        """The device whose ways of computing are taken."""
        return self.planned or self.device


def pair_losses(network: Network, batch: MicroBatch) -> Tensor:
    """-log p(target | what its source sees) for each pair of `batch`, in nats: (pairs,) fp32.

    The model must run under segment attention if the network can, else the batch holds one sequence.
    """
    model, device, pairs = network.causal, network.device, len(batch.sources)
    on_cpu = network.runs_on.type == "cpu"
    if network.segments and on_cpu and model.dtype.itemsize == 2 and not batch.spread:
        batch = round_up(batch)
    lengths = [segment.end - segment.start for segment in batch.segments]
    ancestors = [segment.ancestors for segment in batch.segments]
    paths = Paths(lengths, ancestors, cascade=on_cpu, kernel=network.kernel, spread=batch.spread)
    rows = (batch.ids, batch.positions, batch.sources, batch.targets)
    owners = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)  # the number of each token's segment
    ids, positions, sources, targets, owner, *places = send((*rows, owners, *paths.numbers), device)
    inputs: dict[str, Any] = {"input_ids": ids.unsqueeze(0), "use_cache": False}
    if network.segments:
        inputs |= {"position_ids": positions.unsqueeze(0), "segments": replace(paths, places=places)}
    if network.told:
        inputs |= {"cu_seq_lens_q": places[0], "cu_seq_lens_k": places[0], "seq_idx": owner.unsqueeze(0)}
    with patch.object(model, "row", lengths, create=True):  # for its mixers: not all models hand on what they are given
        if network.head is None:
            logits = model(**inputs, logits_to_keep=sources).logits.squeeze(0)  # (pairs, vocabulary)
            return F.cross_entropy(logits.float(), targets, reduction="none")[:pairs]
        hidden = model.base_model(**inputs).last_hidden_state.squeeze(0)  # (tokens, hidden)
    rows = hidden[sources].to(network.head.weight.dtype)  # a residual may be in fp32 (Mamba)
    with whole_head(model, network.head.weight) as weight:
        head, own = replace(network.head, weight=weight), trained_rows(model.get_output_embeddings())
        losses: Tensor = ChunkedLoss.apply(rows, targets, head, *own)  # type: ignore[no-untyped-call]
    return losses[:pairs]


@contextlib.contextmanager
def whole_head(model: Any, weight: Any = None) -> Iterator[Tensor]:
    """The `weight` of the head of `model`; where it lies over several processes, gathered for as long as it is used."""
    holder = getattr(model, "head_holder", None)
    if holder is None:
        yield weight
        return
    holder.unshard()
    try:
        yield holder.weight
    finally:
        holder.reshard()


def weighted_loss(network: Network, batch: MicroBatch) -> Tensor:
    """The losses of the pairs of `batch`, each times its weight, summed: () fp32."""
    (weights,) = send([batch.weights], network.device)
    return (pair_losses(network, batch) * weights).sum()


def send(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """`arrays` on `device`, in one copy; the host does not wait for it where it goes to CUDA, from pinned memory."""
    given = [torch.from_numpy(array) for array in arrays]
    sizes = [-(-tensor.nbytes // 8) * 8 for tensor in given]  # a view begins at a multiple of what a number takes
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for tensor, part in zip(given, torch.split(buffer, sizes), strict=True):
        part[: tensor.nbytes].view(tensor.dtype).copy_(tensor)
    there = torch.split(buffer.to(device, non_blocking=True), sizes)  # torch keeps pinned memory until its copy is done
    return [part[: tensor.nbytes].view(tensor.dtype) for tensor, part in zip(given, there, strict=True)]


def round_up(batch: MicroBatch) -> MicroBatch:
    """`batch` with its last token and its last pair repeated, each up to a multiple of 64: at the end of the last
    segment, where no other token sees them."""
    tokens, pairs = (-len(numbers) % _ROUND for numbers in (batch.ids, batch.sources))
    last = batch.segments[-1]
    more: dict[str, Any] = {"ids": tokens, "positions": tokens, "sources": pairs, "targets": pairs}
    padded: dict[str, Any] = {
        name: np.pad(getattr(batch, name), (0, count), mode="edge") for name, count in more.items()
    }
    return replace(batch, segments=(*batch.segments[:-1], replace(last, end=last.end + tokens)), **padded)


class ChunkedLoss(torch.autograd.Function):
    """hidden (pairs, hidden), targets (pairs,), Head, and its `trained_rows` -> losses (pairs,) fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, tokens: Any = None, own: Any = None) -> Tensor:
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        chunk = max(1, min(len(targets), head.chunk))
        memory = hidden.new_empty(chunk, len(head.weight))  # one for the logits of all chunks
        rows = max(1, head.fp32_logits // len(head.weight))
        tokens, own = (targets[:0], hidden.new_empty(0, hidden.shape[1])) if own is None else (tokens, own.to(hidden))
        grad_own = hidden.new_empty(len(targets), len(own))  # over the logits of trained rows
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = torch.mm(hidden[part], head.weight.t(), out=memory[: len(hidden[part])])
            logits.index_copy_(1, tokens, hidden[part] @ own.t())
            if head.bias is not None:
                logits.add_(head.bias)
            pieces = (torch.split(one, rows) for one in (logits, targets[part], losses[part]))
            for some, wanted, found in zip(*pieces, strict=True):
                _cross_entropy(some, wanted, found, head, with_gradient=grad_hidden is not None)
            if grad_hidden is not None:
                grad_own[part] = logits[:, tokens]
                torch.mm(logits.index_fill_(1, tokens, 0), head.weight, out=grad_hidden[part])
                grad_hidden[part].addmm_(grad_own[part], own)
        ctx.save_for_backward(grad_hidden, *((grad_own, hidden) if len(own) else ()))
        ctx.scale = head.scale
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *own = ctx.saved_tensors
        scales = (upstream[0] * ctx.scale).unsqueeze(1).to(grad_hidden.dtype)  # (pairs, 1)
        grad_rows = (own[0] * scales).t() @ own[1] if own else None  # (tokens, hidden)
        return grad_hidden * scales, None, None, None, grad_rows


def _cross_entropy(logits: Tensor, targets: Tensor, losses: Tensor, head: Head, *, with_gradient: bool) -> None:
    """Write the `losses` (rows,) of `logits` (rows, vocabulary), and over these the gradient by scaled ones.

    In 16 bits three kernels pass over the rows, a cast, a softmax and an exponential; a soft cap takes four more.
    """
    exact = logits.float().mul(head.scale) if head.scale != 1 else logits
    if head.softcap is not None:
        bent = torch.tanh(exact.float() / head.softcap)
        exact = bent * head.softcap
    logs = torch.log_softmax(exact, dim=-1, dtype=torch.float32)
    wanted = targets.unsqueeze(1)
    torch.neg(logs.gather(1, wanted).squeeze(1), out=losses)
    if not with_gradient:
        return
    grads = torch.exp(logs, out=logits if head.softcap is None else logs)
    grads.scatter_(1, wanted, torch.expm1(-losses).unsqueeze(1).to(grads.dtype))  # p - 1, exact also where p is near 1
    if head.softcap is not None:
        logits.copy_(torch.ops.aten.tanh_backward(grads, bent))
