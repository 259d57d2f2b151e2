"""One base over several processes, and one row: the losses and gradients of one process that holds everything.

The oracle is plain transformers and PEFT in fp32, with the numbers that bitsandbytes takes out of the same 4-bit base.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from conftest import save_base
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_experts import save as save_experts
from test_oracles import Rows, assert_same_step, gradients, plain_step
from test_ranks import Launch, some, step_run
from test_train import metrics
from tiny_models import randomize_adapter

from lorasft.cli import main
from lorasft.errors import CapacityError
from lorasft.files import read_objects, verify_folder
from lorasft.model import scoring, selfcheck
from lorasft.model.adapter import attach_adapter
from lorasft.model.base import load_base
from lorasft.model.experts import _dequantize
from lorasft.model.loss import weighted_loss
from lorasft.model.recompute import recompute
from lorasft.model.selfcheck import verify
from lorasft.model.shard import keep_whole, load_around, shard_base
from lorasft.recipe import AdapterSettings, ModelSettings
from lorasft.signals import StopRequest
from lorasft.training import checkpoint, layout, loop, samples
from lorasft.training import metrics as metrics_module
from lorasft.training import run as runs
from lorasft.training.distributed import Ranks, join

CPU = torch.device("cpu")
ADAPTER = AdapterSettings(rank=4, alpha=8)
Write = Callable[..., str]


def settings_of(base: Path) -> ModelSettings:
    return ModelSettings(base=str(base), dtype="float32")


def plain_model(base: Path) -> Any:
    """The 4-bit base as one in fp32, under PEFT's own linears."""
    packed, model = load_base(settings_of(base), CPU), load_base(replace_quantization(base), CPU)
    linears = dict(model.named_modules())
    for path, one in packed.named_modules():
        if isinstance(one, bnb.nn.Linear4bit):
            linears[path].weight.data = bnb.functional.dequantize_4bit(one.weight.data, one.weight.quant_state)
    found = [path for path, one in packed.named_modules() if isinstance(one, bnb.nn.Linear4bit)]
    for path, one in packed.named_modules():
        for name in getattr(one, "packed", ()):
            getattr(linears[path], name).data = _dequantize(one, name, slice(None), torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=found))
    randomize_adapter(model)
    return model


def replace_quantization(base: Path) -> ModelSettings:
    return settings_of(base).model_copy(update={"quantization": "none"})


def sharded_model(base: Path, ranks: Ranks) -> Any:
    """As a run loads it that lies over `ranks.shard` processes."""
    ranks.on_main(lambda: keep_whole(settings_of(base)))
    model = attach_adapter(load_around(settings_of(base), CPU), ADAPTER, seed=0)
    shard_base(model.get_base_model(), settings_of(base), ranks.shard)
    randomize_adapter(model)
    return model


def long_rows(count: int, *, share: bool) -> Rows:
    """Some rows, of which the first is longer than a micro-batch."""
    rows = some(count, share=share)
    tokens, *others = rows.rows[0]
    longer = replace(tokens, ids=np.tile(tokens.ids, 5)[:61], labels=np.tile(tokens.labels, 5)[:61])
    rows.rows[0] = (longer, *others)
    return rows


# Rows, tokens of a micro-batch, prefixes shared, rows spread, layers recomputed.
STEPS = [
    (6, 1000, False, False, 0),  # one micro-batch: others have nothing to do
    (6, 20, False, False, 1),
    (6, 40, True, False, 2),
    (6, 40, False, True, 1),
    (6, 40, True, True, 0),
]
BASES = ("llama", "gemma3", "qwen-3-moe")  # with a head of its own; tied, with windows; with experts in 4 bit


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in BASES}
    return {name: (save_experts if "moe" in name else save_base)(folder, name) for name, folder in folders.items()}


@pytest.mark.parametrize(("count", "shard", "names"), [(2, 2, BASES), (3, 3, BASES[:1]), (4, 2, BASES[1:2])])
def test_sharded_steps_are_those_of_one_process(
    count: int, shard: int, names: tuple[str, ...], bases: dict[str, Path], tmp_path: Path
) -> None:
    """Also of three, one of which may be idle, and with two copies of the base."""

    def act(rank: int) -> None:
        with join() as ranks:
            ranks.shard = shard
            for name in names:
                model = sharded_model(bases[name], ranks)
                network = verify(model.get_base_model())
                assert network.head is not None and network.segments and network.share
                for number, (size, capacity, share, spreads, layers) in enumerate(STEPS):
                    ranks.spread = spreads
                    recompute(network.causal, layers)
                    plan = {"micro_batch_tokens": capacity, "share_prefixes": share, "spread": spreads}
                    rows = long_rows(size, share=share)
                    run = step_run(model, network, rows, ranks, loss=("token", "example")[number % 2], **plan)
                    step = run.plan.step(1, rows)
                    work = lambda run=run, step=step: loop.add_gradients(run, step)  # noqa: E731
                    network.causal.train()
                    value = ranks.sum_step(work, run.trained.gradient, stop=StopRequest(alone=False))
                    if rank == 0:
                        save_file(gradients(model) | {"loss": value}, tmp_path / f"{name}-{number}.safetensors")

    launch = Launch(tmp_path, act, count=count)
    assert launch.codes(120) == [0] * count, launch.said()
    for name in names:
        model = plain_model(bases[name])
        for number, (size, _, share, _, _) in enumerate(STEPS):
            want = plain_step(model, long_rows(size, share=share), ("token", "example")[number % 2])
            got = load_file(tmp_path / f"{name}-{number}.safetensors")
            assert_same_step((float(got.pop("loss")), got), want)


def cut(choose: Any, *given: Any, **named: Any) -> Any:
    """What `choose_layout` gives, as if all of the optimizer's state did not fit."""
    network, fit = choose(*given, **named)
    return network, replace(fit, cut=named["moments"] > 0)


def same_metrics(one: Path, other: Path) -> None:
    """Losses, norms and evaluations of two runs, to rounding."""
    for want, line in zip(metrics(one), metrics(other), strict=True):
        assert line.keys() == want.keys()
        for name in line.keys() & {"step", "loss", "grad_norm", "eval_loss", "learning_rate", "supervised_tokens"}:
            assert line[name] == pytest.approx(want[name], rel=1e-5), (name, line, want)


@pytest.mark.parametrize(
    ("machine", "optimizer"),
    [
        pytest.param({"shard": "all"}, "adamw", marks=pytest.mark.slow),
        ({"shard": 2, "spread_rows": True}, "adamw8bit"),
    ],
)
def test_a_sharded_run_is_that_of_one_process_and_continues_with_any_number(
    machine: dict[str, Any], optimizer: str, recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps, clipped, evaluations, answers and checkpoints; each process has a part of the optimizer's state."""
    monkeypatch.setattr(runs, "choose_layout", partial(cut, runs.choose_layout))
    monkeypatch.setattr(layout, "_LEAST_CUT", 0)
    settings: dict[str, Any] = {"adapter": {"dropout": 0, "rank": 16}, "optimizer": {"name": optimizer}}
    settings["run"] = {"sample_every": 1, "eval_every": 3, "save_every": 3, "keep": 9}
    both = {"micro_batch_tokens": 40, "share_prefixes": False}
    one, many = tmp_path / "one", tmp_path / "many"
    assert main(["train", recipe(**settings, machine=both), f"run.output={one}"]) == 0
    path = recipe(**settings, machine=both | machine)
    launch = Launch(tmp_path, lambda _: main(["train", path, f"run.output={many}"]))
    assert launch.codes(120) == [0, 0], launch.said()
    same_metrics(one, many)
    answers = [[line["answer"] for line in read_objects(folder / "answers.jsonl")] for folder in (one, many)]
    assert answers[0] == answers[1] and len(answers[0]) == 3 * 4
    moments = [load_file(folder / "checkpoints/step-000006/optimizer.safetensors") for folder in (one, many)]
    assert [{name: value.shape for name, value in each.items()} for each in moments] == 2 * [
        {name: value.shape for name, value in moments[0].items()}  # whole, whoever had them
    ]
    shutil.rmtree(many / "adapter")
    shutil.rmtree(many / "checkpoints/step-000009")
    alone, replicated = shutil.copytree(many, tmp_path / "alone"), shutil.copytree(many, tmp_path / "replicated")
    assert main(["train", str(alone), "--resume", f"run.output={alone}", "machine.shard=1"]) == 0
    same_metrics(one, alone)
    for folder, parts in ((many, "all"), (replicated, "1"))[: 1 + (optimizer == "adamw")]:
        words = ["train", str(folder), "--resume", f"run.output={folder}", f"machine.shard={parts}"]
        launch = Launch(tmp_path, lambda _, words=words: main(words))
        assert launch.codes(120) == [0, 0], launch.said()
        same_metrics(one, folder)


def no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError


def not_finite(given: Any, *others: Any) -> Any:
    return weighted_loss(given, *others) * float("nan")


def disk_full(*_: Any, **__: Any) -> Any:
    raise CapacityError("no space is left")


PASSES = {  # what fails, where, with which code
    "loading": (runs, "shard_base", no_memory, 6),
    "verifying": (selfcheck, "pair_losses", no_memory, 6),
    "training": (loop, "weighted_loss", no_memory, 6),
    "evaluating": (scoring, "pair_losses", no_memory, 6),
    "answering": (samples, "_answer", no_memory, 6),
    "not finite": (loop, "weighted_loss", not_finite, 7),
    "saving": (checkpoint, "save_checkpoint", disk_full, 6),
    "noting": (metrics_module.Metrics, "step", disk_full, 6),
}
FAILING = [(kind, rank) for kind in PASSES for rank in ((0,) if kind in ("saving", "noting") else (0, 1))]
GATED = [("training", 0), ("evaluating", 1)]


@pytest.mark.parametrize(
    ("kind", "rank"), [pytest.param(*one, marks=[] if one in GATED else pytest.mark.slow) for one in FAILING]
)
def test_a_failure_in_a_pass_of_all_ends_all_with_its_code(kind: str, rank: int, recipe: Write, tmp_path: Path) -> None:
    """The others wait for that process in a collective, and are told; its error is said once."""
    path = recipe(run={"sample_every": 1, "eval_every": 2}, adapter={"dropout": 0}, machine={"shard": "all"})
    place, name, failing, code = PASSES[kind]

    def act(number: int) -> int:
        if number == rank:
            setattr(place, name, failing)
        return main(["train", path])

    launch = Launch(tmp_path, act)
    assert launch.codes(40) == [code, code], launch.said()
    said = launch.said()
    assert said.count("error:") == 1 and "Traceback" not in said, said
    for saved in (tmp_path / "run").glob("checkpoints/*"):
        verify_folder(saved)
