"""Tokenizers and templates in other formats: llama.cpp's cases and hashes, and a small reader of Go templates."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from copy import copy
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from jinja2 import Environment
from tiny_tokenizer import TEMPLATE, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lorasft.data.templates import set_template
from lorasft.data.tokenizer import load_tokenizer
from lorasft.errors import ModelError
from lorasft.export.gguf import write_gguf
from lorasft.export.ollama import find_joints, go_template, write_ollama
from lorasft.export.tokenizer import describe_tokenizer, find_raw_start, name_splitter
from lorasft.recipe import ChatSettings

pytest.importorskip("gguf", reason="the extra gguf is not installed")
DATA = Path(__file__).parents[2] / "shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the public test material is not here")
SPACE = "\u2581"


@cache
def describe(name: str) -> tuple[Any, dict[str, Any]]:
    folder = DATA / "tokenizers" / name
    tokenizer = load_tokenizer(str(folder))
    fields = describe_tokenizer(folder, max(tokenizer.get_vocab().values()) + 3)
    return tokenizer, {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}


# llama.cpp names the rule of a tokenizer by a hash of what it makes of this text (convert_hf_to_gguf_update.py).
HASHED = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 "
    "33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you "
    "sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
HASHES = {
    "llama-3.1": ("llama-bpe", "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5"),
    "qwen2.5": ("qwen2", "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea"),
    "gpt2": ("gpt-2", "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454"),
}


@needs_data
@pytest.mark.parametrize("name", HASHES)
def test_the_rule_for_splitting_has_llama_cpps_name(name: str) -> None:
    tokenizer, fields = describe(name)
    rule, digest = HASHES[name]
    assert fields["pre"] == rule
    assert hashlib.sha256(str(tokenizer.encode(HASHED)).encode()).hexdigest() == digest


@pytest.mark.parametrize("name", ["llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o"])
def test_the_rules_are_those_of_transformers_reader(name: str) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    split = {"type": "Split", "pattern": {"Regex": GGUF_PRE_TOKENIZER_SPLITS[name]}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    rule = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    spec = {"normalizer": None, "pre_tokenizer": rule, "model": {"ignore_merges": name != "dbrx"}}
    assert name_splitter(spec, Path("model")) == name


def split_at_specials(text: str, fields: dict[str, Any]) -> Iterator[str]:
    specials = [token for token, kind in zip(fields["tokens"], fields["token_type"], strict=True) if kind in (3, 4)]
    specials.sort(key=len, reverse=True)
    return (part for part in re.split("(" + "|".join(map(re.escape, specials)) + ")", text) if part)


def merge_by_score(text: str, fields: dict[str, Any]) -> list[int]:
    """llama.cpp's SentencePiece tokenizer: the neighbours whose union scores best are merged, from the left."""
    ids = {token: at for at, token in enumerate(fields["tokens"])}
    symbols = list(text.replace(" ", SPACE))
    while True:
        pairs = [(ids.get(a + b), at) for at, (a, b) in enumerate(pairwise(symbols))]
        scored = [(-fields["scores"][token], at) for token, at in pairs if token is not None]
        if not scored:
            break
        at = min(scored)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    spelled = ([ids[s]] if s in ids else [ids[f"<0x{byte:02X}>"] for byte in s.encode()] for s in symbols)
    return [token for tokens in spelled for token in tokens]


def tokenize(text: str, fields: dict[str, Any]) -> list[int]:
    found: list[int] = []
    behind_special = True
    for part in split_at_specials(text, fields):
        special = part in fields["tokens"] and fields["token_type"][fields["tokens"].index(part)] in (3, 4)
        space = " " if fields["add_space_prefix"] and behind_special else ""
        found += [fields["tokens"].index(part)] if special else merge_by_score(space + part, fields)
        behind_special = special
    return found


@needs_data
@pytest.mark.parametrize(("name", "cases"), [("tinyllama-zephyr", "llama-spm"), ("phi-3.5", "phi-3")])
def test_scores_give_the_ids_of_llama_cpps_cases(name: str, cases: str) -> None:
    _, fields = describe(name)
    folder = DATA / "oracles/llama.cpp-vocab"
    texts = (folder / f"{cases}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    wanted = (folder / f"{cases}.out").read_text(encoding="utf-8").split("\n")
    checked = 0
    for text, ids in zip(texts, wanted, strict=False):
        if text:
            assert merge_by_score(" " + text, fields) == [int(number) for number in ids.split()], text
            checked += 1
    assert checked > 40


PROBES = (  # texts on which rebuilt pre-tokenizers and normalizers are known to differ
    "Hello world",
    "  two spaces first",
    "tabs\tand\n\nlines\r\n \n end ",
    "def f(x):\n    return x**2  # 12345.678",
    "It's 1984, we'll see; don't WE'LL",
    "naïve café Ångström ﬁ",
    "Ünï\u0301cödé e\u0301",
    "日本語と中文 한국어",
    "👩‍👩‍👧 🙂 \u200d",
    "١٢٣ ½ ²",
    "<s> [INST] </s>",
    "\u00a0nbsp\u2028line\u0000nul",
)
CHAT = [
    {"role": "system", "content": "Speak of ships."},
    {"role": "user", "content": "Where is the  Vasa?"},
    {"role": "assistant", "content": "In Stockholm.\nIn a museum."},
    {"role": "user", "content": "And the Mary Rose, {{ is it }} there?"},
]


@needs_data
@pytest.mark.parametrize("name", ["tinyllama-zephyr", "mistral-v0.2", "mistral-v0.3", "gemma-2-standin"])
def test_prompts_have_the_ids_of_training(name: str) -> None:
    tokenizer, fields = describe(name)
    text = tokenizer.apply_chat_template(CHAT[1:], tokenize=False, add_generation_prompt=True)
    assert tokenize(text, fields) == tokenizer(text, add_special_tokens=False)["input_ids"]


def save_weights(folder: Path) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=331, hidden_size=32, intermediate_size=32, num_hidden_layers=1, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def test_a_tokenizer_is_read_back(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "model"))
    save_weights(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "m.gguf")
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in (tokenizer.apply_chat_template(CHAT, tokenize=False), *PROBES):
        assert back.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    assert (back.chat_template, back.bos_token_id, back.eos_token_id) == (TEMPLATE, 0, 1)


def test_a_rule_that_is_not_known_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    spec = json.loads(file.read_bytes())
    split = {"type": "Split", "pattern": {"Regex": r"\d+"}, "behavior": "Isolated", "invert": False}
    byte_level = {**spec["pre_tokenizer"], "use_regex": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    file.write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(ModelError, match="by a rule that is not known"):
        describe_tokenizer(tmp_path, 400)


def evaluate(template: str, messages: list[dict[str, str]]) -> str:
    """The few constructs of Go's text/template that are written, on `.Messages`: read as Jinja."""
    blocks: list[str] = []

    def translate(found: re.Match[str]) -> str:
        action = re.sub(r"\.(Role|Content)\b", lambda name: f"m.{name[1].lower()}", found[1])
        action = action.replace("$before", "state.before")
        word, _, rest = action.partition(" ")
        if test := re.fullmatch(r"(?:else )?if (eq|ne) (\S+) (\S+)", action):
            blocks.extend(["if"] * (word == "if"))
            return f"{{% {'if' if word == 'if' else 'elif'} {test[2]} {'==' if test[1] == 'eq' else '!='} {test[3]} %}}"
        if action == "range .Messages":
            blocks.append("for")
            return "{% for m in messages %}"
        if word in ("else", "end"):
            return "{% else %}" if word == "else" else f"{{% end{blocks.pop()} %}}"
        return f"{{% set {word} = {rest.partition('= ')[2]} %}}" if word == "state.before" else f"{{{{ {action} }}}}"

    text = "{% set state = namespace() %}" + re.sub(r"\{\{ (.*?) \}\}", translate, template)
    return Environment(keep_trailing_newline=True).from_string(text).render(messages=messages)


CONVERSATIONS = (CHAT[1:2], CHAT[:2], CHAT[1:], CHAT, [*CHAT, CHAT[2], CHAT[1]])
WITH_BOS = ("llama-3.1", "mistral-v0.2", "gemma-2-standin")  # that a server puts in front


@needs_data
@pytest.mark.parametrize("name", [*WITH_BOS, "qwen2.5", "qwen3", "phi-3.5", "smollm2", "tinyllama-zephyr"])
def test_ollama_renders_the_prompts_of_training(name: str) -> None:
    tokenizer = copy(describe(name)[0])
    set_template(tokenizer, ChatSettings())  # as training saves it: system messages merged where they were refused
    joints = find_joints(tokenizer, where=name)
    bos = str(tokenizer.bos_token) if name in WITH_BOS else ""
    for messages in CONVERSATIONS:
        want = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert bos + evaluate(go_template(joints), messages) == want


def test_a_begun_answer_is_left_open(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path)))
    text = evaluate(go_template(find_joints(tokenizer, where="")), CHAT[:3])
    assert text.endswith("<|start|>assistant\nIn Stockholm.\nIn a museum.")


def test_text_that_go_would_take_for_its_own(tmp_path: Path) -> None:
    odd = '{{ \'a {{ b }} {"""\' }}{% for m in messages %}{{ "{" + m.role + "}" + m.content }}"{% endfor %}'
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path, template=odd)))
    template = go_template(find_joints(tokenizer, where=""))
    assert '"""' not in template
    want = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    literals = re.sub(r"\{\{ (\"(?:[^\"\\]|\\.)*\") \}\}", lambda found: json.loads(found[1]), template)
    assert 'a {{ b }} {"""{system}' in literals and want.startswith('a {{ b }} {"""{system}')


REFUSED = {
    "counts": "{% for m in messages %}[{{ m.role }}{{ loop.index }}]{{ m.content }}{% endfor %}",
    "hides": "{% for m in messages[-1:] %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    "clock": "{{ strftime_now('%Y') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_go_cannot_have_is_refused(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path, template=REFUSED[name])))
    with pytest.raises(ModelError, match="the chat template"):
        find_joints(tokenizer, where="")


def test_the_folder_for_ollama(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "model")
    save_weights(tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"eos_token_id": [1, 3]}', encoding="utf-8")
    assert write_ollama(tmp_path / "model", tmp_path / "out")["system"]
    text = (tmp_path / "out/Modelfile").read_text(encoding="utf-8")
    start, template, stops = text.split('"""')
    assert start == "FROM ./model.gguf\nTEMPLATE "
    assert stops.split("\n")[1:-1] == ['PARAMETER stop "</s>"', 'PARAMETER stop "<|end|>"']
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    want = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert "<s>" + evaluate(template, CHAT) == want
    assert (tmp_path / "out/model.gguf").is_file()


STARTS = {  # what a raw text needs in front in llama.cpp, which follows the chat template
    "mistral-v0.2": "",
    "tinyllama-zephyr": "<s>",  # the template writes no BOS, so the file asks for none
    "phi-3.5": "<s>",
    "llama-3.1": "",
    "qwen2.5": "",
}


@needs_data
@pytest.mark.parametrize("name", STARTS)
def test_raw_texts_are_compared_with_training(name: str) -> None:
    tokenizer, _ = describe(name)
    assert find_raw_start(tokenizer) == STARTS[name]


def save_sentencepiece(folder: Path, scheme: str) -> Path:
    """A tokenizer that writes blanks into its pieces, and one before a text as `scheme` says."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", "a", "b", SPACE, SPACE + "a", SPACE + "b"]
    backend = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, [(SPACE, "a"), (SPACE, "b")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("scheme", "start"), [("always", ""), ("first", " "), ("never", "")])
def test_a_blank_before_texts_is_found_missing(scheme: str, start: str, tmp_path: Path) -> None:
    assert find_raw_start(load_tokenizer(str(save_sentencepiece(tmp_path, scheme)))) == start


TRIMS = {
    "none": (TEMPLATE, False),
    "all": (TEMPLATE.replace("m.content", "m.content | trim"), True),
    "answers": (TEMPLATE.replace("m.content", "m.content.strip() if m.role == 'assistant' else m.content"), True),
    "ends": (TEMPLATE.replace("m.content", "m.content.rstrip()"), True),
}


@pytest.mark.parametrize("name", TRIMS)
def test_messages_that_a_template_trims_are_told(name: str, tmp_path: Path, cli: Command) -> None:
    template, trims = TRIMS[name]
    save_tokenizer(tmp_path / "model", template=template)
    save_weights(tmp_path / "model")
    done = cli("export", tmp_path / "model", "--to", "ollama", "--out", tmp_path / "out")
    assert done.code == 0 and ("trims messages" in done.err) == trims


@pytest.mark.parametrize(("template", "start"), [(TEMPLATE, None), (TEMPLATE.replace("{{ bos_token }}", ""), "<s>")])
def test_which_beginning_is_right_is_told(template: str, start: str | None, tmp_path: Path, cli: Command) -> None:
    save_tokenizer(tmp_path / "model", template=template)
    save_weights(tmp_path / "model")
    done = cli("export", tmp_path / "model", "--to", "gguf", "--out", tmp_path / "m.gguf")
    assert done.code == 0 and ("only after" in done.err) == bool(start) and repr(start or "") in done.err + "''"
