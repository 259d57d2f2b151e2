"""A run from its folder to its adapter: checked, prepared, started or resumed, exported.

recipe.yaml        the resolved recipe; its presence makes a folder a run
provenance.json    versions, layout, base and data that the run is made of
memory.json        what a step was predicted to need, and what the heaviest took where it was run beforehand
tokens/            what is trained and evaluated on
metrics.jsonl      one line a step
answers.jsonl      what held-out prompts were answered at evaluations
rows.jsonl         the losses of held-out rows and of some that are trained on
events.jsonl       when it was started, continued and ended, and why; report.html: the page of all that
checkpoints/       see checkpoint.py
adapter/           the result: a plain PEFT adapter with tokenizer and template
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast

from lorasft.artifact import GENERATION_CONFIG, list_stops
from lorasft.data.packing import Step
from lorasft.data.templates import set_default_system
from lorasft.data.tokenizer import refuse_untrained
from lorasft.errors import DivergedError
from lorasft.files import replace_file, staged_folder, verify_folder, write_file
from lorasft.machine import free_memory
from lorasft.model.adapter import attach_adapter, load_adapter, write_adapter
from lorasft.model.base import check_files, compute_dtype, copy_base, load_base, patch_linear4bit, read_generation
from lorasft.model.cache import Keep
from lorasft.model.memory import static_bytes
from lorasft.model.shard import keep_whole, load_around, shard_base
from lorasft.model.trained import Trained
from lorasft.model.weightless import make_weightless
from lorasft.recipe import ModelSettings, Recipe
from lorasft.recipe.load import dump_recipe
from lorasft.report import note_event, refresh_report
from lorasft.signals import StopRequest
from lorasft.terminal import say
from lorasft.training.checkpoint import find_checkpoint, restore_checkpoint, save, take_folder, write_start
from lorasft.training.distributed import ALONE, Ranks
from lorasft.training.inputs import read_checked_config, read_inputs
from lorasft.training.layout import Fit, choose_layout, choose_shard, find_heaviest, retry_on_oom
from lorasft.training.loop import add_gradients, peak_memory
from lorasft.training.metrics import Metrics
from lorasft.training.optimizer import make_optimizer
from lorasft.training.samples import keep_samples, open_ledger, score_trained_rows
from lorasft.training.state import Run, RunInputs, State

_REHEARSED = {"cuda"}  # devices whose operations take work space of their own, which no prediction sees


@dataclass(frozen=True)
class Shared:
    """What the runs of a sweep have in common."""

    tokens: Path  # the folder of what they are trained on, instead of one in each run
    deadline: float  # after which they stop, by `time.monotonic`
    bases: dict[Any, Any] = field(default_factory=dict)  # the last one, as loaded, by its settings; and Run.of_base

    def load(self, settings: ModelSettings, device: torch.device, *, keep: Keep, own_rows: bool) -> Any:
        """What `load_base` gives, which is called for the first run; see `copy_base`."""
        if (name := settings.model_dump_json()) not in self.bases:
            self.bases.clear()
            self.bases[name] = load_base(settings, device, keep=keep)
        return copy_base(self.bases[name], own_rows=own_rows)


@contextmanager
def open_run(
    recipe: Recipe, *, resume: bool, ranks: Ranks = ALONE, shared: Shared | None = None
) -> Iterator[tuple[Run, State]]:
    """Lock the run folder of `recipe`, prepare its data, load its model; start, or resume where it stopped.

    All that can be known before the weights are loaded is refused before. Raises RecipeError for a folder that is
    taken, and ModelError when nothing can be resumed.
    """
    with ExitStack() as held:
        ranks.on_main(lambda: held.enter_context(take_folder(recipe, resume=resume)))
        ranks.check_folder(Path(recipe.run.output))
        inputs = ranks.on_main(lambda: _prepare(recipe, resume=resume, shared=shared))
        run, state = _load(recipe, inputs, ranks, shared)
        if ranks.is_main:
            note_event(run.folder, "continued" if resume else "started", step=state.step)
            held.callback(refresh_report, run.folder)
            held.push(lambda _, error, __: note_event(run.folder, "ended", error=error, why=run.early_end))
        yield run, state


def _prepare(recipe: Recipe, *, resume: bool, shared: Shared | None) -> RunInputs:
    """Prepare the data; find what to resume from."""
    folder = Path(recipe.run.output)
    config = read_checked_config(recipe)
    check_files(recipe.model.base)
    inputs = read_inputs(recipe, config, shared.tokens if shared else folder / "tokens")
    if resume:
        saved = find_checkpoint(recipe, inputs)
        inputs = replace(inputs, saved=saved)
        say(f"continuing from step {saved.step}")
    if not recipe.adapter.modules_to_save:
        supervised = [*{*inputs.prepared.supervised_special} - {*inputs.new_rows}]
        refuse_untrained(recipe.model.base, inputs.tokenizer, supervised=supervised)
    return inputs


def _load(recipe: Recipe, inputs: RunInputs, ranks: Ranks, shared: Shared | None) -> tuple[Run, State]:
    device, saved = PartialState().device, inputs.saved
    with ranks.sync_errors():
        dtype = compute_dtype(saved.layout.dtype if saved else recipe.model.dtype, device)
        settings = recipe.model.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
        weightless = make_weightless(inputs.config, settings, inputs.adapter, device)
        patch_linear4bit(weightless, device)  # refused before weights are read
    # All processes must decide in the same way.
    free = min(ranks.gather(free_memory(device)))
    local = min(ranks.gather(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    with ranks.sync_errors():
        ranks.shard = choose_shard(recipe, inputs, weightless, device, count=ranks.count, local=local, free=free)
        load = partial(shared.load, own_rows=bool(inputs.new_rows or inputs.start)) if shared else load_base
        if ranks.shard > 1:
            with ranks.sync_errors():  # the others wait
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    keep_whole(settings)
            base = load_around(settings, device)
        else:
            base = load(settings, device, keep=recipe.machine.cache_base)
        if inputs.start:
            model = load_adapter(base, inputs.start, trainable=True)
        else:
            model = attach_adapter(base, recipe.adapter, seed=recipe.train.seed, new_rows=inputs.new_rows)
        if ranks.shard > 1:
            shard_base(model.get_base_model(), settings, ranks.shard)
    static = static_bytes(weightless, recipe.optimizer.name, shard=ranks.shard)
    spare = free_memory(device) - sum(static[kind] for kind in ("gradients", "optimizer", "16-bit copies", "gathered"))
    spare = min(ranks.gather(spare))
    with ranks.sync_errors(passes=True):
        sizes = {"spare": spare, "moments": static["optimizer"] if ranks.shard > 1 else 0}
        network, fit = choose_layout(recipe, inputs, model, weightless=weightless, **sizes)
    plan, ranks.spread = fit.plan, fit.plan.spread
    process, apart = (ranks.index, ranks.count) if fit.cut else (0, 1), recipe.optimizer.lora_plus is not None
    trained = Trained(model, network.causal.dtype, rates_apart=apart, process=process)
    broadcast(trained.master.detach())  # that of the first process: unlike devices draw unlike random numbers
    trained.refresh()
    optimizer = make_optimizer(recipe.optimizer, trained)
    done, written = (saved.step, saved.metrics_bytes) if saved else (0, 0)
    metrics = Metrics(recipe, steps=plan.steps, done=done, metrics_bytes=written, quiet=not ranks.is_main)
    run = Run(recipe, inputs, plan, network, model, trained, optimizer, metrics, ranks)
    run.of_base = shared.bases if shared else {}
    with ranks.sync_errors():
        if saved:
            restore_checkpoint(run.checkpoint(saved.step), run)
        if ranks.is_main:
            _begin_records(run, done)
    with ranks.sync_errors(passes=True):
        run_heaviest_batch(run, fit, static)
    with ranks.sync_errors():
        state = saved or State(0, inputs.prepared.key, metrics_bytes=0, layout=run.layout, run=secrets.token_hex(8))
        if ranks.is_main and not saved:  # from here on there is something to resume: this makes the folder a run
            save(run, state)
            write_start(run, state)
    return run, state


def _begin_records(run: Run, done: int) -> None:
    """Cut answers and losses of rows back to step `done`, and say what a person should know of the model."""
    keep_samples(run.folder, until=done)
    with open_ledger(run.folder, until=done):
        pass
    for notice in run.network.notices:
        say(notice)
    if any(hasattr(module, "is_concatenated") for module in run.network.causal.modules()):
        say("the experts stay as they are: the adapter is on attention and shared linears that PEFT can adapt")


def run_heaviest_batch(run: Run, fit: Fit, static: dict[str, int]) -> None:
    """Run the heaviest micro-batch where its memory is not known, so that what does not fit is met at once.

    Nothing is updated, and each step begins its random numbers anew: the losses keep their bits. Writes `memory.json`
    (bytes; null where a number is not known). Raises CapacityError when it fits in no layout.
    """
    kinds = {**static, **fit.needs.by_kind} if fit.needs else {}
    predicted = {**kinds, "peak": sum(kinds.values())} if kinds else None
    unseen = fit.needs is None or run.network.device.type in _REHEARSED
    measured = retry_on_oom(run, partial(_measure_heaviest, run)) if unseen else None
    record = {"free": sum(static.values()) + fit.spare, "predicted": predicted, "measured": measured}
    if run.ranks.is_main:
        replace_file(run.folder / "memory.json", json.dumps(record, indent=1))


def _measure_heaviest(run: Run) -> int:
    """Bytes at the peak of the run's heaviest micro-batch, weights included, with the gradients of one before it."""
    batch, device = find_heaviest(run.plan, run.rows), run.network.device
    run.network.causal.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ranks = run.ranks if len(batch.ids) > run.share.spread_above else ALONE
    add_gradients(replace(run, ranks=ranks), Step(1, 0.0, batch.examples, (batch,)))
    run.trained.gradient.zero_()
    return peak_memory(device)["memory_bytes"]


def export_adapter(run: Run, state: State) -> Path:
    """Write the result, the last adapter or the best, to `adapter/`. Raises DivergedError when nothing was trained."""
    if run.recipe.run.keep_best and state.best_step not in (None, state.step):
        best = run.checkpoint(state.best_step)
        verify_folder(best)
        restore_checkpoint(best, run)
        score_trained_rows(run, state.best_step, ["best"], StopRequest())
    trained = (one for name, one in run.trained.parameters.items() if "_B" in name or "modules_to_save" in name)
    if not any(one.any() for one in trained):
        hint = "see metrics.jsonl; if no step was better than the base, run.keep_best=false takes the last"
        raise DivergedError("nothing was trained: the adapter is zero", hint=hint)
    target = run.folder / "adapter"
    if not target.exists():
        with staged_folder(target) as stage:
            write_adapter(run.model, stage, base=run.recipe.model)
            set_default_system(run.inputs.tokenizer, run.recipe.chat)
            run.inputs.tokenizer.save_pretrained(stage)
            generation = read_generation(run.recipe.model.base, run.recipe.model.revision)
            stops, prepared = list_stops(run.network.causal.generation_config.eos_token_id), run.inputs.prepared
            if prepared.report.answers and prepared.stop_ids[0] not in stops:  # it would run on past the answers' end
                stops = [prepared.stop_ids[0], *stops]
            generation["eos_token_id"] = stops or None
            write_file(stage / GENERATION_CONFIG, json.dumps(generation, indent=2))
            # Whoever copies the adapter elsewhere takes along how it was made, its base quantized and prompts written.
            write_file(stage / "recipe.yaml", dump_recipe(run.recipe))
            if (record := run.folder / "provenance.json").is_file():  # who lost it continues without
                write_file(stage / record.name, record.read_bytes())
    run.metrics.close()
    return target
