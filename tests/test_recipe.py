"""The recipe: what it accepts, what it refuses and in which words, and that its dump is itself."""

from __future__ import annotations

import json
import re
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorasft.errors import ErrorGroup, LorasftError, UnsafeError
from lorasft.recipe import DataSource, Recipe, mathematics, recipe_schema
from lorasft.recipe.load import dump_recipe, load_recipe, read_peers, shipped_recipes
from lorasft.recipe.yaml_reader import dump_yaml, parse_yaml, read_scalar

SMALLEST = "model: {base: some/model}\ndata: {train: x.jsonl}\n"


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> Recipe:
    Path("r.yaml").write_text(text, encoding="utf-8")
    return load_recipe("r.yaml", overrides)


def refused(text: str, *overrides: str) -> LorasftError:
    with pytest.raises(LorasftError) as caught:
        load(text, *overrides)
    return caught.value


# --- scalars -------------------------------------------------------------------------------------------------------


NUMBERS = {"2e-4": 2e-4, "1e3": 1e3, ".5": 0.5, "5.": 5.0, "-1.5E+2": -150.0, "0123": 123, "+7": 7}
WORDS = {"true": True, "False": False, "null": None, "~": None, "": None}
TEXTS = ("no", "on", "y", "tRue", "1:30", "1_000", "2024-01-31", "0b11", "0o17", ".inf", "e5", ".", "=", "１２")


@pytest.mark.parametrize(("text", "value"), [*NUMBERS.items(), *WORDS.items(), *((text, text) for text in TEXTS)])
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    """Fullwidth digits are text."""
    read = read_scalar(text)
    assert read == value and type(read) is type(value)
    assert parse_yaml(f"- {text}\n", "x").value == [value]
    assert parse_yaml(f'- "{text}"\n', "x").value == [text]


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
awkward = st.sampled_from(["1e3", "0o17", "no", "1:30", "~", "", " a", "a: b", "#", "- x", "\x85", "\ufeff", "'", "<<"])


@given(st.recursive(scalars | awkward, lambda inner: st.lists(inner) | st.dictionaries(st.text() | awkward, inner)))
def test_dumped_yaml_reads_back(value: Any) -> None:
    document = parse_yaml(dump_yaml([value]), "x")
    assert document.value == [value]
    assert repr(document.value) == repr([value])  # also the types: 1 is not 1.0


@given(st.text(alphabet=string.printable) | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_any_text_gives_values_or_our_error(text: str) -> None:
    try:
        parse_yaml(text, "x")
    except LorasftError as fault:
        assert "x" in str(fault)


# --- recipes that load ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["x.jsonl", "{path: x.jsonl}", "[x.jsonl]", "[{path: x.jsonl}]"])
def test_one_source_may_be_text_mapping_or_list(written: str) -> None:
    recipe = load(f"model: {{base: m}}\ndata: {{train: {written}, eval: {written}}}\n")
    assert recipe.data.train == recipe.data.eval == (DataSource(path="x.jsonl"),)


@pytest.mark.parametrize(("written", "value"), [("1", 1), ("0", 0), ("0.0", 0.0), ("0.5", 0.5), ("1e-1", 0.1)])
def test_warmup_is_steps_or_share_by_how_it_is_written(written: str, value: float) -> None:
    warmup = load(SMALLEST, f"schedule.warmup={written}").schedule.warmup
    assert warmup == value and type(warmup) is type(value)


def test_overrides_win_and_reach_into_mappings() -> None:
    text = SMALLEST + "train: {batch_size: fast}\nchat: {template_options: {a: 1}}\nadapter:\n"
    recipe = load(text, "train.batch_size=4", "chat.template_options.b=no", "run.eval_every=null", "chat.system=a=b")
    assert recipe.train.batch_size == 4  # also over a wrong value
    assert recipe.chat.template_options == {"a": 1, "b": "no"}
    assert recipe.run.eval_every is None and recipe.chat.system == "a=b"
    assert load("model: {base: m}\n", "data.train=x.jsonl").data.train == (DataSource(path="x.jsonl"),)


def test_retired_keys_of_an_earlier_version_are_ignored_at_their_default() -> None:
    assert load(SMALLEST + "machine: {kernels: torch}\n") == load(SMALLEST)


def test_no_held_out_data_means_no_evaluation() -> None:
    recipe = load(SMALLEST, "data.eval=null")
    assert recipe.run.eval_every is None and recipe.run.output == "runs/r"
    assert load(dump_recipe(recipe)) == recipe


def test_paths_are_looked_up_beside_the_recipe_then_here(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    (folder / "base").mkdir(parents=True)
    for path in (folder / "both.jsonl", tmp_path / "both.jsonl", tmp_path / "here.jsonl", folder / "t.jinja"):
        path.write_text("")
    text = (
        "model: {base: base}\nadapter: {start: no/such}\nchat: {template: t.jinja}\n"
        "data: {train: [both.jsonl, {path: here.jsonl}, org/name], eval: both.jsonl}\nrun: {output: base}\n"
    )
    (folder / "r.yaml").write_text(text)
    recipe = load_recipe("elsewhere/r.yaml")
    assert recipe.model.base == str(folder / "base")
    paths = [source.path for source in recipe.data.train]
    assert paths == [str(folder / "both.jsonl"), str(tmp_path / "here.jsonl"), "org/name"]
    assert recipe.chat.template == str(folder / "t.jinja")
    assert (recipe.adapter.start, recipe.run.output) == ("no/such", "base")
    overridden = load_recipe("elsewhere/r.yaml", ["data.eval=both.jsonl", "model.base=base", "chat.template=t.jinja"])
    assert isinstance(overridden.data.eval, tuple) and overridden.data.eval[0].path == str(tmp_path / "both.jsonl")
    assert (overridden.model.base, overridden.chat.template) == ("base", "t.jinja")


def test_a_built_in_template_is_no_folder_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    assert load(SMALLEST, "chat.template=plain").chat.template == "plain"


text_values = (st.text(min_size=1, max_size=8) | awkward).filter(
    lambda text: text[:1] not in ("", "~") and "\0" not in text
)
fractions = st.floats(0.001, 0.5)
sections: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "model": {"revision": st.none() | text_values, "quantization": st.sampled_from(["nf4", "none"])},
    "adapter": {"rank": st.integers(1, 1024), "alpha": st.floats(1e-3, 1e6), "targets": st.lists(text_values)},
    "data": {
        "eval": st.none() | fractions | text_values,
        "columns": st.none() | st.dictionaries(text_values, text_values),
        "max_dropped": st.floats(0, 1),
    },
    "chat": {"system": st.none() | st.text(), "template_options": st.dictionaries(text_values, scalars)},
    "train": {"epochs": st.floats(1e-3, 100) | st.integers(1, 9), "steps": st.none() | st.integers(1, 10**9)},
    "optimizer": {"learning_rate": st.floats(1e-300, 0.01), "betas": st.tuples(fractions, fractions).map(list)},
    "schedule": {"warmup": st.integers(0, 10**6) | st.floats(0, 0.999)},
    "run": {"output": text_values, "trackers": st.lists(st.sampled_from(["wandb", "mlflow"]))},
    "machine": {"micro_batch_tokens": st.just("auto") | st.integers(1, 10**6), "share_prefixes": st.booleans()},
}
sources = st.one_of(text_values, st.fixed_dictionaries({"path": text_values}, optional={"share": fractions}))
raw_recipes = st.fixed_dictionaries(
    {name: st.fixed_dictionaries({}, optional=keys) for name, keys in sections.items()}
    | {
        "model": st.fixed_dictionaries({"base": text_values}, optional=sections["model"]),
        "data": st.fixed_dictionaries({"train": sources | st.lists(sources, min_size=1)}, optional=sections["data"]),
    }
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw_recipes)
def test_the_dump_of_a_recipe_loads_as_the_recipe(raw: dict[str, Any]) -> None:
    recipe = load(json.dumps(raw))  # JSON is YAML
    dumped = dump_recipe(recipe)
    again = load(dumped)
    assert again == recipe and dump_recipe(again) == dumped
    assert json.loads(json.dumps(mathematics(recipe))) == mathematics(again)
    for section, keys in raw.items():  # what was written is what is held
        for key in set(keys) - {"train", "eval", "base"}:
            held = getattr(getattr(recipe, section), key)
            assert (list(held) if isinstance(held, tuple) else held) == keys[key]


def test_mathematics_ignores_run_and_machine() -> None:
    here = load(SMALLEST, "run.output=a", "machine.micro_batch_tokens=512")
    assert mathematics(here) == mathematics(load(SMALLEST))
    assert mathematics(here) != mathematics(load(SMALLEST, "train.seed=1"))


# --- recipes that are refused --------------------------------------------------------------------------------------

# Those of a plain misuse are in test_bad_inputs.py, by their numbers there.
BAD = {  # what follows the smallest recipe (lines 1 and 2) -> exit code, line, what must be said
    "train:\n  epochs: '2'": (2, 4, ["train.epochs", 'it is "2"']),
    "train: {epochs: true}": (2, 3, ["train.epochs", "it is true"]),
    "train: {seed: 1.0}": (2, 3, ["train.seed", "integer"]),
    "train: {epochs: 1e999}": (2, 3, ["train.epochs", "finite"]),
    "optimizer: {betas: [0.9, 1.0]}": (2, 3, ["optimizer.betas.1", "less than 1", "it is 1.0"]),
    "optimizer: {betas: [0.9]}": (2, 3, ["optimizer.betas"]),
    "adapter: {targets: 3}": (2, 3, ["adapter.targets", "all-linear"]),
    "adapter: qlora": (2, 3, ["adapter", '"qlora"']),
    "schedule: {warmup: 1.5}": (2, 3, ["schedule.warmup", "less than 1"]),
    "run: {trackers: [tensorbord]}": (2, 3, ["run.trackers.0", "tensorboard", '"tensorbord"']),
    "run: {output: ''}": (2, 3, ["run.output"]),
    "chat: {thinking: no}": (2, 3, ["chat.thinking", "follow_template"]),
    "chat: {template_options: {a: [1]}}": (2, 3, ["chat.template_options.a"]),
    "? [a]\n: 2": (2, 3, ["not text"]),
    "<<: {train: {seed: 1}}": (2, 3, ["unknown key <<"]),
    "run: {keep: 1": (2, "4:1", ["not YAML"]),
    "a: b: c": (2, "3:5", ["not YAML"]),
    "---\nrun: {keep: 1}": (2, "3:1", ["another document"]),
    'chat: {system: "\\ud800"}': (2, 3, ["surrogate"]),
    "chat: " + "[" * 20_000: (8, 3, ["deeper than 32"]),
    "? " * 40 + "a": (8, 3, ["deeper than 32"]),
    "model_:\n  WANDB_API_KEY: canary": (2, 3, ["unknown key model_"]),
    "machine: {attention: evil/kernel}": (8, 3, ["machine.attention"]),
    "machine: {attention: flash}": (2, 3, ["machine.attention", "sdpa"]),
    "machine: {kernels: liger}": (2, 3, ["unknown key machine.kernels", "does without"]),
    "learning_rate: 1e-4": (2, 3, ["unknown key learning_rate", "optimizer.learning_rate"]),
    "'\\e[31m': 1": (2, 3, ["unknown key \\e[31m"]),
    '"\\e[31m": 1': (2, 3, ["unknown key \\x1b[31m"]),
}
BAD_DATA = {  # a whole recipe of its own, where the data or the base is the matter
    "data: {train: x}": (2, 1, ["model.base"]),
    "model: {base: m}": (2, 1, ["data.train"]),
    "model: {base: m}\ndata:": (2, 2, ["data.train"]),
    "model: {base: m}\ndata:\n  train: []": (2, 3, ["data.train"]),
    "model: {base: m}\ndata:\n  train:\n    - a\n    - {share: 200}": (2, 5, ["train.1.path", "train.1.share"]),
    "model: {base: m}\ndata:\n  train:\n    path: a\n    pth: b": (
        2,
        5,
        ["unknown key data.train.pth", "data.train.path"],
    ),
    "model: {base: m}\ndata: {train: a, eval: 0}": (2, 2, ["data.eval", "greater than 0"]),
    "model: {base: m}\ndata:\n  train: a\n  eval:\n    - {path: b, share: 0}": (2, 5, ["data.eval.0.share"]),
    "model: {base: m}\ndata: {train: a, eval: null}\nrun: {keep_best: true}": (2, 3, ["keep_best needs data.eval"]),
    "model: {base: m}\ndata: {train: a}\nrun: {keep_best: true, eval_every: null}": (2, 3, ["needs run.eval_every"]),
    "model: {base: m}\ndata: {train: a, eval: null}\nrun: {patience: 2}": (2, 3, ["patience needs data.eval"]),
    "model: {base: m}\ndata: {train: a}\nrun: {patience: 2, eval_every: null}": (
        2,
        3,
        ["run.patience needs run.eval_every", "run.eval_every=100, or", "run.patience=null"],
    ),
    "model: {base: m}\ndata: {train: a}\nrun: {patience: 0}": (2, 3, ["run.patience"]),
    "model: {base: m}\ndata: {train: a}\noptimizer: {lora_plus: 0}": (2, 3, ["optimizer.lora_plus"]),
    "model: {base: m}\ndata:\n  train: a\n  eval:\n    - {path: b, share: 0.5}": (2, 5, ["takes all rows"]),
    "- a": (2, 1, ["mapping of sections"]),
}
REFUSED = {**{f"{SMALLEST}{text}\n": expected for text, expected in BAD.items()}, **BAD_DATA}


@pytest.mark.parametrize(("text", "code", "line", "said"), [(text, *expected) for text, expected in REFUSED.items()])
def test_bad_recipes_say_what_where_and_how_to_fix_it(text: str, code: int, line: int | str, said: list[str]) -> None:
    error = refused(text)
    message = str(error)
    assert error.exit_code == code and "hint: " in message, message
    assert re.search(rf"r.yaml:{line}( |$)", message, re.MULTILINE), message
    assert all(words in message for words in said), message
    assert not any(word in message for word in ("pydantic", "canary", "Traceback", "\x1b"))
    assert not Path("hacked").exists()


BAD_OVERRIDES = {
    "train.btch_size=3": [
        "unknown key train.btch_size",
        "where: command line: train.btch_size=...",
        "here it is train.batch_size",
    ],
    "train.batch_size": ["section.key=value", "command line: train.batch_size"],
    "model={base: x}": ["section.key=value"],
    ".base=x": ["section.key=value"],
    "train.batch_size=4x": ["command line: train.batch_size=...", 'it is "4x"'],
    "chat.system=a: b: c": ["not YAML", "command line: chat.system"],
    "chat.system=!x y": ["tags", "command line: chat.system"],
    "lora_r=8": ["adapter.rank"],
    "model.hf_token=canary": ["model.hf_token", "command line: model.hf_token=..."],
    "model.x={hf_token: canary}": ["unknown key model.x"],
    "adapter.rank.x=3": ["adapter.rank: "],
    "train.seed=\x1b[31m": ["train.seed"],
    "--epochs=3": ["unknown key --epochs"],
    "data.train=[{path: 3}]": ["where: command line: data.train=...", "it is 3"],
}


@pytest.mark.parametrize(("override", "said"), BAD_OVERRIDES.items())
def test_bad_overrides_name_the_command_line(override: str, said: list[str]) -> None:
    message = str(refused(SMALLEST + "train: {loss: token}\n", override))
    assert all(words in message for words in said) and "hint: " in message, message
    assert "canary" not in message and "\x1b" not in message


def test_all_errors_come_at_once_and_the_unsafe_decides() -> None:
    text = "train: {seed: x}\nlora_r: 2\nrun: {keep: 0}\ntrust_remote_code: true\n"
    error = refused(SMALLEST + text, "adapter.rank=0")
    assert isinstance(error, ErrorGroup) and len(error.errors) == 5
    assert error.exit_code == 8 and isinstance(error.errors[0], UnsafeError)
    assert all(f"r.yaml:{line}" in str(error) for line in (3, 4, 5, 6)) and "command line: adapter.rank" in str(error)
    for count in (50, 500):
        lines = str(refused(SMALLEST + "".join(f"k{number}: 1\n" for number in range(count)))).splitlines()
        assert len(lines) == count
    doubled = str(refused("data: {train: d}\nmodel:\nmodel: {base: m}\n"))
    assert doubled.count("error:") == 1  # none that follows from it
    assert "recipes schema" in str(refused(SMALLEST + "xyzzy: 1\n"))  # no name is near


NEAR = (
    "num_train_epochs",
    "model_max_length",
    "stage",
    "wandb_name",
    "ddp_backend",
    "eval_sample_packing",
    "use_flash_attention_2",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "chat_template",
    "system_prompt",
    "output_dir",
)


@pytest.mark.parametrize(
    "name", sorted({*NEAR, *(name for theirs in read_peers().values() for name in theirs.split())})
)
def test_names_of_peers_lead_to_a_key_that_exists(name: str) -> None:
    hint = str(refused(SMALLEST + f"{name.replace('*', 'x')}: 1\n"))
    assert hint.count("here it is ") == 1 and " or data." not in hint, hint
    key = hint.partition("here it is ")[2].split()[0].rstrip(":")
    section, _, field = key.partition(".")
    assert key == "nothing" or field in Recipe.model_fields[section].annotation.model_fields, hint  # type: ignore[union-attr]


FOREIGN = {  # files of other tools, in short -> hints that must be there
    "axolotl": (
        "base_model: x/y\nadapter: qlora\ndatasets: [{path: a, type: alpaca}]\nlora_r: 8\nlora_alpha: 16\n"
        "sample_packing: true\neval_sample_packing: true\npad_to_sequence_len: true\nmicro_batch_size: 2\n"
        "gradient_accumulation_steps: 4\noptimizer: adamw_bnb_8bit\nbf16: auto\ntf32: false\nwandb_entity: me\n"
        "early_stopping_patience: 3\nloraplus_lr_ratio: 16\n"
        "gradient_checkpointing: true\nresume_from_checkpoint:\nflash_attention: true\nwarmup_ratio: 0.1\n"
        "saves_per_epoch: 1\nspecial_tokens: {pad_token: x}\ndeepspeed:\nmodel_type: LlamaForCausalLM\nnum_epochs: 1\n",
        ["this is a section: adapter.rank", "this is a section: optimizer.name", "run.patience", "optimizer.lora_plus"],
    ),
    "llama-factory": (
        "model_name_or_path: x\nstage: sft\ndo_train: true\nfinetuning_type: lora\nlora_target: all\ntemplate: qwen3\n"
        "dataset: identity\ncutoff_len: 2048\nmax_samples: 1000\noverwrite_cache: true\nplot_loss: true\n"
        "preprocessing_num_workers: 16\nddp_timeout: 1\nreport_to: none\nsave_only_model: false\nval_size: 0.1\n"
        "overwrite_output_dir: true\nper_device_train_batch_size: 1\nlr_scheduler_type: cosine\nlogging_steps: 10\n",
        ["(SFT)", "share of a source"],
    ),
    "ms-swift": (
        "model: Qwen/Qwen3-4B\ntrain_type: lora\ndataset: [a]\ntorch_dtype: bfloat16\nsplit_dataset_ratio: 0.01\n"
        "dataset_num_proc: 4\nattn_impl: flash_attn\nsave_total_limit: 2\ntarget_modules: all-linear\n",
        ["this is a section: model.base"],
    ),
    "mlx-lm": (
        "model: x/y\nfine_tune_type: lora\niters: 100\nsteps_per_report: 10\nsteps_per_eval: 100\nmask_prompt: true\n"
        "grad_checkpoint: true\nadapter_path: out\n",
        ["run.output"],
    ),
}


@pytest.mark.parametrize("tool", FOREIGN)
def test_every_key_of_another_tools_file_is_answered_at_its_line(tool: str) -> None:
    text, said = FOREIGN[tool]
    lines = str(refused(text)).splitlines()
    keys = {line.partition(":")[0]: number for number, line in enumerate(text.splitlines(), start=1)}
    assert all(words in "".join(lines) for words in said)
    for key, number in keys.items():
        (line,) = (line for line in lines if re.search(rf"(key |error: ){key}\b", line) and f"r.yaml:{number} " in line)
        assert "here it is " in line or "this is a section: " in line, line


@pytest.mark.parametrize(("written", "held"), [("q_proj", ("q_proj",)), ("q_proj, v_proj", ("q_proj", "v_proj")),
                                               ("[q_proj]", ("q_proj",)), ("all-linear", "all-linear")])  # fmt: skip
def test_names_may_be_written_without_a_list(written: str, held: Any) -> None:
    recipe = load(SMALLEST, f"adapter.targets={written}", "run.trackers=tensorboard", "adapter.modules_to_save=lm_head")
    assert (recipe.adapter.targets, recipe.run.trackers) == (held, ("tensorboard",))
    assert load(dump_recipe(recipe)) == recipe and recipe.adapter.modules_to_save == ("lm_head",)
    assert "mlflow" in str(refused(SMALLEST, "run.trackers=tensorboard,neptune"))


def test_no_held_out_rows_turn_off_what_the_recipe_says_of_evaluation() -> None:
    text = SMALLEST + "run: {eval_every: 5, keep_best: true, patience: 3}\n"
    recipe = load(text, "data.eval=null")
    assert recipe.run.eval_every is recipe.run.patience is None and not recipe.run.keep_best
    assert load_recipe("tiny", ["data.eval=null"]).run.eval_every is None
    # By the same hand: one of the two is a mistake.
    for typed in ("run.eval_every=5", "run.keep_best=true", "run.patience=3"):
        assert "needs data.eval" in str(refused(text, "data.eval=null", typed))
    assert "needs data.eval" in str(refused(text.replace("x.jsonl", "x.jsonl, eval: null")))


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + SMALLEST.encode())
    assert load_recipe("bom.yaml").model.base == "some/model"


# --- the schema for editors ----------------------------------------------------------------------------------------


def test_every_key_is_described_for_editors() -> None:
    schema = recipe_schema()
    for definition in schema["$defs"].values():
        for name, key in definition["properties"].items():
            assert key.get("description"), name
    text, source, several = schema["$defs"]["DataSettings"]["properties"]["train"]["anyOf"]
    assert text == {"type": "string"} and source["$ref"].endswith("DataSource")
    assert several == {"items": {"anyOf": [text, source]}, "minItems": 1, "type": "array"}
    assert "data" not in schema["required"]


# --- shipped recipes and their command -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_short_and_load(name: str) -> None:
    path = shipped_recipes()[name]
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 25 and text.startswith("# ")
    recipe = load_recipe(name, ["data.train=x.jsonl"])
    assert recipe.run.output == f"runs/{name}" and recipe.data.train[0].path == "x.jsonl"
    assert yaml.safe_load(text)["model"]["base"]  # an ordinary YAML file, too


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_copied_recipe_means_the_same(name: str, tmp_path: Path, cli: Command) -> None:
    assert "wrote" in cli("recipes", "copy", name).err
    has_data = "train" in yaml.safe_load(shipped_recipes()[name].read_text(encoding="utf-8")).get("data", {})
    overrides = [] if has_data else ["data.train=x"]
    assert load_recipe(f"{name}.yaml", overrides) == load_recipe(name, overrides)
    assert "exists" in cli("recipes", "copy", name, tmp_path).err


def test_copying_makes_paths_beside_the_recipe_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "x.jsonl").write_text("")
    (folder / "own.yaml").write_text("# A recipe.\n# More.\n" + SMALLEST + "optimizer: {learning_rate: 2e-4}\n")
    monkeypatch.setattr("lorasft.recipe.load.shipped_recipes", lambda: {"own": folder / "own.yaml"})
    assert cli("recipes", "copy", "own", "copy.yaml").code == 0
    text = (tmp_path / "copy.yaml").read_text()
    assert yaml.safe_load(text)["data"]["train"] == f"{folder}/x.jsonl" and text.startswith("# A recipe.\n")
    copied = load_recipe("copy.yaml")
    assert copied.data.train[0].path == str(folder / "x.jsonl") and copied.optimizer.learning_rate == 2e-4


def test_list_show_and_schema_print_what_programs_can_read(cli: Command) -> None:
    rows = json.loads(cli("recipes", "list", "--json").out)
    assert [row["base"] for row in rows if row["name"] == "gpt2"] == ["openai-community/gpt2"]
    lines = cli("recipes", "list").out.splitlines()
    assert len(lines) == 1 + len(rows) >= 50 and max(map(len, lines)) <= 100
    assert [row["weights"] for row in rows] == sorted(row["weights"] for row in rows)
    assert cli("recipes", "show", "gpt2").out == shipped_recipes()["gpt2"].read_text()
    assert json.loads(cli("recipes", "show", "gpt2", "--json").out)["data"]["max_length"] == 1024
    assert json.loads(cli("recipes", "schema").out) == recipe_schema()


def test_what_fits_is_listed(cli: Command) -> None:
    rows = json.loads(cli("recipes", "list", "--json").out)
    fitting = json.loads(cli("recipes", "list", "--memory", "12GiB", "--json").out)
    assert fitting == [row for row in rows if row["needs"] <= 12 * 2**30] and rows[-1] not in fitting
    lines = cli("recipes", "--memory", "12GiB").out.splitlines()
    assert lines[1:] == [
        line for line in cli("recipes").out.splitlines() if line.split()[0] in {r["name"] for r in fitting}
    ]


def test_a_reader_that_goes_away_is_no_fault() -> None:
    """As in `lorasft recipes show tiny | head -1`."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "lorasft", "recipes", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (0, b"recipes: importing libraries ...\n")
    process.stderr.close()
