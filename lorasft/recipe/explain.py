"""What is wrong with a recipe: pydantic's findings with places and hints, and names that users know from peers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from lorasft.errors import LorasftError, RecipeError, UnsafeError, in_words
from lorasft.recipe import DataSource, Recipe
from lorasft.recipe.yaml_reader import Document, KeyPath
from lorasft.terminal import shorten

# What it is here -> what TRL, transformers, PEFT, Axolotl, LLaMA-Factory, Unsloth and torchtune call it, if that is
# not near by its letters (as lora_alpha is).
PEERS = {
    "model.base": "base_model model_name_or_path model_name model_id pretrained_model_name_or_path",
    "model.quantization (nf4 or none)": "load_in_4bit load_in_8bit quantization_bit quantization_config",
    "model.dtype": "bf16 fp16 tf32 torch_dtype bnb_4bit_compute_dtype compute_dtype",
    "adapter.rank": "r lora_r lora_rank lora_dim",
    "adapter.targets": "lora_target target_modules lora_target_modules lora_target_linear lora_attn_modules",
    "adapter.start": "lora_model_dir adapter_name_or_path",
    "data.train": "dataset datasets dataset_name dataset_path train_file data_files",
    "data.eval": "val_set_size eval_dataset test_datasets eval_split validation_file",
    "data.format": "dataset_format dataset_type",
    "data.max_length": "sequence_len max_seq_length max_seq_len cutoff_len model_max_length",
    "chat.supervise": "train_on_inputs assistant_only_loss completion_only_loss roles_to_train mask_history",
    "train.epochs": "num_train_epochs num_epochs",
    "train.steps": "max_steps max_steps_per_epoch",
    "train.batch_size (examples per optimizer step, over all devices; the machine cuts it)": (
        "gradient_accumulation_steps per_device_train_batch_size micro_batch_size train_batch_size global_batch_size"
    ),
    "train.max_grad_norm": "gradient_clipping clip_grad_norm",
    "train.seed": "data_seed random_state",
    "optimizer.learning_rate": "lr",
    "optimizer.name (adamw or adamw8bit)": "optim",
    "optimizer.betas": "adam_beta1 adam_beta2",
    "schedule.name": "lr_scheduler lr_scheduler_type",
    "schedule.warmup (a whole number is steps, a fraction a share)": "warmup_ratio warmup_steps num_warmup_steps",
    "schedule.min_ratio": "cosine_min_lr_ratio min_lr_rate",
    "run.log_every": "logging_steps log_every_n_steps",
    "run.eval_every": "eval_steps evals_per_epoch eval_strategy",
    "run.save_every": "save_steps saves_per_epoch save_strategy",
    "run.keep": "save_total_limit",
    "run.keep_best": "load_best_model_at_end",
    "run.trackers": "report_to use_wandb wandb_project",
    "machine.activation_checkpointing": "gradient_checkpointing use_gradient_checkpointing",
    "machine.attention": "flash_attention flash_attn attn_implementation sdp_attention use_flash_attention_2",
    "nothing: sequences are always packed, without padding": "packing sample_packing pad_to_sequence_len eval_packing",
    "nothing: torch's own kernels are used": "kernels liger use_liger use_liger_kernel",
    "nothing: set HF_TOKEN in the environment, or run `hf auth login`": "hf_token hub_token token use_auth_token",
}
_SECTIONS: dict[str, Any] = {name: field.annotation for name, field in Recipe.model_fields.items()}
_NAMES = {name: name for name in _SECTIONS}  # each key -> its last part
_NAMES |= {f"{name}.{key}": key for name, section in _SECTIONS.items() for key in section.model_fields}
_NAMES |= {f"data.train.{key}": key for key in DataSource.model_fields}


def explain(error: ValidationError, document: Document) -> list[LorasftError]:
    """One error for each key that pydantic refused, with the place where it was written."""
    found: dict[KeyPath, list[Any]] = {}
    for detail in error.errors(include_url=False):
        path = _written_path(document.value, detail["loc"], missing=detail["type"] == "missing")
        found.setdefault(path, []).append({**detail, "loc": path})
    # A union reports every branch: the branch that got deepest is the one that was meant.
    above = {path[:end] for path in found for end in range(len(path))}
    return [_explain_key(path, details, document) for path, details in found.items() if path not in above]


def check_together(recipe: Recipe, document: Document) -> None:
    """Raise RecipeError for keys that are each fine, but not together."""
    held_out, every = recipe.data.eval is not None, recipe.run.eval_every is not None
    key = "eval_every" if every and not held_out else "keep_best"
    if (every or recipe.run.keep_best) and not (every and held_out):
        needed, example = ("run.eval_every", 100) if held_out else ("data.eval", 0.02)
        hint = f"{needed}={example}, or run.eval_every=null and run.keep_best=false"
        raise RecipeError(f"run.{key} needs {needed}", where=place_of(("run", key), document), hint=hint)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of `names`, or None when none is similar."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)), None)


def value_at(path: KeyPath, value: Any) -> Any:
    """What is at `path` in a tree of mappings and lists, or None."""
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def place_of(path: KeyPath, document: Document) -> str:
    """Where `path` was written, or else what contains it."""
    return next(document.places[path[:end]] for end in range(len(path), -1, -1) if path[:end] in document.places)


def _written_path(value: Any, loc: tuple[int | str, ...], *, missing: bool) -> KeyPath:
    """The part of pydantic's location that is in the recipe: without the names of union branches."""
    path: list[int | str] = []
    for part in loc:
        keys: Any = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
        if part in keys:
            value = value[part]
            path.append(part)
    return (*path, loc[-1]) if missing else tuple(path)


def _explain_key(path: KeyPath, details: list[Any], document: Document) -> LorasftError:
    where, name = place_of(path, document), shorten(".".join(map(str, path)))
    key, value = str(path[-1]), value_at(path, document.value)
    kernel = isinstance(value, str) and "/" in value and re.search("attn|attention|experts_impl", key, re.IGNORECASE)
    if kernel or key == "trust_remote_code":
        return UnsafeError(f"{name}: lorasft runs no code from repositories", where=where, hint="remove the key")
    if details[0]["type"] == "extra_forbidden":
        return RecipeError(f"unknown key {name}", where=where, hint=_hint_for_name(key))
    return RecipeError(in_words(details), where=where, hint="lorasft recipes schema has each key and its values")


def _hint_for_name(key: str) -> str:
    ours = [ours for ours, theirs in PEERS.items() if key.lower() in theirs.split()]
    close = None if ours else nearest(key, _NAMES.values())
    ours += [name for name, own in _NAMES.items() if own == close]
    return f"here it is {' or '.join(ours)}" if ours else "lorasft recipes schema has each key"
