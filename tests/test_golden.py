"""What is learned of six conversations under every template, as files to read: learned text stands in brackets.

`python tests/test_golden.py` writes them anew; read the difference before you commit it. And the same for random
conversations: what is learned is what was said, and it stands behind what a server feeds.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quirks import QUIRKS
from test_chat import PAIRS, PLACE, SHARED, Encoder, check_against_server, conversation, make_encoder, needs_shared
from tiny_tokenizer import save_tokenizer

from lorasft.commands.preview import BRACKETS, mark, painted
from lorasft.data.examples import Example, normalize_message
from lorasft.data.tokenizer import load_tokenizer
from lorasft.errors import DataError

GOLDEN = Path(__file__).parent / "golden"
CODE = "    for naïve in ['é', '日本']:\n\treturn 👩‍👩‍👧  # done\n"
TOOL = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": {"type": "object"}}}
CALLS = [
    {"type": "function", "id": f"call0000{n}", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}
    for n, city in enumerate(("Rome", "Oslo"))
]
PARALLEL = (
    {"role": "user", "content": "Rome and Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "content": "31", "tool_call_id": "call00000", "name": "weather"},
    {"role": "tool", "content": "12", "tool_call_id": "call00001", "name": "weather"},
    {"role": "assistant", "content": "Rome 31, Oslo 12."},
)
SIX = {
    "single": conversation("What is 2 + 2?", "4."),
    "system": conversation("Hi", "Hello.", system="Be brief."),
    "multi-turn": conversation("Hi", "Hello there!", "Who?", "It is me.\n\nReally.", "ok", "Bye"),
    "thinking": conversation("2 + 2?", "<think>\neasy\n</think>\n\n4.", "3 + 3?", "<think>\nstill\n</think>\n\n6."),
    "parallel tool calls": Example(tuple(normalize_message(one, set()) for one in PARALLEL), (TOOL,), None, PLACE),
    "unicode and code": conversation("Loop in Ünïcode?", CODE),
}


def describe(encoder: Encoder) -> str:
    """The six conversations as one page of text."""
    tokenizer = encoder.format.tokenizer
    pages = []
    for name, example in SIX.items():
        before = dict(vars(encoder.report))
        try:
            sequences = encoder.encode(example)
        except DataError as fault:
            pages.append(f"=== {name}\nrefused: {fault.what}\n")
            continue
        grown = {key: value - before[key] for key, value in vars(encoder.report).items() if isinstance(value, int)}
        held = f"parity {grown['answers'] - grown['parity_breaks']} of {grown['answers']}"
        lost = grown["dropped_reasoning"]
        pages.append(f"=== {name}: {held}{f', dropped_reasoning {lost}' if lost else ''}\n")
        pages.extend(mark(painted(tokens, tokenizer), BRACKETS) + "\n---\n" for tokens in sequences)
    return "".join(pages)


@functools.cache
def tiny_folder() -> Path:
    import tempfile

    return save_tokenizer(Path(tempfile.mkdtemp(prefix="lorasft-tiny-")))


@functools.cache
def own_encoder(quirk: str) -> Encoder:
    tokenizer = load_tokenizer(str(tiny_folder()))
    tokenizer.chat_template = QUIRKS[quirk]
    return make_encoder(tokenizer)


@functools.cache
def shared_encoder(name: str, template: str | None) -> Encoder:
    file = str(SHARED / "templates" / f"{template}.jinja") if template else None
    return make_encoder(load_tokenizer(str(SHARED / "tokenizers" / name)), chat={"template": file})


def shared_file(name: str, template: str | None) -> Path:
    return GOLDEN / f"{name}{f' with {template}' if template else ''}.txt"


@pytest.mark.parametrize("quirk", QUIRKS)
def test_own_templates(quirk: str) -> None:
    assert describe(own_encoder(quirk)) == (GOLDEN / f"own, {quirk}.txt").read_text(encoding="utf-8")


@needs_shared
@pytest.mark.parametrize(("name", "template"), PAIRS)
def test_real_templates(name: str, template: str | None) -> None:
    assert describe(shared_encoder(name, template)) == shared_file(name, template).read_text(encoding="utf-8")


ASKED = "\u0416"  # in every question and in no answer
CHARACTERS = st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Co", "Cn"), exclude_characters="▁" + ASKED)
SAID = st.text(st.one_of(CHARACTERS, st.sampled_from(" \n\tab.")), min_size=1, max_size=14).filter(
    lambda text: text.strip() and "<" not in text
)
TALKS = st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3)


def check_talks(encoder: Encoder) -> None:
    @given(TALKS)
    @settings(max_examples=15, deadline=None)
    def check(pairs: list[tuple[str, str]]) -> None:
        talk = conversation(*(text for asked, said in pairs for text in (f"{asked}{ASKED}", said)))
        assert not any(ASKED in text for text in check_against_server(encoder, talk))

    check()


@pytest.mark.parametrize("quirk", QUIRKS)
def test_random_talks_under_own_templates(quirk: str) -> None:
    check_talks(own_encoder(quirk))


@needs_shared
@pytest.mark.parametrize(("name", "template"), PAIRS)
def test_random_talks_under_real_templates(name: str, template: str | None) -> None:
    check_talks(shared_encoder(name, template))


if __name__ == "__main__":
    for one in QUIRKS:
        (GOLDEN / f"own, {one}.txt").write_text(describe(own_encoder(one)), encoding="utf-8")
    for pair in PAIRS if SHARED.is_dir() else ():
        shared_file(*pair).write_text(describe(shared_encoder(*pair)), encoding="utf-8")
