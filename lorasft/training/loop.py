"""The loop: one step on one screen, and when to log, evaluate, save and stop."""

from __future__ import annotations

import math
import resource
import signal
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lorasft.data.packing import Step, assign
from lorasft.errors import DivergedError, Stopped
from lorasft.files import remove_folder
from lorasft.model.loss import weighted_loss
from lorasft.model.scoring import score_batches
from lorasft.signals import StopRequest, exit_code, stop_signals
from lorasft.terminal import say, train_command
from lorasft.training.checkpoint import CheckpointSaver, list_checkpoints
from lorasft.training.layout import oom_context, retry_on_oom
from lorasft.training.optimizer import join_states, learning_rate, optimizer_state
from lorasft.training.samples import add_losses, average_by_source, note_held_out, score_trained_rows, take_samples
from lorasft.training.state import Run, State


def take_step(run: Run, number: int, stop: StopRequest) -> dict[str, Any]:
    """Optimizer step `number`, from 1: its losses summed over all micro-batches and divided once. Returns its metrics.

    Of several processes each does its share; `stop` holds what they agreed on afterwards. Raises DivergedError before
    the update when loss or gradient is not finite, naming the rows, and MicroBatchTooLarge when memory runs out.
    """
    step = run.plan.step(number, run.rows)
    started = time.monotonic()
    trained, optimizer = run.trained, run.optimizer
    total = run.ranks.sum_step(lambda: add_gradients(run, step), trained.gradient, stop=stop)
    norm = get_total_norm([trained.gradient])
    # The only numbers of a step that the host waits for: a GPU computes the while what was launched before.
    loss, grad_norm = torch.stack([total, norm.double()]).tolist()
    refuse_non_finite(run, step, loss=loss, norm=grad_norm)
    if run.recipe.train.max_grad_norm is not None:
        clip_grads_with_norm_([trained.master], run.recipe.train.max_grad_norm, norm)
    peak = run.recipe.optimizer.learning_rate
    rate = learning_rate(number, steps=run.plan.steps, peak=peak, schedule=run.recipe.schedule)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
    optimizer.step()
    trained.gradient.zero_()
    seconds = time.monotonic() - started
    return {
        "step": number,
        "epoch": step.epoch,
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": grad_norm,  # before clipping
        "tokens": step.tokens,
        "supervised_tokens": step.supervised_tokens,
        "tokens_per_second": step.tokens / seconds,
        **peak_memory(run.network.device),
        "seconds": seconds,
    }


def add_gradients(run: Run, step: Step) -> Tensor:
    """Forward and backward over this process's share of the step. Returns its part of the step's loss: () fp64."""
    torch.manual_seed(run.plan.seed * 1_000_003 + step.number + (run.ranks.index << 40))  # dropout: step and process
    loss = torch.zeros((), dtype=torch.float64, device=run.network.device)
    for batch in assign(step.micro_batches, run.share):
        run.trained.check()
        with oom_context(run.rows, batch):
            part = weighted_loss(run.network, batch) / step.divisor
            part.backward()  # type: ignore[no-untyped-call]
        loss += part.detach()
    return loss


def run_steps(run: Run, state: State, *, deadline: float = math.inf) -> State:
    """Run from `state` to the end of the plan. Returns the last state; raises Stopped after a signal, or after the
    first step that begins when the clock (`time.monotonic`) is past the `deadline`, saved."""
    settings, saver = run.recipe.run, CheckpointSaver(state)
    again = f"{train_command(run.folder)} --resume"
    run.network.causal.train()
    with stop_signals(alone=run.ranks.count == 1) as stop:
        if (state.step == 0 and run.inputs.start) or state.evaluation_due:
            state = look(run, state, stop)
            if stop.signal:
                raise Stopped(exit_code(stop.signal), f"stopped before step {state.step + 1}", again)
        elif state.step:
            state = measure_base(run, state, stop)
        end_early(run, state)
        if state.step < run.plan.steps and run.ranks.is_main and (run.folder / "adapter").is_dir():
            remove_folder(run.folder / "adapter")  # of an end that is none any more
        for number in range(state.step + 1, run.plan.steps + 1):
            overdue = time.monotonic() - saver.tried > 60 * (settings.save_minutes or math.inf)
            if run.ranks.is_main and overdue:
                stop.save_wanted = True
            if time.monotonic() > deadline:
                stop.signal = stop.signal or signal.SIGALRM
            values = retry_on_oom(run, partial(take_step, run, number, stop))
            if run.ranks.is_main:
                run.metrics.step(values)
            state = replace(state, step=number)
            if number == run.plan.steps or (settings.eval_every and number % settings.eval_every == 0):
                state = look(run, state, stop)
            elif number == 1:
                state = measure_base(run, state, stop)
            last = number == run.plan.steps  # which the evaluation may have changed
            planned = settings.save_every and number % settings.save_every == 0
            best = settings.keep_best and state.best_step == number
            if last or planned or best or stop.save or stop.signal:
                with run.metrics.progress.interlude("saving"):
                    if run.trained.process[1] > 1:
                        run.moments = join_states(run.ranks.gather(optimizer_state(run.optimizer)))
                    state = run.ranks.on_main(partial(saver.attempt, run, state, final=last or stop.signal > 0))
            if stop.signal and (not last or state.evaluation_due):
                raise Stopped(exit_code(stop.signal), f"stopped after step {number} of {run.plan.steps}, saved", again)
            if last:
                run.signal = stop.signal
                break
        score_trained_rows(run, state.step, ["last", *["best"] * (state.best_step == state.step)], stop)
    return state


def look(run: Run, state: State, stop: StopRequest) -> State:
    """Evaluate, end the run where its patience does, and answer the prompts. Returns the state that `evaluate` does."""
    state = measure_base(run, state, stop)
    state = retry_on_oom(run, partial(evaluate, run, state, stop))
    end_early(run, state)
    take_samples(run, state, stop)
    return state


def measure_base(run: Run, state: State, stop: StopRequest) -> State:
    """Evaluate the base, as which a new adapter begins, as step 0, unless that was done: after the first step, for
    which a person waits, or where a signal came then, before the next. Returns the state with it as the best."""
    if run.inputs.start or state.best_step is not None:
        return state
    with run.model.disable_adapter():
        found = retry_on_oom(run, partial(evaluate, run, replace(state, step=0), stop))
    return replace(found, step=state.step, evaluation_due=state.evaluation_due)


def end_early(run: Run, state: State) -> None:
    """Make the step of `state` the last of the plan after `run.patience` evaluations without a better held-out loss: a
    pure function of the state, so that a resumed run ends where the other one did."""
    every, patience = run.recipe.run.eval_every, run.recipe.run.patience
    if not (every and patience) or state.evaluation_due or state.step >= run.plan.steps:
        return
    if state.step // every - (state.best_step or 0) // every >= patience:
        run.plan = replace(run.plan, steps=state.step)
        if run.ranks.is_main:
            say(f"ended after step {state.step}: {run.early_end}")


def evaluate(run: Run, state: State, stop: StopRequest) -> State:
    """The held-out loss a supervised token, in nats, and that of each row, noted; the state with it when it is the best
    so far. A signal leaves it due. Of the base it is what a run of the same sweep found that is laid out alike."""
    rows, ranks, attention = run.inputs.prepared.held_out, run.ranks, run.network.causal.config._attn_implementation
    state = replace(state, evaluation_due=False)
    if rows is None:
        return state
    base = (run.inputs.prepared.key, run.layout, attention) if state.step == 0 and not run.inputs.start else None
    sums = run.of_base.get(base)
    if sums is None:
        sums = np.zeros((2, len(rows)))  # of each row the losses, and how many
        score = partial(score_batches, run.network, rows.sequences, range(len(rows)))
        with ranks.sync_errors(passes=True), run.metrics.progress.interlude("evaluating"):
            capacity, explain = run.plan.micro_batch_tokens, partial(oom_context, rows)
            for batch, losses in score(capacity=capacity, share=run.share, explain=explain):
                if stop.signal:  # of several processes none, before they agree on it in a step
                    return replace(state, evaluation_due=True)
                add_losses(sums, batch, losses)
        sums = np.sum(ranks.gather(sums, passes=True), axis=0)
        run.of_base |= {base: sums} if base else {}
    total, tokens = sums.sum(axis=1).tolist()
    loss = total / tokens
    if not math.isnan(loss) and (state.best_loss is None or loss < state.best_loss):
        state = replace(state, best_step=state.step, best_loss=loss)
    if ranks.is_main:
        note_held_out(run, rows, (sums[0] / sums[1]).tolist(), state)
        by_source = average_by_source(sums, rows.sources(), run.inputs.prepared.sources)
        run.metrics.evaluation(step=state.step, loss=loss, tokens=int(tokens), by_source=by_source)
    return state


def refuse_non_finite(run: Run, step: Step, *, loss: float, norm: float) -> None:
    """Raise DivergedError, naming the first rows of the step and the last good checkpoint."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    places = ", ".join(str(run.rows.place(int(example))) for example in step.examples[:8])
    saved = list_checkpoints(run.checkpoints)
    what = f"step {step.number} is not finite (loss {loss}, gradient norm {norm}); nothing was updated"
    hint = f"look at these rows or lower optimizer.learning_rate; last good: {saved[-1] if saved else 'none yet'}"
    raise DivergedError(what, where=places, hint=hint)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes at the peak so far: on CUDA of tensors, and of all that the allocator holds; elsewhere of the process."""
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device)
        return {"memory_bytes": torch.cuda.max_memory_allocated(device), "memory_reserved_bytes": reserved}
    return {"memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
