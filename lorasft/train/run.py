"""A run from its folder to its adapter: claimed, prepared, started or resumed, finished.

recipe.yaml        the resolved recipe; its presence makes a folder a run
provenance.json    versions, layout, base and data that the run stands on
tokens/            what is trained and evaluated on
metrics.jsonl      one line a step
checkpoints/       see checkpoint.py
adapter/           the result: a plain PEFT adapter with tokenizer and template
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from lorasft import __version__
from lorasft.data.packing import Plan, count_steps
from lorasft.data.prepare import Prepared, prepare
from lorasft.data.tokenizer import compare_with_file, load_tokenizer
from lorasft.data.untrained import refuse_untrained
from lorasft.errors import ModelError, RecipeError
from lorasft.files import fingerprint, locked, make_folder, replace_file, staged_folder, sweep, truncate
from lorasft.model.adapter import attach_adapter, load_adapter, trainable, write_adapter
from lorasft.model.base import compute_dtype, count_bytes, load_base, read_config
from lorasft.model.selfcheck import verify
from lorasft.recipe import Recipe, dump_recipe, load_recipe, mathematics
from lorasft.train.checkpoint import (
    Layout,
    Learner,
    State,
    newest_checkpoint,
    read_state,
    restore_checkpoint,
)
from lorasft.train.logbook import Logbook, start_trackers
from lorasft.train.loop import Run
from lorasft.train.optimizer import make_optimizer
from lorasft.train.schedule import warmup_steps

_AUTO_TOKENS = {"cpu": 2048, "cuda": 4096}  # tokens of a micro-batch: measured on CPU; the planner will know better
_OURS = {"tokens", "run.lock"}  # what a start that failed may leave behind


@dataclass(frozen=True)
class Opened:
    """A run that is ready to train, and what a person wants to see of it."""

    run: Run
    state: State
    tokenizer: Any
    prepared: Prepared
    notes: tuple[str, ...]


@contextmanager
def open_run(recipe: Recipe, *, resume: bool) -> Iterator[Opened]:
    """Claim the run folder of `recipe`, prepare its data, load its model; start, or go on where it stopped.

    All that can be known before the weights are loaded is refused before. Raises RecipeError for a folder that is
    taken, and ModelError when nothing can be resumed.
    """
    folder = Path(recipe.run.output)
    claim(folder, resume=resume)
    refuse_unbuilt(recipe)
    make_folder(folder)
    with locked(folder):
        sweep(folder)
        sweep(folder / "checkpoints")
        if not resume and (folder / "tokens").exists():
            shutil.rmtree(folder / "tokens")  # left by a start that failed
        yield _open(recipe, folder, resume=resume)


def _open(recipe: Recipe, folder: Path, *, resume: bool) -> Opened:
    device = PartialState().device
    config = read_config(recipe.model.base, recipe.model.revision)
    refuse_long(recipe, config)
    tokenizer = load_tokenizer(recipe.model.base, recipe.model.revision)
    notices = [notice] if (notice := compare_with_file(tokenizer)) else []
    prepared = prepare(recipe.data, recipe.chat, tokenizer=tokenizer, folder=folder / "tokens")
    checkpoint, skipped = newest_checkpoint(folder / "checkpoints") if resume else (None, [])
    saved = read_state(checkpoint) if checkpoint else None
    if saved:
        refuse_changes(recipe, folder, saved, data=prepared.key)
    plan = make_plan(recipe, examples=len(prepared.train), device=device, saved=saved)
    refuse_ids(prepared, config)
    if not recipe.adapter.modules_to_save:
        refuse_untrained(recipe.model.base, tokenizer, learned=prepared.learned_special)

    dtype = compute_dtype(saved.layout.dtype if saved else recipe.model.dtype, device)
    settings = recipe.model.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    base = load_base(settings, device)
    if recipe.adapter.start:
        model = load_adapter(base, Path(recipe.adapter.start), trainable=True)
    else:
        model = attach_adapter(base, recipe.adapter, seed=recipe.train.seed)
    wants_segments = recipe.machine.attention in ("auto", "segments")
    network = verify(model.get_base_model(), segments=saved.layout.segments if saved else wants_segments)
    if recipe.machine.attention in ("eager", "sdpa"):
        network.causal.set_attn_implementation(recipe.machine.attention)
    layout = Layout(
        dtype=settings.dtype,
        micro_batch_tokens=plan.micro_batch_tokens if network.segments else 1,  # 1: sequences go alone
        activation_checkpointing=checkpoints_activations(recipe, device, saved=saved),
        segments=network.segments,
    )
    if layout.activation_checkpointing:
        network.causal.activation_checkpointing_enable({"use_reentrant": False})
    parameters = trainable(model)
    learner = Learner(model, parameters, make_optimizer(recipe.optimizer, parameters))
    state = State(step=0, data=prepared.key, metrics_bytes=0, layout=layout)
    if checkpoint and saved:
        restore_checkpoint(checkpoint, learner)
        state = replace(saved, layout=layout)
        truncate(folder / "metrics.jsonl", saved.metrics_bytes)
    else:
        write_start(folder, recipe, prepared, layout=layout, config=config)
    logbook = Logbook(
        folder,
        steps=plan.steps,
        log_every=recipe.run.log_every,
        first_step=state.step + 1,
        trackers=start_trackers(recipe.run.trackers, folder, mathematics(recipe)),
    )
    run = Run(
        folder=folder,
        recipe=recipe,
        plan=replace(plan, micro_batch_tokens=layout.micro_batch_tokens),
        rows=prepared.train,
        held_out=prepared.held_out if prepared.held_out is not None and len(prepared.held_out) else None,
        network=network,
        learner=learner,
        logbook=logbook,
    )
    unstopped = missing_stop(prepared, network.causal)
    if unstopped is not None:
        token = tokenizer.convert_ids_to_tokens(unstopped)
        notice = f"generation of this base does not stop at {token}: the adapter's generation_config.json will"
        notices.append(notice)
    notes = (
        *notices,
        *(f"skipped {reason}" for reason in skipped),
        *network.notices,
        f"model on {device} in {layout.dtype}: {count_bytes(model)}",
    )
    return Opened(run, state, tokenizer, prepared, notes)


def finish(opened: Opened, state: State) -> Path:
    """Write the result, the last adapter or the best one, to `adapter/`. Returns its folder."""
    run = opened.run
    if run.recipe.run.keep_best and state.best_step and state.best_step != state.step:
        restore_checkpoint(run.checkpoints / f"step-{state.best_step:06d}", run.learner)
    target = run.folder / "adapter"
    if not target.exists():
        with staged_folder(target) as stage:
            write_adapter(run.learner.model, stage, base=run.recipe.model)
            opened.tokenizer.save_pretrained(stage)
            write_generation_config(stage, opened.prepared, run.network.causal)
    run.logbook.close()
    return target


def claim(folder: Path, *, resume: bool) -> None:
    """Raise RecipeError when the run folder is taken, or when there is nothing to resume."""
    is_run = (folder / "recipe.yaml").is_file()
    if resume and not is_run:
        raise RecipeError("there is no run to resume", where=str(folder), hint="leave out --resume to start one")
    if not resume and is_run:
        raise RecipeError(
            "this run folder exists",
            where=str(folder),
            hint=f"--resume to go on with it, or run.output={folder}-2 to start another",
        )
    strangers = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    strangers = [name for name in strangers if name not in _OURS and not name.startswith(".")]
    if not is_run and strangers:
        raise RecipeError(
            f"the folder holds {len(strangers)} files that are no run's, {strangers[0]} among them",
            where=str(folder),
            hint="run.output=NEW_FOLDER",
        )


def refuse_unbuilt(recipe: Recipe) -> None:
    """Raise RecipeError for a setting that this version understands and cannot do yet, rather than ignore it."""
    if recipe.machine.share_prefixes is True:
        raise RecipeError(
            "this version computes shared prefixes for each example", where="machine.share_prefixes", hint="use auto"
        )


def refuse_changes(recipe: Recipe, folder: Path, saved: State, *, data: str) -> None:
    """Raise RecipeError when what decides the result differs from what the run was started with."""
    before, now = (_flatten(mathematics(one)) for one in (load_recipe(str(folder / "recipe.yaml")), recipe))
    changed = [f"{key}: {before.get(key)} -> {now.get(key)}" for key in sorted(before.keys() | now.keys())
               if before.get(key) != now.get(key)]  # fmt: skip
    if changed:
        raise RecipeError(
            "the recipe differs from the one that this run was started with",
            where="; ".join(changed[:10]),
            hint="restore these values, or start another run with run.output=FOLDER",
        )
    if saved.data != data:
        raise RecipeError(
            f"the data or the tokenizer changed since step {saved.step}",
            where=str(folder),
            hint="restore the files, or start another run with run.output=FOLDER",
        )


def refuse_long(recipe: Recipe, config: Any) -> None:
    """Raise RecipeError when sequences may be longer than the model's positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and recipe.data.max_length > positions:
        raise RecipeError(
            f"data.max_length is {recipe.data.max_length}, the model has {positions} positions",
            where="data.max_length",
            hint=f"data.max_length={positions}",
        )


def refuse_ids(prepared: Prepared, config: Any) -> None:
    """Raise ModelError when the data has token ids that the model has no row for: a GPU would only assert."""
    rows = config.get_text_config().vocab_size
    for store in (prepared.train, prepared.held_out):
        if store is not None and len(store.ids) and int(store.ids.max()) >= rows:
            raise ModelError(
                f"the tokenizer gives id {int(store.ids.max())}, the model has {rows} embedding rows",
                hint="use the tokenizer that belongs to the model",
            )


def missing_stop(prepared: Prepared, causal: Any) -> int | None:
    """The token that ends the answers of the data, when generation with this base would run on past it."""
    own = causal.generation_config.eos_token_id
    stop = prepared.stop_ids[0]
    return None if prepared.report.answers == 0 or stop in (own if isinstance(own, list) else [own]) else stop


def write_generation_config(folder: Path, prepared: Prepared, causal: Any) -> None:
    """The base's generation config, which stops where the answers of the data end."""
    config = copy.deepcopy(causal.generation_config)
    stop = missing_stop(prepared, causal)
    if stop is not None:
        own = config.eos_token_id
        config.eos_token_id = [stop, *(own if isinstance(own, list) else [] if own is None else [own])]
    config.save_pretrained(folder)


def make_plan(recipe: Recipe, *, examples: int, device: torch.device, saved: State | None) -> Plan:
    """The run as a function of the step. Raises RecipeError when there are fewer rows than one batch."""
    if examples < recipe.train.batch_size:
        raise RecipeError(
            f"{examples} rows are fewer than one batch of {recipe.train.batch_size}",
            where="train.batch_size",
            hint=f"train.batch_size={examples}",
        )
    steps = count_steps(
        examples, batch_size=recipe.train.batch_size, epochs=recipe.train.epochs, steps=recipe.train.steps
    )
    warmup_steps(steps, recipe.schedule)
    tokens = recipe.machine.micro_batch_tokens
    if tokens == "auto":
        tokens = saved.layout.micro_batch_tokens if saved else _AUTO_TOKENS.get(device.type, 2048)
    return Plan(
        examples=examples,
        batch_size=recipe.train.batch_size,
        steps=steps,
        seed=recipe.train.seed,
        loss=recipe.train.loss,
        micro_batch_tokens=tokens,
    )


def checkpoints_activations(recipe: Recipe, device: torch.device, *, saved: State | None) -> bool:
    """Whether layers recompute their activations: as the recipe or the checkpoint says, else on GPUs."""
    wanted = recipe.machine.activation_checkpointing
    if wanted == "auto":
        return saved.layout.activation_checkpointing if saved else device.type == "cuda"
    return wanted


def write_start(folder: Path, recipe: Recipe, prepared: Prepared, *, layout: Layout, config: Any) -> None:
    """Record what the run stands on; recipe.yaml comes last and makes the folder a run."""
    base = Path(recipe.model.base)
    packages = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors", "numpy")
    provenance = {
        "lorasft": __version__,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "layout": asdict(layout),
        "threads": torch.get_num_threads(),
        "base": {
            "name": recipe.model.base,
            "commit": getattr(config, "_commit_hash", None),
            "fingerprint": fingerprint(base) if base.is_dir() else None,  # one from the hub has its commit
        },
        "data": prepared.key,
        "report": prepared.report.as_dict(),
    }
    replace_file(folder / "provenance.json", json.dumps(provenance, indent=1).encode())
    replace_file(folder / "recipe.yaml", dump_recipe(recipe).encode())


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
