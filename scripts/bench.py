"""What things cost, on the CPU: python scripts/bench.py NAME [options] [--write]

    train    beside the peers: TRL's SFTTrainer, and transformers' Trainer with PEFT and bitsandbytes
    flat     whether a supervised token costs the same with many rows, and with long ones
    prefix   steps with shared prefixes against the same without
    hybrid   steps of models with recurrent mixers, several sequences in a row, against one at a time
    head     the head and its loss against transformers' own
    experts  a mixture of experts in 4 bit against transformers' in 16
    memory   what `lorasft plan` predicts, of bytes and of speed, against what comes
    start    whole commands, and a base in 4 bit until its first forward pass
    merge    a merge against PEFT's, and against copying the same bytes
    data     preparing rows, beside TRL's preparation

Each figure is taken in a process of its own, the arms in turn, `--rounds` times; printed are medians. Models have
random weights. `--write` puts the tables into docs/benchmarks.md, with the machine and the cores that other processes
used. `python scripts/bench.py NAME --help` tells more.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib
import importlib.metadata
import itertools
import json
import os
import pty
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import truediv
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
TRL = "1.16.0"
WARMUP = 2  # steps: the first ones page the weights in
LATE = ("bitsandbytes", "transformers.models.llama.modeling_llama", "peft.tuners.lora.bnb")  # imported on first use
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
SMALL = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
TINY = {**SMALL, "intermediate_size": 1408, "vocab_size": 32000, "max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, int]] = {
    "tiny": TINY,
    "tiny-152k": TINY | {"vocab_size": 151936},
    "m350": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16,
             "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip
Measured = dict[str, Any]


# ---- shared: processes of their own, memory, tables ------------------------------------------------------------------


@dataclass
class Bench:
    """A benchmark under way in a temporary `folder`; `busiest`: cores that other processes used in the worst run."""

    options: argparse.Namespace
    folder: Path
    busiest: float = 0.0

    def run(self, cell: Callable[..., Measured], python: str = sys.executable, **given: Any) -> Measured:
        """What `cell` measures in a process of its own."""
        measured, foreign = run_process(python, [__file__, "--cell", cell.__name__, json.dumps(given)])
        self.busiest = max(self.busiest, foreign)
        return measured

    def rounds(self, arms: Mapping[str, Callable[[], Measured]]) -> dict[str, list[Measured]]:
        """Every arm in turn, `--rounds` times."""
        found: dict[str, list[Measured]] = {name: [] for name in arms}
        for number in range(self.options.rounds):
            for name, run in arms.items():
                started, busy, own = time.perf_counter(), _busy_seconds(), _children_seconds()
                found[name].append(run())
                foreign = (_busy_seconds() - busy) - (_children_seconds() - own)
                self.busiest = max(self.busiest, foreign / (time.perf_counter() - started))
                print(f"round {number + 1}  {name}", file=sys.stderr, flush=True)
        return found

    def medians(self, arms: Mapping[str, Callable[[], Measured]]) -> dict[str, Measured]:
        return {
            name: {key: median(one[key] for one in many) for key in many[0]} for name, many in self.rounds(arms).items()
        }

    def show(self, title: str, head: Sequence[str], lines: Iterable[Sequence[str]], more: Sequence[str] = ()) -> None:
        """Print a table; put it into the page where asked."""
        text = table(head, lines)
        print(f"{title}\n\n{text}", flush=True)
        if self.options.write:
            write_section(title, text, busiest=self.busiest, more=more)


def run_process(python: str, arguments: list[str]) -> tuple[Measured, float]:
    """The JSON line that a process of its own prints last, and how many cores other processes kept busy meanwhile."""
    # As the command line sets it: long spinning makes the figures of a busy machine meaningless.
    quiet = {
        "GOMP_SPINCOUNT": "10000",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    started, busy, own = time.perf_counter(), _busy_seconds(), _children_seconds()
    done = subprocess.run([python, *arguments], capture_output=True, text=True, env={**os.environ, **quiet})
    if done.returncode:
        raise SystemExit(f"{shlex.join(arguments)} failed:\n{done.stderr[-4000:]}")
    foreign = (_busy_seconds() - busy) - (_children_seconds() - own)
    return json.loads(done.stdout.splitlines()[-1]), max(0.0, foreign) / (time.perf_counter() - started)


def _busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used."""
    user, nice, system = Path("/proc/stat").read_text(encoding="ascii").split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def settle() -> int:
    """The bytes that this process holds after its imports; its peak is counted anew where the kernel lets it."""
    for name in LATE:
        importlib.import_module(name)
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS")


def status(name: str) -> int:
    """A size in bytes by its name in proc/self/status; VmHWM is the peak since `settle`."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextlib.contextmanager
def watch_anonymous() -> Iterator[list[int]]:
    """The last of the numbers is the most bytes above the start that no file backs, sampled every 5 ms."""
    start, most, done = status("RssAnon"), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most.append(max(most[-1], status("RssAnon") - start))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A markdown table, its columns aligned for a terminal; all but the first to the right."""
    cells = [list(head), *map(list, lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    cells.insert(1, rule)
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def write_section(title: str, text: str, *, busiest: float, more: Sequence[str] = ()) -> None:
    """Replace or append the section `title` of the page: `text`, and what made it, without this machine's paths."""
    words = [Path(word).name if Path(word).is_absolute() or Path(word).exists() else word for word in sys.argv[1:]]
    versions = ", ".join([*(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES), *more])
    machine = f"{datetime.date.today()}, {os.cpu_count()} cores, {_cpu()}, others on {busiest:.1f} cores at most"
    made = f"{machine};\n{versions}:\n`{shlex.join(['python', 'scripts/bench.py', *words])}`"
    head, *sections = PAGE.read_text(encoding="utf-8").rstrip("\n").split("\n\n## ")
    found = dict(section.split("\n", 1) for section in sections) | {title: f"\n{text}\n{made}"}
    parts = [head, *(f"## {name}\n{body}" for name, body in found.items())]
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _cpu() -> str:
    """The processor's name, and what it multiplies bf16 with."""
    facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.partition(":")[2].strip() for line in facts.splitlines() if line.startswith("model name")]
    return " ".join([names[0] if names else "unknown", *(one for one in ("amx_bf16", "avx512_bf16") if one in facts)])


# ---- shared: bases, recipes, steps ----------------------------------------------------------------------------------


def save_base(folder: Path, sizes: dict[str, Any], tokenizer: Path | None, *, config: str = "LlamaConfig") -> str:
    """A random model of a config class of transformers in bf16, with the files of a tokenizer beside it."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="900MB")
    for file in tokenizer.iterdir() if tokenizer else ():
        if file.name.startswith(("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges")):
            shutil.copyfile(file, folder / file.name)
    return str(folder)


def make_recipe(base: str, rows: str, **sections: Any) -> Any:
    """A recipe without held-out rows, into a folder of its own beside the base."""
    from lorasft.recipe import Recipe

    output = tempfile.mkdtemp(dir=Path(base).parent)
    fixed = {
        "model": {"base": base, "dtype": "bfloat16"},
        "data": {"train": [{"path": rows}], "eval": None},
        "schedule": {"name": "constant", "warmup": 0},
        "run": {"output": output, "eval_every": None},
    }
    merged = {name: {**fixed.get(name, {}), **sections.get(name, {})} for name in {**fixed, **sections}}
    return Recipe.model_validate_json(json.dumps(merged))


def time_step(run: Any, number: int) -> tuple[float, Any, float]:
    """Seconds of one step of a run, its cutting included; the step; its loss."""
    from lorasft.signals import StopRequest
    from lorasft.training.loop import take_step

    step = run.plan.step(number, run.rows)
    started = time.perf_counter()
    loss = take_step(run, number, StopRequest())["loss"]
    return time.perf_counter() - started, step, loss


# ---- train ----------------------------------------------------------------------------------------------------------


@dataclass
class Meter:
    """What an arm notes while it trains: one number a step in each list, and bytes of memory.

    Tokens are the rows' own, never padding; a step is all between two updates, loader included. Memory is the largest
    resident size from loading to the last step, above what the process held after its imports.
    """

    seconds: list[float] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    total: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: int = 0
    last: float = 0.0

    def count(self, supervised: int, total: int) -> None:
        """Tokens of the step that is under way."""
        if len(self.total) == len(self.seconds):
            self.supervised.append(0)
            self.total.append(0)
        self.supervised[-1] += supervised
        self.total[-1] += total

    def end_step(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now

    def rate(self, tokens: list[int]) -> float:
        """Tokens a second, the median over the steps after the warm-up."""
        return float(median(list(map(truediv, tokens, self.seconds))[WARMUP:]))


def train_arm(arm: str, **job: Any) -> Measured:
    """Import, settle, load and train."""
    meter = Meter()
    rest = settle()
    (train_ours if arm == "lorasft" else train_peer)(arm, job, meter)
    meter.memory = status("VmHWM") - rest
    return vars(meter)


def train_ours(arm: str, job: Measured, meter: Meter) -> None:
    from lorasft.training.run import open_run

    with open_run(train_recipe(job), resume=False) as (run, _):
        run.network.causal.train()
        meter.last = time.perf_counter()
        for number in range(1, job["steps"] + 1):
            _, step, loss = time_step(run, number)
            meter.losses.append(loss)
            sequences = [one for example in step.examples for one in run.rows.sequences(int(example))]
            meter.count(sum(int((one.labels != -100).sum()) for one in sequences), sum(map(len, sequences)))
            meter.end_step()


def train_recipe(job: Measured) -> Any:
    data = {"max_length": job["max_length"], "max_dropped": 0.5}
    return make_recipe(job["base"], job["data"], data=data, train={"batch_size": job["batch"], "steps": job["steps"]})


TRL_ARMS: dict[str, dict[str, Any]] = {
    "TRL": {},
    "TRL padding-free": {"padding_free": True, "max_length": None, "gradient_checkpointing": False},
    "TRL packing": {"packing": True, "gradient_checkpointing": False, "per_device_train_batch_size": 1},
}


def train_peer(arm: str, job: Measured, meter: Meter) -> None:
    """The same LoRA on the same base and rows, as transformers or TRL train it."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    base, peers_rows = job["base"], job["peer_rows"]
    arguments = {
        "output_dir": tempfile.mkdtemp(dir=Path(base).parent),
        "max_steps": job["steps"],
        "per_device_train_batch_size": peers_rows,
        "gradient_accumulation_steps": job["batch"] // peers_rows,
        "train_sampling_strategy": "sequential",
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        **{"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True},
    }
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    scheme = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=scheme, device_map={"": "cpu"}
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = Dataset.from_list(json.loads((Path(base).parent / "rows.json").read_text(encoding="utf-8")))
    torch.manual_seed(0)  # A is drawn next: the seed of lorasft, so that all start from the same adapter
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")
    if arm == "Trainer":
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        collator = DataCollatorForSeq2Seq(tokenizer)
        settings = TrainingArguments(**arguments, bf16=True)
        fit(Trainer(get_peft_model(model, lora), settings, train_dataset=rows, data_collator=collator), meter)
        return
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found,unused-ignore]

    best = TRL_ARMS[arm]
    if "packing" in best:
        best = best | {"max_length": job["pack"], "gradient_accumulation_steps": job["pack_bins"]}
    settings = SFTConfig(**arguments | best)
    fit(SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer, peft_config=lora), meter)


def fit(trainer: Any, meter: Meter) -> None:
    """Train a peer; its tokens are counted in what reaches the model, its losses are those that it logs."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.end_step()

    take_micro_step = trainer.training_step

    def counted(model: Any, inputs: dict[str, Any], *more: Any) -> Any:
        mask = inputs.get("attention_mask")
        total = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        meter.count(int((inputs["labels"] != -100).sum()), total)
        return take_micro_step(model, inputs, *more)

    trainer.training_step = counted
    trainer.add_callback(Clock())
    trainer.train()
    meter.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def make_job(options: argparse.Namespace, folder: Path) -> Measured:
    """Base and rows in `folder`, one sequence a row, in the order in which lorasft takes them."""

    from lorasft.data.packing import Portion
    from lorasft.data.prepare import prepare
    from lorasft.data.tokenizer import load_tokenizer
    from lorasft.training.inputs import make_plan

    base = save_base(folder / "base", SHAPES[options.shape], options.tokenizer)
    job = {name: getattr(options, name) for name in ("batch", "peer_rows", "steps", "max_length")}
    job |= {"base": base, "data": str(options.data.absolute()), "pack": max(1024, options.max_length)}
    recipe = train_recipe(job)
    store = prepare(recipe.data, recipe.chat, tokenizer=load_tokenizer(base), folder=folder / "tokens").train
    plan = make_plan(recipe, [Portion(len(store), 1.0)])
    supply = 3 * options.steps // 2  # packing needs more rows for as many steps
    if supply * options.batch > len(store):
        raise SystemExit(f"{len(store)} rows are too few: {supply * options.batch} are needed")
    rows = [store.sequences(int(row)) for step in range(1, supply + 1) for row in plan.step_examples(step)]
    if any(len(sequences) != 1 for sequences in rows):
        raise SystemExit("the peers train one sequence a row: use rows with one answer each")
    text = json.dumps([{"input_ids": one.ids.tolist(), "labels": one.labels.tolist()} for (one,) in rows])
    (folder / "rows.json").write_text(text, encoding="utf-8")
    return job | {"pack_bins": max(1, round(sum(len(one) for (one,) in rows) / supply / job["pack"]))}


def find_peers(venv: Path) -> str:
    """The python of the peers' environment, which is made where there is none."""
    python = str(venv.absolute() / "bin" / "python")
    asked = "import importlib.metadata as m; print(m.version('trl'))"
    if Path(python).exists():
        answer = subprocess.run([python, "-c", asked], capture_output=True, text=True).stdout.strip()
        if answer == TRL:
            return python
    print(f"installing TRL {TRL} into {venv} (once; torch is large)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    packages = ["torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", f"trl=={TRL}"]
    pinned = ["-c", str(ROOT / "constraints.txt")]  # torch among them: never another than ours
    subprocess.run([python, "-m", "pip", "install", "--quiet", *pinned, *packages], check=True)
    return python


def bench_train(bench: Bench) -> None:
    """All arms train the same LoRA (rank 16, alpha 32, all linears, AdamW) on the same NF4 base and the same token ids.

    lorasft as `lorasft train` does it, `machine: auto`; Trainer padded, bf16 autocast, no checkpointing; TRL as it
    comes: padded, activation checkpointing; padding-free: the rows of a batch side by side, no checkpointing; packing:
    bins of 1024 tokens (bfd), no checkpointing, other rows in a step, so its losses are not compared. Ratios are
    lorasft's to the arm's within a round.
    """
    options = bench.options
    job = make_job(options, bench.folder)
    arms = {name: partial(bench.run, train_arm, arm=name, **job) for name in ("lorasft", "Trainer")}
    if options.peers:
        python = find_peers(options.peers)
        arms |= {name: partial(bench.run, train_arm, python, arm=name, **job) for name in TRL_ARMS}
    found = {name: [Meter(**one) for one in many] for name, many in bench.rounds(arms).items()}
    ours, lines = found["lorasft"], []
    for name, rounds in found.items():
        faster = [mine.rate(mine.supervised) / one.rate(one.supervised) for mine, one in zip(ours, rounds, strict=True)]
        losses, same = rounds[0].losses, rounds[0].supervised == ours[0].supervised
        off = max(abs(loss - mine) for loss, mine in zip(losses, ours[0].losses, strict=True))
        lines.append(
            [
                name,
                f"{median(one.rate(one.supervised) for one in rounds):,.0f}",
                f"{median(one.rate(one.total) for one in rounds):,.0f}",
                f"{median(one.memory for one in rounds) / 1e6:,.0f}",
                f"{losses[0]:.3f} {losses[-1]:.3f}",
                f"{off:.3f}" if same else "other rows",
                spread(faster),
                f"{median(mine.memory / one.memory for mine, one in zip(ours, rounds, strict=True)):.2f}x",
            ]
        )
    head = ["arm", "supervised tok/s", "all tok/s", "MB", "loss, first and last step", "off", "speed", "memory"]
    bench.show(f"Training, {options.shape}", head, lines, [f"trl {TRL}"] if options.peers else [])


def spread(ratios: Sequence[float]) -> str:
    return f"{median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


# ---- flat -----------------------------------------------------------------------------------------------------------

STEP_TOKENS, LONGEST = 4096, 2048


def flat_case(base: str, file: str, length: int, steps: int) -> Measured:
    """Prepare, plan and train rows of `length` tokens; seconds, tokens and bytes by name."""
    from torch.profiler import ProfilerActivity, profile

    from lorasft.data.prepare import prepare
    from lorasft.data.tokenizer import load_tokenizer
    from lorasft.training.run import open_run

    rest = settle()
    train = {"batch_size": STEP_TOKENS // length, "steps": steps + 1}
    recipe = make_recipe(base, file, data={"max_length": LONGEST}, chat={"template": "none"}, train=train)
    tokenizer, folder = load_tokenizer(base), Path(tempfile.mkdtemp(dir=Path(base).parent))
    started = time.perf_counter()
    report = prepare(recipe.data, recipe.chat, tokenizer=tokenizer, folder=folder / "tokens").report
    prepared = time.perf_counter() - started
    with open_run(recipe, resume=False) as (run, _):
        run.network.causal.train()
        started = time.perf_counter()
        run.plan.step(1, run.rows)
        planned = time.perf_counter() - started
        taken = [time_step(run, number) for number in range(1, steps + 1)]
        memory = status("VmHWM") - rest
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            seconds, _, _ = time_step(run, run.plan.steps)
        kernels = [event for event in watched.key_averages() if "scaled_dot_product" in event.key]
    return {
        "cost": median([seconds / int(step.supervised_tokens) for seconds, step, _ in taken][WARMUP:]),
        "memory": memory,
        "attention": sum(event.self_cpu_time_total for event in kernels) / 1e6 / seconds,
        "prepare": prepared / report.supervised_tokens,
        "plan": planned,
        "tokens": report.tokens / report.train_examples,
    }


def write_words(file: Path, words: list[str], *, rows: int, length: int) -> str:
    """Rows of random words, each one token; half of them prompt. A few are left for what begins and ends a row."""
    rng = random.Random(length)
    with open(file, "w", encoding="utf-8") as stream:
        for _ in range(rows):
            prompt, completion = (" ".join(rng.choices(words, k=length // 2 - 2)) for _ in range(2))
            stream.write(json.dumps({"prompt": prompt, "completion": f" {completion}"}) + "\n")
    return str(file)


def bench_flat(bench: Bench) -> None:
    """Synthetic rows of one length, half of whose tokens are supervised, through the real preparation, plan and step.

    rows: 1 to 100 thousand rows of 128 tokens. length: 64 to 2048 tokens a row, as many tokens a step; attention grows
    with the length by its nature, so its time (of the kernels, by torch's profiler) is shown and the rest compared.
    `cost` is microseconds per supervised token.
    """
    from lorasft.data.tokenizer import load_tokenizer

    options = bench.options
    base = save_base(bench.folder / "base", SHAPES[options.shape], options.tokenizer)
    tokens = load_tokenizer(base).get_vocab()
    words = sorted(token[1:] for token in tokens if token[0] in "Ġ▁" and token[1:].isascii() and token[1:].isalpha())
    cases = {
        "rows": [(count, 128) for count in (1_000, 10_000, 100_000)],
        "length": [(1_000, length) for length in (64, 128, 256, 512, 1024, LONGEST)],
    }
    for name in [options.only] if options.only else cases:
        arms = {}
        for rows, length in cases[name]:
            file = write_words(bench.folder / f"{rows}-{length}.jsonl", words, rows=rows, length=length)
            case = {"base": base, "file": file, "length": length, "steps": options.steps}
            arms[f"{rows:,} of {length}"] = partial(bench.run, flat_case, **case)
        found = bench.medians(arms)
        first = next(iter(found.values()))
        for one in found.values():
            one["rest"] = one["cost"] * (1 - one["attention"])
        if name == "rows":
            head = ["rows", "prepare, us", "plan an epoch, ms", "cost, us", "to first", "MB"]
            lines = [
                [
                    label.split()[0],
                    f"{one['prepare'] * 1e6:.2f}",
                    f"{one['plan'] * 1e3:.1f}",
                    f"{one['cost'] * 1e6:,.0f}",
                    f"{one['cost'] / first['cost']:.2f}",
                    f"{one['memory'] / 1e6:,.0f}",
                ]
                for label, one in found.items()
            ]
        else:
            head = ["tokens a row", "cost, us", "attention", "cost of the rest, us", "rest to first", "MB"]
            lines = [
                [
                    f"{one['tokens']:,.0f}",
                    f"{one['cost'] * 1e6:,.0f}",
                    f"{one['attention']:.0%}",
                    f"{one['rest'] * 1e6:,.0f}",
                    f"{one['rest'] / first['rest']:.2f}",
                    f"{one['memory'] / 1e6:,.0f}",
                ]
                for one in found.values()
            ]
        bench.show(f"Cost by {name}, {options.shape}", head, lines)


# ---- prefix ---------------------------------------------------------------------------------------------------------


def prefix_steps(base: str, stem: int, answer: int, batch: int, steps: int, tokens: int) -> Measured:
    """Both ways train one adapter in one process, step about; seconds and tokens of each step, first alone."""
    import numpy as np

    from lorasft.data.packing import Plan
    from lorasft.data.store import Tokens
    from lorasft.training.layout import widen

    network, optimizer = load_network(base)
    draw, vocabulary = np.random.default_rng(0), network.causal.config.get_text_config().vocab_size
    shared, sequences = draw.integers(0, vocabulary, stem), []
    for length in draw.integers(answer // 2, answer * 3 // 2 + 1, 4 * batch):
        ids = np.concatenate([shared, draw.integers(0, vocabulary, length)]).astype(np.int32)
        labels = np.where(np.arange(len(ids)) < max(1, stem), -100, ids).astype(np.int32)
        sequences.append(Tokens(ids, labels))
    rows: Any = SimpleNamespace(sequences=lambda index: (sequences[index],))
    alone = Plan(len(sequences), batch, steps, 0, "token", tokens)
    if network.mixer:
        return time_plans(network, optimizer, [replace(alone, micro_batch_tokens=1), alone], rows)
    together = replace(alone, share_prefixes=True)
    plans = [alone, replace(together, micro_batch_tokens=widen(together, rows))]
    return time_plans(network, optimizer, plans, rows)


def load_network(base: str) -> tuple[Any, Any]:
    """The verified network of a base in 4 bit with a new adapter, and an optimizer of it."""
    import torch
    from accelerate import PartialState

    from lorasft.model.adapter import attach_adapter, trainable
    from lorasft.model.base import load_base
    from lorasft.model.selfcheck import verify
    from lorasft.recipe import AdapterSettings, ModelSettings

    model = attach_adapter(load_base(ModelSettings(base=base), PartialState().device), AdapterSettings(), seed=0)
    network = verify(model.get_base_model())
    network.causal.train()
    return network, torch.optim.AdamW(trainable(model).values(), lr=2e-4)


def time_plans(network: Any, optimizer: Any, plans: Sequence[Any], rows: Any) -> Measured:
    """Seconds and tokens of each step by each plan, step about."""
    import torch

    from lorasft.model.loss import pair_losses

    seconds: list[list[float]] = [[], []]
    computed: list[list[int]] = [[], []]
    for number in range(1, plans[0].steps + 2):
        for arm, plan in enumerate(plans):
            started = time.perf_counter()
            step = plan.step(number, rows)
            for micro_batch in step.micro_batches:
                weights = torch.as_tensor(micro_batch.weights, device=network.device)
                ((pair_losses(network, micro_batch) * weights).sum() / step.divisor).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[arm].append(time.perf_counter() - started)
            computed[arm].append(step.tokens)
    return {"seconds": seconds, "tokens": computed, "widths": [plan.micro_batch_tokens for plan in plans]}


def bench_prefix(bench: Bench) -> None:
    """Examples that begin with the same `--stem` tokens and end with about `--answer` supervised ones of their own.

    With shared prefixes the micro-batches are as wide as `machine: auto` would make them; both begin with `--tokens`.
    With a short stem it shows from where on sharing pays (the cost of a segment in lorasft/data/prefixes.py).
    """
    options = bench.options
    base = options.base or save_base(bench.folder / "base", TINY, None)
    case = {name: getattr(options, name) for name in ("stem", "answer", "batch", "steps", "tokens")}
    found = bench.run(prefix_steps, base=base, **case)
    alone, shared = (times[1:] for times in found["seconds"])  # the first step pages weights in
    lines = [
        [
            name,
            f"{options.batch / median(found['seconds'][arm][1:]):.2f}",
            f"{median(found['tokens'][arm][1:]):,.0f}",
            f"{found['widths'][arm]:,}",
            ratio,
        ]
        for arm, (name, ratio) in enumerate([("alone", "1.00x"), ("shared", spread(list(map(truediv, alone, shared))))])
    ]
    title = f"Shared prefixes, {options.stem} tokens and about {options.answer} of each example's own"
    bench.show(title, ["prefixes", "examples/s", "tokens a step", "micro-batches of up to", "speed"], lines)


HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3.5": ("Qwen3_5TextConfig", {**TINY, "head_dim": 64, "linear_num_key_heads": 8, "linear_num_value_heads": 8,
                                      "linear_key_head_dim": 64, "linear_value_head_dim": 64}),
    "Mamba 2": ("Mamba2Config", {"hidden_size": 512, "num_hidden_layers": 16, "vocab_size": 32000, "num_heads": 16,
                                 "head_dim": 64, "state_size": 64, "n_groups": 1, "chunk_size": 128}),
}  # fmt: skip


def bench_hybrid(bench: Bench) -> None:
    """Examples of about `--answer` tokens, all of them supervised but the first: alone, and in rows of `--tokens`."""
    options, lines = bench.options, []
    for name, (config, sizes) in HYBRIDS.items():
        base = save_base(bench.folder / config, sizes, None, config=config)
        case = {key: getattr(options, key) for key in ("answer", "batch", "steps", "tokens")}
        found = bench.run(prefix_steps, base=base, stem=0, **case)
        alone, packed = (times[1:] for times in found["seconds"])  # the first step pages weights in
        rates = [f"{options.batch / median(times):.2f}" for times in (alone, packed)]
        lines.append([name, *rates, spread(list(map(truediv, alone, packed)))])
    title = f"Hybrid models, examples of about {options.answer} tokens"
    bench.show(title, ["model", "examples/s alone", f"in rows of {options.tokens:,}", "speed"], lines)


# ---- head -----------------------------------------------------------------------------------------------------------


def head_loss(arm: str, width: int, vocabulary: int, tokens: int) -> Measured:
    """One arm: seconds, processor seconds, the peak above the memory held before, loss."""
    import torch
    from transformers.loss.loss_utils import ForCausalLMLoss

    from lorasft.model.loss import ChunkedLoss, Head

    torch.manual_seed(0)
    weight = (torch.randn(vocabulary, width) * 0.05).to(torch.bfloat16)
    hidden = torch.randn(1, tokens, width).to(torch.bfloat16).requires_grad_()
    labels = torch.randint(0, vocabulary, (1, tokens))
    labels[torch.rand(1, tokens) > 0.55] = -100
    sources = (labels[0, 1:] != -100).nonzero().squeeze(1)

    def loss() -> torch.Tensor:
        if arm == "transformers":
            return ForCausalLMLoss(hidden @ weight.t(), labels, vocabulary)
        pairs = ChunkedLoss.apply(hidden[0, sources], labels[0, sources + 1], Head(weight, None, 1.0, None))
        return pairs.sum() / len(sources)

    seconds, processor, rest = [], [], settle()
    for _ in range(4):  # the first warms up
        hidden.grad = None
        wall, cpu = time.perf_counter(), time.process_time()
        value = loss()
        value.backward()
        seconds.append(time.perf_counter() - wall)
        processor.append(time.process_time() - cpu)
    peak = status("VmHWM") - rest
    return {"s": median(seconds[1:]), "cpu": median(processor[1:]), "peak": peak, "loss": float(value.detach())}


def bench_head(bench: Bench) -> None:
    """The loss and its gradient with respect to the same hidden states under the same frozen bf16 head.

    transformers as a model does it, logits of all positions and its ForCausalLMLoss; lorasft from the supervised
    positions alone, 55 % of them, as in Alpaca's rows.
    """
    lines = []
    for shape, sizes in {"H512 V32k": (512, 32_000), "H1024 V152k": (1024, 152_000)}.items():
        case = {"width": sizes[0], "vocabulary": sizes[1], "tokens": bench.options.tokens}
        found = bench.medians(
            {arm: partial(bench.run, head_loss, arm=arm, **case) for arm in ("transformers", "lorasft")}
        )
        for arm, one in found.items():
            ratios = [f"{one[key] / found['transformers'][key]:.2f}x" for key in ("s", "cpu", "peak")]
            lines.append([shape, arm, f"{one['s']:.2f}", f"{one['peak'] / 1e6:,.0f}", f"{one['loss']:.4f}", *ratios])
    head = ["shape", "loss by", "s", "MB", "loss", "time", "of the processor", "memory"]
    bench.show("The head and its loss alone", head, lines)


# ---- experts --------------------------------------------------------------------------------------------------------

MIXTURE = {**SMALL, "hidden_size": 1024, "num_hidden_layers": 4, "intermediate_size": 2816, "vocab_size": 32_000,
           "moe_intermediate_size": 768, "num_experts": 64, "num_experts_per_tok": 8}  # fmt: skip


def expert_steps(arm: str, base: str, tokens: int) -> Measured:
    """Steps on one sequence: seconds, processor seconds, and the most memory that no file backs, from loading on."""
    import torch
    from transformers import AutoModelForCausalLM

    from lorasft.data.packing import make_micro_batches
    from lorasft.data.store import all_supervised
    from lorasft.model.adapter import attach_adapter
    from lorasft.model.base import load_base
    from lorasft.model.loss import Network, pair_losses
    from lorasft.model.selfcheck import verify
    from lorasft.recipe import AdapterSettings, ModelSettings

    settle()
    ids = torch.randint(5, 32_000, (tokens,), generator=torch.Generator().manual_seed(0)).numpy().astype("int32")
    (batch,) = make_micro_batches(lambda index: (all_supervised(ids),), range(1), capacity=tokens)
    seconds, processor = [], []
    with watch_anonymous() as anonymous:
        if "transformers" in arm:
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).requires_grad_(False)
        else:
            quantization = "nf4" if "4 bit" in arm else "none"
            model = load_base(ModelSettings(base=base, quantization=quantization), torch.device("cpu"))
        peft = attach_adapter(model, AdapterSettings(rank=16), seed=0)
        network = Network(model, head=None, segments=False) if "transformers" in arm else verify(model)
        for _ in range(4):  # the first warms up
            peft.zero_grad()
            wall, cpu = time.perf_counter(), time.process_time()
            pair_losses(network, batch).mean().backward()
            seconds.append(time.perf_counter() - wall)
            processor.append(time.process_time() - cpu)
    return {"s": median(seconds[1:]), "cpu": median(processor[1:]), "peak": anonymous[-1]}


def bench_experts(bench: Bench) -> None:
    """Forwards and backwards through a random Qwen3-MoE of 64 experts, 8 for each token, with LoRA on its attention.

    transformers' model in bf16 under its own experts, and the same base in 4 bit; the same sequence for all.
    """
    base = save_base(bench.folder / "base", MIXTURE, None, config="Qwen3MoeConfig")
    lines = []
    for tokens in (256, bench.options.tokens):
        arms = ("transformers, 16 bit", "lorasft, 16 bit", "lorasft, 4 bit")
        found = bench.medians(
            {arm: partial(bench.run, expert_steps, arm=arm, base=base, tokens=tokens) for arm in arms}
        )
        for arm, one in found.items():
            ratios = [f"{one[key] / found[arms[0]][key]:.2f}x" for key in ("s", "cpu", "peak")]
            lines.append([arm, f"{tokens:,}", f"{one['s']:.2f}", f"{one['peak'] / 1e6:,.0f}", *ratios])
    head = ["arm", "tokens", "s", "MB", "time", "of the processor", "memory"]
    bench.show("A mixture of experts", head, lines)


# ---- memory ---------------------------------------------------------------------------------------------------------

WIDE = {**SMALL, "intermediate_size": 1408, "head_dim": 64}
EXPERTS = {"moe_intermediate_size": 704, "num_experts": 8, "num_experts_per_tok": 2}
PLANNED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {**WIDE, "vocab_size": 32_000}),
    "Qwen3, 152k tokens": ("Qwen3Config", {**WIDE, "vocab_size": 151_936}),
    "Gemma 2, window 512": ("Gemma2Config", {**WIDE, "vocab_size": 64_000, "sliding_window": 512}),
    "Qwen3-MoE, 2 of 8": ("Qwen3MoeConfig", {**WIDE, **EXPERTS, "vocab_size": 32_000}),
}


def plan_and_run(base: str, data: str, quantization: str, recompute: bool) -> Measured:
    """Predicted and measured bytes and speeds of a run."""
    from lorasft.training.plan import plan_run
    from lorasft.training.run import open_run

    recipe = make_recipe(
        base,
        data,
        model={"quantization": quantization, "dtype": "auto"},
        data={"max_length": 2048, "overlong": "truncate"},
        chat={"template": "plain"},
        machine={"activation_checkpointing": recompute},
    )
    planned = plan_run(recipe, memory=None)
    loaded = sum(size for kind, size in planned["bytes"].items() if kind == "adapter" or "weights" in kind)
    with open_run(recipe, resume=False) as (run, _):
        measured = real_peak(partial(work_twice, run))
        taken = [time_step(run, number) for number in range(1, 4)][1:]
    return {
        **planned["heaviest"],
        "loaded": loaded,
        "predicted": planned["peak"] - loaded,
        "measured": measured,
        "foretold": planned["duration"]["supervised_tokens_per_second"],
        "reached": sum(step.supervised_tokens for _, step, _ in taken) / sum(seconds for seconds, _, _ in taken),
    }


def work_twice(run: Any) -> None:
    """The heaviest micro-batch before and after an update, which makes the optimizer's states."""
    from lorasft.data.packing import Step
    from lorasft.training.layout import find_heaviest
    from lorasft.training.loop import add_gradients

    batch = find_heaviest(run.plan, run.rows)
    step = Step(1, 0.0, batch.examples, (batch,))
    run.network.causal.train()
    add_gradients(run, step)
    run.optimizer.step()
    add_gradients(run, step)


def real_peak(work: Callable[[], object]) -> int:
    """Bytes at the peak of the CPU's allocator while `work` runs."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # nothing older may be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def bench_memory(bench: Bench) -> None:
    """For every shape and file, with no layer recomputed and with all: what `lorasft plan` predicts, and what comes.

    The peak of the CPU's allocator over two micro-batches, the heaviest of the run, with an update between them, on the
    base as `lorasft train` loads it. `beside` is the peak without the weights, which are known; `off` is how far the
    prediction is from it, and from the whole. Then supervised tokens a second, predicted and over real steps.
    """
    peaks, speeds = [], []
    for shape, (config, sizes) in PLANNED.items():
        base = save_base(bench.folder / shape.split(",")[0], sizes, bench.options.tokenizer, config=config)
        for data in bench.options.data:
            for layers, recompute in (("none", False), ("all", True)):
                case = {"base": base, "data": str(data.absolute()), "quantization": "nf4"}
                one = bench.run(plan_and_run, **case, recompute=recompute)
                predicted, measured, loaded = one["predicted"], one["measured"], one["loaded"]
                off = f"{predicted / measured - 1:+.1%}", f"{(predicted + loaded) / (measured + loaded) - 1:+.1%}"
                counts = [f"{one['tokens']:,}", f"{one['sequences']}", layers]
                sizes_text = [f"{predicted / 1e6:,.1f}", f"{measured / 1e6:,.1f}"]
                peaks.append([shape, data.name, *counts, *sizes_text, *off])
                rates = [f"{one['foretold']:,.0f}", f"{one['reached']:,.0f}"]
                speeds.append([shape, data.name, layers, *rates, f"{one['foretold'] / one['reached'] - 1:+.0%}"])
                print(*peaks[-1], *speeds[-1][3:], sep="  ", file=sys.stderr, flush=True)
    head = ["shape", "rows", "tokens", "sequences", "recomputed", "predicted, MB", "beside, MB", "off", "of the whole"]
    bench.show("Memory predicted", head, peaks)
    bench.show("Speed predicted", ["shape", "rows", "recomputed", "foretold, tok/s", "reached, tok/s", "off"], speeds)


# ---- start ----------------------------------------------------------------------------------------------------------

BIG = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
STARTS = ("bitsandbytes", "first start", "keeping it", "second start")


def load_and_run(arm: str, base: str, cache: str) -> Measured:
    """Load `base` and run it once; `anonymous` is the most memory that no file backs."""
    import torch

    import lorasft.model
    from lorasft.model.base import load_base
    from lorasft.recipe import ModelSettings

    os.environ["LORASFT_CACHE"] = cache
    importlib.import_module("lorasft.training.run")
    before = settle()
    if arm == "bitsandbytes":
        lorasft.model.QUANTIZER = None
    with watch_anonymous() as anonymous:
        started, cpu = time.perf_counter(), time.process_time()
        model = load_base(ModelSettings(base=base), torch.device("cpu"), keep=arm in ("keeping it", "second start"))
        loaded = time.perf_counter() - started
        with torch.no_grad():
            model(torch.arange(32).unsqueeze(0), use_cache=False)
        both, used = time.perf_counter() - started, time.process_time() - cpu
    memory = {"anonymous": anonymous[-1] / 1e6, "peak": (status("VmHWM") - before) / 1e6}
    return {"load": loaded, "forward": both - loaded, "both": both, "cpu": used, **memory}


# What each command waits for in any case: bitsandbytes without the compiler that its decorators ask for, peft and
# transformers without it, and what the command loads.
LIBRARIES = """
import sys, torch
from types import ModuleType
from unittest.mock import patch
compiler = sys.modules["torch._dynamo"] = ModuleType("torch._dynamo")
compiler.__path__ = [torch.__path__[0] + "/_dynamo"]
def leave(function=None, *_, **__):
    return function or leave
compiler.disable = compiler.allow_in_graph = compiler.assume_constant_result = compiler.graph_break = leave
with patch("torch.compile", lambda function, **_: function):
    import bitsandbytes
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
assert "torch._inductor" not in sys.modules
"""
LOADED = """
scheme = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
tokenizer = AutoTokenizer.from_pretrained({base!r})
model = AutoModelForCausalLM.from_pretrained({base!r}, quantization_config=scheme, device_map={{"": "cpu"}})
"""
TRAINABLE = "model = get_peft_model(model, LoraConfig(r=16, target_modules='all-linear'))\n"
ADAPTED = "model = PeftModel.from_pretrained(model, {adapter!r})\n"


def time_command(words: list[str]) -> Measured:
    """Seconds of one whole process, and those of its CPU."""
    started, own = time.perf_counter(), _children_seconds()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return {"s": time.perf_counter() - started, "cpu": _children_seconds() - own}


def watch_command(words: list[str], *, until: str = "", code: int = 0) -> Measured:
    """On a terminal: seconds to the first output, to that in which `until` is found, and to the end; from `done` on."""
    terminal, follower = pty.openpty()
    started, seen = time.perf_counter(), ""
    when: Measured = {}
    with subprocess.Popen(
        [sys.executable, "-m", "lorasft", *words], stdin=subprocess.DEVNULL, stdout=follower, stderr=follower
    ) as process:
        os.close(follower)
        with contextlib.suppress(OSError):  # the other side is closed
            while got := os.read(terminal, 1 << 16):
                seen += got.decode(errors="replace")
                now = time.perf_counter() - started
                when.setdefault("first", now)
                if re.search(until, seen):
                    when.setdefault("until", now)
                if "done in" in seen:
                    when.setdefault("done", now)
    os.close(terminal)
    end = time.perf_counter() - started
    if process.returncode != code:
        raise SystemExit(f"lorasft {shlex.join(words)} ended with {process.returncode}:\n{seen}")
    return {"first": when["first"], "until": when["until"] if until else end, "exit": end - when.get("done", end)}


def bench_commands(bench: Bench) -> None:
    """Whole commands, and those of `tiny` beside what they import and load in any case."""
    commands = {
        "python": ["-c", "pass"],
        "lorasft --help": ["-m", "lorasft", "--help"],
        "lorasft recipes": ["-m", "lorasft", "recipes"],
        "import torch": ["-c", "import torch"],
        "import lorasft.training.run": ["-c", "import lorasft.training.run"],
    }
    found = bench.medians({name: partial(time_command, words) for name, words in commands.items()})
    lines = [[name, f"{one['s']:.3f}", f"{one['cpu']:.3f}"] for name, one in found.items()]
    bench.show("Commands", ["command", "s", "CPU, s"], lines)

    base, run = str(ROOT / "recipes/tiny/base"), str(bench.folder / "run")
    watch_command(["train", "tiny", f"run.output={run}"])
    load, adapted = LOADED.format(base=base), ADAPTED.format(adapter=f"{run}/adapter")
    floors = {"libraries": "", "and base": load, "and adapter": load + adapted, "and new adapter": load + TRAINABLE}
    numbers = itertools.count()

    def train(*words: str, **expected: Any) -> Measured:
        return watch_command(["train", "tiny", f"run.output={run}-{next(numbers)}", *words], **expected)

    arms: dict[str, tuple[str, Callable[[], Measured]]] = {
        "plan tiny": ("libraries", partial(watch_command, ["plan", "tiny"])),
        "chat RUN --prompt": ("and adapter", partial(watch_command, ["chat", run, "--prompt", "hello"])),
        "train tiny, first step": ("and new adapter", partial(train, until=r" 1/\d+ ")),
        "the same, nothing evaluated": ("and new adapter", partial(train, "data.eval=null", until=r" 1/\d+ ")),
        "preview tiny": ("", partial(watch_command, ["preview", "tiny"])),
        "refused: the run folder": ("", partial(watch_command, ["train", "tiny", f"run.output={run}"], code=2)),
        "refused: no such data": ("", partial(train, "data.train=nowhere.jsonl", code=3)),
        "refused: no such tracker": ("", partial(train, "run.trackers=[trackio]", code=5)),
        "refused: the recipe": ("", partial(train, "train.epochs=many", code=2)),
    }
    bare = {name: partial(time_command, ["-c", LIBRARIES + script]) for name, script in floors.items()}
    found = bench.medians(bare | {name: run for name, (_, run) in arms.items()})
    lines = [[name, "", f"{found[name]['s']:.2f}", "", ""] for name in floors]
    for name, (floor, _) in arms.items():
        one = found[name]
        ratio = f"{one['until'] / found[floor]['s']:.2f}x {floor}" if floor else ""
        lines.append([name, f"{one['first']:.2f}", f"{one['until']:.2f}", ratio, f"{one['exit']:.2f}"])
    bench.show("First words", ["command", "first line, s", "s", "of the floor", "exit, s"], lines)


def bench_start(bench: Bench) -> None:
    """How long a person waits: whole commands, then a base in 4 bit from the call that loads it to a forward pass.

    Commands run on a terminal. The floors are python processes that import torch, transformers, peft and bitsandbytes
    without torch's compiler, and load what the command loads, as plain transformers and PEFT do it. exit: from the
    line that says that a run is done to the end of the process.

    The base is a random Llama of the shape of TinyLlama 1.1B, or `--base`; imports are left out, files are in the
    system's cache. bitsandbytes: quantized by its own general kernel. first start: by lorasft's, which gives the same
    bits. keeping it: the same, and written for the next start. second start: what was kept, its hashes compared.
    """
    options = bench.options
    if options.only != "base":
        bench_commands(bench)
    if options.only == "commands":
        return
    base = options.base or save_base(bench.folder / "base", {**BIG, "num_hidden_layers": options.layers}, None)
    case = {"base": base, "cache": str(bench.folder / "cache")}
    found = bench.medians({arm: partial(bench.run, load_and_run, arm=arm, **case) for arm in STARTS})
    lines = [
        [
            arm,
            *(f"{one[key]:.2f}" for key in ("load", "forward", "both", "cpu")),
            f"{one['anonymous']:,.0f}",
            f"{one['peak']:,.0f}",
        ]
        for arm, one in found.items()
    ]
    head = ["base of 1.1B", "load, s", "forward, s", "both, s", "CPU, s", "anonymous, MB", "peak, MB"]
    bench.show("Start", head, lines)


# ---- merge ----------------------------------------------------------------------------------------------------------


def merge_way(way: str, folder: str) -> Measured:
    """Seconds of the work after its imports, until it is on the disk, and the peak of memory."""
    out, base, adapter = (Path(folder, name) for name in ("out", "base", "adapter"))
    rest = settle()
    os.sync()
    started = time.perf_counter()
    if way == "copy":
        shutil.copytree(base, out)
    elif way == "lorasft":
        from lorasft.artifact import find_artifact
        from lorasft.merge.merge import merge

        merge(find_artifact(str(adapter)), out, check=False)
    else:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(out, max_shard_size="900MB")
    for path in out.iterdir():  # lorasft has done so already, which makes it free
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return {"work": seconds, "peak": (status("VmHWM") - rest) / 1e6}


def make_adapter(base: str, folder: Path) -> None:
    """An adapter of rank 16 on all linears of the base, whose B is not zero."""
    import torch
    from transformers import AutoModelForCausalLM

    from lorasft.model.adapter import attach_adapter, write_adapter
    from lorasft.recipe import AdapterSettings, ModelSettings

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    peft = attach_adapter(model, AdapterSettings(rank=16), seed=0)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    folder.mkdir()
    write_adapter(peft, folder, base=ModelSettings(base=base))


def bench_merge(bench: Bench) -> None:
    """A random Llama of the shape of TinyLlama 1.1B (22 layers) in bf16; answers are not compared, as PEFT's are not.

    With `--layers 140` the weights are those of a 7B model: the peak must not grow.
    """
    options = bench.options
    make_adapter(
        save_base(bench.folder / "base", {**BIG, "num_hidden_layers": options.layers}, None), bench.folder / "adapter"
    )
    ways = [way for way in ("copy", "lorasft", "peft") if way not in options.skip]
    found = bench.medians({way: partial(bench.run, merge_way, way=way, folder=str(bench.folder)) for way in ways})
    first = next(iter(found.values()))["work"]
    lines = [
        [way, f"{one['work']:.1f}", f"{one['peak']:,.0f}", f"{one['work'] / first:.1f}x"] for way, one in found.items()
    ]
    bench.show(f"Merge, {options.layers} layers", ["way", "work, s", "peak, MB", "to first"], lines)


# ---- data -----------------------------------------------------------------------------------------------------------


def prepare_rows(way: str, tokenizer: str, file: str, length: int = 2048) -> Measured:
    """Seconds of preparing conversations of `file`, one a line."""
    from lorasft.data.prepare import prepare
    from lorasft.data.tokenizer import load_tokenizer
    from lorasft.recipe import ChatSettings, DataSettings

    loaded: Any = load_tokenizer(tokenizer)
    rows = [json.loads(line)["messages"] for line in Path(file).read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        if way == "lorasft":
            settings = DataSettings(train=(file,), max_length=length, max_dropped=1.0)  # type: ignore[arg-type]
            work: Callable[[], object] = partial(
                prepare, settings, ChatSettings(), tokenizer=loaded, folder=Path(folder) / "tokens"
            )
        elif way == "TRL, one process":
            work = trl_preparation(tokenizer, rows, folder, length)
        else:
            work = partial(loaded, [loaded.apply_chat_template(row, tokenize=False) for row in rows])
        started = time.perf_counter()
        work()
        return {"s": time.perf_counter() - started, "rows": len(rows)}


def trl_preparation(name: str, rows: list[Any], folder: str, length: int) -> Callable[[], object]:
    """TRL's own: prompt and completion where there is one answer, whole conversations otherwise."""
    import datasets
    import transformers
    import trl

    datasets.disable_caching()
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pairs = all(len(row) == 2 for row in rows)
    data = datasets.Dataset.from_list(
        [{"prompt": row[:-1], "completion": row[-1:]} if pairs else {"messages": row} for row in rows]
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes))
    settings = trl.SFTConfig(
        folder, max_length=length, assistant_only_loss=not pairs, use_cpu=True, bf16=False, report_to=[]
    )
    trainer = trl.SFTTrainer(model, settings, train_dataset=data.select(range(4)), processing_class=tokenizer)
    return lambda: trainer._prepare_dataset(data, tokenizer, settings, False, None, "train")


def bench_data(bench: Bench) -> None:
    """Rows of `--data` repeated up to `--rows`, each with its number in its first question, with every check on.

    TRL prepares in one process, lorasft in one per core; the third arm is a bare batched call of the tokenizer on the
    finished text.
    """
    from lorasft.data.examples import read_blocks, shape_block
    from lorasft.data.report import Report
    from lorasft.recipe import DataSettings

    options = bench.options
    settings = DataSettings(train=(str(options.data),), on_bad_row="drop")  # type: ignore[arg-type]
    report = Report()
    blocks = (block for source in settings.train for block in read_blocks(source, settings))
    examples = (example for block in blocks for example in shape_block(block, settings, report=report))
    found = [example.messages for example in examples if example.messages]
    file = bench.folder / "rows.jsonl"
    with open(file, "w", encoding="utf-8") as stream:
        for number in range(options.rows):
            first, *rest = (dict(message) for message in found[number % len(found)])
            messages = [{**first, "content": f"{first['content']} ({number})"}, *rest]
            stream.write(json.dumps({"messages": messages}) + "\n")
    case = {"tokenizer": str(options.tokenizer), "file": str(file)}
    arms = {way: partial(bench.run, prepare_rows, way=way, **case) for way in ("lorasft", "the tokenizer alone")}
    if options.peers:
        arms["TRL, one process"] = partial(
            bench.run, prepare_rows, find_peers(options.peers), way="TRL, one process", **case
        )
    lines = [[way, f"{one['s']:.2f}", f"{one['rows'] / one['s']:,.0f}"] for way, one in bench.medians(arms).items()]
    bench.show(f"Preparing {options.rows:,} rows", ["way", "s", "rows/s"], lines)


# ---- the command line -----------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "--data": {"type": Path, "help": "rows in a format of a recipe"},
    "--tokenizer": {"type": Path, "default": ROOT / "recipes/tiny/base", "help": "a folder (default: of `tiny`)"},
    "--shape": {"choices": list(SHAPES), "default": "tiny"},
    "--peers": {"type": Path, "metavar": "VENV", "help": "environment with TRL; made when there is none"},
    "--base": {"help": "a model folder instead of random weights"},
    "--steps": {"type": int, "default": 6, "help": f"optimizer steps; the first {WARMUP} are not counted"},
    "--batch": {"type": int, "default": 8, "help": "examples of an optimizer step"},
    "--layers": {"type": int, "default": 22},
    "--peer-rows": {"type": int, "default": 8, "help": "rows of a peer's padded batch; divides --batch"},
    "--max-length": {"type": int, "default": 512},
    "--only": {"choices": ["rows", "length"], "help": "one of the two tables"},
    "--stem": {"type": int, "default": 800, "help": "tokens that all examples begin with"},
    "--answer": {"type": int, "default": 200, "help": "tokens of each example's own, about"},
    "--tokens": {"type": int, "default": 2048, "help": "of a micro-batch, or of a sequence"},
    "--skip": {"nargs": "*", "default": [], "help": "ways to leave out, for example peft"},
    "--rows": {"type": int, "default": 10_000},
}
MANY = {"nargs": "+", "required": True}
NEEDED = {"required": True}
COMMANDS: dict[str, tuple[Callable[[Bench], None], dict[str, dict[str, Any]]]] = {
    "train": (bench_train, {"--data": NEEDED, "--tokenizer": {}, "--shape": {}, "--peers": {},
                            "--steps": {"default": 10}, "--batch": {}, "--peer-rows": {}, "--max-length": {}}),
    "flat": (bench_flat, {"--tokenizer": {}, "--shape": {}, "--steps": {}, "--only": {}}),
    "prefix": (bench_prefix, {"--base": {}, "--stem": {}, "--answer": {}, "--batch": {"default": 32},
                              "--steps": {"default": 5}, "--tokens": {}}),
    "hybrid": (bench_hybrid, {"--answer": {}, "--batch": {"default": 32}, "--steps": {"default": 5}, "--tokens": {}}),
    "head": (bench_head, {"--tokens": {"default": 1024}}),
    "experts": (bench_experts, {"--tokens": {}}),
    "memory": (bench_memory, {"--data": MANY, "--tokenizer": {}}),
    "start": (bench_start, {"--base": {}, "--layers": {}, "--only": {"choices": ["commands", "base"]}}),
    "merge": (bench_merge, {"--layers": {}, "--skip": {}}),
    "data": (bench_data, {"--data": NEEDED, "--tokenizer": NEEDED, "--rows": {}, "--peers": {}}),
}  # fmt: skip
CELLS = {cell.__name__: cell for cell in (train_arm, flat_case, prefix_steps, head_loss, expert_steps, plan_and_run,
                                          load_and_run, merge_way, prepare_rows)}  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--cell"]:
        print(json.dumps(CELLS[sys.argv[2]](**json.loads(sys.argv[3]))))
        return
    wrapped = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=wrapped)
    verbs = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, (run, options) in COMMANDS.items():
        verb = verbs.add_parser(name, description=run.__doc__, formatter_class=wrapped)
        for option, settings in options.items():
            verb.add_argument(option, **OPTIONS[option] | settings)
        verb.add_argument("--rounds", type=int, default=3)
        verb.add_argument("--write", action="store_true", help="the tables into docs/benchmarks.md")
        verb.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        COMMANDS[options.name][0](Bench(options, Path(folder)))


if __name__ == "__main__":
    main()
