"""Chat templates: the built-in ones, the one that a run uses, and rendering with errors in plain words."""

from __future__ import annotations

import datetime
import json
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import jinja2

from lorasft.data.keys import REASONING
from lorasft.data.tokenizer import FastTokenizer, adds_bos
from lorasft.errors import DataError, ModelError, UnsafeError, reading
from lorasft.recipe import ChatSettings

BUILT_IN = ("plain", "chatml", "none")
CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)\s*\)""")
_TAG = re.compile(r"{[{%].*?[%}]}", re.DOTALL)
# In a tag, outside of strings: a filter that has the texts beside it escaped as HTML, and what llama.cpp gives a date.
_CHANGED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\|\s*safe\b|(?<![\w.])(?:date_string|datetime)\b""")
LARGEST_TEXT = 64 << 20  # characters
LARGEST_NUMBER = 1 << 16  # bits
ROOM = 1 << 29  # bytes, for one conversation
WORD = "lorasftword"  # to be looked for in a rendering: nothing that a template trims, splits or escapes
SECONDS = 10  # for one rendering, which takes a thousandth of one


def set_template(tokenizer: FastTokenizer, chat: ChatSettings) -> None:
    """Give the tokenizer the template of the recipe, so that saving the tokenizer saves it, with `template_options` as
    default values at its head. Raises ModelError when the template cannot be used with this tokenizer."""
    chosen = chat.template or (None if tokenizer.chat_template else "plain")
    if chosen:
        tokenizer.chat_template = _load_template(tokenizer, chosen)
    options = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
        for name, value in sorted(chat.template_options.items())
    )
    settle = partial(_settle, day=chat.template_date)
    _change_template(tokenizer, lambda text: _before(settle(options), settle(text)))
    if chosen != "none" and _loses_system(tokenizer):
        _change_template(tokenizer, partial(_before, read_template("merge_system")))


def set_default_system(tokenizer: FastTokenizer, chat: ChatSettings) -> None:
    """Give the tokenizer the template of the recipe, and that the recipe's system message: servers know no recipe."""
    set_template(tokenizer, chat)
    if chat.system is not None:
        head = read_template("default_system").replace("SYSTEM", _literal(chat.system))
        _change_template(tokenizer, partial(_before, head))


def read_template(name: str) -> str:
    """A file of chat_templates as saved models have it: without its comments, line breaks and indents."""
    text = Path(__file__).with_name("chat_templates").joinpath(f"{name}.jinja").read_text(encoding="utf-8")
    return re.sub(r"{#.*#}|\n *", "", text)


def render(
    tokenizer: FastTokenizer,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    *,
    generation_prompt: bool = False,
) -> str:
    """The text of a conversation, as `apply_chat_template` of any server gives it; `variables`: its documents and
    keyword arguments. Raises DataError with the template's own words when it refuses, ModelError when it is broken."""
    schemas = list(tools) if tools else None
    where, hint = tokenizer.name_or_path, "chat.template=FILE with another, or plain where there are no tools"
    try:
        # What apply_chat_template does with messages of plain JSON types, at half its price; a test compares the two.
        with limits():
            template = tokenizer.get_chat_template(None, schemas)
            if any("tool_calls" in message for message in messages):
                form = _call_form(template, **tokenizer.special_tokens_map)
                messages = [_with_calls(message, *form) for message in messages]
            own = {"messages": [_with_reasoning(message) for message in messages], "tools": schemas}
            given = {"documents": None, **tokenizer.special_tokens_map, **(variables or {}), **own}
            text = _compile(template).render(given, add_generation_prompt=generation_prompt)
            if len(text) > LARGEST_TEXT:
                raise MemoryError("it makes text without end")
            return text
    except (MemoryError, TimeoutError) as error:
        what = f"the chat template takes too much: {str(error) or 'memory'}"
        raise ModelError(what, where=where, hint=hint) from None
    except jinja2.exceptions.SecurityError as error:
        what = f"the chat template reaches for what is not data: {error}"
        raise UnsafeError(what, where=where, hint=hint) from None
    except jinja2.TemplateSyntaxError as error:
        what = f"the chat template does not parse: {error.message}"
        raise ModelError(what, where=f"line {error.lineno}", hint=hint) from None
    except Exception as error:  # a template is a program: it raises what its operators raise
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"the chat template refuses this conversation ({roles}): {error}", hint=hint) from None


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    """As transformers does, with numbers bounded: a clock cannot end a product of two that are millions long."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    sandbox: Any = _compile_jinja_template("").environment
    sandbox.intercepted_binops = frozenset(["*", "**"])
    sandbox.call_binop = _multiply
    compiled: jinja2.Template = sandbox.from_string(template)
    compiled.globals = dict(compiled.globals)  # copied at each rendering: as the ChainMap it was, half of the time
    return compiled


def _multiply(_: object, sign: str, left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * (right if sign == "**" else 1) + right.bit_length()
        if bits > LARGEST_NUMBER:
            raise MemoryError("it makes a number without end")
    return left**right if sign == "**" else left * right


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under both names that templates read, as transformers gives it to them."""
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


@lru_cache(maxsize=8)
def _call_form(template: str, **special: Any) -> tuple[bool, bool]:
    """How a template takes calls, without writing them as Python would: whether with arguments as text, not as objects,
    and whether beside null, not an empty text."""
    given = {"tools": None, "documents": None, "add_generation_prompt": False, **special}
    call = {"id": "lorasft00", "type": "function", "function": {"name": WORD, "arguments": {"key": WORD}}}
    answer: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
    for as_text, null in product((False, True), repeat=2):
        messages = [{"role": "user", "content": "q"}, _with_calls(answer, as_text, null)]
        with suppress(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
            text = _compile(template).render(given, messages=messages)
            if text.count(WORD) > 1 and str({"key": WORD}) not in text and not (null and "None" in text):
                return as_text, null
    return False, False


def _with_calls(message: dict[str, Any], as_text: bool, null: bool) -> dict[str, Any]:
    """The message in one form of its calls; arguments as text are those of the row, or else JSON."""
    calls = []
    for call in message.get("tool_calls", ()):
        arguments = call["function"].get("arguments", {})
        text = getattr(arguments, "text", "") or json.dumps(arguments, ensure_ascii=False)
        calls.append(call | {"function": call["function"] | {"arguments": text}} if as_text else call)
    content = message["content"] or (None if null else "")
    return message | {"tool_calls": calls, "content": content} if calls else message


@contextmanager
def limits() -> Iterator[None]:
    """Raise TimeoutError in the block after SECONDS, and MemoryError where it takes over ROOM more bytes than now.

    A block within another only sets the clock back. A main thread alone can be interrupted; Linux counts the memory.
    """
    if signal.getsignal(signal.SIGALRM) is _stop:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        yield
        return
    with ExitStack() as stack:
        if sys.platform.startswith("linux"):
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
            if soft == resource.RLIM_INFINITY or soft > taken + ROOM:
                resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, hard))
                stack.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
        if threading.current_thread() is threading.main_thread():
            stack.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, _stop))
            stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
        yield


def _stop(*_: object) -> None:
    raise TimeoutError(f"over {SECONDS} s")


def _change_template(tokenizer: FastTokenizer, change: Callable[[str], str]) -> None:
    """Change the tokenizer's template; some carry one more, for tools."""
    own: Any = tokenizer.chat_template
    changed = {name: change(text) for name, text in own.items()} if isinstance(own, dict) else change(own)
    tokenizer.chat_template = changed


def _settle(template: str, day: datetime.date | None) -> str:
    """The template as every server renders it: with its calls of `strftime_now` replaced by what they give on `day`, no
    date that a server may name (null: both left to the clock), and no text that becomes HTML."""

    def change(found: re.Match[str]) -> str:
        word = found.group()
        if word.startswith("|"):
            return ""
        return word if day is None or word[0] in "'\"" else f"fixed_{word}"

    template = _TAG.sub(lambda tag: _CHANGED.sub(change, tag.group()), template)
    return template if day is None else CLOCK.sub(lambda call: json.dumps(day.strftime(call["format"])), template)


def _loses_system(tokenizer: FastTokenizer) -> bool:
    """Whether the template refuses a system message, or leaves it out."""
    try:
        text = render(tokenizer, [{"role": "system", "content": WORD}, {"role": "user", "content": "q"}])
    except DataError:  # if it refuses more than that, its words come when a conversation is rendered
        return True
    return WORD not in text.lower()


def _load_template(tokenizer: FastTokenizer, name: str) -> str:
    if name not in BUILT_IN:
        hint = f"chat.template is {', '.join(BUILT_IN)}, a file, or null for the tokenizer's own"
        with reading("cannot read the chat template", where=name, hint=hint):
            return Path(name).read_text(encoding="utf-8")
    encode = tokenizer.backend_tokenizer.encode
    needed = ("<|im_start|>", "<|im_end|>") if name == "chatml" else ()
    if unknown := [text for text in needed if encode(text, add_special_tokens=False).tokens != [text]]:
        what = f"template chatml needs {' and '.join(unknown)}, which this tokenizer does not know as single tokens"
        raise ModelError(what, where=tokenizer.name_or_path, hint="chat.template=plain")
    return read_template(name).replace("{{ BOS }}", "{{ bos_token }}" if adds_bos(tokenizer) else "")


def _before(head: str, template: str) -> str:
    """`head` put before a template, once: a saved one has it."""
    if not head or head in template:
        return template
    # Jinja drops a newline after a block: one that the template begins with has to stay.
    return head + ("\n" if template.startswith("\n") else "") + template


def _literal(value: Any) -> str:
    """A value as Jinja writes it: JSON, but for null."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
