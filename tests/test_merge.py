"""The merge: PEFT's bits, the base's files, refusals before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import Command, save_base, save_to_hub
from safetensors.torch import load_file, save_file
from test_merge_variants import KINDS, PEFT_DOUBTS, load, make_pair, merge, save_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lorasft.artifact import find_artifact
from lorasft.cli import main
from lorasft.errors import ModelError
from lorasft.files import sha256, verify_folder
from lorasft.merge.changes import Change
from lorasft.merge.merge import merge as merge_artifact
from lorasft.model.adapter import load_adapter, load_artifact
from lorasft.tensors import fingerprint, open_tensors

ALL: dict[str, Any] = {"target_modules": "all-linear"}
pytestmark = PEFT_DOUBTS


@pytest.mark.parametrize("kind", KINDS)
def test_i14_merged_logits_equal_the_adapters(kind: str, tmp_path: Path) -> None:
    base, adapter = make_pair(tmp_path, kind)
    merge(base, adapter, tmp_path / "out")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert merged.get_input_embeddings().num_embeddings == merged.config.get_text_config().vocab_size
    ids = torch.arange(3, 13).unsqueeze(0)
    answers, without = merged(input_ids=ids).logits, load(base)(input_ids=ids).logits
    live = load_adapter(load(base), find_artifact(str(adapter))).eval()(input_ids=ids).logits
    torch.testing.assert_close(live, answers, atol=1e-4, rtol=1e-4)
    assert (answers[..., : without.shape[-1]] - without).abs().max() > 0.01


def test_shards_and_sidecars_are_the_bases(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="100KB")
    (base / "model.safetensors").unlink()
    (base / "notes.txt").write_text("kept", encoding="utf-8")
    save_file({"stale": torch.zeros(3)}, base / "consolidated.safetensors")
    adapter = save_adapter(base, tmp_path / "adapter", **ALL)
    weights, kept = load_file(adapter / "adapter_model.safetensors"), "model.layers.0.mlp.down_proj"
    weights[f"base_model.model.{kept}.lora_B.weight"].zero_()
    save_file(weights, adapter / "adapter_model.safetensors")
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    done = merge(base, adapter, tmp_path / "out")
    shards = sorted(path.name for path in base.glob("model-*.safetensors"))
    assert len(shards) > 1 and done["updated"] == 14
    for name in shards:
        ours, theirs = (open_tensors(folder / name) for folder in (tmp_path / "out", base))
        assert ours.specs == theirs.specs and list(ours.specs) == list(theirs.specs)
        assert ours.metadata == theirs.metadata == {"format": "pt"}
    assert not (tmp_path / "out/consolidated.safetensors").exists()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json", "notes.txt"):
        assert sha256(tmp_path / "out" / name) == sha256(base / name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "trained"}], tokenize=False) == "trained"
    for name in shards:
        before, written = load_file(base / name), load_file(tmp_path / "out" / name)
        assert all(torch.equal(before[key], written[key]) == ("proj" not in key or kept in key) for key in before)


def test_a_stop_that_training_added_is_kept(base: Path, tmp_path: Path) -> None:
    """Else the merged model runs past the end of its turn; an adapter without the file leaves the base's."""
    adapter = save_adapter(base, tmp_path / "adapter", **ALL)
    own = json.loads((base / "generation_config.json").read_text(encoding="utf-8"))
    merge(base, adapter, tmp_path / "same")
    assert sha256(tmp_path / "same/generation_config.json") == sha256(base / "generation_config.json")
    stops = [7, own["eos_token_id"]]
    (adapter / "generation_config.json").write_text(json.dumps({**own, "eos_token_id": stops}), encoding="utf-8")
    merge(base, adapter, tmp_path / "more")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "more").generation_config.eos_token_id == stops


@pytest.fixture(scope="module")
def trained(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in 4 bit that has learned something."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {
        "model": {"base": str(base), "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(rows), "eval": 0.3, "max_length": 120},
        "train": {"epochs": 10, "batch_size": 8},
        "optimizer": {"learning_rate": 5e-3},
        "run": {"output": str(folder / "run"), "eval_every": 40},
    }
    (folder / "recipe.yaml").write_text(json.dumps(settings), encoding="utf-8")
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    return folder / "run"


def test_a_run_in_4_bit_is_merged_onto_what_it_saw(trained: Path, tmp_path: Path, cli: Command) -> None:
    """Held-out rows do not speak for the original here, and the dequantized base is what was trained against."""
    said = json.loads(cli("merge", trained, "--out", tmp_path / "out", "--json").out)
    table = said["table"]
    assert said["updated"] == 14 and said["onto"] == "dequantized" and said["rows"] == "held-out rows"
    assert 30 < said["longest_row"] <= 120
    assert table["trained"]["kl"] == 0 and table["trained"]["same_choice"] == 1
    assert 0 < table["merged"]["kl"] < table["onto original, before rounding"]["kl"] / 5
    assert table["onto original, before rounding"]["kl"] < table["without the adapter"]["kl"]
    record = json.loads((tmp_path / "out/merge.json").read_text(encoding="utf-8"))
    assert record["adapter"] == sha256(trained / "adapter/adapter_model.safetensors")
    assert record["base"]["fingerprint"] == record["base"]["trained_on"] and record["table"] == table
    assert record["result"] == {"model.safetensors": sha256(tmp_path / "out/model.safetensors")}
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "dequantized weights" in card and "please" not in card
    assert str(tmp_path.parent) not in card and f"`{Path(record['base']['name']).name}`" in card
    assert "base_model" not in card  # the hub takes ids alone
    verify_folder(tmp_path / "out")


def test_dequantized_is_the_trained_function(trained: Path, base: Path, tmp_path: Path) -> None:
    """An oracle without our quantizer: transformers' 4-bit model with PEFT's adapter, and PEFT's arithmetic."""
    merge_artifact(find_artifact(str(trained)), tmp_path / "out", onto="dequantized", check=False)
    scheme = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    live = AutoModelForCausalLM.from_pretrained(base, quantization_config=scheme, dtype=torch.float32)
    seen = {
        name: dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in live.named_modules()
        if isinstance(module, Linear4bit)
    }
    adapter = load_file(trained / "adapter/adapter_model.safetensors")
    merged = load_file(tmp_path / "out/model.safetensors")
    for name, weight in seen.items():
        prefix = f"base_model.model.{name}.lora_"
        update = adapter[f"{prefix}B.weight"] @ adapter[f"{prefix}A.weight"] * 2.0
        assert torch.equal(merged[f"{name}.weight"], (weight + update).to(torch.bfloat16)), name
    assert len(seen) == 14


def test_a_model_that_does_not_fit_is_streamed(trained: Path) -> None:
    """The same bits, with its adapter on it and without, while no weight of it is in memory."""
    found = find_artifact(str(trained))
    own = replace(found, model=found.model.model_copy(update={"quantization": "none"}))
    ids = torch.arange(5, 60).unsqueeze(0)
    answers = []
    for streamed in (False, True):
        model = load_artifact(own, torch.device("cpu"), streamed=streamed)
        assert any(parameter.is_meta for parameter in model.parameters()) == streamed
        with torch.no_grad():
            answers.append(model(input_ids=ids).logits)
            with model.disable_adapter():
                answers.append(model(input_ids=ids).logits)
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])
    assert not torch.equal(answers[0], answers[1])


def test_a_merge_that_answers_otherwise_gets_no_name(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Change, "apply", lambda self, rows, start, product: rows.add_(0.3))
    with pytest.raises(ModelError, match="does not answer like"):
        merge_artifact(find_artifact(str(trained)), tmp_path / "out", onto="original")
    assert list(tmp_path.iterdir()) == []


def test_what_may_not_be_merged(trained: Path, base: Path, tmp_path: Path, cli: Command) -> None:
    out, other = tmp_path / "out", save_base(tmp_path / "other", dtype="float32")
    assert cli("merge", trained, "--out", out, "--onto", "original", "--no-check").code == 0
    assert cli("merge", trained, "--out", out).code == 2
    assert cli("merge", trained, "--out", base / "inside", "--base", base).code == 2
    refused = cli("merge", trained, "--out", tmp_path / "wrong", "--base", other)
    assert refused.code == 4 and "not the one that the adapter was trained on" in refused.err
    forced = ["merge", trained, "--no-check", "--force-base", "--out"]
    assert cli(*forced, tmp_path / "forced", "--base", other).code == 0
    record = json.loads((tmp_path / "forced/merge.json").read_text(encoding="utf-8"))
    assert record["base"]["fingerprint"] != record["base"]["trained_on"]
    assert cli("merge", trained, "--out", tmp_path / "twice", "--base", out).code == 4  # into which it is merged


def test_a_merged_folder_takes_another_adapter(base: Path, tmp_path: Path) -> None:
    """And the records of the first merge are not those of the second."""
    one, other = (save_adapter(base, tmp_path / name, **ALL) for name in ("one", "other"))
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({name: tensor * 0.5 for name, tensor in tensors.items()}, other / "adapter_model.safetensors")
    merge(base, one, tmp_path / "first")
    merge(tmp_path / "first", other, tmp_path / "second")
    verify_folder(tmp_path / "second")
    record = json.loads((tmp_path / "second/merge.json").read_text(encoding="utf-8"))
    assert record["adapter"] == sha256(other / "adapter_model.safetensors")


def test_a_merge_in_4_bit(trained: Path, tmp_path: Path, cli: Command) -> None:
    said = json.loads(cli("merge", trained, "--out", tmp_path / "out", "--quantize", "nf4", "--json").out)
    assert said["onto"] == "original"
    assert said["table"]["merged, in 4 bit"]["kl"] < said["table"]["without the adapter"]["kl"]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 14
    assert not (tmp_path / "out/16-bit").exists() and AutoTokenizer.from_pretrained(tmp_path / "out")
    verify_folder(tmp_path / "out")


def test_an_adapter_of_another_tool_is_merged_with_the_check_and_into_4_bit(
    base: Path, tmp_path: Path, cli: Command
) -> None:
    """It brings no tokenizer, and nothing says that it was trained in 4 bit."""
    adapter = save_adapter(base, tmp_path / "adapter", **ALL)
    said = json.loads(cli("merge", adapter, "--out", tmp_path / "out", "--json").out)
    assert said["rows"] == "a text of lorasft's own"
    assert cli("merge", adapter, "--out", tmp_path / "four", "--quantize", "nf4", "--no-check").code == 0
    assert (tmp_path / "four/model.safetensors").stat().st_mode == (tmp_path / "four/config.json").stat().st_mode


def test_a_fine_tune_has_another_fingerprint(tmp_path: Path) -> None:
    """Its sizes, headers and first megabyte, which holds the embedding, may all be those of its base."""
    base = save_base(tmp_path / "base")
    first = fingerprint(base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    changed = fingerprint(base)
    shutil.copytree(base, tmp_path / "copy")
    assert first != changed == fingerprint(tmp_path / "copy")


def test_a_run_on_a_hub_model_knows_its_base(
    recipe: Callable[..., str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    """The hub's client keeps a snapshot of each commit; nothing is downloaded that is there."""
    save_to_hub(base, tmp_path / "hub", monkeypatch)
    path = recipe(model={"base": "people/tiny", "dtype": "float32"}, train={"steps": 3, "batch_size": 8})
    assert cli("train", path).code == 0
    merge = ["merge", tmp_path / "run", "--no-check", "--out"]
    assert cli(*merge, tmp_path / "out").code == 0
    done = cli(*merge, tmp_path / "wrong", "--base", save_base(tmp_path / "other", "qwen3"))
    assert done.code == 4 and "not the one that the adapter was trained on" in done.err
