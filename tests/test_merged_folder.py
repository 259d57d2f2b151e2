"""The merged folder tokenizes, renders and stops as the adapter's folder did, wherever that had it from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, save_base
from test_merge_variants import PEFT_DOUBTS, merge, save_adapter
from tiny_tokenizer import TEMPLATE, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasft.artifact import find_artifact, read_stops
from lorasft.data.chat_format import ChatFormat
from lorasft.data.templates import set_default_system
from lorasft.data.tokenizer import read_tokenizer
from lorasft.errors import ModelError
from lorasft.merge.merge import merge as merge_artifact
from lorasft.recipe import ChatSettings

pytestmark = PEFT_DOUBTS
TRAINED = "TRAINED{% for m in messages %}<|start|>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}<|start|>assistant:"
ASKED = [{"role": "user", "content": " hello <|tool|> "}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}), encoding="utf-8")


def save(tokenizer: Any, folder: Path, **changes: Any) -> None:
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)


def bring_nothing_but(*names: str) -> Callable[[Any, Path], None]:
    """A folder of which somebody fetched no more than these files; the template is its own."""

    def bring(tokenizer: Any, folder: Path) -> None:
        save(tokenizer, folder, chat_template=TRAINED)
        for path in folder.iterdir():
            if path.name not in (*names, "adapter_config.json", "adapter_model.safetensors"):
                path.unlink()

    return bring


def bring_in_config(tokenizer: Any, folder: Path) -> None:
    """As transformers before 4.50 saves it."""
    save(tokenizer, folder)
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=TRAINED)


def bring_a_list(tokenizer: Any, folder: Path) -> None:
    bring_in_config(tokenizer, folder)
    named = [{"name": "default", "template": TRAINED}, {"name": "tool_use", "template": "TOOLS" + TRAINED}]
    edit(folder / "tokenizer_config.json", chat_template=named)


def bring_a_processors(tokenizer: Any, folder: Path) -> None:
    save(tokenizer, folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TRAINED}), encoding="utf-8")


def bring_a_token(tokenizer: Any, folder: Path) -> None:
    tokenizer.add_tokens(["<|tool|>"], special_tokens=True)
    save(tokenizer, folder)


def bring_another_beginning(_: Any, folder: Path) -> None:
    save_tokenizer(folder, bos=False)


BROUGHT: dict[str, Callable[[Any, Path], None]] = {
    "a token": bring_a_token,
    "a template in its config": bring_in_config,
    "a template for tools": lambda t, f: save(t, f, chat_template={"default": TRAINED, "tool_use": "T" + TRAINED}),
    "two templates in its config": bring_a_list,
    "a processor's template": bring_a_processors,
    "a template alone": bring_nothing_but("chat_template.jinja"),
    "config and template alone": bring_nothing_but("chat_template.jinja", "tokenizer_config.json"),
    "another end": lambda t, f: save(t, f, eos_token="<|end|>"),
    "another beginning": bring_another_beginning,
}


def make_adapter(base: Path, folder: Path, bring: Callable[[Any, Path], None]) -> Path:
    adapter = save_adapter(base, folder, target_modules="all-linear")
    bring(AutoTokenizer.from_pretrained(base), adapter)
    return adapter


@pytest.mark.parametrize("place", ["jinja", "config"])
@pytest.mark.parametrize("name", BROUGHT)
def test_the_merged_folder_asks_and_stops_as_the_adapters(name: str, place: str, tmp_path: Path) -> None:
    """Also where the base's own template lies in its tokenizer's config."""
    base = save_base(tmp_path / "base")
    (base / "notes.txt").write_text("kept", encoding="utf-8")
    if place == "config":
        (base / "chat_template.jinja").unlink()
        edit(base / "tokenizer_config.json", chat_template=TEMPLATE)
    adapter = make_adapter(base, tmp_path / "adapter", BROUGHT[name])
    merge(base, adapter, tmp_path / "out")
    trained, merged = read_tokenizer(find_artifact(str(adapter))), AutoTokenizer.from_pretrained(tmp_path / "out")
    if (adapter / "tokenizer.json").is_file() and "processor" not in name:  # what others read there
        theirs = AutoTokenizer.from_pretrained(adapter)
        assert theirs.chat_template == trained.chat_template and theirs("<|tool|>") == trained("<|tool|>")
    if "alone" in name or "template" in name:
        assert "TRAINED" in merged.apply_chat_template(ASKED, tokenize=False)
    if "token" in name:
        assert merged("<|tool|>")["input_ids"] == [0, 316]
    assert merged("a <|tool|>b<|end|> c")["input_ids"] == trained("a <|tool|>b<|end|> c")["input_ids"]
    for tools in (None, TOOLS):
        texts = [each.apply_chat_template(ASKED, tools, tokenize=False) for each in (trained, merged)]
        assert texts[0] == texts[1]
    stops = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id
    assert trained.eos_token_id in (stops if isinstance(stops, list) else [stops])
    config = json.loads((tmp_path / "out/tokenizer_config.json").read_bytes())
    assert config.get("chat_template") in (None, merged.get_chat_template())  # nothing stale for those who look there
    assert (tmp_path / "out/notes.txt").is_file()


def test_a_base_without_generation_settings_stops_where_training_did(tmp_path: Path) -> None:
    """transformers takes the stops from the model's config then; those stay, as settings of the adapter's folder do."""
    base = save_base(tmp_path / "base")
    (base / "generation_config.json").unlink()
    adapter = make_adapter(base, tmp_path / "adapter", BROUGHT["another end"])
    merge(base, adapter, tmp_path / "out")
    assert read_stops(tmp_path / "out") == [3, *read_stops(base)]
    (base / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="not a config"):
        merge(base, adapter, tmp_path / "broken")
    (adapter / "generation_config.json").write_text('{"eos_token_id": [7, 3], "top_k": 5}', encoding="utf-8")
    merge(base, adapter, tmp_path / "own")
    settings = json.loads((tmp_path / "own/generation_config.json").read_bytes())
    assert settings == {"eos_token_id": [7, 3], "top_k": 5}


def test_a_tokenizer_that_was_only_saved_anew_leaves_the_bases_files(base: Path, tmp_path: Path) -> None:
    """Converters of other formats read some that transformers does not write."""
    origin = shutil.copytree(base, tmp_path / "base")
    (origin / "tokenizer.model").write_bytes(b"pieces")
    adapter = make_adapter(origin, tmp_path / "adapter", lambda t, f: save(t, f, chat_template=TRAINED))
    merge(origin, adapter, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (tmp_path / "out" / name).read_bytes() == (origin / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TRAINED
    bring_a_token(AutoTokenizer.from_pretrained(origin), adapter)
    merge(origin, adapter, tmp_path / "more")
    assert not (tmp_path / "more/tokenizer.model").exists()  # it lacks the token


WRONG: dict[str, tuple[str, Any, str]] = {
    "ids": ("a token", "_has_ids_of", "ids"),
    "prompts": ("a template alone", "own_files", "prompts"),
    "ends": ("another end", "_has_ids_of", "ends of answers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_check_compares_ids_prompts_and_stops(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought, function, words = WRONG[name]
    adapter = make_adapter(base, tmp_path / "adapter", BROUGHT[brought])
    found = find_artifact(str(adapter), base=str(base))
    merge_artifact(found, tmp_path / "right")
    monkeypatch.setattr(f"lorasft.merge.sidecars.{function}", lambda *given: function == "_has_ids_of")
    if name == "ends":
        monkeypatch.setattr("lorasft.merge.sidecars.replace_file", lambda *given: None)
    with pytest.raises(ModelError, match=f"other {words}"):
        merge_artifact(found, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_exports_have_what_the_adapter_brought(base: Path, tmp_path: Path, cli: Command) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

    def bring(tokenizer: Any, folder: Path) -> None:
        tokenizer.add_tokens(["<|tool|>"], special_tokens=True)
        save(tokenizer, folder, eos_token="<|end|>", chat_template=TRAINED)

    adapter = make_adapter(base, tmp_path / "adapter", bring)
    assert cli("export", adapter, "--to", "ollama", "--out", tmp_path / "out").code == 0
    fields = gguf.GGUFReader(tmp_path / "out/model.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[316] == "<|tool|>"
    assert fields["tokenizer.chat_template"].contents() == TRAINED
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 3
    modelfile = (tmp_path / "out/Modelfile").read_text(encoding="utf-8")
    assert "TRAINED" in modelfile and 'PARAMETER stop "<|end|>"' in modelfile


def test_a_token_beyond_the_embedding_is_left_out_of_an_export(base: Path, tmp_path: Path, cli: Command) -> None:
    """Padding that a tool added and did not train; an end that the model cannot say is an error."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

    def bring(tokenizer: Any, folder: Path) -> None:
        tokenizer.add_tokens([f"<|{at}|>" for at in range(68)], special_tokens=True)
        save(tokenizer, folder, pad_token="[PAD]")

    adapter = make_adapter(base, tmp_path / "adapter", bring)
    assert cli("export", adapter, "--to", "gguf", "--out", tmp_path / "m.gguf").code == 0
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 384 and "tokenizer.ggml.padding_token_id" not in fields
    edit(adapter / "tokenizer_config.json", eos_token="[PAD]")
    assert cli("export", adapter, "--to", "gguf", "--out", tmp_path / "n.gguf").code == 4


SYSTEMS = {"plain words": "You are Bob.", "syntax": "Say \"{{ hi }}\" {% or %}\n\t'é' \\ end", "nothing": ""}


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_system_message_of_the_recipe_is_in_the_saved_template(
    name: str, recipe: Callable[..., str], tmp_path: Path, rows: Path, cli: Command
) -> None:
    """In that of the adapter, for other tools, and so in the merged folder; a conversation's own comes first."""
    system = SYSTEMS[name]
    model = {"quantization": "none", "dtype": "float32"}
    path = recipe(model=model, chat={"system": system}, train={"steps": 3}, adapter={"dropout": 0.0})
    assert cli("train", path).code == 0
    done = json.loads(cli("merge", tmp_path / "run", "--out", tmp_path / "out", "--json").out)
    assert done["onto"] == "original" and "system message" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    for folder in (tmp_path / "run/adapter", tmp_path / "out"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        told = [{"role": "system", "content": system}, *ASKED]
        prompts = [tokenizer.apply_chat_template(each, tokenize=False) for each in (ASKED, told)]
        assert prompts[0] == prompts[1] and system in prompts[0]
        other = tokenizer.apply_chat_template([{"role": "system", "content": "OTHER"}, *ASKED], tokenize=False)
        assert other == prompts[0].replace(f"system\n{system}", "system\nOTHER", 1)
    for folder in ("run", "out"):
        out = tmp_path / f"{folder}.jsonl"
        assert cli("evaluate", tmp_path / folder, "--data", rows, "--per-example", out).code == 0
    lines = [json.loads((tmp_path / f"{folder}.jsonl").read_text().splitlines()[0]) for folder in ("run", "out")]
    asked = [line.get("adapter", line.get("model"))["log_prob_x"] for line in lines]
    assert asked[0] == pytest.approx(asked[1], rel=3e-3)


REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
ANSWERED = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}"
)
TEMPLATES: dict[str, Any] = {
    "refuses": REFUSES,
    "takes it apart": ANSWERED + TEMPLATE,
    "has a default": "{% if messages[0].role != 'system' %}DEFAULT{% endif %}" + TEMPLATE,
    "begins with a line": "\n" + TEMPLATE,
    "two": {"default": TEMPLATE, "tool_use": REFUSES},
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_asks_as_training_did(name: str, tiny: Any, tmp_path: Path) -> None:
    """Read back by transformers alone, and by lorasft, where it stays as it is."""
    tiny.chat_template, chat = TEMPLATES[name], ChatSettings(system=" Be {{ brief }}.\n")
    set_default_system(tiny, chat)
    tiny.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    text = saved.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert "Be {{ brief }}." in text and "DEFAULT" not in text
    question = [{"role": "user", "content": "a"}]
    wanted = saved.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    for settings in (chat, ChatSettings()):
        assert ChatFormat(AutoTokenizer.from_pretrained(tmp_path), settings).prompt_ids(question) == wanted
    again = AutoTokenizer.from_pretrained(tmp_path)
    set_default_system(again, chat)
    assert again.chat_template == saved.chat_template


def test_a_system_message_is_told_or_merged_in(base: Path, rows: Path, tmp_path: Path, cli: Command) -> None:
    """Of an adapter whose tool wrote none down, as of the adapters of earlier versions."""
    adapter = make_adapter(base, tmp_path / "adapter", lambda t, f: save(t, f))
    asked, told = ["--data", rows, "--per-example"], ["--system", "Say this: no, {that}"]
    for name, words in {"without": [], "with": told, "key": ["chat.system=''"]}.items():
        assert cli("evaluate", adapter, *asked, tmp_path / name, *words).code == 0
    assert len({(tmp_path / name).read_text() for name in ("without", "with", "key")}) == 3
    assert cli("chat", adapter, *told, "--prompt", "y", "--max-tokens", 2).code == 0
    assert cli("merge", adapter, "--out", tmp_path / "out", "chat.system='Say this: no, {that}'").code == 0
    assert "Say this: no, {that}" in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
