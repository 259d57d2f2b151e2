"""Losses and log-probabilities of rows, answers that a model gives itself, and whether an adapter makes them better.

What training runs under is restored after each of them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList, TextStreamer

from lorasft.artifact import list_stops
from lorasft.data.packing import MicroBatch, Sequences, Share, assign, make_micro_batches
from lorasft.data.prepare import Prepared, prepare, settings_for
from lorasft.data.sources import RowLocation
from lorasft.data.store import all_supervised, supervised_runs
from lorasft.errors import DataError, DivergedError, ModelError
from lorasft.model.attention import default_attention, evaluating
from lorasft.model.loss import Network, pair_losses
from lorasft.recipe import ChatSettings, DataSettings, DataSource
from lorasft.terminal import say

_CAPACITY = 2048  # tokens of answers that are scored at once
_AT_ONCE = 8  # answers that are generated together
_AROUND, _ENDS = "\"'`*_()[]{}“”‘’«» ", ".,;:!?…。"
_GROUP = 64  # examples cut together: enough to fill micro-batches well, few enough to bound what is held


def score_batches(
    network: Network,
    sequences: Sequences,
    examples: Sequence[int],
    *,
    capacity: int,
    share: Share = Share(),  # noqa: B008  frozen
    explain: Callable[[MicroBatch], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[tuple[MicroBatch, Tensor]]:
    """Micro-batches of `examples` and the losses of their pairs, (pairs,) each, with the model in evaluation mode.

    Of several processes those of `share`. `explain`: a context round each computation, which says what an error means.
    The model is put back into the mode that it was in.
    """
    room = capacity if network.segments else 1
    cut = partial(make_micro_batches, sequences, capacity=room, processes=share.count, share=network.share)
    with evaluating(network.causal):
        for start in range(0, len(examples), _GROUP):
            batches = cut(examples[start : start + _GROUP], rope_switch_length=network.rope_switch_length)
            for batch in assign(batches, share):
                with torch.no_grad(), explain(batch):
                    losses = pair_losses(network, batch)
                yield batch, losses


def log_probabilities(
    network: Network, sequences: Sequence[NDArray[np.int32]], *, capacity: int
) -> list[NDArray[np.float64]]:
    """log p(token | tokens before it), natural, for each sequence from its second token on: (length - 1,) each."""
    scores = [np.zeros(max(0, len(ids) - 1)) for ids in sequences]
    rows = [(all_supervised(ids),) for ids in sequences]
    for batch, losses in score_batches(network, rows.__getitem__, range(len(rows)), capacity=capacity):
        found = -losses.double().cpu().numpy()
        for example in np.unique(batch.examples):
            scores[example][:] = found[batch.examples == example]
    return scores


def check_ids(sequences: Iterable[NDArray[np.int32]], rows: int, *, where: str | None = None) -> None:
    """Raise ModelError for ids that an embedding of so many `rows` has no row for, at which a GPU would only assert."""
    if (most := max(int(ids.max()) for ids in sequences)) >= rows:
        what = f"the tokenizer gives id {most}, the model has {rows} embedding rows"
        raise ModelError(what, where=where, hint="use the tokenizer that belongs to the model")


@dataclass(frozen=True)
class Answer:
    """One answer: ids[:start] is x, ids[start:] is y. An example has as many as it has learned turns."""

    ids: NDArray[np.int32]
    start: int
    place: RowLocation


def read_answers(
    source: DataSource, data: DataSettings, chat: ChatSettings, *, tokenizer: Any
) -> tuple[list[Answer], Prepared]:
    """The answers in the rows of `source`, tokenized as training would, and what else was prepared, its files excepted.
    Raises DataError when there are no answers."""
    with TemporaryDirectory(prefix="lorasft-") as folder:
        prepared = prepare(settings_for(source, data), chat, tokenizer=tokenizer, folder=Path(folder), workers=1)
        for notice in prepared.report.notices():
            say(notice)
        answers = [
            Answer(tokens.ids[:end], max(1, int(start)), prepared.store.place(example))
            for example in range(len(prepared.store))
            for tokens in prepared.store.sequences(example)
            for start, end in supervised_runs(tokens)
        ]
    return answers, prepared


def score_answers(network: Network, answers: Sequence[Answer]) -> list[dict[str, float]]:
    """The log-probabilities of every answer, natural, summed over tokens (the first of all has no source); its loss.

    x and [x, y] go through separate passes, so that log Pr(y|x) = log Pr([x,y]) - log Pr(x) is a real test. Raises
    DivergedError for one that is not finite.
    """
    check_ids([answer.ids for answer in answers], network.causal.config.get_text_config().vocab_size)
    wholes = log_probabilities(network, [answer.ids for answer in answers], capacity=_CAPACITY)
    prompts = log_probabilities(network, [answer.ids[: answer.start] for answer in answers], capacity=_CAPACITY)
    scores = []
    for answer, whole, prompt in zip(answers, wholes, prompts, strict=True):
        sums = {"log_prob_y_given_x": whole[answer.start - 1 :], "log_prob_x": prompt, "log_prob_xy": whole}
        scores.append({name: float(numbers.sum()) for name, numbers in sums.items()})
        if not all(map(math.isfinite, scores[-1].values())):
            what = f"the log-probabilities of an answer are not finite, in {network.causal.dtype}"
            raise DivergedError(what, where=answer.place, hint="another --dtype; else the weights are broken")
        scores[-1]["tokens"] = len(answer.ids) - answer.start
        scores[-1]["loss"] = -scores[-1]["log_prob_y_given_x"] / scores[-1]["tokens"]
    return scores


def generate_answers(
    network: Network, tokenizer: Any, answers: Sequence[Answer], stops: Sequence[int], most: int | None
) -> Iterator[tuple[int, str, bool]]:
    """What the model answers to the prompts, greedily: the number of the answer; its text, with special tokens, without
    the stop; whether it ended by itself. `most`: tokens; None: twice as many as expected, and 32."""
    order = sorted(range(len(answers)), key=lambda number: len(answers[number].ids))
    # What is recurrent may see the padding: it is known of a row of several sequences only that attention does not.
    at_once = _AT_ONCE if network.segments and not (network.mixer or network.told) else 1
    for first in range(0, len(order), at_once):
        batch = [answers[number] for number in order[first : first + at_once]]
        limit = most or 2 * max(len(one.ids) - one.start for one in batch) + 32
        prompts = [one.ids[: one.start].tolist() for one in batch]
        given = generate(network.causal, tokenizer, prompts, max_new_tokens=limit, stops=stops)
        for number, (ids, ended) in zip(order[first:], given, strict=False):
            yield number, tokenizer.decode(ids), ended


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
        raise DataError(f"the prompt has {length} tokens, the model {positions} positions", hint="a shorter prompt")
    stops = sorted({*stops, *list_stops(causal.generation_config.eos_token_id)})
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p} if temperature > 0 else {}
    config = GenerationConfig(
        **sampling,
        max_new_tokens=min(max_new_tokens, positions - length),
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


def match(answer: str, expected: str) -> dict[str, bool]:
    """Whether an answer is the expected one, but for blanks around it; and whether it is when case and form of letters,
    blanks, quotes, brackets and marks of emphasis around it and what ends a sentence are set aside. Signs of numbers,
    what is inside, and a text of nothing else count."""
    texts = [" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in (answer, expected)]
    plain = [text.lstrip(_AROUND).rstrip(_AROUND + _ENDS) or text for text in texts]
    return {"exact_match": answer.strip() == expected.strip(), "normalised_match": plain[0] == plain[1]}


def compare_with_base(lines: Sequence[dict[str, Any]], name: str) -> dict[str, list[float]]:
    """The model `name` - base, of the loss and of generated answers' matches: the mean, and its 95 % interval.

    The paired bootstrap by percentiles (Efron and Tibshirani 1993; Koehn 2004): rows, told apart by their `source`, are
    drawn anew, each with all its answers, by both models: what makes rows differ from one another does not count.
    """
    found, (_, rows) = {}, np.unique([str(line["source"]) for line in lines], return_inverse=True)
    for key in [key for key in ("loss", "exact_match", "normalised_match") if key in lines[0][name]]:
        counts = np.array([line["tokens"] if key == "loss" else 1.0 for line in lines])
        changes = np.array([float(line[name][key]) - line["base"][key] for line in lines]) * counts
        sums, sizes = np.bincount(rows, changes), np.bincount(rows, counts)
        generator, count = np.random.default_rng(0), len(sums)
        draws = (generator.integers(count, size=count) for _ in range(2000))
        means = [sums[drawn].sum() / sizes[drawn].sum() for drawn in draws]
        found[key] = [float(changes.sum() / counts.sum()), *np.percentile(means, [2.5, 97.5]).tolist()]
    return found


def summarize(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean negative log-likelihood per token of the answers, in nats, its perplexity, and the counts; of generated
    ones the shares that match and that ended by themselves."""
    tokens = sum(score["tokens"] for score in scores)
    loss = -sum(score["log_prob_y_given_x"] for score in scores) / tokens
    perplexity = math.exp(min(loss, 700.0))  # beyond that fp64 ends
    found = {"loss": loss, "perplexity": perplexity, "tokens": tokens, "answers": len(scores)}
    names = [name for name in ("exact_match", "normalised_match", "ended") if name in scores[0]]
    return found | {name: sum(score[name] for score in scores) / len(scores) for name in names}
