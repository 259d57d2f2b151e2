"""A run from its folder to its adapter: checked, prepared, started or resumed, exported.

recipe.yaml        the resolved recipe; its presence makes a folder a run
provenance.json    versions, layout, base and data that the run is made of
memory.json        what a step was predicted to need, and what the heaviest took where it was run beforehand
tokens/            what is trained and evaluated on
metrics.jsonl      one line a step
checkpoints/       see checkpoint.py
adapter/           the result: a plain PEFT adapter with tokenizer and template
"""

from __future__ import annotations

import copy
import json
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from lorasft.artifact import find_artifact
from lorasft.data.packing import Plan, count_steps
from lorasft.data.prepare import Prepared, prepare
from lorasft.data.tokenizer import compare_with_file, load_tokenizer
from lorasft.data.untrained import refuse_untrained
from lorasft.errors import DivergedError, ModelError, RecipeError
from lorasft.files import (
    locked,
    make_folder,
    refuse_overlap,
    remove_folder,
    replace_file,
    staged_folder,
    sweep,
    verify_folder,
    write_file,
)
from lorasft.model.adapter import attach_adapter, check_targets, load_adapter, trainable, write_adapter
from lorasft.model.base import (
    check_files,
    check_mostly_quantized,
    compute_dtype,
    load_base,
    make_skeleton,
    read_config,
)
from lorasft.model.free_memory import free_memory
from lorasft.model.generate import own_stops
from lorasft.model.loss import Network
from lorasft.model.memory import static_bytes
from lorasft.model.recompute import decoder_layers, recomputed_layers
from lorasft.model.selfcheck import verify
from lorasft.recipe import Recipe, dump_recipe
from lorasft.terminal import size_text
from lorasft.train.checkpoint import newest_checkpoint, read_layout, restore_checkpoint, save
from lorasft.train.distributed import ALONE, Ranks
from lorasft.train.layout import choose_layout, choose_tokens, without_weights
from lorasft.train.metrics import Metrics, check_trackers
from lorasft.train.oom import plain_oom_errors
from lorasft.train.optimizer import make_optimizer
from lorasft.train.rehearsal import describe_memory, run_heaviest_batch
from lorasft.train.run_folder import check_run_folder, read_run_id, refuse_changes, write_start
from lorasft.train.schedule import warmup_steps
from lorasft.train.state import Learner, Run, State


@dataclass(frozen=True)
class ReadyRun:
    """A run that is ready to train, and what a person wants to see of it."""

    run: Run
    state: State
    tokenizer: Any
    prepared: Prepared
    notes: tuple[str, ...]


@dataclass(frozen=True)
class RunInputs:
    """What is known before any weight is read: to the first process, which then tells the others."""

    config: Any
    tokenizer: Any
    prepared: Prepared
    plan: Plan
    checkpoint: Path | None  # to resume from
    saved: State | None  # its state
    notices: list[str]


@contextmanager
def open_run(recipe: Recipe, *, resume: bool, ranks: Ranks = ALONE) -> Iterator[ReadyRun]:
    """Lock the run folder of `recipe`, prepare its data, load its model; start, or resume where it stopped.

    All that can be known before the weights are loaded is refused before. Raises RecipeError for a folder that is
    taken, and ModelError when nothing can be resumed.
    """
    folder = Path(recipe.run.output)
    with ExitStack() as held, plain_oom_errors(folder):
        inputs = ranks.on_main(lambda: _prepare_inputs(recipe, folder, resume=resume, held=held))
        yield _load(recipe, folder, inputs, ranks=ranks)


def _prepare_inputs(recipe: Recipe, folder: Path, *, resume: bool, held: ExitStack) -> RunInputs:
    """Take the folder, which stays locked while `held` is open; prepare the data; find what to resume from."""
    refuse_overlap(folder, *(path for path in [Path(recipe.model.base)] if path.is_dir()))
    check_run_folder(folder, resume=resume)
    make_folder(folder)
    left = held.enter_context(locked(folder))
    check_run_folder(folder, resume=resume)  # it may have become a run before the lock was ours
    sweep(folder)
    sweep(folder / "checkpoints")
    for name in () if resume else ("tokens", "checkpoints"):  # what a start that failed has left
        if (folder / name).is_dir():
            remove_folder(folder / name)
    config = read_checked_config(recipe)
    check_files(recipe.model.base)
    tokenizer, prepared = read_data(recipe, config, folder / "tokens")
    checkpoint, saved = None, None
    notices = [f"process {left} ended without a word: it was killed, or the power was lost"] if left else []
    if resume:
        checkpoint, saved, skipped = newest_checkpoint(folder / "checkpoints", run=read_run_id(folder))
        refuse_changes(recipe, folder, saved, prepared=prepared)
        notices += [*(f"skipped {reason}" for reason in skipped), f"going on from step {saved.step}"]
    plan = make_plan(recipe, examples=len(prepared.train), device=PartialState().device, saved=saved)
    if not recipe.adapter.modules_to_save:
        refuse_untrained(recipe.model.base, tokenizer, learned=prepared.learned_special)
    return RunInputs(config, tokenizer, prepared, plan, checkpoint, saved, notices)


def read_checked_config(recipe: Recipe) -> Any:
    """The config of the base. Raises RecipeError or DeviceError for what it or this machine cannot do for `recipe`.

    A setting is never ignored: what is not built yet is refused.
    """
    config = read_config(recipe.model.base, recipe.model.revision)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and recipe.data.max_length > positions:
        what = f"data.max_length is {recipe.data.max_length}, the model has {positions} positions"
        raise RecipeError(what, where="data.max_length", hint=f"data.max_length={positions}")
    skeleton = make_skeleton(config)
    if recipe.adapter.targets != "all-linear" or recipe.adapter.modules_to_save:
        check_targets(skeleton, recipe.adapter)
    decided = sorted(recipe.adapter.model_fields_set - {"start"})
    if recipe.adapter.start and decided:
        what = f"adapter.{decided[0]} has no effect with adapter.start, whose own config decides"
        raise RecipeError(what, where=f"adapter.{decided[0]}", hint="leave one of the two out")
    compute_dtype(recipe.model.dtype, PartialState().device)
    if recipe.model.quantization == "nf4" and not hasattr(config, "quantization_config"):
        check_mostly_quantized(skeleton)
    check_trackers(recipe.run.trackers)
    return config


def read_data(recipe: Recipe, config: Any, folder: Path) -> tuple[Any, Prepared]:
    """The tokenizer, and the data prepared in `folder`. Raises ModelError for ids that the model has no row for."""
    tokenizer = load_tokenizer(recipe.model.base, recipe.model.revision)
    prepared = prepare(recipe.data, recipe.chat, tokenizer=tokenizer, folder=folder)
    rows, most = config.get_text_config().vocab_size, int(prepared.store.arrays["ids"].max())
    if most >= rows:  # on which a GPU would only assert
        what = f"the tokenizer gives id {most}, the model has {rows} embedding rows"
        raise ModelError(what, where="model.base", hint="use the tokenizer that belongs to the model")
    return tokenizer, prepared


def _load(recipe: Recipe, folder: Path, inputs: RunInputs, *, ranks: Ranks) -> ReadyRun:
    device, prepared, saved = PartialState().device, inputs.prepared, inputs.saved
    with ranks.sync_errors():
        model, network = load_model(recipe, device, saved=saved)
        static = static_bytes(model, recipe.optimizer.name)
        weightless = without_weights(recipe, inputs.config, model, device)
        network, fit = choose_layout(
            recipe,
            network,
            weightless,
            plan=replace(inputs.plan, processes=ranks.count),
            rows=prepared.train,
            saved=saved,
            spare=free_memory(device) - static.upcoming,
        )
    # All processes must cut a step in the same way.
    plan = replace(fit.plan, micro_batch_tokens=min(ranks.gather(fit.plan.micro_batch_tokens)))
    parameters = trainable(model)
    ranks.copy_first(list(parameters.values()))
    learner = Learner(model, parameters, make_optimizer(recipe.optimizer, parameters))
    if inputs.checkpoint and saved:
        with ranks.sync_errors():
            restore_checkpoint(inputs.checkpoint, learner)
    done, written = (saved.step, saved.metrics_bytes) if saved else (0, 0)
    logbook = Metrics(folder, recipe, steps=plan.steps, done=done, metrics_bytes=written, quiet=not ranks.is_main)
    run = Run(folder, recipe, plan, prepared.train, prepared.held_out, network, learner, logbook, ranks)
    with ranks.sync_errors():
        memory, run = run_heaviest_batch(run, weightless, fit, static)
        layout, data = read_layout(run), prepared.key
        new = State(step=0, data=data, metrics_bytes=0, layout=layout, run=secrets.token_hex(8))
        state = replace(saved, layout=layout) if saved else new
        if ranks.is_main and not saved:  # from here on there is something to resume: this makes the folder a run
            save(run, state)
            write_start(folder, recipe, prepared, state=state, config=inputs.config)
        if ranks.is_main:
            replace_file(folder / "memory.json", json.dumps(memory, indent=1).encode())
    sizes = ", ".join(f"{kind} {size_text(size)}" for kind, size in static.weights.items() if size)
    notes = (
        *_notes(run, inputs),
        f"model on {device} in {layout.dtype}: {sizes}",
        describe_memory(memory),
    )
    return ReadyRun(run, state, inputs.tokenizer, prepared, notes)


def _notes(run: Run, inputs: RunInputs) -> Iterator[str]:
    """What a person should know before the first step."""
    causal = run.network.causal
    if notice := compare_with_file(inputs.tokenizer):
        yield notice
    for token in inputs.tokenizer.convert_ids_to_tokens(missing_stops(inputs.prepared, causal)):
        yield f"generation of this base does not stop at {token}: the adapter's generation_config.json will"
    yield from inputs.notices
    yield from run.network.notices
    if run.held_out is None and run.recipe.data.eval is not None:
        yield "no rows are held out: data.eval=FILE names some"
    yield f"activations: {recomputed_layers(causal)} of {len(decoder_layers(causal))} layers recomputed"


def load_model(recipe: Recipe, device: torch.device, *, saved: State | None) -> tuple[Any, Network]:
    """The PEFT model, in the dtype of the checkpoint where there is one, and what was verified about it."""
    dtype = compute_dtype(saved.layout.dtype if saved else recipe.model.dtype, device)
    settings = recipe.model.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    start = find_artifact(recipe.adapter.start, base=recipe.model.base) if recipe.adapter.start else None
    base = load_base(settings, device, keep=recipe.machine.cache_base)
    if start:
        model = load_adapter(base, start, trainable=True)
    else:
        model = attach_adapter(base, recipe.adapter, seed=recipe.train.seed)
    return model, probe(recipe, model, saved=saved)


def probe(recipe: Recipe, model: Any, *, saved: State | None) -> Network:
    """What is verified about the PEFT model `model`, under the attention that the recipe wants."""
    own = recipe.machine.attention if recipe.machine.attention in ("eager", "sdpa") else None
    network = verify(model.get_base_model(), segments=saved.layout.segments if saved else own is None)
    if own:
        network.causal.set_attn_implementation(own)
    return network


def export_adapter(ready: ReadyRun, state: State) -> Path:
    """Write the result, the last adapter or the best one, to `adapter/`. Returns its folder.

    Raises DivergedError when nothing was trained, ModelError when the best checkpoint is damaged.
    """
    run = ready.run
    if run.recipe.run.keep_best and state.best_step not in (None, state.step):
        best = run.checkpoints / f"step-{state.best_step:06d}"
        verify_folder(best)
        restore_checkpoint(best, run.learner)
    trained = (one for name, one in run.learner.parameters.items() if "lora_" not in name or "_B" in name)
    if not any(one.any() for one in trained):
        hint = "see metrics.jsonl; if no step was better than the base, run.keep_best=false takes the last"
        raise DivergedError("nothing was trained: the adapter is zero", hint=hint)
    target = run.folder / "adapter"
    if not target.exists():
        with staged_folder(target) as stage:
            write_adapter(run.learner.model, stage, base=run.recipe.model)
            ready.tokenizer.save_pretrained(stage)
            generation = copy.deepcopy(run.network.causal.generation_config)
            if stops := missing_stops(ready.prepared, run.network.causal):
                generation.eos_token_id = [*stops, *own_stops(run.network.causal)]
            generation.save_pretrained(stage)
            # Whoever copies the adapter elsewhere takes along how it was made, its base quantized and prompts written.
            write_file(stage / "recipe.yaml", dump_recipe(run.recipe).encode())
            if (record := run.folder / "provenance.json").is_file():  # who lost it continues without
                write_file(stage / record.name, record.read_bytes())
    run.logbook.close()
    return target


def missing_stops(prepared: Prepared, causal: Any) -> list[int]:
    """The token that ends the answers of the data, when generation with this base would run on past it."""
    ends = prepared.stop_ids[:1] if prepared.report.answers else ()
    return [stop for stop in ends if stop not in own_stops(causal)]


def make_plan(recipe: Recipe, *, examples: int, device: torch.device, saved: State | None) -> Plan:
    """The run as a function of the step. Raises RecipeError when there are fewer rows than one batch."""
    if examples < recipe.train.batch_size:
        what = f"{examples} rows are fewer than one batch of {recipe.train.batch_size}"
        raise RecipeError(what, where="train.batch_size", hint=f"train.batch_size={examples}")
    wanted = recipe.train
    steps = count_steps(examples, batch_size=wanted.batch_size, epochs=wanted.epochs, steps=wanted.steps)
    warmup_steps(steps, recipe.schedule)
    return Plan(
        examples=examples,
        batch_size=wanted.batch_size,
        steps=steps,
        seed=wanted.seed,
        loss=wanted.loss,
        micro_batch_tokens=choose_tokens(recipe.machine.micro_batch_tokens, device, saved=saved),
    )
