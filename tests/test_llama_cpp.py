"""An export in llama.cpp itself, where its wheel `xllamacpp` is installed: tokens, template, answers, stops."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_base
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
MESSAGES = [
    {"role": "system", "content": "Speak of cats."},
    {"role": "user", "content": "hello  12 + 30?"},
    {"role": "assistant", "content": "= 42"},
    {"role": "user", "content": "and the dög"},
]


@contextmanager
def serve(model: Path) -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """llama.cpp's own server for the export of `model`, on the CPU. Yields what posts to one of its addresses."""
    written = write_gguf(model, model / "m.gguf")
    params = xllamacpp.CommonParams()
    params.model.path = written["file"]
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers, params.use_jinja = 128, 1, False, 0, True
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)

    def post(address: str, given: dict[str, Any]) -> Any:
        request = urllib.request.Request(server.listening_address + address, json.dumps(given).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    yield post


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
        asked = {"prompt": ids, "n_predict": 12, "temperature": 0.0, "n_probs": 1, "return_tokens": True}
        said = post("/completion", asked)
    new, numbers = said["tokens"], {one["id"]: one["logprob"] for one in said["completion_probabilities"]}
    with torch.no_grad():
        logs = plain(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    chosen = logs.gather(1, torch.tensor(new).unsqueeze(1)).squeeze(1)
    assert len(new) == 12 or said["stop_type"] == "eos"
    assert (logs.max(-1).values - chosen < 0.05).all()  # nearly equals change places in fp16
    # Tokens that end within a character have no number there.
    compared = [(number, chosen[new.index(token)]) for token, number in numbers.items() if new.count(token) == 1]
    assert compared and all(abs(ours - theirs) < 0.05 for ours, theirs in compared)


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
