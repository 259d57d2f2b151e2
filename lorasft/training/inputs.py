"""What a run is made of, before any weight is read: the checked recipe, the base's config, the data, the plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from lorasft.adapter_files import adapts_experts
from lorasft.artifact import find_artifact
from lorasft.data.packing import Plan, Portion
from lorasft.data.prepare import prepare
from lorasft.data.tokenizer import add_tokens, load_tokenizer, needed_rows
from lorasft.errors import DeviceError, RecipeError
from lorasft.model.adapter import check_targets
from lorasft.model.base import check_device, check_mostly_quantized, compute_dtype, make_skeleton, read_config
from lorasft.model.scoring import check_ids
from lorasft.recipe import Recipe
from lorasft.terminal import say
from lorasft.training.optimizer import warmup_steps
from lorasft.training.state import RunInputs


def read_inputs(recipe: Recipe, config: Any, folder: Path) -> RunInputs:
    """Prepare the data in `folder`; `config` becomes that of the model with new tokens. Raises ModelError for ids that
    it has no row for, RecipeError for new tokens that cannot be."""
    adapter, start = recipe.adapter, None
    if adapter.start:
        start = find_artifact(adapter.start, base=recipe.model.base)
        start.require_adapter()
        fields = start.adapter_config
        kind = fields.get("init_lora_weights") or ("experts'" if adapts_experts(fields) else None)
        if kind and recipe.model.quantization == "nf4":
            what = f"the {kind} start of {adapter.start} does not belong on a base in 4 bit"
            raise RecipeError(what, where="model.quantization", hint="model.quantization=none")
        sizes = {
            "rank": fields["r"],
            "dropout": fields.get("lora_dropout", 0.0),
            "dora": fields.get("use_dora", False),
            "targets": fields["target_modules"],
            "modules_to_save": fields.get("modules_to_save") or (),
        }
        adapter = adapter.model_copy(update=sizes)
    tokenizer, wanted = load_tokenizer(recipe.model.base, recipe.model.revision), recipe.model.new_tokens
    new_rows, text = add_tokens(tokenizer, wanted), config.get_text_config()
    if start and wanted.keys() != (start.recipe.model.new_tokens if start.recipe else {}).keys():
        raise RecipeError("not those of adapter.start", where="model.new_tokens", hint="name those of its recipe")
    text.vocab_size = needed_rows(text.vocab_size, new_rows)
    prepared = prepare(recipe.data, recipe.chat, tokenizer=tokenizer, folder=folder)
    for notice in prepared.report.notices():
        say(notice)
    check_ids([prepared.store.arrays["ids"]], text.vocab_size, where="model.base")
    return RunInputs(config, tokenizer, new_rows, prepared, make_plan(recipe, prepared.portions), adapter, start)


def read_checked_config(recipe: Recipe) -> Any:
    """The config of the base. Raises RecipeError or DeviceError for what it or this machine cannot do for `recipe`."""
    config, device = read_config(recipe.model.base, recipe.model.revision), PartialState().device
    check_device(device, compute_dtype(recipe.model.dtype, device))
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and recipe.data.max_length > positions:
        what = f"data.max_length is {recipe.data.max_length}, the model has {positions} positions"
        raise RecipeError(what, where="data.max_length", hint=f"data.max_length={positions}")
    skeleton = make_skeleton(config)
    check_targets(skeleton, recipe.adapter)
    decided = sorted(recipe.adapter.model_fields_set - {"start"})
    if recipe.adapter.start and decided:
        what = f"adapter.{decided[0]} has no effect with adapter.start, whose own config decides"
        raise RecipeError(what, where=f"adapter.{decided[0]}", hint="leave one of the two out")
    if recipe.model.dtype == "float16":
        what = "training in float16 needs loss scaling, which lorasft does not do"
        raise DeviceError(what, where="model.dtype", hint="use auto, bfloat16 or float32")
    if recipe.model.quantization == "nf4" and not hasattr(config, "quantization_config"):
        check_mostly_quantized(skeleton)
    return config


def make_plan(recipe: Recipe, portions: Sequence[Portion]) -> Plan:
    """The run as a function of the step. `portions`: what an epoch takes of each source. Raises RecipeError when there
    are fewer rows than one batch."""
    examples = sum(portion.taken for portion in portions)
    if examples < recipe.train.batch_size:
        what = f"{examples} rows are fewer than one batch of {recipe.train.batch_size}"
        raise RecipeError(what, where="train.batch_size", hint=f"train.batch_size={examples}")
    train, tokens = recipe.train, recipe.machine.micro_batch_tokens
    steps = train.steps or max(1, math.ceil(train.epochs * math.ceil(examples / train.batch_size)))
    warmup_steps(steps, recipe.schedule)
    if tokens == "auto":
        tokens = 4096 if PartialState().device.type == "cuda" else 2048  # measured on CPU
    processes = PartialState().num_processes
    sizes = (examples, train.batch_size, steps)
    return Plan(*sizes, train.seed, train.loss, tokens, processes, portions=tuple(portions))
