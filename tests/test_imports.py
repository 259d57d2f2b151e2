"""`lorasft recipes import`: configs of Axolotl and LLaMA-Factory, against what those tools do with them, by hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS, Command

from lorasft.data.survey import FRAME
from lorasft.recipe import Recipe, recipe_schema
from lorasft.recipe.load import load_recipe

AXOLOTL = """
base_model: {base}
load_in_4bit: true
adapter: qlora
datasets:
  - path: {rows}
    type: chat_template
val_set_size: 0.1
sequence_len: 120
lora_r: 4
lora_alpha: 8
lora_target_linear: true
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 2
learning_rate: 1e-3
warmup_ratio: 0.25
output_dir: out
wandb_project:
flash_attention: true
"""
FACTORY = """
model_name_or_path: {base}
quantization_bit: 4
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
dataset: own
template: llama3
cutoff_len: 120
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
warmup_steps: 2
output_dir: out
plot_loss: true
"""


@pytest.fixture
def bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command) -> Callable[..., tuple[Recipe, str, str]]:
    """Writes a config, imports it, and returns the recipe, its text and what was said."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, **values: object) -> tuple[Recipe, str, str]:
        (tmp_path / "config.yml").write_text(text.format(**values) if values else text, encoding="utf-8")
        (tmp_path / "config-lorasft.yaml").unlink(missing_ok=True)
        done = cli("recipes", "import", "config.yml")
        assert (done.code, done.out) == (0, "config-lorasft.yaml\n"), done.err
        return load_recipe("config-lorasft.yaml"), (tmp_path / done.out.strip()).read_text(encoding="utf-8"), done.err

    return run


def write_factory_data(folder: Path, rows: Path, **entry: Any) -> None:
    (folder / "data").mkdir(exist_ok=True)
    info = {"own": {"file_name": "own.json", "formatting": "sharegpt", "columns": {"messages": "turns"}} | entry}
    (folder / "data/dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    names = {"user": "human", "assistant": "gpt"}
    turns = [
        {"turns": [{"from": names[m["role"]], "value": m["content"]} for m in json.loads(line)["messages"]]}
        for line in rows.read_text(encoding="utf-8").splitlines()
    ]
    (folder / "data/own.json").write_text(json.dumps(turns), encoding="utf-8")


def supervised(rows: Path, tokenizer: Any) -> int:
    """Tokens of all answers, each with its end of turn: what both tools learn of a chat template."""
    answers = [json.loads(line)["messages"][1]["content"] for line in rows.read_text(encoding="utf-8").splitlines()]
    return sum(len(tokenizer(answer, add_special_tokens=False).input_ids) + 1 for answer in answers)


def train(cli: Command, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of steps, and those of evaluations, of a run."""
    done = cli("train", name)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "learning_rate" in line], [line for line in lines if "eval_tokens" in line]


def test_axolotls_steps_rates_and_tokens(
    bring: Callable[..., tuple[Recipe, str, str]], base: Path, rows: Path, tiny: Any, cli: Command
) -> None:
    recipe, _, said = bring(AXOLOTL, base=base, rows=rows)
    assert recipe.data.eval == pytest.approx(3 / 26)  # 0.1 of 26 rows, rounded up
    steps, evaluations = train(cli, "config-lorasft.yaml")
    # 23 rows in batches of 2 x 2: 6 steps an epoch. The warm-up is int(0.25 x 12) = 3 steps, from 0; then a cosine
    # over 9 steps, which would be 0 at the 13th.
    cosine = [1, 0.969846, 0.883022, 0.75, 0.586824, 0.413176, 0.25, 0.116978, 0.030154]
    assert [line["step"] for line in steps] == list(range(1, 13))
    rates = [line["learning_rate"] for line in steps]
    assert rates == pytest.approx([rate * 1e-3 for rate in (0, 1 / 3, 2 / 3, *cosine)], abs=1e-9)
    held_out = evaluations[-1]["eval_tokens"]
    assert sum(line["supervised_tokens"] for line in steps) == 2 * (supervised(rows, tiny) - held_out)
    assert (recipe.model.quantization, recipe.adapter.rank, recipe.adapter.alpha) == ("nf4", 4, 8)
    assert (recipe.train.seed, recipe.train.max_grad_norm, recipe.schedule.name) == (42, 1.0, "cosine")
    assert recipe.model.dtype == "auto"  # its default is bf16: auto
    assert "flash_attention: here it is machine.attention" in said and "wandb" not in said


def test_llama_factorys_steps_rates_and_tokens(
    bring: Callable[..., tuple[Recipe, str, str]], base: Path, rows: Path, tiny: Any, cli: Command, tmp_path: Path
) -> None:
    write_factory_data(tmp_path, rows)
    recipe, _, said = bring(FACTORY, base=base)
    steps, evaluations = train(cli, "config-lorasft.yaml")
    # 26 rows in batches of 4 x 2: 4 steps an epoch, 3 epochs. Linear is its default, and 5e-5: from 0 in 2 steps, then
    # down by a tenth each, which would be 0 at the 13th.
    falling = [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert [line["learning_rate"] for line in steps] == pytest.approx([r * 5e-5 for r in (0, 0.5, *falling)], abs=1e-12)
    assert sum(line["supervised_tokens"] for line in steps) == 3 * supervised(rows, tiny) and not evaluations
    assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.targets) == (8, 16, "all-linear")
    assert recipe.data.overlong == "truncate" and recipe.data.train[0].columns == {"conversations": "turns"}
    assert "template: llama3: the tokenizer's own is taken" in said


def test_the_recipe_names_the_keys_that_it_comes_from_and_what_it_leaves_out(
    bring: Callable[..., tuple[Recipe, str, str]], base: Path, rows: Path, tmp_path: Path
) -> None:
    text = AXOLOTL + "neftune_noise_alpha: 5\nloraplus_lr_ratio: 16\nlora_mlp_kernel: true\nbf16: auto\ndebug: false\n"
    recipe, written, said = bring(text, base=base, rows=rows)
    lines = written.splitlines()
    assert lines[0] == "# yaml-language-server: $schema=lorasft-schema.json"
    assert json.loads((tmp_path / "lorasft-schema.json").read_text(encoding="utf-8")) == recipe_schema()
    assert "  rank: 4  # lora_r" in lines and "  weight_decay: 0  # weight_decay: default" in lines
    assert "  batch_size: 4  # micro_batch_size x gradient_accumulation_steps, on one process" in lines
    left = dict(line.removeprefix("#   ").split(": ", 1) for line in lines if line.startswith("#   "))
    learned = "it changes what is learned, and lorasft does without it"
    assert left == {
        "flash_attention": "here it is machine.attention",
        "neftune_noise_alpha": learned,
        "lora_mlp_kernel": "there is nothing like it here",
    }
    for what, why in left.items():
        assert f"not as in config.yml: {what}: {why}\n" in said
    assert recipe.model.dtype == "auto"
    assert (
        '  dtype: "auto"  # bf16' in lines
        and "  eval_every: null  # eval_steps, eval_strategy, evals_per_epoch" in lines
    )
    assert any(line.startswith("  max_dropped: 1.0  # excess_length_strategy: however many") for line in lines)


def test_packed_rows_become_about_as_many_examples(
    bring: Callable[..., tuple[Recipe, str, str]], base: Path, rows: Path, tiny: Any, tmp_path: Path
) -> None:
    tokens = [len(tiny.apply_chat_template(json.loads(line)["messages"], return_dict=True).input_ids)
              for line in rows.read_text(encoding="utf-8").splitlines()]  # fmt: skip
    mean = sum(tokens) / len(tokens)
    recipe, _, said = bring(AXOLOTL + "sample_packing: true\n", base=base, rows=rows)
    assert recipe.train.batch_size == pytest.approx(4 * 120 / mean, rel=0.25)
    assert f"a step of 4 packed rows of 120 tokens: {recipe.train.batch_size} examples here, about as many" in said
    gone, _, said = bring(AXOLOTL + "sample_packing: true\n", base=base, rows="people/set")
    assert gone.train.batch_size == 4 and "4 examples here: raise it" in said
    assert gone.data.eval == 0.1 and gone.schedule.warmup == 0.25 and gone.data.train[0].path == "people/set"
    write_factory_data(tmp_path, rows)
    packed, _, said = bring(FACTORY + "packing: true\nfp16: true\n", base=base)
    assert packed.train.batch_size == pytest.approx(8 * 120 / mean, rel=0.25)
    assert "examples here, about as many; val_size is of packed rows there" in said and "fp16: true: float16" in said


CHANGES: list[tuple[str, str, str, Any]] = [  # of Axolotl's, or of LLaMA-Factory's: what is said, our key, its value
    ("A", "train_on_inputs: true", "chat.supervise", "everything"),
    ("A", "load_in_4bit: false", "model.quantization", "none"),
    ("A", "adapter: lora\nload_in_4bit: false\nload_in_8bit: true", "model.quantization", "none"),
    ("A", "excess_length_strategy: truncate", "data.overlong", "truncate"),
    ("A", "excess_length_strategy: raise", "data.overlong", "error"),
    ("A", "optimizer: adamw_bnb_8bit", "optimizer.name", "adamw8bit"),
    ("A", "optimizer: paged_adamw_32bit", "optimizer.name", "adamw"),
    ("A", "optimizer: lion_8bit", "optimizer.name", "adamw"),
    ("A", "lr_scheduler: constant_with_warmup", "schedule.name", "constant"),
    ("A", "lr_scheduler: constant_with_warmup", "schedule.warmup", 3),
    ("A", "lr_scheduler: constant", "schedule.warmup", 0),
    ("A", "cosine_min_lr_ratio: 0.2", "schedule.min_ratio", 0.2),
    ("A", "warmup_steps: 5", "schedule.warmup", 5),
    ("A", "warmup_ratio: 0.1", "schedule.warmup", 2),  # int(1.2) is 1, of which Axolotl makes 2
    ("A", "warmup_ratio:", "schedule.warmup", 0),  # int(0.03 x 12)
    ("A", "max_steps: 7", "train.steps", 7),
    ("A", "adam_beta2: 0.95", "optimizer.betas", (0.9, 0.95)),
    ("A", "lora_target_linear: false\nlora_target_modules: [q_proj, v_proj]", "adapter.targets", ("q_proj", "v_proj")),
    ("A", "peft_use_rslora: true", "adapter.rslora", True),
    ("A", "val_set_size: 0", "data.eval", None),
    ("A", "val_set_size: 4", "data.eval", 4 / 26),
    ("A", "evals_per_epoch: 2", "run.eval_every", 3),  # a quarter of 12 steps
    ("A", "eval_steps: 5", "run.eval_every", 5),
    ("A", "eval_steps: 0.2", "run.eval_every", 3),  # 2.4, rounded up
    ("A", "save_steps: 9", "run.save_every", 9),
    ("A", "saves_per_epoch: 3", "run.save_every", 2),
    ("A", "save_strategy: 'no'", "run.save_every", None),
    ("A", "chat_template: chatml", "chat.template", "chatml"),
    ("A", "chat_template: gemma", "chat.template", None),
    ("A", "fp16: true", "model.dtype", "auto"),  # what trains: float16 is listed
    ("A", "bf16: true\nfp16: false", "model.dtype", "auto"),
    ("A", "bf16: true\nfp16: true", "model.dtype", "auto"),  # resolve_dtype: bf16 turns fp16 off
    ("A", "bf16: false\nload_in_8bit: true", "model.dtype", "auto"),  # float16 there
    ("A", "bf16: false", "model.dtype", "float32"),
    ("A", "bf16: false\nfp16: true", "model.dtype", "auto"),
    ("A", "excess_length_strategy: truncate", "data.max_dropped", 0.05),
    ("A", "num_epochs: 2", "data.max_dropped", 1.0),
    ("A", "num_epochs: 2", "train.steps", 12),  # ceil(23 x 2 / 4)
    ("A", "num_epochs: 3", "train.steps", 18),  # ceil(17.25): an epoch at a time it would be 18 as well
    ("A", "num_epochs: 4", "train.steps", 23),  # and here 24
    ("A", "num_epochs: 4\nwarmup_ratio: 0.25", "schedule.warmup", 5),  # int(5.75)
    ("A", "num_epochs: 4\nevals_per_epoch: 1", "run.eval_every", 6),  # ceil(23 / 4)
    ("A", "num_epochs: 4\nsample_packing: true", "train.steps", None),
    ("A", "max_steps: -1", "train.steps", 12),
    ("A", "warmup_steps: 1", "schedule.warmup", 2),  # as Axolotl makes of 1
    ("A", "warmup_ratio:\nwarmup_steps: 0", "schedule.warmup", 0),
    ("A", "warmup_ratio: 0", "schedule.warmup", 0),
    ("A", "wandb_project: mine", "run.trackers", ("wandb",)),
    ("A", "use_wandb: false", "run.trackers", ()),
    ("A", "default_system_message: Be exact.", "chat.system", "Be exact."),
    ("A", "val_set_size: 0\nearly_stopping_patience: 3", "run.patience", None),
    ("A", "early_stopping_patience: 3", "run.patience", None),
    ("A", "early_stopping_patience: 3\neval_steps: 5", "run.patience", 3),
    ("A", "save_steps: 500", "run.save_every", 500),
    ("F", "quantization_bit: 8", "model.quantization", "none"),
    ("F", "quantization_bit:", "model.quantization", "none"),
    ("F", "lora_rank: 32", "adapter.alpha", 64),
    ("F", "lora_target: q_proj,v_proj", "adapter.targets", ("q_proj", "v_proj")),
    ("F", "mask_history: true", "chat.supervise", "last"),
    ("F", "train_on_prompt: true", "chat.supervise", "everything"),
    ("F", "lr_scheduler_type: cosine", "schedule.name", "cosine"),
    ("F", "warmup_steps: 0\nwarmup_ratio: 0.1", "schedule.warmup", 2),  # 1.2, rounded up
    ("F", "warmup_steps: 0.1", "schedule.warmup", 2),  # of 12, rounded up
    ("F", "fp16: true\nbf16: false", "model.dtype", "auto"),
    ("F", "val_size: 0.1", "data.eval", 3 / 26),
    ("F", "val_size: 5\neval_strategy: steps\neval_steps: 2", "run.eval_every", 2),
    ("F", "val_size: 5\neval_strategy: epoch", "run.eval_every", 3),  # 21 rows in batches of 8
    ("F", "val_size: 0.1", "run.eval_every", None),
    ("F", "max_samples: 13", "data.train", 0.5),
    ("F", "max_samples: 13", "train.steps", 6),  # 2 an epoch
    ("F", "max_samples: 13\nval_size: 0.2", "data.eval", 3 / 26),  # 2.6, rounded up
    ("F", "max_samples: 13\nval_size: 0.2", "data.train", 10 / 23),
    ("F", "max_samples: 100", "data.train", 1.0),
    ("F", "max_steps: -1", "train.steps", None),
    ("F", "report_to: [wandb]", "run.trackers", ("wandb",)),
    ("F", "report_to: [tensorboard, wandb]", "run.trackers", ("wandb", "tensorboard")),
    ("F", "report_to: none", "run.trackers", ()),
    ("F", "use_dora: true", "adapter.dora", True),
    ("F", "learning_rate: 3.0e-4", "optimizer.learning_rate", 3e-4),
]


@pytest.mark.parametrize(("tool", "lines", "key", "value"), CHANGES, ids=[f"{a}-{b}-{c}" for a, b, c, _ in CHANGES])
def test_what_each_key_becomes(
    bring: Callable[..., tuple[Recipe, str, str]], base: Path, rows: Path, tmp_path: Path, tool: str, lines: str,
    key: str, value: Any,
) -> None:  # fmt: skip
    write_factory_data(tmp_path, rows)
    changed = {line.partition(":")[0] for line in lines.splitlines()}
    text = (AXOLOTL if tool == "A" else FACTORY).format(base=base, rows=rows)
    kept = [line for line in text.splitlines() if line.partition(":")[0] not in changed]
    recipe, _, _ = bring("\n".join([*kept, lines]))
    if key == "adapter.targets":  # as the schema for editors has it
        assert f"targets: {json.dumps(value)}" in (tmp_path / "config-lorasft.yaml").read_text(encoding="utf-8")
    section, name = key.split(".")
    found = getattr(getattr(recipe, section), name)
    assert (found[0].share if key == "data.train" else found) == (
        pytest.approx(value) if isinstance(value, float) else value
    )


DATASETS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # of Axolotl -> a row, and the source
    ("{path: x.jsonl, type: alpaca}", {"instruction": "Q", "output": "A"}, {"format": "alpaca"}),
    ("{path: x.jsonl, type: 'alpaca_w_system.load_open_orca'}", {"instruction": "Q", "output": "A"},
     {"format": "alpaca"}),
    ("{path: x.jsonl, type: sharegpt}",
     {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, {"format": "sharegpt"}),
    ("{path: x.jsonl, type: chat_template, field_messages: chat}",
     {"chat": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
     {"format": "chat", "columns": {"messages": "chat"}}),
    ("{path: x.jsonl, type: chat_template, message_property_mappings: {role: from, content: value}}",
     {"messages": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
     {"format": "sharegpt", "columns": {"conversations": "messages"}}),
    ("{path: json, data_files: x.jsonl, ds_type: json, type: completion, field: body}", {"body": "text"},
     {"format": "text", "columns": {"text": "body"}}),
    ("{path: x.jsonl, type: {field_instruction: ask, field_output: reply, format: '{instruction}'}}",
     {"ask": "Q", "reply": "A"}, {"format": "alpaca", "columns": {"instruction": "ask", "output": "reply"}}),
    ("{path: x.jsonl, type: gpteacher}", {"question": "Q", "answer": "A"}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "row", "source"), DATASETS, ids=[entry for entry, _, _ in DATASETS])
def test_axolotls_types_of_data(
    bring: Callable[..., tuple[Recipe, str, str]], base: Path, tmp_path: Path, cli: Command, entry: str,
    row: dict[str, Any], source: dict[str, Any],
) -> None:  # fmt: skip
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row | {"n": n}) + "\n" for n in range(10)), encoding="utf-8")
    text = AXOLOTL.format(base=base, rows="@").replace("  - path: @\n    type: chat_template", f"  - {entry}")
    recipe, _, said = bring(text)
    (found,) = recipe.data.train
    expected = {"format": None, "columns": None} | source
    assert {"format": found.format, "columns": found.columns} == expected and Path(found.path).name == "x.jsonl"
    assert cli("preview", "config-lorasft.yaml", "data.eval=null").code == 0
    assert ("a text of its own around" in said) == ("type: alpaca" in entry.replace("'", ""))
    if "gpteacher" in entry:
        assert "type: gpteacher: its rows are read by their columns" in said
    if "format:" in entry:
        assert "datasets: format: Axolotl writes it around instruction and input" in said


def test_roles_split_and_files_of_axolotl(
    bring: Callable[..., tuple[Recipe, str, str]], base: Path, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "two.jsonl").write_bytes(rows.read_bytes())
    entry = f"[{rows}, two.jsonl]"
    text = AXOLOTL.format(base=base, rows="json").replace(
        "type: chat",
        f"data_files: {entry}\n    split: test\n    shards: 3\n    roles_to_train: [user, assistant]\n    type: chat",
    )
    recipe, written, said = bring(text + f"test_datasets: [{{path: {rows}, type: chat_template}}]\n")
    assert [(Path(one.path).name, one.split) for one in recipe.data.train] == [
        (rows.name, "test"),
        ("two.jsonl", "test"),
    ]
    assert recipe.chat.supervise == "everything" and isinstance(recipe.data.eval, tuple)
    assert [one.share for one in recipe.data.train] == pytest.approx([1 / 3] * 2, abs=0.02)
    assert "datasets: shards: the same rows in each epoch there" in said
    assert "eval: [{" in written and "]  # test_datasets" in written


def test_counts_are_of_the_rows_that_are_taken(
    bring: Callable[..., tuple[Recipe, str, str]], base: Path, tmp_path: Path, cli: Command
) -> None:
    """130 of 260 rows (100 of 200, 30 of 60); 0.1 held out: 13. 117 in batches of 8: 15 steps, three times; the warm-up
    is 4.5 steps, rounded up."""
    for name, count in (("a", 200), ("b", 60)):
        rows = [{"instruction": f"{name} {number}", "output": f"{number}"} for number in range(count)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    info = {"a": {"file_name": "a.json"}, "b": {"file_name": "b.json", "num_samples": 30}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    text = FACTORY.replace("dataset: own", "dataset: a,b\ndataset_dir: .\nmax_samples: 100\nval_size: 0.1")
    text = text.replace("per_device_train_batch_size: 4", "per_device_train_batch_size: 1")
    text = text.replace("gradient_accumulation_steps: 2", "gradient_accumulation_steps: 8")
    text = text.replace("warmup_steps: 2", "warmup_ratio: 0.1\nsave_strategy: epoch\neval_strategy: epoch")
    recipe, _, said = bring(text, base=base)
    assert (recipe.train.steps, recipe.train.epochs, recipe.schedule.warmup) == (45, 3.0, 5)
    assert (recipe.run.save_every, recipe.run.eval_every, recipe.train.batch_size) == (15, 15, 8)
    assert "max_samples: the same rows in each epoch there; here a share" in said
    seen = cli("preview", "config-lorasft.yaml").out
    assert "13 held out examples" in seen
    taken = [int(number) for number in re.findall(r"(\d+) \(of \d+\) of [ab]\.json", seen)]
    assert len(taken) == 2 and abs(sum(taken) - 117) <= 1 and abs(taken[0] - 90) <= 3
    held_out = "dataset: a,b\neval_dataset: b\n"
    recipe, written, _ = bring(text.replace("val_size: 0.1", "").replace("dataset: a,b\n", held_out), base=base)
    assert isinstance(recipe.data.eval, tuple) and recipe.data.eval[0].share == 1 and "]  # eval_dataset\n" in written
    assert recipe.train.steps == 51  # 130 rows: 17 steps an epoch


def test_nine_rows_in_axolotl_and_rows_that_are_too_long(
    bring: Callable[..., tuple[Recipe, str, str]], base: Path, tiny: Any, tmp_path: Path, cli: Command
) -> None:
    def write(long: int) -> None:
        rows = [{"instruction": f"say {number}", "output": "one two " * (500 if number < long else 2)}
                for number in range(9 + long)]  # fmt: skip
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    text = AXOLOTL.format(base=base, rows="x.jsonl").replace("chat_template", "alpaca")
    text = text.replace("num_epochs: 2", "num_epochs: 4").replace("micro_batch_size: 2", "micro_batch_size: 4")
    text = text.replace("val_set_size: 0.1", "").replace("warmup_ratio: 0.25", "warmup_ratio: 0.4")
    for long in (0, 6):  # what is too long is left out, and counts for nothing
        write(long)
        recipe, written, _ = bring(text)
        assert (recipe.train.steps, recipe.schedule.warmup) == (5, 2)  # ceil(9 x 4 / 8), int(2.0)
        assert (recipe.run.save_every, recipe.data.max_dropped) == (2, 1.0)
        assert "  steps: 5  # 9 rows x 4, as Axolotl rounds it\n" in written
    steps, _ = train(cli, "config-lorasft.yaml")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    recipe, _, _ = bring(text + "val_set_size: 0.3\n")
    assert recipe.data.eval == pytest.approx(3 / 9)  # 2.7 of those that are left
    packed, _, _ = bring(text + "sample_packing: true\n")
    texts = [f"say {number} one two one two " for number in range(6, 15)]  # 8 rows of 120 tokens hold so many of these
    mean = sum(len(tiny(one).input_ids) + 2 * FRAME for one in texts) / 9
    assert packed.train.batch_size == pytest.approx(8 * 120 / mean, rel=0.15) and packed.train.batch_size > 9
    (tmp_path / "x.jsonl").write_text(json.dumps({"instruction": "say", "output": "one two " * 12}) + "\n" * 2)
    full, _, _ = bring(
        text.replace("sequence_len: 120", "sequence_len: 8\nsample_packing: true\nexcess_length_strategy: truncate")
    )
    assert full.train.batch_size == 8  # each of 8 packed rows is one that is cut


def test_what_cannot_be_counted_or_is_meant_otherwise_is_listed(
    bring: Callable[..., tuple[Recipe, str, str]], base: Path, tmp_path: Path
) -> None:
    text = AXOLOTL + "saves_per_epoch: 1\nevals_per_epoch: 4\nhub_model_id: me/it\nspecial_tokens: {{pad_token: x}}\n"
    text += "deepspeed: zero3.json\nearly_stopping_patience: 3\n"
    entry = "people/set\n    train_on_eos: last\n    roles_to_train: [user, assistant]\n    shards: 4"
    recipe, _, said = bring(text, base=base, rows=entry)
    assert (recipe.run.save_every, recipe.run.eval_every, recipe.run.patience) == (None, None, None)
    assert recipe.data.train[0].share == 0.25 and recipe.chat.supervise == "everything"
    for line in (
        "rows that are not here: cannot be counted",
        "train_on_eos: last: only the last end of a turn",
        "roles_to_train: chat.supervise=everything is of all data sets",
        "early_stopping_patience: nothing is evaluated on the way",
        "hub_model_id: lorasft push uploads",
        "special_tokens: the tokenizer's own",
        "deepspeed: each process holds the whole base",
    ):
        assert f"not as in config.yml: {line}" in said, line
    for prompts, system in ((("Be exact.", "Be exact."), "Be exact."), (("Be exact.", "Be kind."), None)):
        sets = ", ".join(f"{{path: p/x, type: {{system_prompt: {one}, field_output: answer}}}}" for one in prompts)
        plain = f"base_model: {base}\nadapter: lora\nlearning_rate: 1e-4\ndatasets: [{sets}]\n"
        recipe, _, said = bring(plain)
        assert recipe.chat.system == system and ("system_prompt: chat.system is of all" in said) == (system is None)


def test_what_dataset_info_says(
    bring: Callable[..., tuple[Recipe, str, str]], base: Path, rows: Path, tmp_path: Path
) -> None:
    write_factory_data(tmp_path, rows)
    info = {
        "pairs": {"file_name": "p.json",
                  "columns": {"prompt": "ask", "query": "more", "response": "reply", "system": "sys"}},
        "online": {"hf_hub_url": "people/set", "subset": "en", "split": "validation"},
        "own": {"file_name": "own.json", "formatting": "sharegpt", "columns": {"messages": "turns", "tools": "kit"},
                "num_samples": 13},
    }  # fmt: skip
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    recipe, _, said = bring(
        FACTORY.replace("dataset: own", "dataset: pairs, online ,own\neval_dataset: own"), base=base
    )
    pairs, online, own = recipe.data.train
    assert (pairs.format, pairs.columns) == (
        "alpaca", {"instruction": "ask", "input": "more", "output": "reply", "system": "sys"})  # fmt: skip
    assert (online.path, online.config, online.split, online.format) == ("people/set", "en", "validation", "alpaca")
    assert own.columns == {"conversations": "turns", "tools": "kit"} and own.path == str(tmp_path / "data/own.json")
    assert isinstance(recipe.data.eval, tuple) and recipe.data.eval[0].path == own.path
    assert "a line break between instruction and input" in said


def test_a_config_below_its_data_finds_it(
    cli: Command, base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in LLaMA-Factory's own examples/train_qlora, run from elsewhere."""
    write_factory_data(tmp_path, rows)
    (tmp_path / "examples/train").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "examples/train/c.yaml").write_text(FACTORY.format(base=base), encoding="utf-8")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli("recipes", "import", "../examples/train/c.yaml", "deep/r.yaml").code == 0
    assert load_recipe("deep/r.yaml").data.train[0].path == str(tmp_path / "data/own.json")


REFUSED: list[tuple[str, int, list[str]]] = [
    ("model: {base: x}\n", 2, ["neither Axolotl nor LLaMA-Factory", "model_name_or_path"]),
    ("base_model: a\nmodel_name_or_path: b\n", 2, ["both Axolotl and LLaMA-Factory"]),
    ("- 1\n", 2, ["neither"]),
    ("base_model: a\ndatasets: [{path: x}]\n", 2, ["adapter is not said", "LoRA adapters on answers"]),
    ("base_model: a\nadapter: qlora\nrl: dpo\n", 2, ["config.yml:3", "rl: dpo cannot be imported"]),
    ("model_name_or_path: a\nstage: dpo\n", 2, ["config.yml:2", "stage: dpo"]),
    ("model_name_or_path: a\nfinetuning_type: full\n", 2, ["finetuning_type: full"]),
    ("model_name_or_path: a\ndataset: gone\n", 3, ["dataset_info.json", "gone", "dataset_dir names the folder"]),
    (
        "base_model: a\nadapter: qlora\nlearning_rate: 0.5\ndatasets: [{path: x/y}]\n",
        2,
        ["config.yml: learning_rate\n"],
    ),
    (
        "base_model: a\nadapter: qlora\nlearning_rate: fast\ndatasets: [{path: x/y}]\n",
        2,
        ["config.yml: learning_rate\n"],
    ),
    (
        "base_model: a\nadapter: qlora\nval_set_size: 0.7\ndatasets: [{path: x/y}]\n",
        2,
        ["config.yml: val_set_size\n"],
    ),
    ("base_model: a\nadapter: qlora\nlearning_rate: 1e-4\n", 2, ["datasets", "a list of mappings, each with a path"]),
    ("base_model: a\nadapter: qlora\ndatasets: 3\n", 2, ["config.yml", "a list of mappings, each with a path"]),
    ("base_model: a\nadapter: qlora\ndatasets: foo\n", 2, ["config.yml", "a list of mappings, each with a path"]),
    ("base_model: a\nadapter: qlora\ndatasets: [{type: x}]\n", 2, ["config.yml", "each with a path"]),
    ("base_model: a\nadapter: qlora\nnum_epochs: many\n", 2, ["config.yml:3", "num_epochs: many", "a number"]),
    (
        "base_model: a\nadapter: qlora\nmicro_batch_size: 0\n",
        2,
        ["config.yml:3", "micro_batch_size: 0", "a number above 0"],
    ),
    ("model_name_or_path: a\n", 2, ["dataset", "names in dataset_info.json"]),
    ("base_model: !x a\n", 8, ["tags"]),
]


@pytest.mark.parametrize(("text", "code", "said"), REFUSED, ids=[text for text, _, _ in REFUSED])
def test_what_cannot_be_a_recipe_is_refused(
    tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch, text: str, code: int, said: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yml").write_text(text, encoding="utf-8")
    done = cli("recipes", "import", "config.yml", "to.yaml")
    assert done.code == code and all(words in done.err for words in said), done.err
    assert "to.yaml" not in done.err and "None" not in done.err and "Error(" not in done.err
    assert not (tmp_path / "to.yaml").exists()


def test_pairs_and_an_existing_file_are_refused(
    bring: Callable[..., tuple[Recipe, str, str]], cli: Command, base: Path, rows: Path, tmp_path: Path
) -> None:
    write_factory_data(tmp_path, rows)
    bring(FACTORY, base=base)
    done = cli("recipes", "import", "config.yml")
    assert done.code == 2 and "this exists already" in done.err
    assert cli("recipes", "import", "gone.yml", "new.yaml").code == 2 and cli("recipes", "import").code == 2
    write_factory_data(tmp_path, rows, ranking=True)
    done = cli("recipes", "import", "config.yml", "new.yaml")
    assert done.code == 2 and "pairs of a better and a worse answer" in done.err


def test_a_step_can_have_the_rate_of_the_one_before() -> None:
    """As get_linear_schedule_with_warmup and get_cosine_schedule_with_warmup of transformers give it."""
    import torch
    from transformers import get_scheduler

    from lorasft.recipe import ScheduleSettings
    from lorasft.training.optimizer import learning_rate

    for name, warmup, steps in (("linear", 3, 10), ("cosine", 0, 7), ("cosine", 2, 9), ("constant", 0, 4)):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        schedule = ScheduleSettings(name=name, warmup=warmup, min_ratio=0.0, delay=1)  # type: ignore[arg-type]
        for step in range(1, steps + 1):
            ours = learning_rate(step, steps=steps, peak=1e-3, schedule=schedule)
            assert math.isclose(ours, theirs.get_last_lr()[0], rel_tol=1e-12, abs_tol=1e-15), (name, step)
            optimizer.step()
            theirs.step()


assert ROWS == 26  # the numbers above are of these rows
