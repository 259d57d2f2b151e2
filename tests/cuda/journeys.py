"""What tests run on the emulated device: python journeys.py NAME WORD...; the last line of stdout is a JSON value."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import emu
import numpy as np
import torch
from tiny_models import CONFIGS, WINDOWS, make_base, randomize_adapter, shape
from transformers import AutoModelForCausalLM, Gemma4TextConfig, Qwen3MoeConfig

import lorasft.model.tables
from lorasft.cli import main
from lorasft.data.packing import make_micro_batches
from lorasft.data.store import all_supervised
from lorasft.model.adapter import attach_adapter, trainable
from lorasft.model.base import count_bytes, load_base, read_config
from lorasft.model.linear import copy_bytes
from lorasft.model.loss import Network, weighted_loss
from lorasft.model.memory import dry_run, heaviest_batch
from lorasft.model.recompute import recompute
from lorasft.model.scoring import score_batches
from lorasft.model.selfcheck import verify
from lorasft.model.trained import Trained
from lorasft.model.weightless import make_weightless, plan_network
from lorasft.recipe import AdapterSettings, ModelSettings
from lorasft.recipe.load import load_recipe
from lorasft.signals import Ended
from lorasft.training import loop
from lorasft.training.run import export_adapter, open_run

Row = dict[str, Any]
CONFIGS["qwen3-moe"] = lambda hidden: Qwen3MoeConfig(
    **shape(hidden), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
)
CONFIGS["packed"] = lambda hidden: Qwen3MoeConfig(
    **shape(hidden), num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64
)
NAMES = ("llama", "qwen3", "gemma2", "gemma3", "gpt2", "qwen3-moe")
FEW = ["train.steps=4", "data.eval=null", "run.eval_every=null", "run.save_every=2", "schedule.warmup=1"]
# Views and new memory are no work of the device.
NO_LAUNCH = re.compile(
    r"aten::(_unsafe_view|_reshape_alias|view|view_as|transpose|t|as_strided|expand|slice|select|squeeze|unsqueeze|detach"
    r"|alias|split|split_with_sizes|permute|empty|empty_like|empty_strided|new_empty|reshape|unbind|resize_)(\..+)?"
)


def command(words: list[str]) -> Row:
    """What `lorasft` says with `words`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def commands(folder: str) -> dict[str, Row]:
    """Every command on the shipped recipe `tiny`: in fp32, to be compared with the CPU's, then as it comes."""
    few, exact = FEW, [*FEW, "model.dtype=float32"]
    done: dict[str, Row] = {"doctor": command(["doctor", "--json"])}
    for name, more in {"fp32": exact, "bf16": few, "8bit": [*exact, "optimizer.name=adamw8bit"]}.items():
        waits: list[dict[str, int]] = []
        with each_step(before=lambda number: emu.clear(), after=lambda waits=waits: waits.append(emu.waits())):
            done[name] = command(["train", "tiny", f"run.output={folder}/{name}", *more]) | {"waits": waits}
    done["resumed"] = resume(f"{folder}/resumed", exact)
    done["redone"] = redo(f"{folder}/redone", few)
    done["plan"] = command(["plan", "tiny", *few, "--json"])
    rows = "recipes/tiny/heldout.jsonl"
    done["evaluate"] = command(["evaluate", f"{folder}/fp32", "--data", rows, "--json"])
    done["chat"] = command(["chat", f"{folder}/fp32", "--prompt", "Who?", "--max-tokens", "4"])
    done["merge"] = command(["merge", f"{folder}/fp32", "--out", f"{folder}/merged"])
    return done


def resume(folder: str, settings: list[str]) -> Row:
    """A run that is stopped in its third step and resumed."""
    words = ["train", "tiny", f"run.output={folder}", *settings]

    def stop(number: int) -> None:
        if number == 3:
            raise Ended(signal.SIGINT)

    with each_step(before=stop):
        stopped = command(words)
    return command([*words, "--resume"]) | {"stopped": stopped["code"]}


@contextlib.contextmanager
def each_step(
    *, before: Callable[[int], None] = lambda number: None, after: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Do something `before` each step, given its number, and `after` it."""
    plain = loop.take_step

    def take_step(run: Any, number: int, stop: Any) -> Row:
        before(number)
        values = plain(run, number, stop)
        after()
        return values

    loop.take_step = take_step
    try:
        yield
    finally:
        loop.take_step = plain


def redo(folder: str, settings: list[str]) -> Row:
    """A run whose device gets smaller after the first micro-batch of its first step, too small for the second."""
    wide = [*settings, "machine.micro_batch_tokens=300", "machine.activation_checkpointing=false"]
    said, recipe = io.StringIO(), load_recipe("tiny", [f"run.output={folder}", *wide])
    plain, calls = loop.weighted_loss, Counter[str]()

    def shrinks(*given: Any) -> torch.Tensor:
        calls["all"] += 1
        if calls["all"] == 2:
            torch.cuda.set_per_process_memory_fraction((held + 0.6 * (peak - held)) / emu.TOTAL)
        return plain(*given)

    gc.collect()  # what earlier runs hold
    with contextlib.redirect_stderr(said), open_run(recipe, resume=False) as (run, state):
        held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        held -= copy_bytes(run.network.causal)  # to give these back is not enough
        loop.weighted_loss = shrinks
        try:
            export_adapter(run, loop.run_steps(run, state))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            loop.weighted_loss = plain
    return {"code": 0, "out": "", "err": said.getvalue()}


def with_adapter(base: Any) -> Network:
    """The verified network of `base` as it is trained, with an adapter whose values matter."""
    model = attach_adapter(base.requires_grad_(False), AdapterSettings(rank=4), seed=0)
    randomize_adapter(model)
    network = verify(model.get_base_model().train())
    Trained(network.causal, network.causal.dtype)
    return network


def batches_of(share: Any, count: int = 4) -> list[Any]:
    """Micro-batches of rows of unequal length, some of which begin alike."""
    draw = torch.Generator().manual_seed(3)
    stem = torch.randint(5, 90, (9,), generator=draw)
    rows = []
    for number in range(4 * count):
        own = torch.randint(5, 90, (5 + 3 * (number % 4),), generator=draw)
        ids = torch.cat([stem, own]) if number % 2 else own
        rows.append(all_supervised(ids.numpy().astype("int32")))
    give = lambda index: (rows[index],)  # noqa: E731
    return list(make_micro_batches(give, range(len(rows)), capacity=60, share=share))


def architectures(dtype: str) -> dict[str, Row]:
    """How far losses and gradients of each architecture on the device, in `dtype`, are from the CPU's in fp32; and how
    far the CPU's in `dtype` are.
    """
    found = {}
    for name in NAMES:
        want = compute(name, torch.float32, "cpu")
        got, usual = (compute(name, getattr(torch, dtype), device) for device in ("cuda", "cpu"))
        network = got["network"]
        found[name] = {
            "losses": distance(got["losses"], want["losses"]),
            "gradients": max(map(distance, got["gradients"], want["gradients"])),
            "usual": max(map(distance, usual["gradients"], want["gradients"])),
            "notices": network.notices,
            "shared": network.share,
            "waits": got["waits"],
        }
    return found


def compute(name: str, dtype: torch.dtype, device: str) -> Row:
    """The losses of a few micro-batches, the gradients of all of them, and what was waited for, also to score rows."""
    network = with_adapter(make_base(name).to(dtype).to(device))
    emu.clear()
    losses = [weighted_loss(network, batch) for batch in batches_of(network.share)]
    torch.stack(losses).sum().backward()
    rows = [all_supervised(np.arange(5, 9 + number, dtype=np.int32)) for number in range(8)]
    list(score_batches(network, lambda index: (rows[index],), range(len(rows)), capacity=20))
    waits = emu.waits()
    gradients = [one.grad.cpu() for one in trainable(network.causal).values()]
    return {"network": network, "losses": torch.stack(losses).detach().cpu(), "gradients": gradients, "waits": waits}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def old_card(folder: str) -> Row:
    """On a card without bf16: a run, one that asks for bf16, and the architectures in fp32."""
    words = ["train", "tiny", *FEW]
    done = {"auto": command([*words, f"run.output={folder}/auto"])}
    done["bf16"] = command([*words, f"run.output={folder}/bf16", "model.dtype=bfloat16"])
    shutil.copytree(f"{folder}/../bf16", f"{folder}/begun")
    for last in ("adapter", "checkpoints/step-000004"):
        shutil.rmtree(f"{folder}/begun/{last}")
    done["resumed"] = command([*words, f"run.output={folder}/begun", "--resume"])
    return done | {"architectures": architectures("float32")}


def refused(folder: str) -> dict[str, Row]:
    """On a card that torch has no kernels for."""
    rows = "recipes/tiny/heldout.jsonl"
    return {
        "train": command(["train", "tiny", f"run.output={folder}/run"]),
        "plan": command(["plan", "tiny"]),
        "evaluate": command(["evaluate", "recipes/tiny/base", "--data", rows]),
        "doctor": command(["doctor"]),
    }


def launches(folder: str) -> Row:
    """Dispatches that are work of the device, a Llama layer in NF4 and micro-batch, forwards and backwards; memory."""
    found: Row = {}
    for layers in (2, 4):
        make_base("llama", hidden=64, layers=layers).save_pretrained(f"{folder}/{layers}")
    for name in ("kept", "recomputed"):
        counted = []
        for layers in (2, 4):
            base = load_base(ModelSettings(base=f"{folder}/{layers}", dtype="bfloat16"), torch.device("cuda"))
            network = with_adapter(base)
            recompute(network.causal, layers if name == "recomputed" else 0)
            network.causal.frozen_weights.forget("layer")
            for batch in batches_of(share=False)[:2]:
                emu.clear()
                weighted_loss(network, batch).backward()
            counted.append(sum(number for one, number in emu.report().items() if not NO_LAUNCH.fullmatch(one)))
        found[name] = (counted[1] - counted[0]) / 2
    return found | {"memory": memory(f"{folder}/memory")}


def experts(folder: str) -> dict[str, Row]:
    """How far losses and gradients of experts in 4 bit on the device are from the CPU's, all of a layer at once or one
    by one; what was waited for; and memory over what was predicted.
    """
    make_base("packed", hidden=64).save_pretrained(folder)
    found = {}
    for dtype in ("float32", "bfloat16"):
        want = None
        for name, whole in (("cpu", False), ("at once", True), ("one by one", False)):
            base = load_base(ModelSettings(base=folder, dtype=dtype), torch.device("cpu" if name == "cpu" else "cuda"))
            network = with_adapter(base)
            assert base.frozen_weights.whole == (name != "cpu")
            base.frozen_weights.whole = whole
            emu.clear()
            losses = torch.stack([weighted_loss(network, batch) for batch in batches_of(network.share)])
            losses.sum().backward()
            waits = emu.waits()
            got = [losses.detach().cpu(), *(one.grad.cpu() for one in trainable(network.causal).values())]
            want = want or got
            apart = [distance(*both) for both in zip(got, want, strict=True)]
            found[f"{dtype}, {name}"] = {"losses": apart[0], "gradients": max(apart[1:]), "waits": waits}
    return found | {"memory": {str(whole): memory(folder, "packed", whole) for whole in (True, False)}}


def memory(folder: str, name: str = "llama", whole: bool = False) -> list[list[float]]:
    """What a micro-batch keeps and needs at its peak, over what was predicted, with 0, 1 and 3 layers recomputed."""
    make_base(name, hidden=128, layers=3).save_pretrained(folder)
    settings, device = ModelSettings(base=folder, dtype="bfloat16"), torch.device("cuda")
    network = with_adapter(load_base(settings, device))
    network.causal.frozen_weights.whole = whole
    planned = plan_network(network, make_weightless(read_config(folder), settings, AdapterSettings(rank=4), device))
    batch, found = heaviest_batch(network, longest=100, capacity=1000), []
    for count in (0, 1, 3):
        needs = dry_run(planned, batch, recomputed=count)
        recompute(network.causal, count)
        weighted_loss(network, batch).backward()  # makes what is made once
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = weighted_loss(network, batch)
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        found.append([kept / needs.kept, (torch.cuda.max_memory_allocated() - before) / needs.peak])
        del loss
    return found


def tables(folder: str) -> Row:
    """A model with an embedding too large for the card, beside itself on the CPU: where its bytes are, and its step."""
    lorasft.model.tables._SHARE = 1 << 12  # of the card; transformers cannot load onto one of less than 1.2 GiB
    more = {"vocab_size_per_layer_input": 1 << 15, "hidden_size_per_layer_input": 64, "num_kv_shared_layers": 0}
    config = Gemma4TextConfig(**shape(64), **WINDOWS, **more, global_head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    settings, found = ModelSettings(base=folder, dtype="float32"), {}
    for device in ("cpu", "cuda"):
        base = load_base(settings, torch.device(device))
        found[f"{device} table"] = str(base.model.embed_tokens_per_layer.weight.device)
        network = with_adapter(base)
        losses = [weighted_loss(network, batch) for batch in batches_of(network.share)]
        torch.stack(losses).sum().backward()
        rows = base.model.embed_tokens_per_layer(torch.arange(90, device=device).view(1, -1))
        found[device] = [torch.stack(losses).detach().cpu(), *(one.grad.cpu() for one in trainable(base).values())]
        found[f"{device} rows"] = rows.cpu()
    planned = make_weightless(config, settings, AdapterSettings(rank=4), torch.device("cuda"))
    return {
        "places": [found["cpu table"], found["cuda table"]],
        "same rows": torch.equal(found["cpu rows"], found["cuda rows"]),
        "apart": max(map(distance, found["cuda"], found["cpu"])),
        "peak": torch.cuda.max_memory_allocated(),
        "counted": [sum(count_bytes(one).values()) for one in (network.causal, planned)],
        "host": sum(one.nbytes for one in planned.parameters() if hasattr(one, "on_host")),
    }


if __name__ == "__main__":
    value = globals()[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(value, default=str))
