"""What one base over several processes costs each: torchrun --nproc-per-node 2 scripts/bench_shard.py [BASE]

Bytes at the peak of loading, bytes held by kind against what `lorasft plan` says, and bytes that come in a step by
kind, counted at torch's collectives against their number on paper. BASE: a model folder; without it a random one of 1.1
billion parameters (TinyLlama's shape) is written to a temporary folder, which stays for the next call. A step has 8
rows of 256 tokens. The first call quantizes the base and keeps it: take the numbers of the second.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import lorasft.model  # noqa: F401  which sets up the libraries
from lorasft.data.packing import Plan, Share, assign
from lorasft.data.store import all_supervised
from lorasft.model.adapter import attach_adapter
from lorasft.model.loss import weighted_loss
from lorasft.model.memory import static_bytes
from lorasft.model.recompute import decoder_layers
from lorasft.model.selfcheck import verify
from lorasft.model.shard import keep_whole, load_around, shard_base
from lorasft.model.trained import Trained
from lorasft.model.weightless import make_weightless
from lorasft.recipe import AdapterSettings, ModelSettings
from lorasft.training.distributed import Ranks, join

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
SHAPE |= {"num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048}
LENGTH = 256
ADAPTER = AdapterSettings(rank=16)
came: Counter[str] = Counter()  # bytes from other processes, by kind


def write_base(folder: Path) -> None:
    """A random model of 1.1 billion parameters, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    model.save_pretrained(folder)


def anonymous() -> int:
    """Bytes of this process that no file has."""
    return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))[0]) << 10


@contextlib.contextmanager
def watch_peak() -> Iterator[list[int]]:
    """The most bytes meanwhile, beyond those at the beginning: filled in when it is left."""
    before, done, found = anonymous(), threading.Event(), [0]

    def look() -> None:
        while not done.wait(0.002):
            found[0] = max(found[0], anonymous() - before)

    thread = threading.Thread(target=look)
    thread.start()
    yield found
    done.set()
    thread.join()
    found.append(anonymous() - before)


def count_collectives(count: int) -> None:
    """Count what comes by each collective that FSDP and the sum of gradients use."""
    for name, kind, times in (
        ("all_gather_single", "base", 1.0),
        ("all_gather_into_tensor", "base", 1.0),
        ("all_reduce", "gradient", 2.0),
    ):
        plain = getattr(torch.distributed, name, None)
        if plain:

            def counted(tensor: Any, *given: Any, _: Any = (plain, kind, times), **named: Any) -> Any:
                own, what, factor = _
                came[what] += round(factor * tensor.nbytes * (count - 1) / count)
                return own(tensor, *given, **named)

            setattr(torch.distributed, name, counted)


def held(model: Any) -> dict[str, int]:
    """Bytes of the parameters of this process, by kind as in a plan."""
    sizes: Counter[str] = Counter()
    seen = set()
    for one in model.parameters():
        own = one.to_local() if isinstance(one, DTensor) else one
        if id(one) not in seen:
            kind = "adapter" if one.requires_grad else "16/32-bit weights"
            kind = kind if own.is_floating_point() and one.numel() and not small(one) else "4-bit weights"
            sizes["adapter" if one.requires_grad else kind] += own.nbytes
            seen.add(id(one))
    return sizes


def small(parameter: Any) -> bool:
    """Whether it is constants of constants, which are in fp32: sharded, and of one dimension."""
    return isinstance(parameter, DTensor) and parameter.dim() == 1


def main(ranks: Ranks) -> None:
    """Measure, and print a table in the first process."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir()) / "lorasft-bench-1b"
    ranks.on_main(lambda: None if (folder / "config.json").exists() else write_base(folder))
    settings = ModelSettings(base=str(folder), dtype="float32")
    ranks.shard = ranks.count
    with watch_peak() as memory:
        ranks.on_main(lambda: keep_whole(settings))
        model = attach_adapter(load_around(settings, CPU), ADAPTER, seed=0)
        causal = model.get_base_model()
        shard_base(causal, settings, ranks.shard)
    network = verify(causal)
    weightless = make_weightless(causal.config, settings, ADAPTER, CPU)
    planned = static_bytes(weightless, "adamw", shard=ranks.shard)
    trained = Trained(model, torch.float32)
    rows = [(all_supervised(torch.randint(100, (LENGTH,)).numpy().astype("int32")),) for _ in range(8)]
    sequences = type("Rows", (list,), {"sequences": list.__getitem__})(rows)
    plan = Plan(len(rows), len(rows), 1, seed=0, loss="token", micro_batch_tokens=LENGTH, processes=ranks.count)
    count_collectives(ranks.count)
    mine = assign(plan.step(1, sequences).micro_batches, Share(ranks.index, ranks.count, in_step=True))
    for batch in mine:
        weighted_loss(network, batch).backward()  # type: ignore[no-untyped-call]
    torch.distributed.all_reduce(trained.gradient)
    layers = sum(one.numel() * one.element_size() for layer in decoder_layers(causal) for one in layer.parameters()
                 if isinstance(one, DTensor))  # fmt: skip
    table = causal.get_input_embeddings().weight.nbytes
    share = (ranks.count - 1) / ranks.count
    paper = {
        # Layers forwards and backwards, the embedding forwards and with the first layer backwards, the head once.
        "base": round(len(mine) * (2 * layers + 3 * table) * share),
        "gradient": round(2 * share * trained.gradient.nbytes),
    }
    found = {
        "peak of loading": memory[0],
        "after it": memory[1],
        "held": held(model),
        "came": dict(came),
        "passes": len(mine),
    }
    everyone = ranks.gather(found)
    if ranks.is_main:
        print(json.dumps({"each": everyone, "planned": planned, "paper": paper}, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with join() as together:
        main(together)
