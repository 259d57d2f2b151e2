"""Training beside the peers: TRL's SFTTrainer, and transformers' Trainer with PEFT and bitsandbytes. On the CPU.

    python scripts/bench_train.py --data FILE --tokenizer FOLDER [--shape tiny|m350|tiny-152k] [--peers VENV]
                                  [--rounds 3] [--steps 10] [--batch 8] [--peer-rows 8] [--write]

Every arm trains the same LoRA (rank 16, alpha 32, all linears, AdamW) on the same NF4 base (double quantized) and the
same token ids, made once by lorasft from FILE (any format of a recipe; one sequence a row). The base has random weights
in one of three shapes. The arms run in turn, each in a process of its own, for `--rounds` rounds; printed are medians
over the rounds, and the median of the ratios within a round. `--peers VENV` runs TRL with the python of an environment
that is made when it is not there; without it only lorasft and the Trainer run. `--write` puts the table into
docs/benchmarks.md.

Tokens a second are the median over the steps after the warm-up; a step is all between two updates, loader included.
All tokens are the rows' own, never padding. Memory is the largest resident size of the process from loading to the
last step, above what it held after its imports.

    lorasft           as `lorasft train` does it, `machine: auto`
    Trainer           padded, DataCollatorForSeq2Seq, bf16 autocast, no checkpointing
    TRL               SFTTrainer as it comes: padded, activation checkpointing
    TRL padding-free  the rows of a batch side by side, no checkpointing
    TRL packing       bins of 1024 tokens (bfd), no checkpointing: other rows in a step, so its losses are not compared
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

from bench_shared import SHAPES, TRL, find_peers, make_base, peak, run_process, settle, table, write_section

WARMUP = 2  # steps: the first ones page the weights in


@dataclass(frozen=True)
class Job:
    """The work, the same for every arm."""

    folder: str  # holds base/ and rows.json, a list of {input_ids, labels}
    data: str
    max_length: int
    batch: int  # rows of an optimizer step
    peer_rows: int  # rows of a peer's padded batch; it accumulates up to `batch`
    pack: int  # tokens of a bin of TRL's packing
    pack_bins: int  # bins of an optimizer step: about as many tokens as `batch` rows have
    steps: int


@dataclass
class Meter:
    """What an arm notes while it trains: one number a step in each list, and bytes of memory."""

    seconds: list[float] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    total: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rest: int = 0  # after the imports
    peak: int = 0
    last: float = 0.0

    def start(self) -> None:
        self.last = time.perf_counter()

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

    @property
    def memory(self) -> int:
        return self.peak - self.rest


# ---- the arms: each imports, settles, loads, trains -----------------------------------------------------------------


def train_ours(job: Job, meter: Meter) -> None:
    from lorasft.signals import StopRequest
    from lorasft.train.loop import take_step
    from lorasft.train.run import open_run

    meter.rest = settle()
    with open_run(make_recipe(job), resume=False) as opened:
        run = opened.run
        run.network.causal.train()
        meter.start()
        for number in range(1, job.steps + 1):
            step = run.plan.step(number, run.rows)
            meter.losses.append(take_step(run, step, StopRequest())["loss"])
            sequences = [one for example in step.examples for one in run.rows.sequences(int(example))]
            meter.count(sum(int((one.labels != -100).sum()) for one in sequences), sum(map(len, sequences)))
            meter.end_step()


def train_trainer(job: Job, meter: Meter) -> None:
    from peft import get_peft_model
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    meter.rest = settle()
    tokenizer = AutoTokenizer.from_pretrained(f"{job.folder}/base")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = Trainer(
        model=get_peft_model(load_peer_base(job), peer_lora()),
        args=TrainingArguments(**peer_arguments(job), bf16=True),
        train_dataset=read_rows(job),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    fit(trainer, meter)


def train_trl(job: Job, meter: Meter, **best: Any) -> None:
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found,unused-ignore]

    meter.rest = settle()
    trainer = SFTTrainer(
        model=load_peer_base(job),
        args=SFTConfig(**peer_arguments(job) | best),
        train_dataset=read_rows(job),
        processing_class=AutoTokenizer.from_pretrained(f"{job.folder}/base"),
        peft_config=peer_lora(),
    )
    fit(trainer, meter)


def train_trl_padding_free(job: Job, meter: Meter) -> None:
    train_trl(job, meter, padding_free=True, max_length=None, gradient_checkpointing=False)


def train_trl_packing(job: Job, meter: Meter) -> None:
    bins = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": job.pack_bins}
    train_trl(job, meter, packing=True, max_length=job.pack, gradient_checkpointing=False, **bins)


ARMS: dict[str, Callable[[Job, Meter], None]] = {
    "lorasft": train_ours,
    "Trainer": train_trainer,
    "TRL": train_trl,
    "TRL padding-free": train_trl_padding_free,
    "TRL packing": train_trl_packing,
}


def make_recipe(job: Job) -> Any:
    from lorasft.recipe import Recipe

    sections = {
        "model": {"base": f"{job.folder}/base", "dtype": "bfloat16"},
        "data": {"train": job.data, "eval": None, "max_length": job.max_length, "max_dropped": 0.5},
        "train": {"batch_size": job.batch, "steps": job.steps},
        "schedule": {"name": "constant", "warmup": 0},
        "run": {"output": tempfile.mkdtemp(dir=job.folder)},
    }
    return Recipe.model_validate(sections)


def peer_arguments(job: Job) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(dir=job.folder),
        "max_steps": job.steps,
        "per_device_train_batch_size": job.peer_rows,
        "gradient_accumulation_steps": job.batch // job.peer_rows,
        "train_sampling_strategy": "sequential",
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        **{"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True},
    }


def peer_lora() -> Any:
    import torch
    from peft import LoraConfig

    torch.manual_seed(0)  # A is drawn next: the seed of lorasft, so that all start from the same adapter
    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")


def load_peer_base(job: Job) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    scheme = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    return AutoModelForCausalLM.from_pretrained(
        f"{job.folder}/base", dtype=torch.bfloat16, quantization_config=scheme, device_map={"": "cpu"}
    )


def read_rows(job: Job) -> Any:
    from datasets import Dataset

    return Dataset.from_list(json.loads((Path(job.folder) / "rows.json").read_text(encoding="utf-8")))


def fit(trainer: Any, meter: Meter) -> None:
    """Train a peer; its tokens are counted in what reaches the model, its losses are those that it logs."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.start()

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


# ---- the work, made once --------------------------------------------------------------------------------------------


def make_job(options: argparse.Namespace, folder: Path) -> Job:
    """Base and rows in `folder`; the rows stand in the order in which lorasft takes them."""
    import torch

    from lorasft.data.prepare import prepare
    from lorasft.data.tokenizer import load_tokenizer
    from lorasft.train.run import make_plan

    make_base(SHAPES[options.shape], Path(options.tokenizer), folder=folder / "base")
    sizes = {"batch": options.batch, "peer_rows": options.peer_rows, "steps": options.steps}
    data = str(Path(options.data).absolute())
    job = Job(str(folder), data, options.max_length, **sizes, pack=max(1024, options.max_length), pack_bins=1)
    recipe = make_recipe(job)
    tokenizer = load_tokenizer(recipe.model.base)
    store = prepare(recipe.data, recipe.chat, tokenizer=tokenizer, folder=folder / "tokens").train
    plan = make_plan(recipe, examples=len(store), device=torch.device("cpu"), saved=None)
    supply = 3 * job.steps // 2  # packing needs more rows for as many steps
    if supply * job.batch > len(store):
        raise SystemExit(f"{len(store)} rows are too few: {supply * job.batch} are needed")
    rows = [store.sequences(int(row)) for step in range(1, supply + 1) for row in plan.step_examples(step)]
    if any(len(sequences) != 1 for sequences in rows):
        raise SystemExit("the peers train one sequence a row: use rows with one answer each")
    text = json.dumps([{"input_ids": one.ids.tolist(), "labels": one.labels.tolist()} for (one,) in rows])
    (folder / "rows.json").write_text(text, encoding="utf-8")
    tokens = sum(len(one) for (one,) in rows) / supply
    return Job(**asdict(job) | {"pack_bins": max(1, round(tokens / job.pack))})


# ---- what is said of the runs ---------------------------------------------------------------------------------------


def report(results: dict[str, list[Meter]]) -> str:
    """The table over all rounds; ratios are lorasft's to the arm's, within a round."""
    head = ["arm", "supervised tok/s", "all tok/s", "MB", "loss, first and last step", "off", "speed", "memory"]
    ours, lines = results["lorasft"], []
    for name, rounds in results.items():
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
                f"{median(faster):.2f}x ({min(faster):.2f} to {max(faster):.2f})",
                f"{median(mine.memory / one.memory for mine, one in zip(ours, rounds, strict=True)):.2f}x",
            ]
        )
    return table(head, lines)


def measure(options: argparse.Namespace) -> None:
    """All arms in turn, `--rounds` times; every run and then the table is printed, and written where asked."""
    peers = find_peers(Path(options.peers)) if options.peers else None
    results: dict[str, list[Meter]] = {name: [] for name in ARMS if peers or not name.startswith("TRL")}
    busiest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        job = json.dumps(asdict(make_job(options, Path(folder))))
        for number, (name, meters) in itertools.product(range(options.rounds), results.items()):
            python = peers if peers and name.startswith("TRL") else sys.executable
            said, foreign = run_process(python, [__file__, "--arm", name, "--job", job])
            meters.append(one := Meter(**said))
            busiest = max(busiest, foreign)
            print(
                f"round {number + 1}  {name:16}  {one.rate(one.supervised):7,.0f} supervised tok/s"
                f"  {one.memory / 1e6:7,.0f} MB  loss {one.losses[-1]:.3f}  other processes on {foreign:.1f} cores",
                flush=True,
            )
    text = report(results)
    print(f"\n{text}", end="")
    if options.write:
        write_section(f"Training, {options.shape}", text, busiest=busiest, more=[f"trl {TRL}"] if peers else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="rows in a format of a recipe")
    parser.add_argument("--tokenizer", help="a folder")
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--peers", metavar="VENV", help="environment with TRL; made when there is none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help=f"optimizer steps; the first {WARMUP} are not counted")
    parser.add_argument("--batch", type=int, default=8, help="rows of an optimizer step")
    parser.add_argument("--peer-rows", type=int, default=8, help="rows of a peer's padded batch; divides --batch")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--write", action="store_true", help="the table into docs/benchmarks.md")
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        meter = Meter()
        ARMS[options.arm](Job(**json.loads(options.job)), meter)
        meter.peak = peak()
        print(json.dumps(asdict(meter)))
        return
    if not (options.data and options.tokenizer) or options.batch % options.peer_rows or options.steps <= WARMUP:
        parser.error("give --data and --tokenizer; --peer-rows divides --batch; --steps is above the warm-up")
    measure(options)


if __name__ == "__main__":
    main()
