"""A folder that `ollama create` takes: the GGUF, and a Modelfile whose template writes the prompts of training.

Ollama renders Go templates, not the chat template in the file. What is written here is read off renderings: the text
that is before a message depends on its role and on that of the message before it, and on nothing else. That is
compared with the chat template on conversations of several shapes; where it does not hold, the export is refused.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

from lorasft.artifact import read_stops
from lorasft.data.templates import CLOCK, render
from lorasft.data.tokenizer import load_tokenizer
from lorasft.errors import DataError, ModelError
from lorasft.export.gguf import Kind, write_gguf
from lorasft.export.tokenizer import starts_with_bos
from lorasft.files import staged_folder, write_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WEIGHTS, MODELFILE = "model.gguf", "Modelfile"
_SHAPES = ("u", "su", "uau", "suau", "uauau", "suauauau")  # of conversations: system, user, assistant
_ROLES = {"s": "system", "u": "user", "a": "assistant"}
_START, _ANSWER = "", "answer"  # the role before the first message, and the one after the last
# The texts between the messages of a conversation, by the roles before and after; a template that takes no system
# messages has none for them.
Joints = dict[tuple[str, str], str]


def write_ollama(model: Path, out: Path, *, kind: Kind = "f16") -> dict[str, Any]:
    """Write the new folder `out`: model.gguf and Modelfile. Returns what write_gguf does, whether system messages have
    a place in the template, and whether it trims messages, which Ollama does not.

    Raises ModelError when the chat template cannot be written as a Go template, and what write_gguf raises.
    """
    tokenizer = load_tokenizer(str(model))
    joints = find_joints(tokenizer, where=model)
    modelfile = f'FROM ./{WEIGHTS}\nTEMPLATE """{go_template(joints)}"""\n'
    ends = [*read_stops(model), tokenizer.eos_token_id]
    for stop in dict.fromkeys(str(tokenizer.convert_ids_to_tokens(end)) for end in ends if end is not None):
        modelfile += f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}\n"
    with staged_folder(out) as stage:
        written = write_gguf(model, stage / WEIGHTS, kind=kind)
        if context := written["short_context"]:
            modelfile += f"PARAMETER num_ctx {max(context, written['longest_row'] or 0)}\n"
        write_file(stage / MODELFILE, modelfile)
    trims = any(_cut(tokenizer, shape) and not _cut(tokenizer, shape, blank="\n ") for shape in ("u", "su", "uau"))
    return {**written, "file": str(out / WEIGHTS), "system": (_START, "system") in joints, "trims": trims}


def find_joints(tokenizer: PreTrainedTokenizerFast, *, where: object) -> Joints:
    """Read the joints off a chat template, without the BOS that the GGUF has the server put in front."""
    if not tokenizer.chat_template:
        raise ModelError("the model has no chat template", where=where, hint="--to gguf")
    if CLOCK.search(str(tokenizer.chat_template)):
        raise ModelError("the chat template asks for today's date, Ollama's cannot", where=where, hint="--to gguf")
    with_system = _cut(tokenizer, "su") is not None
    joints: Joints = {}
    for shape in _SHAPES:
        if "s" in shape and not with_system:
            continue
        texts, roles = _cut(tokenizer, shape), [_ROLES[letter] for letter in shape]
        if texts is None:
            raise ModelError(f"the chat template refuses {' + '.join(roles)}, Ollama would not", where=where)
        for pair, text in zip(pairwise([_START, *roles, _ANSWER]), texts, strict=True):
            if joints.setdefault(pair, text) != text:
                what = f"the chat template writes {' + '.join(roles)} in a way that a Modelfile cannot"
                raise ModelError(what, where=where, hint="--to gguf, and a server that takes the chat template from it")
    if starts_with_bos(tokenizer):
        bos = str(tokenizer.bos_token)
        joints = {pair: text.removeprefix(bos) if pair[0] == _START else text for pair, text in joints.items()}
    return joints


def _cut(tokenizer: PreTrainedTokenizerFast, shape: str, *, blank: str = "") -> list[str] | None:
    """The texts round the messages of a prompt of this shape; None when the template refuses or rewrites it. `blank`:
    at the ends of messages."""
    contents = [f"{blank}Lorasft{at}{letter}probe{blank}" for at, letter in enumerate(shape)]
    messages = [{"role": _ROLES[letter], "content": text} for letter, text in zip(shape, contents, strict=True)]
    try:
        rest = render(tokenizer, messages, generation_prompt=True)
    except DataError:
        return None
    texts = []
    for message in messages:
        text, found, rest = rest.partition(message["content"])
        if not found or message["content"] in rest:
            return None
        texts.append(text)
    return [*texts, rest]


def go_template(joints: Joints) -> str:
    """The joints as a template of Ollama. An answer that is begun, the last message, is left open."""
    # A text that could be taken for something else is a Go string.
    strings = {text: f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" for text in joints.values()}
    texts = {pair: strings[text] if {"{", '"'} & set(text) else text for pair, text in joints.items()}
    roles = {role: [(pair[0], text) for pair, text in texts.items() if pair[1] == role] for role in _ROLES.values()}
    text = Path(__file__).with_name("template.go.jinja").read_text("utf-8")
    return Environment("<%", "%>", "<<", ">>").from_string(text).render(roles=roles, answer=texts["user", _ANSWER])
