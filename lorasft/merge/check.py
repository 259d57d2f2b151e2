"""Which base does the adapter belong on, and does the merge answer as what was trained? Both are measured.

The reference is what was trained: for a run in 4 bit the NF4 base with the adapter on it. The candidates are the base's
own weights and the weights that NF4 made of them. A model that does not fit in memory is streamed from its files, a
layer at a time.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from lorasft.artifact import Artifact, find_artifact
from lorasft.data.tokens import UNSUPERVISED, Tokens
from lorasft.errors import ModelError
from lorasft.merge.plan import Choice, Onto
from lorasft.merge.probes import read_probes
from lorasft.model.free_memory import free_memory
from lorasft.model.saved import load_artifact
from lorasft.recipe import DataSource

_ROUNDING = 1e-2  # nats: more than bf16 ever does to an answer


@dataclass(frozen=True)
class Answers:
    """What a model says where something was learned: log-probabilities, fp32 on the CPU."""

    logs: Tensor  # (pairs, vocabulary)
    nll: Tensor  # (sequences,) summed over the pairs of each


@dataclass(frozen=True)
class Distance:
    """How far a model is from what was trained, over the learned tokens of held-out rows."""

    kl: float  # mean KL(trained || model), nats a token
    same_choice: float  # share of tokens at which the likeliest one is the same
    nll: float  # of the model, nats a token

    @classmethod
    def between(cls, trained: Answers, model: Answers) -> Distance:
        a, b = trained.logs, model.logs
        kl = float((a.exp() * (a - b)).sum(dim=-1).double().mean())
        same = float((a.argmax(-1) == b.argmax(-1)).double().mean())
        return cls(kl, same, float(model.nll.sum()) / len(b))


class Judge:
    """Compares candidates with what was trained, on the given rows."""

    def __init__(self, artifact: Artifact, rows: Sequence[Tokens], device: torch.device, *, origin: str) -> None:
        """Loads what was trained, asks it and lets it go. `origin`: where the rows come from."""
        self.artifact, self.rows, self.device, self.origin = artifact, rows, device, origin
        self.table: dict[str, Distance] = {}
        self.four_bit = artifact.model.quantization == "nf4"
        model = _load(artifact, device)
        self.trained = ask(model, rows)
        with model.disable_adapter():
            untuned = ask(model, rows)
        del model
        self.table["trained"] = Distance.between(self.trained, self.trained)
        self.table["without the adapter"] = Distance.between(self.trained, untuned)
        self.wanted: dict[Onto, Answers] = {"dequantized" if self.four_bit else "original": self.trained}

    def choose(self) -> Choice:
        """The base whose answers to held-out rows are likelier; between equals the one nearer to what was trained."""
        if not self.four_bit:
            return Choice("original", "the run was not in 4 bit")
        original = self._ask_original()
        gains = (self.trained.nll - original.nll).double() / (len(self.trained.logs) / len(self.rows))
        gain, error = float(gains.mean()), float(gains.std()) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
        if gain > 2 * error:
            return Choice(
                "original", f"its answers to held-out rows are likelier by {gain:.4f} ± {error:.4f} nats a token"
            )
        kl = self.table["onto original, before rounding"].kl
        return Choice("dequantized", f"the original is {kl:.1e} nats a token away from what was trained")

    def verify(self, merged: Path, onto: Onto) -> None:
        """Ask the merged weights. Raises ModelError when they differ from base and adapter by more than rounding."""
        if onto == "original" and onto not in self.wanted:
            self._ask_original()
        answers = ask(_load(find_artifact(str(merged)), self.device), self.rows)
        self.table["merged"] = Distance.between(self.trained, answers)
        off = Distance.between(self.wanted.get(onto, self.trained), answers).kl
        learned = self.table["without the adapter"].kl
        if not off <= max(learned, _ROUNDING):
            what = f"the merged model does not answer like its base with the adapter: {off:.1e} nats a token apart"
            raise ModelError(what, where=str(merged), hint=f"the adapter moves the base by {learned:.1e}")

    def note(self, name: str, folder: Path) -> None:
        """Put the model in `folder` into the table."""
        self.table[name] = Distance.between(
            self.trained, ask(_load(find_artifact(str(folder)), self.device), self.rows)
        )

    def _ask_original(self) -> Answers:
        own = replace(self.artifact, model=self.artifact.model.model_copy(update={"quantization": "none"}))
        self.wanted["original"] = ask(_load(own, self.device), self.rows)
        self.table["onto original, before rounding"] = Distance.between(self.trained, self.wanted["original"])
        return self.wanted["original"]


def make_judge(artifact: Artifact, data: DataSource | None) -> Judge:
    """A judge on the held-out rows of the run or on those in `data`. Raises DataError when there are no rows."""
    config = artifact.base_config
    vocabulary = config.get("vocab_size") or config["text_config"]["vocab_size"]
    rows, origin = read_probes(artifact, data=data, vocabulary=vocabulary)
    return Judge(artifact, rows, PartialState().device, origin=origin)


def ask(model: Any, rows: Sequence[Tokens]) -> Answers:
    """The log-probabilities of all tokens wherever `rows` learn one, from the model's own logits."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    logs, nll = [], []
    with torch.no_grad():
        for row in rows:
            places = torch.from_numpy((row.labels != UNSUPERVISED).nonzero()[0])
            ids = torch.from_numpy(row.ids.astype("int64"))
            inputs = {"input_ids": ids.unsqueeze(0).to(device), "logits_to_keep": (places - 1).to(device)}
            logits = model(**inputs, use_cache=False).logits[0]
            said = logits.float().log_softmax(-1).cpu()
            logs.append(said)
            nll.append(-said.gather(1, ids[places].unsqueeze(1)).sum())
    return Answers(torch.cat(logs), torch.stack(nll))


def _load(artifact: Artifact, device: torch.device) -> Any:
    """The model on `device`, or streamed from its files where it does not fit."""
    gc.collect()
    whole = artifact.model.quantization == "none"
    size = sum(file.stat().st_size for file in artifact.base.glob("*.safetensors")) if whole else 0
    return load_artifact(artifact, device, streamed=size > 0.8 * free_memory(device))
