"""What a base says of generation and dtypes gives way to what is asked; evaluate, chat and merge take that."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import Command, save_base
from safetensors.torch import load_file, save_file
from test_merge_variants import PEFT_DOUBTS, save_adapter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorasft.model.base import load_base
from lorasft.recipe import ModelSettings

pytestmark = PEFT_DOUBTS
SETTINGS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "kind of result": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "stop strings": {"stop_strings": ["a", "e"]},
    "sequences": {"num_return_sequences": 2},
    "several samples": {"num_return_sequences": 3, "do_sample": True, "temperature": 3.0},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "lookup": {"prompt_lookup_num_tokens": 3, "assistant_confidence_threshold": 0.2},
    "layers": {"dola_layers": "low"},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "penalties": {"repetition_penalty": 1.9, "no_repeat_ngram_size": 1, "suppress_tokens": [5, 6, 7, 8]},
    "lengths": {"min_new_tokens": 30, "max_length": 3, "max_time": 0.0},
    "cache": {"cache_implementation": "static", "use_cache": False},
    "guidance": {"guidance_scale": 2.5, "forced_eos_token_id": 1},
    "sampling without sampling": {"temperature": 0.6, "top_p": 0.9},
}


@pytest.fixture(scope="module")
def plain(base: Path) -> Path:
    (base / "generation_config.json").write_text('{"eos_token_id": 1}', encoding="utf-8")
    return base


def say_of(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **settings}), encoding="utf-8")


@pytest.mark.parametrize("name", SETTINGS)
def test_chat_answers_greedily_whatever_the_base_would(name: str, plain: Path, tmp_path: Path, cli: Command) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for path in plain.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "generation_config.json").unlink()
    say_of(folder, SETTINGS[name])
    asked = ["--prompt", "hello", "--max-tokens", "12"]
    given, wanted = (cli("chat", where, *asked) for where in (folder, plain))
    assert (given.code, given.out) == (0, wanted.out) and len(given.out) > 5


@pytest.mark.parametrize("name", ["beams", "sequences", "sampling without sampling"])
def test_a_run_ends_with_its_adapter_and_answers(
    name: str, recipe: Callable[..., str], tmp_path: Path, cli: Command
) -> None:
    """transformers would not save these settings once a stop is added to them."""
    folder = save_base(tmp_path / "base")
    say_of(folder, SETTINGS[name])
    done = cli("train", recipe(model={"base": str(folder)}, train={"steps": 3}, run={"sample_every": 1}))
    assert done.code == 0 and "after:" in done.err
    kept = {key: value for key, value in SETTINGS[name].items() if key != "num_return_sequences"}
    saved = json.loads((tmp_path / "run/adapter/generation_config.json").read_bytes())
    assert saved["eos_token_id"] == [3, 1] and kept.items() <= saved.items()
    merged = ["merge", tmp_path / "run", "--out", tmp_path / "out", "--quantize", "nf4"]
    assert cli(*merged).code == 0
    saved = json.loads((tmp_path / "out/generation_config.json").read_bytes())
    assert saved["eos_token_id"] == [3, 1] and kept.items() <= saved.items()


@pytest.mark.parametrize("named", ["float16", "bfloat16", None])
def test_a_base_in_4_bit_computes_in_what_it_is_told(
    named: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_base(tmp_path / "base")
    scheme = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=scheme).save_pretrained(tmp_path / "four")
    config = json.loads((tmp_path / "four/config.json").read_bytes())
    config["quantization_config"]["bnb_4bit_compute_dtype"] = named
    (tmp_path / "four/config.json").write_text(json.dumps(config), encoding="utf-8")
    for told in ("bfloat16", "float32"):
        model = load_base(ModelSettings(base=str(tmp_path / "four"), dtype=told), torch.device("cpu"))
        linears = [one for one in model.modules() if isinstance(one, Linear4bit)]
        assert len(linears) == 14 and {one.compute_dtype for one in linears} == {getattr(torch, told)}
        assert model.dtype == getattr(torch, told)
        assert (f"computing in {told}" in capsys.readouterr().err) == (told != named)


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """A base whose activations float16 does not hold."""
    folder = save_base(tmp_path / "base", dtype="float32")
    weights = load_file(folder / "model.safetensors")
    for name in ("up_proj", "gate_proj"):
        weights[f"model.layers.0.mlp.{name}.weight"] *= 1e3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_evaluate_takes_no_number_that_is_not_finite(
    dtype: str, overflowing: Path, rows: Path, tmp_path: Path, cli: Command
) -> None:
    done = cli("evaluate", overflowing, "--data", rows, "--dtype", dtype, "--per-example", tmp_path / "each")
    finite = dtype != "float16"
    assert done.code == (0 if finite else 7) and (tmp_path / "each").exists() == finite
    if not finite:
        assert f"torch.{dtype}" in done.err and "--dtype" in done.err and "rows.jsonl:1" in done.err


def test_a_perplexity_beyond_all_numbers_is_one(overflowing: Path, tmp_path: Path, cli: Command) -> None:
    weights = load_file(overflowing / "model.safetensors")
    weights["lm_head.weight"] *= 1e4
    save_file(weights, overflowing / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    done = json.loads(cli("evaluate", overflowing, "--data", tmp_path / "rows.jsonl", "--json").out)
    assert done["model"]["loss"] > 710 and 0 < done["model"]["perplexity"] < float("inf")


ADVICE: dict[str, tuple[str, list[str]]] = {
    "an option": ('{"prompt": "a", "completion": ""}', ["--on-bad-row", "drop"]),
    "a key": ('{"prompt": "a", "completion": ""}', ["data.on_bad_row=drop"]),
    "broken": ("{", ["data.on_bad_row=drop"]),
    "control tokens": ('{"prompt": "a", "completion": "b<|end|>"}', ["chat.control_tokens=as_text"]),
    "a template": (
        '{"prompt": [{"role": "tool", "content": "a"}], "completion": "b"}',
        ["chat.template=none", "data.on_bad_row=drop"],
    ),
}


@pytest.mark.parametrize("name", ADVICE)
def test_what_evaluate_and_merge_advise_can_be_done_there(name: str, base: Path, tmp_path: Path, cli: Command) -> None:
    row, words = ADVICE[name]
    data, adapter = tmp_path / "rows.jsonl", save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    data.write_text(f'{{"prompt": "a", "completion": "b"}}\n{row}\n', encoding="utf-8")
    if name != "a template":
        refused = cli("evaluate", base, "--data", data)
        assert refused.code == 3 and words[-1].partition("=")[0].strip("-").replace("-", "_") in refused.err
    assert cli("evaluate", base, "--data", data, *words).code == 0
    assert cli("evaluate", adapter, "--base", base, *words, "--data", data).code == 0
    assert cli("merge", adapter, "--data", data, "--out", tmp_path / "out", *words).code == 0


def test_how_the_base_is_loaded_can_be_told(base: Path, rows: Path, tmp_path: Path, cli: Command) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    for how in (["--quantization", "none"], ["model.quantization=none"]):
        out = tmp_path / how[-1]
        assert json.loads(cli("merge", adapter, "--out", out, *how, "--json").out)["onto"] == "original"
        assert cli("chat", adapter, "--prompt", "a", "--max-new-tokens", "2", *how).code == 0  # the old name
    losses = [
        json.loads(cli("evaluate", adapter, "--data", rows, "--json", "--quantization", how, "--dtype", "float32").out)
        for how in ("none", "nf4")
    ]
    assert losses[0] != losses[1]
    assert json.loads(cli("merge", adapter, "--out", tmp_path / "four", "--quantization", "nf4", "--json").out)["table"]


@pytest.mark.parametrize("word", ["--dtype=int8", "--quantization=gptq", "model.dtype=half", "train.epochs=3"])
def test_what_cannot_be_told_is_named(word: str, base: Path, rows: Path, cli: Command) -> None:
    done = cli("evaluate", base, "--data", rows, word)
    assert done.code == 2 and "hint:" in done.err and "command line" in done.err
    done = cli("chat", base, "data")  # for evaluate it names another model
    assert done.code == 2 and "hint:" in done.err and "command line" in done.err


SERVED: dict[str, tuple[dict[str, Any], str | None]] = {
    "rank": ({"rank": 20}, "--max-lora-rank 32 "),
    "small": ({"rank": 2}, "--max-lora-rank 8 "),
    "dora": ({"dora": True}, None),
    "whole": ({"modules_to_save": ["lm_head"]}, None),
}


@pytest.mark.parametrize("name", SERVED)
def test_a_run_ends_with_the_whole_command_for_a_server(
    name: str, recipe: Callable[..., str], base: Path, tmp_path: Path, cli: Command
) -> None:
    adapter, rank = SERVED[name]
    done = cli("train", recipe(adapter=adapter, train={"steps": 3}, run={"output": str(tmp_path / "my run")}))
    assert done.code == 0
    (line,) = [line for line in done.err.splitlines() if "serve the adapter" in line]
    words = shlex.split(line.partition(": ")[2])
    folder = tmp_path / "my run/adapter"
    if rank is None:
        assert "merge it" in line
        return
    assert rank in line and words[:3] == ["vllm", "serve", str(base)] and f"mine={folder}" in words
    assert words[words.index("--generation-config") + 1] == str(folder)
    assert Path(words[words.index("--chat-template") + 1]).is_file() and "original base" in done.err


def test_a_tokenizer_of_another_base_is_an_error_in_words(base: Path, rows: Path, tmp_path: Path, cli: Command) -> None:
    """One that gives ids which the model has no row for."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(8)
    model.save_pretrained(tmp_path / "few")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path / "few" / name)
    done = cli("evaluate", str(tmp_path / "few"), "--data", str(rows))
    assert done.code == 4 and "the model has 8 embedding rows" in done.err
