"""Exports in llama.cpp itself, where its wheel `xllamacpp` is installed: tokens, template, answers, stops; K-quants and
adapters."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import Command, save_base
from k_quants import QUANTIZE_BY_GGML, make_tool
from peft import LoraConfig, get_peft_model
from test_export import save_model
from tiny_models import shape
from tiny_tokenizer import TEMPLATE
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasft.data.chat_format import ChatFormat
from lorasft.data.tokenizer import load_tokenizer
from lorasft.export.gguf import write_gguf
from lorasft.export.tokenizer import find_raw_start
from lorasft.recipe import ChatSettings
from lorasft.recipe.load import load_recipe

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's wheel xllamacpp is not installed")
pytest.importorskip("gguf", reason="the extra gguf is not installed")
TEXTS = ("hello  world", " the cat\n\n", "1 + 30 = 42, dög 🙂", "a<|end|>b")
Post = Callable[[str, dict[str, Any]], Any]
MESSAGES = [
    {"role": "system", "content": "Speak of cats."},
    {"role": "user", "content": "hello  12 + 30?"},
    {"role": "assistant", "content": "= 42"},
    {"role": "user", "content": "and the dög"},
]


@contextmanager
def serve(model: Path, *, file: Path | None = None, lora: Path | None = None) -> Iterator[Post]:
    """llama.cpp's own server for the export of `model`, or for `file`, on the CPU. Yields what posts to an address."""
    params = xllamacpp.CommonParams()
    params.model.path = str(file) if file else write_gguf(model, model / "m.gguf")["file"]
    if lora:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers, params.use_jinja = 128, 1, False, 0, True
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)

    def post(address: str, given: dict[str, Any]) -> Any:
        request = urllib.request.Request(server.listening_address + address, json.dumps(given).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    yield post


def distance(post: Post, ids: list[int], plain: Any) -> float:
    """By how much log-probabilities of llama.cpp's greedy answer differ from those of a model of transformers, at most;
    and those of its tokens from the best ones."""
    asked = {"prompt": ids, "n_predict": 12, "temperature": 0.0, "n_probs": 1, "return_tokens": True}
    said = post("/completion", asked)
    new = said["tokens"]
    with torch.no_grad():
        logs = plain(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    chosen = logs.gather(1, torch.tensor(new).unsqueeze(1)).squeeze(1)
    assert len(new) == 12 or said["stop_type"] == "eos"
    # Tokens that end within a character have no number there, so the place of one that comes twice is not known.
    places = [(one["logprob"], chosen[torch.tensor(new) == one["id"]]) for one in said["completion_probabilities"]]
    assert places
    return float(max((logs.max(-1).values - chosen).max(), *((number - there).abs().min() for number, there in places)))


@pytest.mark.parametrize("base", ["random", "tiny"])
@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("{{ bos_token }}", "")])
def test_llama_cpp_answers_as_transformers(template: str, base: str, tmp_path: Path) -> None:
    """The ids of prompts and texts as in training, and greedy answers with their log-probabilities."""
    model = save_base(tmp_path / "model", dtype="float32")
    if base == "tiny":
        shutil.copytree(load_recipe("tiny").model.base, model, dirs_exist_ok=True)
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = load_tokenizer(str(model))
    ids = ChatFormat(tokenizer, ChatSettings()).prompt_ids(MESSAGES)
    start = find_raw_start(tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    with serve(model) as post:
        prompt = post("/apply-template", {"messages": MESSAGES})["prompt"]
        split = {"add_special": True, "parse_special": True}
        assert post("/tokenize", {"content": prompt, **split})["tokens"] == ids
        for text in TEXTS:
            assert post("/tokenize", {"content": start + text, **split})["tokens"] == tokenizer(text)["input_ids"]
        assert distance(post, ids, plain) < 0.05


def test_llama_cpp_stops_where_training_did(tmp_path: Path) -> None:
    """At the tokenizer's end of text: here the first token that the model says and the tokenizer has."""
    model = save_base(tmp_path / "model", dtype="float32")
    ids = ChatFormat(load_tokenizer(str(model)), ChatSettings()).prompt_ids(MESSAGES)
    asked = {"prompt": ids, "temperature": 0.0, "n_predict": 12, "return_tokens": True}
    with serve(model) as post:
        done = post("/completion", asked)
    assert done["stop_type"] == "limit"
    tokenizer = AutoTokenizer.from_pretrained(model)
    last = next(at for at, token in enumerate(done["tokens"]) if token < len(tokenizer))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(done["tokens"][last])
    tokenizer.save_pretrained(model)
    (model / "m.gguf").unlink()
    with serve(model) as post:
        done = post("/completion", asked)
    assert done["stop_type"] == "eos" and done["tokens_predicted"] == last + 1


WIDE = {**shape(256), "vocab_size": 331, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
BASES: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**WIDE),
    "mistral": lambda: hf.MistralConfig(**WIDE, sliding_window=None),
    "qwen2": lambda: hf.Qwen2Config(**WIDE),
    "qwen3": lambda: hf.Qwen3Config(**WIDE),
    "gemma3": lambda: hf.Gemma3TextConfig(**{**WIDE, "head_dim": 256}, sliding_window=64, tie_word_embeddings=False),
    "phi3": lambda: hf.Phi3Config(**{**WIDE, "pad_token_id": 0}),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.self_attn.k_proj": 40}},
}


CASES = [*(("llama", kind) for kind in ADAPTERS), *((name, "plain") for name in BASES if name != "llama")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_llama_cpp_puts_the_adapter_on_its_base(name: str, kind: str, tmp_path: Path, cli: Command) -> None:
    base = save_model(tmp_path / "base", BASES[name]())
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **ADAPTERS[kind])
    base.name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in (value for key, value in adapted.named_parameters() if "lora_" in key):
            parameter.normal_(std=0.1)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    done = cli("export", tmp_path / "adapter", "--to", "gguf-lora", "--out", tmp_path / "new/lora.gguf")
    assert done.code == 0 and "--lora" in done.err and "ADAPTER /" in done.err
    ids = AutoTokenizer.from_pretrained(tmp_path / "base")("hello 1 + 30 = the cat")["input_ids"]
    with serve(tmp_path / "base", lora=tmp_path / "new/lora.gguf") as post:
        assert distance(post, ids, adapted) < 0.05
        with adapted.disable_adapter():
            assert distance(post, ids, adapted) > 0.5


def find_real() -> list[str]:
    return ["llama-quantize"] * bool(shutil.which("llama-quantize")) + ["llama-cpp-python"] * bool(
        find_spec("llama_cpp")
    )


@pytest.mark.parametrize("by", ["llama-quantize", "llama-cpp-python", "ggml"])
@pytest.mark.parametrize("kind", ["q4_k_m", "q6_k"])
def test_llama_cpp_answers_from_k_quants(
    kind: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    """As transformers does with the same numbers, dequantized by gguf's own code; and nearly as before."""
    if by == "ggml":
        monkeypatch.setenv("PATH", str(make_tool(tmp_path / "bin", QUANTIZE_BY_GGML)))
    elif by not in find_real():
        pytest.skip(f"{by} is not installed")
    elif by == "llama-cpp-python":
        monkeypatch.setenv("PATH", "")
    calm = hf.LlamaConfig(**{**WIDE, "initializer_range": 0.05})
    model = save_model(tmp_path / "model", calm, torch.bfloat16)
    file = tmp_path / "m.gguf"
    done = cli("export", tmp_path / "model", "--to", "gguf", "--type", kind, "--out", file, "--json")
    said = json.loads(done.out)
    assert said["quantizer"].startswith(by.replace("ggml", "llama-quantize")) and said["size"] == file.stat().st_size
    assert said["error"] < {"q4_k_m": 0.08, "q6_k": 0.025}[kind] and said["tensors"]["F32"] == 5
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")("hello 1 + 30 = the cat")["input_ids"]
    with serve(tmp_path / "model", file=file) as post:
        assert distance(post, ids, back) < 0.1  # llama.cpp rounds what it multiplies with K-quants to 8 bits
        assert distance(post, ids, model.float()) < {"q4_k_m": 1.0, "q6_k": 0.4}[kind]
