"""The tokenizer and chat template as a GGUF holds them.

llama.cpp splits text by rules in its own source, which the file only names. The name is found from the rules that the
loaded tokenizer has, so that an enlarged vocabulary does not hide it; where there is no name, the export is refused:
a wrong one would give other ids without a word.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasft.data.chat_format import read_style
from lorasft.data.templates import render
from lorasft.data.tokenizer import adds_bos, load_tokenizer
from lorasft.errors import ModelError
from lorasft.export.families import TABLES, not_converted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
_PATTERNS = {"|".join(parts): name for name, parts in TABLES["splitters"].items()}
_LOOKS_SPECIAL = re.compile(r"<[|｜].*[|｜]>|<pad>|<mask>|<unused\d+>")  # llama.cpp's converter takes them for control
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"


def describe_tokenizer(model: Path, vocabulary: int) -> dict[str, Any]:
    """The fields of a GGUF for the tokenizer in the folder `model`, filled up to `vocabulary` tokens.

    Raises ModelError when llama.cpp has no tokenizer that splits text like this one.
    """
    tokenizer = load_tokenizer(str(model))
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise not_converted(f"the tokenizer is {spec['model']['type']}, not BPE", model)
    pieces = _name_tokens(tokenizer, spec, vocabulary)
    steps = json.dumps([spec["normalizer"], spec["pre_tokenizer"]], ensure_ascii=False)
    known = set(re.findall(r'"type": "(\w+)"', steps)) <= {"Sequence", "Prepend", "Replace", "Metaspace", "Split"}
    if spec["model"].get("byte_fallback") and known and _SPACE in steps:  # all that is done is that blanks become it
        own = _describe_sentencepiece(tokenizer, spec, model, pieces["tokenizer.ggml.tokens"])
    else:
        own = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name_splitter(spec, model),
            "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        }
    end = read_style(tokenizer).end_of_turn.strip() if tokenizer.chat_template else None
    ids = {name: getattr(tokenizer, known_as) for name, known_as in TABLES["tokens"].items()}
    ids["eot"] = tokenizer.get_vocab().get(end)
    own |= {f"tokenizer.ggml.{name}_token_id": int(at) for name, at in ids.items() if at in range(vocabulary)}
    own["tokenizer.ggml.add_bos_token"] = starts_with_bos(tokenizer)
    own["tokenizer.ggml.add_eos_token"] = False
    if tokenizer.chat_template:
        own["tokenizer.chat_template"] = tokenizer.get_chat_template(None, None)
    return own | pieces


def name_splitter(spec: dict[str, Any], model: Path) -> str:
    """llama.cpp's name for how a byte-level tokenizer (`spec`: its tokenizer.json) splits text before merging."""
    rule = spec["pre_tokenizer"] or {}
    parts = rule.get("pretokenizers", [rule])
    first, last, kinds = parts[0], parts[-1], tuple(part.get("type") for part in parts)
    name = None
    if kinds[-1] == "ByteLevel" and last["use_regex"] and first.get("individual_digits", True):
        name = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}.get(kinds)
    elif kinds == ("Split", "ByteLevel") and first["behavior"] == "Isolated":
        name = _PATTERNS.get(first["pattern"].get("Regex"))
    if name is None or last["add_prefix_space"] or (spec["normalizer"] or {}).get("type") not in (None, "NFC"):
        raise not_converted("the tokenizer splits text by a rule that is not known here", model)
    if name == "llama-bpe" and not spec["model"].get("ignore_merges"):
        return "dbrx"  # the same rule, and every token is reached by merges
    return name


def _name_tokens(tokenizer: PreTrainedTokenizerFast, spec: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Texts and types of all tokens, in the order of their ids."""
    tokens = [f"[PAD{at}]" for at in range(vocabulary)]
    types = [UNUSED] * vocabulary
    if (end := tokenizer.eos_token_id or 0) >= vocabulary:
        raise ModelError(f"the tokenizer ends with token {end} of {vocabulary}", where=tokenizer.name_or_path)
    for text, at in tokenizer.get_vocab().items():
        if at < vocabulary:  # else as padding that another tool added: the model cannot read it, nor say it
            tokens[at] = text
            types[at] = BYTE if spec["model"].get("byte_fallback") and _BYTE_TOKEN.fullmatch(text) else NORMAL
    inside = {at: added for at, added in tokenizer.added_tokens_decoder.items() if at < vocabulary}
    for at, added in inside.items():
        special = added.special or _LOOKS_SPECIAL.fullmatch(added.content)
        types[at] = CONTROL if special else USER_DEFINED
        tokens[at] = added.content if special else added.content.replace(_SPACE, " ")
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        types[unknown] = UNKNOWN
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}


def _describe_sentencepiece(
    tokenizer: PreTrainedTokenizerFast, spec: dict[str, Any], model: Path, tokens: list[str]
) -> dict[str, Any]:
    """Scores instead of merges: a piece's is the rank of the first merge that makes it, counted downwards."""
    ranks: dict[str, int] = {}
    last = 0
    for rank, (left, right) in enumerate(spec["model"]["merges"]):
        first = ranks.setdefault(left + right, rank)
        # Runs of spaces have merges of their own order, which a score cannot follow; one run, one piece all the same.
        if first < last and set(left + right) != {_SPACE}:
            raise not_converted(f"the tokenizer merges {left!r} and {right!r} at a rank that no score gives", model)
        last = max(last, first)
    start = tokenizer.bos_token or tokenizer.eos_token or ""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(ranks.get(token, 0)) for token in tokens],
        # Whether text after a special token gets a space in front, which the text of every prompt does.
        "tokenizer.ggml.add_space_prefix": tokenizer.tokenize(f"{start}a")[-1].startswith(_SPACE),
    }


def starts_with_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a server shall put BOS before prompts: the tokenizer does, and in training the template did."""
    question = [{"role": "user", "content": "a"}]
    prompt = render(tokenizer, question, generation_prompt=True) if tokenizer.chat_template else tokenizer.bos_token
    return adds_bos(tokenizer) and prompt.startswith(tokenizer.bos_token)


def find_raw_start(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """What has to be put before a text that no template renders, for llama.cpp to give it the ids of training on texts:
    whether it adds BOS and a blank follows the chat template. None: nothing does."""
    encode, bos = tokenizer.backend_tokenizer.encode, str(tokenizer.bos_token or "")
    wanted = [tokenizer.bos_token_id] * adds_bos(tokenizer) + encode("a b", add_special_tokens=False).ids
    added = [tokenizer.bos_token_id] * starts_with_bos(tokenizer)
    anchor = bos or str(tokenizer.eos_token or "")
    for start in ("", " ", bos, f"{bos} "):
        given = encode(f"{anchor}{start}a b", add_special_tokens=False).ids[bool(anchor) :]
        if added + given == wanted:
            return start
    return None
