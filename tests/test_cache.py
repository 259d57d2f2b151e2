"""Kept bases: the bits of a base that was just quantized, found again, guarded, and never in the way."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_to_hub
from faults.damage import HARMS
from safetensors.torch import load_file, save_file
from tiny_models import make_base, shape
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from lorasft.cli import main
from lorasft.files import MANIFEST, verify_folder
from lorasft.model import cache, quantizer
from lorasft.model.base import load_base, nf4_scheme
from lorasft.recipe import ModelSettings

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where bases are kept."""
    monkeypatch.setenv("LORASFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bases"


def mixed_experts() -> Any:
    few = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64, "mlp_only_layers": [0]}
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**shape(64), **few), dtype=torch.bfloat16)


def tied() -> Any:
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape(64), tie_word_embeddings=True), dtype=torch.bfloat16)


BASES: dict[str, Callable[[], Any]] = {
    **{name: (lambda name=name: make_base(name, torch.bfloat16, hidden=64)) for name in ("llama", "gemma2", "gpt2")},
    "tied": tied,
    "experts": mixed_experts,
    "fp32": lambda: make_base("qwen3", torch.float32, hidden=64),
}


def make(folder: Path, name: str = "llama", **options: Any) -> ModelSettings:
    model = BASES[name]()
    model.generation_config.update(eos_token_id=[2, 5], temperature=0.5)  # transformers refuses to save this
    model.generation_config.do_sample = True
    model.save_pretrained(folder, **options)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"do_sample": False}), encoding="utf-8")
    return ModelSettings(base=str(folder), dtype="bfloat16")


def contents(model: Any) -> dict[str, Tensor]:
    """All that a model is made of: weights, constants of quantization, buffers, and its answer."""
    found = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers()),
        **model.state_dict(),
    }
    with torch.no_grad():
        return found | {"logits": model(torch.arange(1, 40).unsqueeze(0), use_cache=False).logits}


def assert_equal(ours: Any, theirs: Any) -> None:
    a, b = contents(ours), contents(theirs)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name
    assert ours.config.to_dict() == theirs.config.to_dict() and ours.name_or_path == theirs.name_or_path
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert not any(parameter.requires_grad for parameter in ours.parameters()) and not ours.training


def refuse_to_quantize(monkeypatch: pytest.MonkeyPatch) -> None:
    def few(flat: Tensor, *args: Any, own: Any = quantizer._quantize, **kwargs: Any) -> Any:
        return own(flat, *args, **kwargs) if flat.numel() <= 64 else pytest.fail("it was quantized again")

    monkeypatch.setattr(quantizer, "_quantize", few)


@pytest.mark.parametrize("name", BASES)
def test_a_kept_base_is_the_one_that_was_quantized(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make(tmp_path / "base", name, max_shard_size="20KB" if name == "llama" else "5GB")
    plain = load_base(settings, CPU)
    assert not root.exists()
    first = load_base(settings, CPU, keep=True)
    (place,) = root.iterdir()
    assert f"{place}" in capsys.readouterr().err
    refuse_to_quantize(monkeypatch)
    second = load_base(settings, CPU, keep=True)
    said = capsys.readouterr().err
    assert "that was kept is used" in said and said.count("\n") == 1
    assert_equal(first, plain)
    assert_equal(second, plain)


def test_a_model_of_the_hub_is_kept_as_well(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "base")
    save_to_hub(tmp_path / "base", tmp_path / "hub", monkeypatch)
    settings = ModelSettings(base="people/tiny", dtype="bfloat16")
    first = load_base(settings, CPU, keep=True)
    refuse_to_quantize(monkeypatch)
    assert_equal(load_base(settings, CPU, keep=True), first)


def test_what_decides_the_bits_decides_the_place(root: Path, tmp_path: Path) -> None:
    settings = make(tmp_path / "base")
    load_base(settings, CPU, keep=True)
    load_base(settings.model_copy(update={"dtype": "float32"}), CPU, keep=True)
    assert len(list(root.iterdir())) == 2
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][-1] = 7  # which is not in the fingerprint
    save_file(weights, path, metadata={"format": "pt"})
    assert load_base(settings, CPU, keep=True).get_input_embeddings().weight[-1, 0] == 7
    assert len(list(root.iterdir())) == 3


def test_what_needs_no_keeping_is_not_kept(root: Path, tmp_path: Path) -> None:
    settings = make(tmp_path / "base")
    load_base(settings, CPU, keep="auto")  # tiny
    load_base(settings.model_copy(update={"quantization": "none"}), CPU, keep=True)
    load_base(settings, CPU).save_pretrained(tmp_path / "quantized")
    load_base(ModelSettings(base=str(tmp_path / "quantized")), CPU, keep=True)
    assert not root.exists()


@pytest.fixture
def kept(root: Path, tmp_path: Path) -> tuple[ModelSettings, Path]:
    """A base that is kept, and where."""
    settings = make(tmp_path / "base")
    load_base(settings, CPU, keep=True)
    (place,) = root.iterdir()
    return settings, place


WEIGHTS = [("model.safetensors", harm) for harm in ("flipped", "zeroed", "emptied", "deleted")]
OTHERS = [("config.json", "flipped"), ("generation_config.json", "flipped"), (MANIFEST, "cut to a byte")]


@pytest.mark.parametrize(("name", "harm"), [*WEIGHTS, *OTHERS])
def test_a_damaged_one_is_made_again(
    name: str, harm: str, kept: tuple[ModelSettings, Path], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, place = kept
    HARMS[harm](place / name, place / MANIFEST)
    capsys.readouterr()
    assert_equal(load_base(settings, CPU, keep=True), load_base(settings, CPU))
    assert "is damaged" in capsys.readouterr().err
    assert list(root.iterdir()) == [place]
    verify_folder(place)


def test_a_folder_that_others_may_use_is_not_used(
    kept: tuple[ModelSettings, Path], root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, place = kept
    HARMS["flipped"](place / "model.safetensors", place)  # which would be noticed
    with monkeypatch.context() as patch:
        patch.setattr("os.geteuid", lambda: os.getuid() + 1)  # it is another user's
        load_base(settings, CPU, keep=True)
    assert list(root.iterdir()) == [place] and "damaged" not in capsys.readouterr().err
    root.chmod(0o755)
    load_base(settings, CPU, keep=True)
    said = capsys.readouterr().err
    assert list(root.iterdir()) == [place] and "damaged" not in said and "chmod 700" in said
    (root.parent / "elsewhere").mkdir(mode=0o700)
    place.rename(root.parent / "elsewhere" / place.name)
    load_base(settings, CPU, keep=True)
    assert "not kept" in capsys.readouterr().err and not list(root.iterdir())
    root.chmod(0o700)
    place.symlink_to(root.parent / "elsewhere" / place.name)  # somebody's, whoever's
    load_base(settings, CPU, keep=True)
    assert place.is_symlink() and "damaged" not in capsys.readouterr().err


def test_no_room_is_no_error(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = make(tmp_path / "base")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        load_base(settings, CPU, keep=True)
    said = capsys.readouterr().err
    assert "not kept" in said and "are free" in said and not list(root.iterdir())
    monkeypatch.setenv("LORASFT_CACHE", str(tmp_path / "base" / "config.json"))  # a file
    load_base(settings, CPU, keep=True)
    assert "not kept" in capsys.readouterr().err


def test_of_two_that_keep_at_once_one_wins(root: Path, tmp_path: Path) -> None:
    settings = make(tmp_path / "base")
    place = cache.find_place(Path(settings.base), None, nf4_scheme(torch.bfloat16), CPU)
    models = [load_base(settings, CPU) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda model: cache.keep_base(model, place, wanted=True), models))
    assert list(root.iterdir()) == [place]
    verify_folder(place)
    assert_equal(load_base(settings, CPU, keep=True), models[0])


def test_what_nobody_uses_goes_after_a_month(kept: tuple[ModelSettings, Path], root: Path) -> None:
    settings, unused = kept
    strangers, left = [root / "letters", root / ".stage-mine"], root / f".stage-{unused.name}-0123"
    for path in (left, *strangers):
        path.mkdir()
    past = time.time() - 31 * 86400
    for path in (unused, left, *strangers):
        os.utime(path, (past, past))
    load_base(settings, CPU, keep=True)  # used once more
    other = settings.model_copy(update={"dtype": "float32"})
    load_base(other, CPU, keep=True)
    assert unused.exists() and not left.exists()
    os.utime(unused, (past, past))
    (newer,) = (path for path in root.iterdir() if path != unused and path not in strangers)
    cache.remove_folder(newer)
    load_base(other, CPU, keep=True)
    assert not unused.exists() and newer.exists() and all(path.exists() for path in strangers)


def test_a_run_and_its_commands_use_what_is_kept(
    root: Path, recipe: Callable[..., str], tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses are those of a run that keeps nothing."""
    path = recipe(train={"steps": 2}, schedule={"warmup": 0})
    losses = []
    for name, wanted in (("never", "false"), ("first", "true"), ("second", "true")):
        if name == "second":
            refuse_to_quantize(monkeypatch)
        assert main(["train", path, f"run.output={tmp_path / name}", f"machine.cache_base={wanted}"]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([json.loads(line).get("loss") for line in lines])
        assert root.exists() == (name != "never")
    assert losses[0] == losses[1] == losses[2]
    assert main(["chat", str(tmp_path / "second"), "--prompt", "hello"]) == 0
    assert main(["evaluate", str(tmp_path / "second"), "--data", str(rows)]) == 0
