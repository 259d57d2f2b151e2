"""`lorasft init`: a recipe for a file of rows that loads, with its reasons; what is asked, proposed and refused."""

from __future__ import annotations

import io
import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import Command

from lorasft import machine
from lorasft.commands import init
from lorasft.commands.recipes import count_text
from lorasft.data.survey import survey_rows
from lorasft.recipe import DataSettings, recipe_schema
from lorasft.recipe.load import load_recipe, shipped_recipes

GIB = 1 << 30


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, count: int, *, length: int = 3, **more: str) -> str:
    rows = [{"question": f"what is {n}?", "answer": f"{n} " * length} | more for n in range(count)]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def test_a_file_of_questions_and_answers_becomes_a_recipe_that_trains(here: Path, cli: Command) -> None:
    text = "question,answer\n" + "".join(f"what is {n}?,it is {n}\n" for n in range(40))
    (here / "q and a.csv").write_text(text, encoding="utf-8")
    done = cli("init", "q and a.csv", "--model", "tiny", "--yes", "--out", "my recipe.yaml")
    assert (done.code, done.out) == (0, "my recipe.yaml\n")
    assert "q and a.csv: 40 rows of format prompt-completion, of user, assistant\n" in done.err
    assert "columns question, answer are read as prompt, completion (data.columns says otherwise)\n" in done.err
    recipe = load_recipe("my recipe.yaml")
    assert recipe.data.train[0].path == str(here / "q and a.csv") and recipe.data.eval == 0.05
    assert recipe.run.output == "runs/q and a" and (recipe.train.epochs, recipe.train.batch_size) == (3, 8)
    assert recipe.optimizer.learning_rate == 2e-3 and recipe.model.base == str(
        shipped_recipes()["tiny"].parent / "base"
    )
    commands = [line.partition("lorasft ")[2] for line in done.err.splitlines() if line.startswith("next: ")]
    assert commands == [f"{verb} 'my recipe.yaml'" for verb in ("preview", "plan", "train")]
    assert cli("preview", "my recipe.yaml").code == 0
    trained = cli("train", "my recipe.yaml", "train.steps=2", "data.eval=null", "schedule.warmup=0")
    assert trained.code == 0 and (here / "runs/q and a/adapter").is_dir()


def test_every_line_says_why_and_the_first_names_a_schema_that_is_there(here: Path, cli: Command) -> None:
    write("rows.jsonl", 30)
    assert cli("init", "rows.jsonl", "--memory", "12GiB", "--yes").code == 0
    lines = (here / "recipe.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# yaml-language-server: $schema=lorasft-schema.json"
    schema = json.loads((here / "lorasft-schema.json").read_text(encoding="utf-8"))
    assert schema == recipe_schema()
    assert all("  # " in line for line in lines if line.startswith("  "))
    written = yaml.safe_load((here / "recipe.yaml").read_text(encoding="utf-8"))
    for section, keys in written.items():  # what an editor would mark
        known = schema["$defs"][schema["properties"][section]["$ref"].rpartition("/")[2]]["properties"]
        assert keys.keys() <= known.keys(), section
    try:
        import jsonschema
    except ImportError:
        return
    jsonschema.validate(written, schema)


@pytest.mark.parametrize(
    ("memory", "most"), [("1GiB", 1.0), ("8GiB", 8.0), ("12GiB", 12.0), ("24GB", 22.4), ("200GiB", 200.0)]
)
def test_the_largest_shipped_model_that_fits_is_proposed(here: Path, cli: Command, memory: str, most: float) -> None:
    write("rows.jsonl", 30)
    assert cli("init", "rows.jsonl", "--memory", memory, "--yes").code == 0
    rows = json.loads(cli("recipes", "list", "--json").out)
    fits = [row for row in rows if row["needs"] <= most * GIB]
    largest = max(fits, key=lambda row: row["parameters"])
    assert load_recipe("recipe.yaml").model.base == largest["base"]
    why = f"{count_text(largest['parameters'])} parameters; {largest['name']} needs"
    assert why in (here / "recipe.yaml").read_text(encoding="utf-8")


def test_what_fits_nowhere_is_refused_with_what_would(here: Path, cli: Command) -> None:
    write("rows.jsonl", 30)
    none = cli("init", "rows.jsonl", "--memory", "300MiB", "--yes")
    assert none.code == 6
    assert "tiny needs 0.51 GiB, more than 300.0 MiB (--memory); no shipped one fits\nhint: --memory 8GB\n" in none.err
    large = cli("init", "rows.jsonl", "--memory", "8GiB", "--model", "Qwen/Qwen3-8B", "--yes")
    assert large.code == 6 and "qwen3-8b needs 9.08 GiB, more than 8.00 GiB (--memory)\n" in large.err
    assert "--memory 12GB" in large.err and not (here / "recipe.yaml").exists()
    fitting = large.err.partition("hint: --model ")[2].partition(",")[0]
    assert cli("init", "rows.jsonl", "--memory", "8GiB", "--model", fitting, "--yes").code == 0


def test_what_train_would_refuse_is_refused_alike(here: Path, cli: Command) -> None:
    write("rows.jsonl", 3)
    assert cli("init", "rows.jsonl", "--model", "tiny", "--yes").code == 0
    before = (here / "recipe.yaml").read_bytes()
    again = cli("init", "rows.jsonl", "--model", "tiny", "--yes")
    assert again.code == 2 and "this exists already" in again.err and (here / "recipe.yaml").read_bytes() == before
    Path("bad.jsonl").write_text('{"prompt": 1, "completion": "x"}\n{"prompt": "a"}\n', encoding="utf-8")
    Path("none.jsonl").write_text("\n", encoding="utf-8")
    Path("odd.jsonl").write_text('{"question": "a", "input": "b", "answer": "c"}\n', encoding="utf-8")
    for name, said in (("bad.jsonl", "bad.jsonl:2"), ("gone.jsonl", "no such file"), ("none.jsonl", "no rows"),
                       ("odd.jsonl", "question or input could be the question")):  # fmt: skip
        done = cli("init", name, "--model", "tiny", "--yes", "--out", "x.yaml")
        assert done.code == 3 and said in done.err and not (here / "x.yaml").exists(), name
        if name != "none.jsonl":
            trained = cli("train", "tiny", f"data.train={name}", "data.eval=null", "run.output=r")
            said = trained.err.replace(f"{here}/", "").splitlines()
            assert trained.code == 3 and {*said} & {*done.err.splitlines()}, name
    assert cli("init", "odd.jsonl", "--columns", "{prompt: input, completion: answer}", "--model", "tiny").code == 2
    chosen = cli(
        "init", "odd.jsonl", "--columns", "{prompt: input, completion: answer}", "--model", "tiny", "--out", "y.yaml"
    )
    assert chosen.code == 0 and load_recipe("y.yaml").data.columns == {"prompt": "input", "completion": "answer"}
    (here / "empty").mkdir()
    (here / "owner/empty").mkdir(parents=True)
    for name in ("./nowhere", "empty", "owner/empty", "qwen3-4bb", ""):
        missing = cli("init", "rows.jsonl", "--model", name, "--yes", "--out", "z.yaml")
        assert missing.code == 4 and not (here / "z.yaml").exists()
        assert f"there is no such folder, or no config.json in it\nwhere: {name!r}\n" in missing.err


PROPOSED = [(1, 3, 1, None), (2, 3, 2, None), (5, 3, 5, None), (9, 3, 8, None), (19, 3, 8, None), (20, 3, 8, 0.05),
            (500, 3, 16, 0.05), (2000, 2, 16, 0.05), (5000, 2, 32, 0.05), (20_000, 1, 32, 0.05)]  # fmt: skip


@pytest.mark.parametrize(("rows", "epochs", "batch", "held_out"), PROPOSED)
def test_epochs_and_batches_follow_the_rows(cli: Command, rows: int, epochs: int, batch: int, held_out: Any) -> None:
    write("rows.jsonl", rows)
    assert cli("init", "rows.jsonl", "--model", "Qwen/Qwen3-0.6B", "--yes").code == 0
    recipe = load_recipe("recipe.yaml")
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.data.eval) == (epochs, batch, held_out)
    assert (recipe.run.eval_every is None) == (held_out is None)


def test_lengths_are_those_of_the_tokenizer_where_it_is_at_hand(base: Path, tiny: Any, cli: Command) -> None:
    write("rows.jsonl", 200, length=18)
    settings = DataSettings(train=("rows.jsonl",))
    survey = survey_rows(settings)
    texts = [f"what is {n}?\n{f'{n} ' * 18}" for n in range(200)]
    exact = sorted(len(tiny(text, add_special_tokens=False).input_ids) + 2 * 6 for text in texts)
    found = survey.lengths(str(base))
    assert (
        abs(sum(found) - sum(exact)) < 0.02 * sum(exact)
        and max(abs(a - b) for a, b in zip(found, exact, strict=True)) < 40
    )
    assert survey.lengths("some/model") == sorted(-(-len(text) // 4) + 12 for text in texts)
    assert cli("init", "rows.jsonl", "--model", base, "--yes").code == 0
    recipe = load_recipe("recipe.yaml")
    usual = found[int(0.99 * 199)]
    assert 1.1 * usual <= recipe.data.max_length < 1.1 * usual + 128 and recipe.data.max_length % 128 == 0
    assert recipe.model.base == str(base) and recipe.data.overlong == "drop"


def test_a_model_that_takes_less_than_the_rows_need_cuts_them(here: Path, cli: Command) -> None:
    write("rows.jsonl", 40, length=2000)
    assert cli("init", "rows.jsonl", "--model", "gpt2", "--yes").code == 0
    recipe, text = load_recipe("recipe.yaml"), (here / "recipe.yaml").read_text(encoding="utf-8")
    assert (recipe.data.max_length, recipe.data.overlong) == (1024, "truncate")
    assert "lose the beginning of their context, an answer too long by itself its end; drop would" in text


CONFIGS = [  # a config.json, max_length, and why
    ('{"text_config": {"max_position_embeddings": 512}}', 512, "; this model takes 512\n"),
    ('{"max_position_embeddings": 40960}', 4096, "; this model takes 40960; more than 4096 are not proposed\n"),
    (
        '{"text_config": 3, "max_position_embeddings": "x"}',
        4096,
        "; what this model takes is not known here; more than",
    ),
    ("[1", 4096, "; what this model takes is not known here; more than 4096 are not proposed\n"),
]


@pytest.mark.parametrize(("config", "length", "why"), CONFIGS)
def test_what_a_model_takes_is_what_its_config_says(
    here: Path, cli: Command, config: str, length: int, why: str
) -> None:
    write("rows.jsonl", 40, length=9000)
    (here / "model").mkdir()
    (here / "model/config.json").write_text(config, encoding="utf-8")
    done = cli("init", "rows.jsonl", "--model", "model", "--yes")
    assert done.code == 0 and load_recipe("recipe.yaml").data.max_length == length
    assert f"about 40 of 40 rows have over {length} tokens: data.overlong=truncate\n" in done.err
    assert why in (here / "recipe.yaml").read_text(encoding="utf-8")
    assert cli("init", "rows.jsonl", "--model", "owner/unknown", "--yes", "--out", "u.yaml").code == 0
    assert "; what this model takes is not known here" in (here / "u.yaml").read_text(encoding="utf-8")


def test_a_text_is_split_where_it_is_long(here: Path, cli: Command) -> None:
    texts = [f"row {n}" + " and all of this" * 50 * (n == 2) for n in range(5)]
    (here / "texts.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts), encoding="utf-8")
    done = cli("init", "texts.jsonl", "--model", "tiny", "--yes")
    assert (
        "texts.jsonl: 5 rows of format text\nabout 1 of 5 rows have over 256 tokens: data.overlong=split\n" in done.err
    )
    assert load_recipe("recipe.yaml").data.overlong == "split"
    said = (here / "recipe.yaml").read_text(encoding="utf-8")
    assert "overlong: split  # a longer text becomes several, where drop would leave it out\n" in said
    assert "5 train examples" in cli("preview", "recipe.yaml").out


def test_one_row_and_rows_that_are_all_alike_train(here: Path, cli: Command) -> None:
    row = '{"prompt": "what is it?", "completion": "it is one"}\n'
    for name, count, batch in (("one", 1, 1), ("alike", 30, 8)):
        Path(f"{name}.jsonl").write_text(row * count, encoding="utf-8")
        done = cli("init", f"{name}.jsonl", "--model", "tiny", "--yes", "--out", f"{name}.yaml")
        assert f": {count} row{'s' * (count > 1)} of format" in done.err
        recipe = load_recipe(f"{name}.yaml")
        assert (recipe.train.batch_size, recipe.data.eval) == (batch, None)
    assert cli("plan", "one.yaml").code == 0 and cli("train", "one.yaml").code == 0


def test_a_row_with_more_tokens_than_its_characters_tell_is_not_dropped(here: Path, cli: Command) -> None:
    rows = [{"prompt": "why?", "completion": "because of that, " * 8}] * 4 + [
        {"prompt": "why?", "completion": "é→" * 50}
    ]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = cli("init", "rows.jsonl", "--model", "tiny", "--yes")
    assert done.code == 0 and "5 train examples" in cli("preview", "recipe.yaml").out


def test_paths_hold_where_the_recipe_lies_and_a_validation_split_is_held_out(here: Path, cli: Command) -> None:
    (here / "set").mkdir()
    write("set/train.jsonl", 30)
    write("set/validation.jsonl", 5, length=4)
    assert cli("init", "set", "--model", "tiny", "--yes", "--out", "deep/er/r.yaml").code == 0
    recipe = load_recipe("deep/er/r.yaml")
    assert recipe.data.train[0].path == str(here / "set") and recipe.data.eval[0].path == str(here / "set")  # type: ignore[index]
    said = cli("preview", "deep/er/r.yaml").out
    assert "30 train examples" in said and "5 held out examples" in said
    assert (here / "deep/er/lorasft-schema.json").is_file()
    (here / "deep/er/lorasft-schema.json").write_text("{}", encoding="utf-8")
    assert cli("init", "set/train.jsonl", "--model", "tiny", "--yes", "--out", "deep/er/s.yaml").code == 0
    assert (here / "deep/er/lorasft-schema.json").read_text(encoding="utf-8") == "{}"  # nothing is overwritten


def test_the_schema_beside_a_recipe_is_none_of_the_rows(here: Path, cli: Command) -> None:
    write("rows.jsonl", 5)
    assert cli("init", ".", "--model", "tiny", "--yes").code == 0 and (here / "lorasft-schema.json").is_file()
    assert "5 train examples" in cli("preview", "recipe.yaml").out
    assert load_recipe("recipe.yaml").run.output == f"runs/{here.name}"


def test_a_path_above_this_folder_is_written_without_dots(
    here: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    (here / "work").mkdir()
    write("rows.jsonl", 3)
    (here / "there").symlink_to(here / "work")
    write("work/own.jsonl", 3)
    monkeypatch.chdir(here / "work")
    rows, own = here / "rows.jsonl", here / "work/own.jsonl"
    named = {"../rows.jsonl": rows, "../there/own.jsonl": own, "../there/../rows.jsonl": rows, "own.jsonl": own}
    for name, path in named.items():
        (here / "work/recipe.yaml").unlink(missing_ok=True)
        assert cli("init", name, "--model", "tiny", "--yes").code == 0
        recipe = load_recipe("recipe.yaml")
        assert recipe.data.train[0].path == str(path) and recipe.run.output == f"runs/{path.stem}"


@pytest.mark.parametrize("size", ["12GiB", "80GB", "9.5 gib"])
def test_the_size_that_is_printed_is_the_one_that_was_typed(cli: Command, size: str) -> None:
    write("rows.jsonl", 3)
    done = cli("init", "rows.jsonl", "--memory", size, "--yes")
    assert f"next: lorasft plan recipe.yaml --memory {shlex.quote(size)}\n" in done.err


def test_columns_are_asked_for_as_init_takes_them(cli: Command) -> None:
    Path("rows.csv").write_text("foo,bar\na,b\n", encoding="utf-8")
    refused = cli("init", "rows.csv", "--model", "tiny", "--yes")
    words = "--columns '{prompt: foo, completion: bar}'"
    assert refused.code == 3 and f"hint: map them with data.columns or {words} (chat: messages;" in refused.err
    assert cli("init", "rows.csv", "--model", "tiny", "--yes", *shlex.split(words)).code == 0
    absent = cli("init", "rows.csv", "--columns", "{prompt: fou, completion: bar}", "--yes", "--out", "x.yaml")
    assert absent.code == 3 and "data.columns (--columns) names 'fou', not in the data" in absent.err


def test_names_of_files_and_columns_stay_in_their_line(here: Path, cli: Command) -> None:
    name = 'a: b # "c\n  d.jsonl'
    rows = [{"Question\n": f"q{n}", "answer": "a"} for n in range(3)]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert cli("init", name, "--model", "tiny", "--yes").code == 0
    recipe = load_recipe("recipe.yaml")
    assert recipe.data.train[0].path == str(here / name) and recipe.run.output == 'runs/a: b # "c\n  d'


def answers(monkeypatch: pytest.MonkeyPatch, *typed: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("".join(f"{line}\n" for line in typed)))


@pytest.mark.parametrize(
    ("typed", "name", "system"),
    [(("", ""), None, None), (("qwen3-4b", "Be brief."), "Qwen/Qwen3-4B", "Be brief."),
     (("some/model", ""), "some/model", None), ((), None, None), (("qwen3-4bb", "qwen3-32b", ""), None, None),
     (("./gone", "qwen3-4b", ""), "Qwen/Qwen3-4B", None)],
)  # fmt: skip
def test_what_is_asked_at_a_terminal(
    monkeypatch: pytest.MonkeyPatch, cli: Command, typed: tuple[str, ...], name: str | None, system: str | None
) -> None:
    write("rows.jsonl", 30)
    answers(monkeypatch, *typed)
    done = cli("init", "rows.jsonl", "--memory", "8GiB")
    assert (done.code, done.out) == (0, "recipe.yaml\n")
    wrong = sum(word in ("qwen3-4bb", "qwen3-32b", "./gone") for word in typed)
    assert done.err.count("model, this or another [") == 1 + wrong and done.err.count("error: ") == wrong
    assert "system message for all conversations [none]" in done.err
    proposed = done.err.partition("another [")[2].partition("]")[0]
    recipe = load_recipe("recipe.yaml")
    assert recipe.model.base == (name or load_recipe(proposed, ["data.train=x"]).model.base)
    assert recipe.chat.system == system


def test_rows_with_a_system_message_and_a_named_model_ask_nothing(
    monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    write("rows.jsonl", 30, system_prompt="Be kind.")
    answers(monkeypatch)
    done = cli("init", "rows.jsonl", "--model", "tiny")
    assert done.code == 0 and "[" not in done.err and "of system, user, assistant" in done.err


def test_a_terminal_of_its_own(here: Path) -> None:
    """Through a pty: the questions are on the terminal, and stdout has the path alone."""
    write("rows.jsonl", 30)
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "lorasft", "init", "rows.jsonl", "--memory", "8GiB"]
    with subprocess.Popen(command, stdin=follower, stderr=follower, stdout=subprocess.PIPE) as process:
        os.close(follower)
        os.write(leader, b"qwen3-1.7b\nBe brief.\n")
        assert process.stdout and process.stdout.read() == b"recipe.yaml\n" and process.wait(timeout=60) == 0
    os.close(leader)
    recipe = load_recipe("recipe.yaml")
    assert (recipe.model.base, recipe.chat.system) == ("Qwen/Qwen3-1.7B", "Be brief.")


def test_without_a_size_the_card_decides_or_else_what_a_cpu_can_train(
    monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    """A stand-in for a card, which this test may not have."""
    write("rows.jsonl", 30)
    for device, free, room, said in (
        ("cuda", 7 * GIB, "7.00 GiB (free on the card)", "the largest that fits into {}: "),
        ("cpu", 64 * GIB, "4.00 GiB (no card: as much as a CPU can train)", "the largest that fits into {}: "),
        ("cpu", GIB // 4, "256.0 MiB (no card: as much as a CPU can train)", "more than {}; no shipped one fits\n"),
    ):
        state = SimpleNamespace(device=torch.device(device))
        monkeypatch.setattr("accelerate.PartialState", lambda state=state: state)
        monkeypatch.setattr(machine, "free_memory", lambda device, free=free: free)
        done = cli("init", "rows.jsonl", "--yes", "--out", f"{device}{free}.yaml")
        assert done.code == (0 if free >= GIB else 6) and said.format(room) in done.err
        warning = f"warning: qwen3-32b needs 23.12 GiB, more than {room}"
        named = cli("init", "rows.jsonl", "--model", "Qwen/Qwen3-32B", "--yes", "--out", f"named{device}{free}.yaml")
        assert named.code == 0 and warning in named.err
        lines = Path(f"named{device}{free}.yaml").read_text(encoding="utf-8").splitlines()
        assert lines[3].endswith("# 32.8B parameters; qwen3-32b needs 23.12 GiB")
    assert init.ON_CPU == 4 * GIB


def modules_after(*words: str) -> set[str]:
    code = f"import sys; from lorasft.cli import main; main({list(words)!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {*done.stdout.split()}


@pytest.mark.parametrize("given", [["--model", "BASE"], ["--memory", "8GiB"], ["--memory", "8GiB", "--model", "tiny"]])
def test_no_torch_is_imported_where_memory_is_not_asked_for(base: Path, given: list[str]) -> None:
    write("rows.jsonl", 30)
    found = modules_after("init", "rows.jsonl", "--yes", *(str(base) if word == "BASE" else word for word in given))
    assert Path("recipe.yaml").is_file() and not found & {"torch", "transformers", "datasets"}
    assert "tokenizers" in found or "--model" not in given
