"""New tokens: rows of embedding and head that are trained alone, from the recipe to the servers' files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_oracles
import torch
from conftest import Command
from gguf import GGUFReader
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_oracles import Rows, assert_same_step, differences, packed_step, plain_step
from tiny_models import CONFIGS, make_base
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lorasft.artifact import find_artifact
from lorasft.data.tokenizer import add_tokens, load_tokenizer
from lorasft.errors import RecipeError
from lorasft.model import loss
from lorasft.model.adapter import attach_adapter, load_artifact
from lorasft.model.attention import evaluating
from lorasft.model.memory import heaviest_batch, run_layers
from lorasft.model.selfcheck import verify
from lorasft.model.weightless import make_weightless, plan_network
from lorasft.recipe import AdapterSettings, ModelSettings, mathematics
from lorasft.recipe.load import dump_recipe, load_recipe

NEW = {94: [], 95: [7, 8, 9], 96: [], 97: [], 98: [3]}  # of 97 rows: some are there, some are not
CPU = torch.device("cpu")


def randomize(model: Any) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def ours(name: str) -> Any:
    model = attach_adapter(make_base(name), AdapterSettings(rank=4, alpha=8.0), seed=0, new_rows=NEW)
    randomize(model)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_equals_plain_transformers_and_peft(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied and untied heads, scaled embeddings, soft caps; rows that were there and rows that were not. Without what
    the head knows of them, or the embedding, it would not be."""
    monkeypatch.setattr(test_oracles, "VOCABULARY", 99)  # of the random ids
    rows, base = Rows(), make_base(name)
    base.resize_token_embeddings(128, mean_resizing=False)
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        module.weight.data[97:] = make_base(name).get_input_embeddings().weight.data.mean(0)
    if name in ("llama", "qwen3"):
        base.lm_head.weight.data[97:] = make_base(name).lm_head.weight.data.mean(0)
    tokens = list(NEW) if base.config.tie_word_embeddings else {"embed_tokens": list(NEW), "lm_head": list(NEW)}
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "fan_in_fan_out": name == "gpt2"}
    oracle = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora, trainable_token_indices=tokens))
    randomize(oracle)
    want = plain_step(oracle, rows, "token")
    model = ours(name)
    network = verify(model.get_base_model())
    assert network.segments and network.head is not None, network.notices
    for capacity in (1, 1000):
        assert_same_step(packed_step(model, network, rows, "token", capacity, share=capacity > 1), want)
    assert_same_step(packed_step(model, verify(model.get_base_model(), segments=False), rows, "token", 1), want)
    monkeypatch.setattr(loss, "trained_rows", lambda _: (None, None))
    got = packed_step(model, network, rows, "token", 1000)
    assert got[1].keys() != want[1].keys() or differences(got[1], want[1])[0] > 1e-3


def test_rows_start_at_means_and_only_they_train() -> None:
    """The mean of all rows, or of those given; what only rounds the number is never trained."""
    base = make_base("llama")
    tables = [module.weight.data.clone() for module in (base.get_input_embeddings(), base.get_output_embeddings())]
    model = attach_adapter(base, AdapterSettings(rank=4), seed=0, new_rows=NEW)
    for table, module in zip(tables, (base.get_input_embeddings(), base.get_output_embeddings()), strict=True):
        weight = module.weight  # PEFT's: with the trained rows in it
        assert weight.shape == (128, 32) and base.config.vocab_size == 128
        for token in range(128):
            ids = NEW.get(token) or range(97)
            expected = table[token] if token < 94 else table[list(ids)].mean(0)
            torch.testing.assert_close(weight[token].detach(), expected)
    trained = [name for name, one in model.named_parameters() if one.requires_grad and "lora_" not in name]
    assert len(trained) == 2 and all(name.endswith("trainable_tokens_delta.default") for name in trained)


@pytest.mark.parametrize("tied", [False, True])
def test_nothing_as_large_as_the_vocabulary_is_made(tied: bool) -> None:
    """PEFT's own way would take two copies of the weight and two gradients of their size."""
    sizes = {"vocab_size": 30_000, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied)
    peaks = []
    for tokens in ({}, {"<a>": "", "<b>": ""}):
        settings = ModelSettings(base="-", quantization="none", dtype="float32", new_tokens=tokens)
        model = make_weightless(config, settings, AdapterSettings(rank=4), CPU)
        network = plan_network(verify(attach_adapter(make_base("llama"), AdapterSettings(), seed=0).model), model)
        peaks.append(run_layers(network, heaviest_batch(network, longest=32, capacity=64), 99, 0).peak)
    assert 0 <= peaks[1] - peaks[0] < 30_000 * 64 * 4 / 8, peaks


@pytest.mark.parametrize(
    ("token", "said"),
    {
        "the": "is a token already",
        "<Gr\u00fc\u00dfe>": "would come out as <Gr",
        "<|end|>": "is a token already",
        " cat": "is a token already",
        "<|end|>!": "would split the token <|end|>",
        "<|st": "would split the token <|start|>",
        "<new>s": "would split the token <new>",
        " \n": "is blank",
        "": "is blank",
    }.items(),
)
def test_a_token_that_cannot_be_is_named(token: str, said: str, tiny: Any) -> None:
    with pytest.raises(RecipeError, match=said.replace("|", r"\|")):
        add_tokens(tiny, {"<new>": "", token: ""})


def test_a_new_token_is_one_wherever_it_is(tiny: Any, tmp_path: Path) -> None:
    given = {"<b>": "the cat", "<a>": "", "\u2192": "", " lead ": ""}
    starts = add_tokens(tiny, given)
    assert list(starts) == list(range(min(starts), min(starts) + 4))
    assert starts[tiny.convert_tokens_to_ids("<b>")] == tiny.encode("the cat", add_special_tokens=False)
    tiny.save_pretrained(tmp_path)
    for tokenizer in (tiny, load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)):
        for token in given:
            assert tokenizer.convert_tokens_to_ids(token) in tokenizer.encode(f"x{token}y") and token in given
            assert tokenizer.decode(tokenizer.encode(token), skip_special_tokens=True) == token


def write_rows(folder: Path, tokens: list[str]) -> Path:
    path, count = folder / "rows.jsonl", max(26, len(tokens))
    rows = [
        {"messages": [{"role": "user", "content": f"what is {tokens[n % len(tokens)]}{tokens[0]}?"},
                      {"role": "assistant", "content": f"{tokens[n % len(tokens)]} is {n}"}]} for n in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("count", "quantization"), [(2, "nf4"), (70, "none")])
def test_the_whole_journey(
    count: int, quantization: str, recipe: Any, base: Path, tmp_path: Path, cli: Command
) -> None:
    """In rows that are free, on a base in 4 bit, and in some that have to come."""
    names = [f"<n{at:02}>" for at in range(count)]
    data, folder = write_rows(tmp_path, names), tmp_path / "run"
    given = {"quantization": quantization, "new_tokens": names}
    epochs = 2 if count == 2 else 1
    path = recipe(
        model=given, data={"train": str(data)}, train={"epochs": epochs}, adapter={"dropout": 0}, run={"keep": 9}
    )
    shown = cli("preview", path)
    assert shown.code == 0 and f"times the new token {names[1]}" in shown.out, shown.err
    spans = json.loads(cli("preview", path, "--json").out.splitlines()[1])["spans"]
    assert [span["text"] for span in spans if "<n" in span["text"]] == [names[1], names[0], names[1]]
    assert count > 2 or cli("plan", path).code == 0
    assert (done := cli("train", path)).code == 0, done.err
    adapter, checkpoints = folder / "adapter", sorted((folder / "checkpoints").glob("step-*"))
    trained = (adapter / "adapter_model.safetensors").read_bytes()
    ids = json.loads((folder / "provenance.json").read_bytes())["new_tokens"]

    # Resumed, it is the same to the bit; with other tokens it is another run.
    for gone in (adapter, *checkpoints[2:]):
        shutil.rmtree(gone)
    other = cli("train", path, "--resume", f"model.new_tokens={json.dumps(names[1:])}")
    assert other.code == 2 and f"model.new_tokens.{names[0]}: '' -> None" in other.err
    assert cli("train", path, "--resume").code == 0
    assert (adapter / "adapter_model.safetensors").read_bytes() == trained

    # PEFT alone gives the same; where the base has to grow, PEFT's own class does that.
    row = load_tokenizer(str(adapter)).encode(f"a{names[0]} b {names[-1]}c", return_tensors="pt")
    assert list(ids) == names and {ids[names[0]], ids[names[-1]]} <= set(row[0].tolist())
    artifact = find_artifact(str(folder))
    plain = replace(artifact, model=artifact.model.model_copy(update={"quantization": "none"}))
    if count == 2:
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    else:
        peft = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    lean = load_artifact(plain, CPU).get_base_model()
    with torch.no_grad(), evaluating(lean, "eager"):
        wanted, got = lean(row).logits, peft.eval()(row).logits
    known = max(ids.values()) + 1  # what is above rounds the number
    assert (got[..., :known] - wanted[..., :known]).abs().max() < 1e-4

    if count == 2:
        answer = cli("chat", folder, "--prompt", f"what is {names[0]}?", "--max-tokens", 4)
        assert answer.code == 0, answer.err
        scores = json.loads(cli("evaluate", folder, "--data", data, "--json").out)
        assert scores["adapter"]["loss"] < scores["base"]["loss"]
    assert (done := cli("merge", folder, "--out", tmp_path / "merged", "--onto", "original")).code == 0, done.err
    merged, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"] and merged.config.vocab_size == wanted.shape[-1] == (384 if count == 2 else 448)
    with torch.no_grad():
        apart = (merged(row).logits.softmax(-1) - wanted.softmax(-1)).abs().max()
    assert apart < 0.02  # the merged weights are in bf16
    rows = load_file(adapter / "adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        written = load_file(tmp_path / "merged/model.safetensors")[f"{name}.weight"]
        own = rows[f"base_model.model.{name}.token_adapter.trainable_tokens_delta"]
        assert torch.equal(written[list(ids.values())], own.to(written.dtype))

    assert cli("export", tmp_path / "merged", "--to", "gguf", "--out", tmp_path / "m.gguf").code == 0
    reader = GGUFReader(tmp_path / "m.gguf")
    texts = reader.fields["tokenizer.ggml.tokens"]
    assert [bytes(texts.parts[texts.data[at]]).decode() for at in ids.values()] == names
    assert next(one for one in reader.tensors if one.name == "token_embd.weight").shape[1] == merged.config.vocab_size


def test_what_does_not_go_together_is_refused_before_weights(
    recipe: Any, run: Path, tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding trained as a whole as well, an adapter with other tokens, a file that is not there, two of one."""
    monkeypatch.setattr("lorasft.training.run.load_base", lambda *_, **__: pytest.fail("weights were read"))
    words = {
        "train as a whole": ({"new_tokens": ["<a>"]}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        "not those of adapter.start": ({"new_tokens": ["<a>"]}, {"start": str(run)}),
        "there is no such file": ({"new_tokens": "nowhere.txt"}, {}),
        "<a> is in it twice": ({"new_tokens": ["<a>", "<b>", "<a>"]}, {}),
        "should have at most 1000 items": ({"new_tokens": [f"<{n}>" for n in range(1001)]}, {}),
    }
    for said, (model, adapter) in words.items():
        path = Path(recipe(model=model))
        settings = json.loads(path.read_bytes())
        settings["adapter"] = adapter
        path.write_text(json.dumps(settings), encoding="utf-8")
        done = cli("train", path)
        assert done.code in (2, 4) and said in done.err and "model.new_tokens" in done.err, done.err


def test_tokens_are_a_list_a_file_beside_the_recipe_or_have_texts(tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("<b>\n\n<a>\n", encoding="utf-8")
    forms = ["tokens.txt", '["<b>", "<a>"]', '{"<a>": "", "<b>": a text}']
    found = []
    for form in forms:
        (tmp_path / "r.yaml").write_text(
            f"model: {{base: x, new_tokens: {form}}}\ndata: {{train: y}}\n", encoding="utf-8"
        )
        found.append(load_recipe(str(tmp_path / "r.yaml")))
        (tmp_path / "again.yaml").write_text(dump_recipe(found[-1]), encoding="utf-8")
        assert load_recipe(str(tmp_path / "again.yaml")) == found[-1]
    assert mathematics(found[0]) == mathematics(found[1]) != mathematics(found[2])
    assert found[2].model.new_tokens == {"<a>": "", "<b>": "a text"}
