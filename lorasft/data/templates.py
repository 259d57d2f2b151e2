"""Chat templates: the built-in ones, the one that a run uses, and rendering with errors in plain words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasft.data.tokenizer import adds_bos
from lorasft.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from lorasft.recipe import ChatSettings

REFUSALS = (
    "{% if tools or message.tool_calls or message.role == 'tool' %}"
    "{{ raise_exception('this template has no place for tools') }}{% endif %}"
)
# Words of the base's own vocabulary only: nothing has to be learned from scratch.
PLAIN = (
    "{{ BOS }}{% for message in messages %}" + REFUSALS + "{% if message.role == 'user' %}"
    "{{ '\\n' if not loop.first and loop.previtem.role == 'assistant' else '' }}"
    "{{ 'User:\\n' + message.content + '\\n\\n' }}"
    "{% elif message.role == 'assistant' %}{{ 'Assistant:\\n' + message.content + eos_token }}"
    "{% else %}{{ message.content + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
CHATML = (
    "{{ BOS }}{% for message in messages %}" + REFUSALS + "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{{ message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NONE = (
    "{{ BOS }}{% for message in messages %}" + REFUSALS + "{% if loop.index0 > 1 or message.role == 'system' %}"
    "{{ raise_exception('template none takes one prompt and one answer, no system text and no further turns') }}"
    "{% endif %}{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
BUILT_IN = {"plain": PLAIN, "chatml": CHATML, "none": NONE}


def set_template(tokenizer: PreTrainedTokenizerFast, chat: ChatSettings) -> None:
    """Give the tokenizer the template of the recipe, so that saving the tokenizer saves it.

    `template_options` become default values at the template's head: a server that is told nothing feeds the same.
    Raises ModelError when the template cannot be used with this tokenizer.
    """
    chosen = chat.template or (None if tokenizer.chat_template else "plain")
    template = _load_template(tokenizer, chosen) if chosen else tokenizer.chat_template
    if isinstance(template, dict):  # some tokenizers carry several, and pick one when tools are given
        tokenizer.chat_template = {name: _with_options(text, chat) for name, text in template.items()}
    else:
        tokenizer.chat_template = _with_options(template, chat)


def render(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
    *,
    generation_prompt: bool = False,
) -> str:
    """The text of a conversation, as `apply_chat_template` of any server gives it.

    Raises DataError with the roles and the template's own words when it refuses, ModelError when it is broken.
    """
    import jinja2

    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=generation_prompt,
        )
    except jinja2.TemplateSyntaxError as fault:
        raise ModelError(f"the chat template does not parse: {fault.message}", where=f"line {fault.lineno}") from None
    except Exception as fault:  # a template is a program: it raises what its operators raise
        roles = ", ".join(message["role"] for message in messages)
        hint = "chat.template=plain, or another template"
        if "system" in str(fault).lower():
            hint = "put the system text into the first user message, or " + hint
        raise DataError(f"the chat template refuses this conversation ({roles}): {fault}", hint=hint) from None
    return str(text)


def _load_template(tokenizer: PreTrainedTokenizerFast, name: str) -> str:
    if name not in BUILT_IN:
        try:
            return Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as fault:
            hint = f"chat.template is {', '.join(BUILT_IN)}, a file, or null for the tokenizer's own"
            raise ModelError(f"cannot read the chat template: {fault}", where=name, hint=hint) from None
    if tokenizer.eos_token is None:
        raise ModelError(f"template {name} ends answers with an EOS token, and this tokenizer has none")
    unknown = [text for text in ("<|im_start|>", "<|im_end|>") if _is_unknown(tokenizer, text)]
    if name == "chatml" and unknown:
        what = f"template chatml needs {' and '.join(unknown)}, which this tokenizer does not know as single tokens"
        raise ModelError(what, hint="chat.template=plain")
    return BUILT_IN[name].replace("{{ BOS }}", "{{ bos_token }}" if adds_bos(tokenizer) else "")


def _is_unknown(tokenizer: PreTrainedTokenizerFast, text: str) -> bool:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).tokens) != [text]


def _with_options(template: str, chat: ChatSettings) -> str:
    head = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
        for name, value in sorted(chat.template_options.items())
    )
    if not head or template.startswith(head):
        return template
    # Jinja drops a newline after a block: one that the template begins with has to stay.
    return head + ("\n" if template.startswith("\n") else "") + template


def _literal(value: Any) -> str:
    """A value as Jinja writes it: JSON, but for null."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
