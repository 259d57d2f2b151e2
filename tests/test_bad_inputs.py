"""Promise I18: every bad input that this program can meet: exit code, what, where and how to fix it, on one screen.

The numbers are those of a list of 94 inputs that break fine-tuning tools. Not here: 13, 19, 23 cannot be met; 22 is in
test_families.py; 54 in test_chat.py; 41, 42, 62, 64, 66, 67, 70 in test_data.py; 87 in test_doctor.py; 32, 89 to 94 in
test_memory.py, test_train.py and faults; 95, a tracker that is not installed, is ours.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from safetensors.torch import load_file, save_file

CANARY = "hf_canaryCANARYcanaryCANARYcanary00"


@dataclass(frozen=True)
class Place:
    """Where a case finds things. `bare` is a base without weights: what ends before they load never misses them."""

    folder: Path
    bare: Path
    base: Path
    rows: Path
    run: Path


Make = Callable[[Place], list[str]]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def edit(path: Path, **values: Any) -> None:
    write(path, json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}))


def of_recipe(text: str = "", *words: str, verb: str = "train") -> Make:
    """`verb` on a recipe over the bare base, with `text` behind the first two lines."""

    def make(at: Place) -> list[str]:
        head = f"model: {{base: {at.bare}, dtype: float32}}\ndata: {{train: {at.rows}, max_length: 120}}\n"
        write(at.folder / "r.yaml", head + text)
        return [verb, "r.yaml", *words]

    return make


def of_file(name: str, content: str | bytes, *words: str) -> Make:
    return lambda at: ["train", str(write(at.folder / name, content).name), *words]


def of_rows(content: str | bytes | list[Any], *words: str, name: str = "rows.jsonl") -> Make:
    """`preview` of these rows, from a base that has a tokenizer only."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)

    def make(at: Place) -> list[str]:
        data = f"{{train: {write(at.folder / name, content)}, eval: null, max_length: 120}}"
        write(at.folder / "r.yaml", f"model: {{base: {at.bare}}}\ndata: {data}\n")
        return ["preview", "r.yaml", *words]

    return make


def of_base(harm: Callable[[Path], object], *words: str, whole: bool = False, verb: str = "train") -> Make:
    """`train` (or another verb) on a copy of the base that `harm` was done to; with its weights if `whole`."""

    def make(at: Place) -> list[str]:
        folder = Path(shutil.copytree(at.base if whole else at.bare, at.folder / "model"))
        harm(folder)
        arguments = of_recipe("", f"model.base={folder}", *words, verb=verb)(at)
        return arguments if verb in ("train", "preview") else [verb, str(folder), *words]

    return make


def of_config(**values: Any) -> Make:
    """`train` on a copy of the base with other `values` in its config."""
    return of_base(lambda model: edit(model / "config.json", **values), whole=True)


def of_template(text: str) -> Make:
    """`preview` with a base that has this chat template."""
    return of_base(lambda model: write(model / "chat_template.jinja", text), verb="preview")


def of_adapter(harm: Callable[[Path], object], *verb: str) -> Make:
    """`merge` (or `verb`) of a copy of an adapter that `harm` was done to."""

    def make(at: Place) -> list[str]:
        folder = Path(shutil.copytree(at.run / "adapter", at.folder / "adapter"))
        (folder / "manifest.json").unlink()
        (folder / "recipe.yaml").unlink()
        edit(folder / "adapter_config.json", base_model_name_or_path=str(at.base))
        harm(folder)
        command, *words = verb or ("merge", "--out", "out", "--no-check")
        return [command, str(folder), *words]

    return make


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "adapter_config.json", **values)


def tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path)

    return harm


def header(fields: object, data: bytes = b"", *, length: int | None = None) -> Callable[[Path], object]:
    text = json.dumps(fields).encode()
    content = (len(text) if length is None else length).to_bytes(8, "little") + text + data
    return lambda folder: write(folder / "adapter_model.safetensors", content)


def of_run(harm: Callable[[Path], object], *words: str, verb: str = "train") -> Make:
    """`verb` on a copy of a finished run that `harm` was done to; `train`: on its recipe."""

    def make(at: Place) -> list[str]:
        folder = Path(shutil.copytree(at.run, at.folder / "run"))
        harm(folder)
        write(at.folder / "r.yaml", (folder / "recipe.yaml").read_bytes())
        return ["train", "r.yaml", f"run.output={folder}", *words] if verb == "train" else [verb, str(folder), *words]

    return make


def chat(*messages: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages], **more}


QA = (("user", "Q"), ("assistant", "A"))
GOOD = {"prompt": "Q", "completion": "A"}
TENSOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
F32 = {"dtype": "F32", "shape": [4, 64], "data_offsets": [0, 1024]}
ODD_NAME = "x\x1b]0;\u202e.jsonl"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"


def call(arguments: Any) -> dict[str, Any]:
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    return {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": calls}]}


def break_checkpoints(run: Path) -> None:
    for path in (run / "checkpoints").glob("*/state.json"):
        path.write_bytes(path.read_bytes()[:-1])


CASES: dict[str, tuple[int, list[str], Make]] = {
    # --- recipe and command line
    "1": (2, ["no recipe recpe.yaml", "did you mean recipe.yaml?"],
          lambda at: [*of_file("recipe.yaml", "")(at)[:1], "recpe.yaml"]),
    "1 shipped": (2, ["did you mean llama-3.1-8b?"], lambda at: ["train", "llama3.1-8b"]),
    "1 shown": (2, ["did you mean gpt2?"], lambda at: ["recipes", "show", "gtp2"]),
    "1 nothing": (2, ["no recipe", "lorasft recipes list"], lambda at: ["recipes", "show"]),
    "1 odd": (2, ["no recipe", "lorasft recipes list"], lambda at: ["train", "\x1b\x00"]),
    "2 nul": (2, ["not YAML", "r.yaml"], of_file("r.yaml", b"a: \x00\n")),
    "2 folder": (2, ["this folder is not that of a run"], lambda at: ["train", str(at.folder)]),
    "2 empty": (2, ["the recipe is empty", "r.yaml"], of_file("r.yaml", "")),
    "3": (2, ["not YAML", "r.yaml:4:1", "spaces"], of_recipe("run:\n\tkeep: 1")),
    "4": (2, ["'learning_rate'", "r.yaml:4 and r.yaml:5"],
          of_recipe("optimizer:\n  learning_rate: 1e-4\n  learning_rate: 2e-4")),
    "5": (0, [], of_recipe("optimizer: {learning_rate: 2e-4}", verb="preview")),
    "6": (2, ["optimizer.learning_rate", "r.yaml:3"], of_recipe("optimizer: {learning_rate: fast}")),
    "7": (2, ["optimizer.learning_rate", "it is 2", "r.yaml:3"], of_recipe("optimizer: {learning_rate: 2}")),
    "8": (2, ["learnig_rate", "r.yaml:3", "optimizer.learning_rate"], of_recipe("optimizer: {learnig_rate: 1e-4}")),
    "9": (2, ["torch_dtype", "r.yaml:3", "model.dtype"], of_recipe("torch_dtype: float32")),
    "10": (2, ["adapter.dora", "boolean", '"on"'], of_recipe("adapter: {dora: on}")),
    "11": (8, ["tags", "r.yaml:3", "remove"], of_recipe("run: !!python/object/apply:os.system [touch hacked]")),
    "12 aliases": (8, ["aliases", "r.yaml:4"], of_recipe("chat: &a {system: x}\nrun: *a")),
    "12 size": (8, ["too large", "r.yaml"], of_recipe("#" * (2 << 20))),
    "14": (2, ["hf_token", "r.yaml:3", "hf auth login"], of_recipe(f"hf_token: {CANARY}")),
    "14 nested": (2, ["run.wandb_api_key", "r.yaml:4"], of_recipe(f"run:\n  wandb_api_key: [{{x: {CANARY}}}]")),
    "14 override": (2, ["my_secret", "command line"], of_recipe("", f"model.my_secret={CANARY}")),
    "14 known key": (2, ["secret"], of_recipe("chat: {template_options: {my_secret: [x]}}")),
    "14 value": (2, ["model.dtype"], of_recipe("", f"model.dtype={CANARY}")),
    "15": (8, ["trust_remote_code", "r.yaml:3"], of_recipe("trust_remote_code: true")),
    "16": (8, ["attn_implementation", "r.yaml:3"], of_recipe("attn_implementation: evil/kernel")),
    "17": (2, ["rank", "alpha", "dropout", "r.yaml:3"], of_recipe("adapter: {rank: 0, alpha: -1, dropout: 1.5}")),
    "18": (2, ["1000000", "128", "data.max_length=128"], of_recipe("", "data.max_length=1000000")),
    "20": (2, ["warmup", "steps"],
           of_recipe("train: {batch_size: 2, steps: 3}\nschedule: {warmup: 5}", "model.base=BASE")),
    "20 share": (2, ["train.epochs"], of_recipe("train: {epochs: 0}")),
    "21": (2, ["q_prj", "adapter.targets", "names: down_proj"], of_recipe("adapter: {targets: [q_prj]}")),
    "21 no linear": (2, ["norm", "all-linear"], of_recipe("adapter: {targets: [norm]}")),
    "21 none": (2, ["no targets", "all-linear"], of_recipe("adapter: {targets: []}")),
    "21 saved": (2, ["lm_haed", "names: ", "lm_head"], of_recipe("adapter: {modules_to_save: [lm_haed]}")),
    "21 start": (2, ["no effect with adapter.start"], of_recipe("adapter: {start: runs/x, rank: 4}")),
    "24": (2, ["lm_head is tied"],
           of_base(lambda model: edit(model / "config.json", tie_word_embeddings=True), "adapter.targets=[lm_head]")),
    "25": (2, ["run.eval_every", "run.eval_every=null", "data.eval"],
           of_recipe("", "run.eval_every=5", "data.eval=null")),
    "26": (0, [], of_recipe("train: {batch_size: fast}", "train.batch_size=2", verb="preview")),
    "27 verb": (2, ["trian", "lorasft --help"], lambda at: ["trian", "x"]),
    "27 flag": (2, ["--resumee", "lorasft train --help"], of_recipe("", "--resumee")),
    "27 words": (2, ["surplus"], lambda at: ["doctor", "surplus"]),
    "28": (2, ["not a run's", "notes.txt", "run.output"],
           lambda at: [*of_recipe()(at), f"run.output={write(at.folder / 'full/notes.txt', 'x').parent}"]),
    "29": (2, ["this run folder exists", "--resume", "run.output="], of_run(lambda run: None)),
    "30": (4, ["no checkpoint to resume from", "state.json", "run.output"], of_run(break_checkpoints, "--resume")),
    "30 none": (2, ["no run to resume"], of_recipe("", "--resume")),
    "31": (2, ["optimizer.learning_rate", "0.005 -> 0.001", "restore"],
           of_run(lambda run: None, "--resume", "optimizer.learning_rate=1e-3")),
    "33 base": (2, ["lie in each other"], of_recipe("", "run.output=BARE")),
    "33 inside": (2, ["lie in each other"], of_recipe("", "run.output=BARE/run")),
    "34 device": (2, ["/dev/null"], of_recipe("", "run.output=/dev/null")),
    "34 long run": (2, ["too long"], of_recipe("", "run.output=" + "x" * 300)),
    "34 long out": (2, ["too long"], of_adapter(lambda _: None, "merge", "--out", "x" * 300, "--no-check")),
    "34 long recipe": (2, ["too long"], lambda at: ["train", "x" * 300]),
    "34 nul": (2, ["run.output"], of_recipe("", r'run.output="a\0b"')),
    "34 nul template": (2, ["chat.template"], of_recipe("", r'chat.template="a\0.jinja"')),
    "34 deep": (2, ["section.key=value"], of_recipe("", "train." + ".".join("a" * 99) + "=1")),
    "34 date": (2, ["chat.template_date", '"foo"'], of_recipe("", "chat.template_date=foo")),
    "27 memory": (2, ["a size like"], of_recipe("", "--memory", "9" * 400 + "GiB", verb="plan")),
    "33 root": (2, ["nothing is written there"], of_recipe("", "run.output=/")),
    "33 home": (2, ["nothing is written there"], of_recipe("", "run.output=HOME")),
    "33 tilde": (2, ["run.output", "null|None|string"], of_recipe("", "run.output=~")),
    # --- data
    "35 file": (3, ["no such file", "absent.jsonl", "folder"],
                of_recipe("", "data.train=absent.jsonl", verb="preview")),
    "35 glob": (3, ["no such file", "*.jsonl", "folder"], of_recipe("", "data.train=none/*.jsonl", verb="preview")),
    "35 ending": (0, [], of_rows([GOOD], name="rows.JSONL")),
    "35 unknown": (3, ["unknown kind of file: .txt", "rows.txt", ".jsonl"], of_rows("x", name="rows.txt")),
    "36 empty": (3, ["no rows", "rows.jsonl"], of_rows("")),
    "37": (3, ["Expecting value", "rows.jsonl:2", "on_bad_row"],
           of_rows('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": oops}\n')),
    "38": (3, ["cut off", "rows.jsonl:2", "fetch"],
           of_rows('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl')),
    "39": (0, [], of_rows(json.dumps([GOOD]))),
    "40": (3, ["utf-8", "0xe9", "rows.jsonl:1", "iconv"], of_rows(b'{"prompt": "caf\xe9", "completion": "b"}\n')),
    "43": (3, ["surrogate", "rows.jsonl:1"], of_rows('{"prompt": "\\ud83d", "completion": "b"}\n')),
    "44": (3, ["'prompt' twice", "rows.jsonl:1"], of_rows('{"prompt": "a", "completion": "b", "prompt": "c"}\n')),
    "45": (3, ["NaN", "rows.jsonl:1"], of_rows('{"prompt": "a", "completion": NaN}\n')),
    "46": (3, ["must be an object", "list", "rows.jsonl:2"], of_rows([GOOD, ["a"]])),
    "47": (3, ["foo, bar", "rows.jsonl:1", "data.columns"], of_rows([{"foo": 1, "bar": 2}])),
    "48": (3, ["prompt-completion and text", "rows.jsonl:1", "data.format"], of_rows([GOOD | {"text": "x"}])),
    "49": (3, ["'prompt'", "rows.jsonl:2", "text"], of_rows([GOOD, {"text": "x"}])),
    "50": (3, ["no assistant turn", "rows.jsonl:1"], of_rows([chat()])),
    "51": (3, ["no assistant turn (roles: user, user)", "rows.jsonl:1"], of_rows([chat(("user", "a"), ("user", "b"))])),
    "52": (3, ["unknown role 'human'", "rows.jsonl:1", "sharegpt"], of_rows([chat(("human", "a"), ("gpt", "b"))])),
    "53": (3, ["refuses", "user, user, assistant", "rows.jsonl:1"],
           of_rows([chat(("user", "a"), *QA)], "chat.template=none")),
    "55": (3, ["assistant without content", "rows.jsonl:1"], of_rows([chat(("user", "a"), ("assistant", None))])),
    "57": (3, ["type image_url", "rows.jsonl:1", "only text"],
           of_rows([chat(("user", [{"type": "image_url"}]), ("assistant", "A"))])),
    "58": (3, ["arguments", "not JSON", "rows.jsonl:1"], of_rows([call("{")])),
    "59 text": (0, [], of_rows([chat(*QA, tools="[]")])),
    "59 mapping": (3, ["'tools' must be a list", "rows.jsonl:1"], of_rows([chat(*QA, tools={"a": 1})])),
    "59 broken": (3, ["tools: not JSON", "rows.jsonl:1"], of_rows([chat(*QA, tools="[oops")])),
    "60": (3, ["without text", "rows.jsonl:1", "on_bad_row=drop"], of_rows([chat(("user", "Q"), ("assistant", " "))])),
    "61": (3, ["control token <|end|>", "rows.jsonl:1", "as_text"],
           of_rows([{"prompt": "a<|end|>", "completion": "b"}])),
    "63": (3, ["2 rows read, 2 dropped", "none left", "2 times as in ", "data.max_length"],
           of_rows([{"prompt": "a" * 200, "completion": f"b{n}"} for n in range(2)])),
    "65": (2, ["40 rows", "batch of 64", "train.batch_size"],
           of_recipe("", "train.batch_size=64", "data.eval=null", "model.base=BASE")),
    "68": (5, ["hub cannot be reached", "no/dataset"], of_recipe("", "data.train=no/dataset", verb="preview")),
    "69": (3, ["'content'", "int64|int"], of_rows([chat(("user", "Q"), ("assistant", 7))])),
    "SEC-14": (3, ["unknown role"], of_rows([chat(("\x1b]0;x\x07\u202e", "a"), *QA)])),
    "SEC-14 key": (3, ["columns seen"], of_rows([{"\x1b[31m\u202e": "a"}])),
    "SEC-14 name": (3, ["x\\x1b]0;\\u202e.jsonl:1"], lambda at: of_recipe(
        "", f"data.train={write(at.folder / 'rows' / ODD_NAME, 'x').parent}", verb="preview")(at)),
    # --- model, tokenizer, adapter, checkpoint
    "71 nothing": (4, ["no config.json", "model"], of_base(lambda model: (model / "config.json").unlink())),
    "71 adapter": (4, ["an adapter", "its base is"], lambda at: of_recipe("", f"model.base={at.run / 'adapter'}")(at)),
    "71 absent": (4, ["no such folder", "no/such/base"], of_recipe("", "model.base=no/such/base", verb="preview")),
    "71 hub": (5, ["hub cannot be reached", "some/model"], of_recipe("", "model.base=some/model", verb="preview")),
    "72 missing": (4, ["model.safetensors"], of_base(lambda model: None)),
    "72 pointer": (4, ["Git LFS", "model.safetensors", "git lfs pull"],
                   of_base(lambda model: write(model / "model.safetensors", LFS))),
    "72 page": (4, ["web page|HTML", "model.safetensors"],
                of_base(lambda model: write(model / "model.safetensors", "<!DOCTYPE html><html>login</html>"))),
    "72 cut": (4, ["model.safetensors", "download"],
               of_base(lambda model: os.truncate(model / "model.safetensors", 9999), whole=True)),
    "72 merge": (4, ["Git LFS"], lambda at: ["merge", str(at.run), "--out", "out", "--force-base", "--base", str(write(
        Path(shutil.copytree(at.bare, at.folder / "base")) / "model.safetensors", LFS).parent)]),
    "73": (8, ["pickle", "model", "safetensors"], of_base(lambda model: write(model / "pytorch_model.bin", b"x"))),
    "74": (4, ["gptq", "16-bit"], of_config(quantization_config={"quant_method": "gptq", "bits": 4})),
    "75": (4, ["t5", "causal"], of_config(model_type="t5", is_encoder_decoder=True)),
    "76": (8, ["code"], of_config(model_type="odd", auto_map={"AutoConfig": "a.B"})),
    "77": (4, ["cannot read the chat template", "absent.jinja"], of_rows([GOOD], "chat.template=absent.jinja")),
    "78 syntax": (4, ["does not parse", "line 1"], of_template("{% if %}")),
    "78 size": (4, ["chat template"], of_template("x" * (2 << 20))),
    "78 number": (4, ["takes too much"], of_template("{% set x = 7 ** 70000000 %}a")),
    "78 list": (4, ["takes too much"], of_template("{% set x = ['x'] * 10 ** 9 %}a")),
    "78 wide": (4, ["takes too much"], of_template("{{ 'x'.center(2000000000) }}")),
    "78 doubled": (4, ["takes too much"], of_template("{% set n = namespace(s='x') %}"
                           "{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}")),
    "78 code": (8, ["__class__"], of_template("{{ ''.__class__.__mro__[1] }}")),
    "79": (4, ["tokenizer.json"], of_base(lambda model: (model / "tokenizer.json").unlink(), verb="preview")),
    "80": (4, ["id", "embedding rows"], of_config(vocab_size=20)),
    "83 remote, with a recipe": (8, ["https://", "base"],
           of_run(lambda run: config(base_model_name_or_path="https://host/x")(run / "adapter"),
                  "--prompt", "q", verb="chat")),
    "81 missing": (4, ["lora_A", "q_proj"], of_adapter(tensors(lambda found: found.pop(TENSOR)))),
    "81 extra": (4, ["odd"], of_adapter(tensors(lambda found: found.update(odd=found[TENSOR] * 1)))),
    "81 shape": (4, ["q_proj"], of_adapter(tensors(lambda found: found.update({TENSOR: found[TENSOR][:, 1:] * 1})))),
    "81 NaN": (4, ["finite", "q_proj"], of_adapter(tensors(lambda found: found[TENSOR].fill_(float("nan"))))),
    "81 rank": (4, ["rank 8", "(64, 4)"], of_adapter(config(r=8))),
    "82": (8, ["pickle", "adapter_model.safetensors"],
           of_adapter(lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"))),
    "83 kind": (4, ["IA3"], of_adapter(config(peft_type="IA3"))),
    "83 unknown": (4, ["strange_field", "adapter_config.json"], of_adapter(config(strange_field={"a": 1}))),
    "83 code": (8, ["auto_map"], of_adapter(config(auto_map={"AutoModel": "os.X"}))),
    "83 tokenizer": (8, ["tokenizer_kwargs"], of_adapter(config(tokenizer_kwargs={"trust_remote_code": True}))),
    "83 pattern": (8, ["alpha_pattern"], of_adapter(config(alpha_pattern={"(a+)+$": 2}))),
    "83 UNC": (8, ["evil", "--base"], of_adapter(config(base_model_name_or_path="//evil/share"))),
    "83 URL": (8, ["file:", "--base"], of_adapter(config(base_model_name_or_path="file:///etc"))),
    "83 chat": (8, ["evil", "--base"],
                of_adapter(config(base_model_name_or_path="//evil/share"), "chat", "--prompt", "x")),
    "83 absent": (4, ["no such", "/etc/absent", "--base"], of_adapter(config(base_model_name_or_path="/etc/absent"))),
    "83 recipe": (8, ["evil", "--base"], of_adapter(
        lambda folder: write(folder / "recipe.yaml", "model: {base: //evil/share}\ndata: {train: x}"),
        "chat", "--prompt", "x")),
    "83 manifest": (4, ["manifest.json"], of_adapter(lambda folder: write(folder / "manifest.json", '{"a": []}'))),
    "83 template": (4, ["chat_template.json"],
                    of_adapter(lambda at: write((at / "chat_template.jinja").rename(at / "chat_template.json"), "{"))),
    "83 record": (4, ["provenance.json"],
           of_run(lambda run: write(run / "provenance.json", '{"base": 1}'), "--out", "out", verb="merge")),
    "83 changed": (4, ["adapter_config.json"],
           of_run(lambda run: config(lora_alpha=7)(run / "adapter"), "--out", "out", "--no-check", verb="merge")),
    "84": (4, ["not the one", "--base", "--force-base"],
           lambda at: ["merge", str(at.run), "--base", str(at.bare), "--out", "out"]),
    "85 huge": (4, ["adapter_model.safetensors"], of_adapter(header({TENSOR: F32}, bytes(1024), length=2**63))),
    "85 short": (4, ["adapter_model.safetensors"], of_adapter(header({TENSOR: F32}, bytes(1000)))),
    "85 trailing": (4, ["adapter_model.safetensors"], of_adapter(header({TENSOR: F32}, bytes(1032)))),
    "85 overlap": (4, ["adapter_model.safetensors"], of_adapter(header({TENSOR: F32, "b": F32}, bytes(1024)))),
    "85 dtype": (4, ["adapter_model.safetensors"], of_adapter(header({TENSOR: F32 | {"dtype": "F8"}}, bytes(1024)))),
    "86 exists": (2, ["exists", "home/out"],
                  lambda at: ["merge", str(at.run), "--out", str(write(at.folder / "out", ""))]),
    "86 in run": (2, ["run"], lambda at: ["merge", str(at.run), "--out", str(at.run / "out")]),
    "27 data": (2, ["--data"], lambda at: ["merge", str(at.run), "--out", "out", "--no-check", "--data", "x.jsonl"]),
    "86 nowhere": (4, ["there is no such folder"], lambda at: ["merge", "nowhere", "--out", "out"]),
    "86 in base": (2, ["base"], lambda at: ["merge", str(at.run), "--out", str(at.base / "out"), "--no-check"]),
    "86 model": (4, ["a model", "adapter"], lambda at: ["merge", str(at.base), "--out", "out"]),
    "95": (5, ["mlflow", "pip install"], of_recipe("run: {trackers: [mlflow]}")),
    "88": (5, ["float16", "model.dtype", "bfloat16"], of_recipe("", "model.dtype=float16")),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, base: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    bare = tmp_path / "bare"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    rows = write(tmp_path / "rows.jsonl", "".join(json.dumps(chat(("user", f"Q{n}"), QA[1])) + "\n" for n in range(40)))
    return Place(home, bare, base, rows, run)


@pytest.mark.parametrize("number", CASES)
def test_i18_a_bad_input_is_refused_in_plain_words(
    number: str, place: Place, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded, to be told what could be known before")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    code, said, make = CASES[number]
    named = {"BARE": place.bare, "BASE": place.base, "HOME": place.folder}
    arguments = [re.sub("BARE|BASE|HOME", lambda found: str(named[found[0]]), word) for word in make(place)]
    ended, out, err = cli(*arguments)
    assert ended == code, err
    for words in said:
        assert any(option in err for option in words.split("|")), (words, err)
    assert CANARY not in out + err and "Traceback" not in err and not (place.folder / "hacked").exists()
    assert all(character.isprintable() or character == "\n" for character in out + err), repr(err)
    if code:
        assert "error: " in err and "hint: " in err and len(err.splitlines()) <= 20, err
        assert all(len(line) <= 400 for line in err.splitlines() if line.startswith("error: ")), err
        assert out == "" and not (place.folder / "out").is_dir()
        assert "where: " in err or number.split()[0] in {"1", "27"}, err
