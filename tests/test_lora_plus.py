"""LoRA+: the steps of PEFT's own optimizer on a plain model, and the same bits when a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from conftest import Command
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from test_oracles import SETTINGS, Rows, differences, gradients, plain_step
from test_train import die, metrics, stop_at
from tiny_models import make_base, randomize_adapter
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_

from lorasft.cli import main
from lorasft.data.packing import make_micro_batches
from lorasft.files import sha256
from lorasft.model.adapter import attach_adapter
from lorasft.model.loss import weighted_loss
from lorasft.model.selfcheck import verify
from lorasft.model.trained import Trained
from lorasft.recipe import OptimizerSettings
from lorasft.training.optimizer import make_optimizer

Write = Callable[..., str]
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}, "more": {"modules_to_save": ["lm_head"]}}


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_are_those_of_peft(kind: str) -> None:
    """With weight decay and one norm for all gradients, of which A's and B's are clipped together."""
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", **KINDS[kind])
    plain = get_peft_model(make_base("llama"), config)
    randomize_adapter(plain)
    options = {"lr": 1e-3, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.1, "betas": (0.9, 0.99)}
    theirs = create_loraplus_optimizer(plain, torch.optim.AdamW, **options)
    own = {"dora": KINDS[kind].get("use_dora", False), "modules_to_save": tuple(KINDS[kind].get("modules_to_save", ()))}
    model = attach_adapter(make_base("llama"), SETTINGS.model_copy(update=own), seed=0)
    randomize_adapter(model)
    network = verify(model.get_base_model())
    trained = Trained(model, torch.float32, rates_apart=True)
    settings = OptimizerSettings(learning_rate=1e-3, lora_plus=16, weight_decay=0.1, betas=(0.9, 0.99))
    optimizer, rows = make_optimizer(settings, trained), Rows()
    assert len(optimizer.param_groups) == (3 if kind == "more" else 2)
    before = {name: one.detach().clone() for name, one in trained.parameters.items()}
    for _ in range(3):
        plain_step(plain, rows, "token")
        norm = clip_grad_norm_(plain.parameters(), 0.5)
        theirs.step()
        batches = list(make_micro_batches(rows.sequences, range(len(rows)), capacity=40))
        for batch in batches:
            trained.check()
            (weighted_loss(network, batch) / sum(len(one.targets) for one in batches)).backward()
        assert trained.gradient.norm() == pytest.approx(float(norm), rel=1e-5)
        clip_grads_with_norm_([trained.master], 0.5, trained.gradient.norm())
        assert differences(gradients(model), gradients(plain))[0] < 1e-5
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        assert not trained.gradient.any()
    moved = {name: one.detach() - before[name] for name, one in trained.parameters.items()}
    wanted = {name: one.detach() - before[name] for name, one in plain.named_parameters() if one.requires_grad}
    whole, worst = differences(moved, wanted)
    assert whole < 1e-5 and worst < 5e-4, (whole, worst)  # Adam divides by moments, also where they are small
    sizes = {end: max(float(one.abs().max()) for name, one in moved.items() if end in name) for end in ("_A.", "_B.")}
    assert sizes["_B."] / sizes["_A."] == pytest.approx(16, rel=0.2)


def test_one_is_the_same_as_none() -> None:
    """But for the last bits of bitsandbytes, whose blocks begin elsewhere; and the order of parameters is another."""
    for name in ("adamw", "adamw8bit"):
        results = []
        for ratio in (None, 1.0):
            model = attach_adapter(make_base("llama"), SETTINGS.model_copy(update={"rank": 32}), seed=0)
            trained = Trained(model, torch.float32, rates_apart=ratio is not None)
            optimizer = make_optimizer(OptimizerSettings(name=name, lora_plus=ratio), trained)  # type: ignore[arg-type]
            for step in range(4):
                random = torch.Generator().manual_seed(step)
                for parameter in sorted(trained.parameters):
                    trained.parameters[parameter].grad.normal_(generator=random)  # type: ignore[union-attr]
                optimizer.step()
            results.append({name: one.detach().clone() for name, one in trained.parameters.items()})
        assert list(results[0]) != list(results[1])
        assert differences(results[1], results[0])[0] < (1e-7 if name == "adamw" else 1e-3)


def test_in_8_bit_it_is_bitsandbytes_own_on_all_a_and_all_b() -> None:
    model = attach_adapter(make_base("llama"), SETTINGS.model_copy(update={"rank": 32}), seed=0)
    trained = Trained(model, torch.float32, rates_apart=True)
    optimizer = make_optimizer(OptimizerSettings(name="adamw8bit", learning_rate=1e-3, lora_plus=4), trained)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * group["ratio"]
    a, b = (
        torch.nn.Parameter(
            torch.cat([one.detach().flatten() for name, one in trained.parameters.items() if end in name])
        )
        for end in ("lora_A", "lora_B")
    )
    oracle = bnb.optim.AdamW8bit([{"params": [a], "lr": 1e-3}, {"params": [b], "lr": 4e-3}], weight_decay=0.0)
    for step in range(4):
        trained.gradient.normal_(generator=torch.Generator().manual_seed(step))
        a.grad, b.grad = trained.gradient[: len(a)].clone(), trained.gradient[len(a) :].clone()
        optimizer.step()
        oracle.step()
    assert torch.equal(trained.master, torch.cat([a, b]))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_run_goes_on_with_the_same_bits(
    name: str, recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    settings: dict[str, Any] = {"optimizer": {"name": name, "lora_plus": 8, "learning_rate": 1e-3}}
    settings |= {"adapter": {"rank": 64}, "train": {"epochs": 2}}
    assert main(["train", recipe(**settings, run={"output": str(tmp_path / "whole")})]) == 0
    path = recipe(**settings, run={"output": str(tmp_path / "parts")})
    with monkeypatch.context() as patch:
        stop_at(patch, 5, die)
        assert main(["train", path]) == 130
    state = load_file(tmp_path / "parts/checkpoints/step-000003/optimizer.safetensors")
    assert {name.partition(".")[2] for name in state} == {"", "1"}
    assert any(tensor.dtype == torch.uint8 for tensor in state.values()) == (name == "adamw8bit")
    assert main(["train", path, "--resume"]) == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    weights = "adapter/adapter_model.safetensors"
    assert sha256(tmp_path / "parts" / weights) == sha256(tmp_path / "whole" / weights)
    changed = cli("train", path, "--resume", "optimizer.lora_plus=4")
    assert changed.code == 2 and "optimizer.lora_plus: 8.0 -> 4.0" in changed.err
