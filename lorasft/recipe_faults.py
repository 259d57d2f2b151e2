"""What is wrong with a recipe, in plain words: what pydantic found, and the names that users bring from elsewhere."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from lorasft.errors import LorasftError, RecipeError, UnsafeError
from lorasft.strict_yaml import Document, KeyPath, read_scalar

# What TRL, transformers, PEFT, Axolotl, LLaMA-Factory, Unsloth and torchtune call it -> what it is here.
PEERS = {
    "model.base": "base_model model_name_or_path model_name model_id pretrained_model_name_or_path",
    "model.revision": "model_revision",
    "model.quantization (nf4 or none)": "load_in_4bit load_in_8bit quantization_bit quantization_config",
    "model.dtype": "bf16 fp16 tf32 torch_dtype bnb_4bit_compute_dtype compute_dtype",
    "adapter.rank": "r lora_r lora_rank lora_dim",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.targets": "lora_target target_modules lora_target_modules lora_target_linear lora_attn_modules",
    "adapter.rslora": "use_rslora peft_use_rslora",
    "adapter.dora": "use_dora peft_use_dora",
    "adapter.modules_to_save": "lora_modules_to_save additional_target",
    "adapter.start": "lora_model_dir adapter_name_or_path",
    "data.train": "dataset datasets dataset_name dataset_path train_file data_files",
    "data.eval": "val_set_size eval_dataset test_datasets eval_split validation_file",
    "data.format": "dataset_format dataset_type",
    "data.max_length": "sequence_len max_seq_length max_seq_len cutoff_len model_max_length",
    "chat.template": "chat_template chat_template_path chat_template_jinja",
    "chat.template_options": "chat_template_kwargs",
    "chat.system": "system_prompt default_system system_message",
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
    "run.output": "output_dir",
    "run.log_every": "logging_steps log_every_n_steps",
    "run.eval_every": "eval_steps evals_per_epoch eval_strategy",
    "run.save_every": "save_steps saves_per_epoch save_strategy",
    "run.keep": "save_total_limit",
    "run.keep_best": "load_best_model_at_end",
    "run.trackers": "report_to use_wandb wandb_project",
    "machine.activation_checkpointing": "gradient_checkpointing use_gradient_checkpointing",
    "machine.attention": "flash_attention flash_attn attn_implementation sdp_attention use_flash_attention_2",
    "nothing: sequences are always packed, without padding": "packing sample_packing pad_to_sequence_len eval_packing",
}
_SECRET = re.compile(r"(token|secret|password|api_key)$", re.IGNORECASE)
_SECRET_IN_TEXT = re.compile(r"(token|secret|password|api_key)\b", re.IGNORECASE)


def plain_faults(error: ValidationError, document: Document, schema: dict[str, Any]) -> list[LorasftError]:
    """One fault per key that pydantic refused, with the place it stands at; `schema` is that of recipe files."""
    found = {}
    for detail in error.errors(include_url=False, include_context=False):
        path = _path_in(document.value, detail["loc"], missing=detail["type"] == "missing")
        found[path] = detail["type"]
    # A union reports every branch: the branch that got deepest is the one that was meant.
    above = {path[:end] for path in found for end in range(len(path))}
    # What was refused before has no value; that one is missing there is no second fault.
    refused = {place for fault in document.faults for place in str(fault.where).split(" and ")}
    return [
        _fault(path, kind, document, schema)
        for path, kind in found.items()
        if path not in above and (value_at(path, document.value) is not None or _place(path, document) not in refused)
    ]


def across_faults(settings: dict[str, Any], document: Document) -> list[LorasftError]:
    """Faults between keys that are each fine; `settings` is the recipe as plain values."""
    run, held_out = settings["run"], settings["data"]["eval"]
    faults: list[LorasftError] = []
    if held_out is None and run["eval_every"] is not None:
        where = _place(("run", "eval_every"), document)
        hint = "run.eval_every=null, or data.eval=FILE to have something to evaluate on"
        faults.append(RecipeError("run.eval_every without held-out data", where=where, hint=hint))
    if run["keep_best"] and (held_out is None or run["eval_every"] is None):
        missing, hint = (
            ("data.eval", "data.eval=0.02") if held_out is None else ("run.eval_every", "run.eval_every=100")
        )
        where = _place(("run", "keep_best"), document)
        faults.append(RecipeError(f"run.keep_best needs {missing}", where=where, hint=hint))
    return faults


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of `names`, or None when none is similar."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)), None)


def printable(text: str) -> str:
    """At most 80 characters of `text`, with nothing in it that a terminal would obey."""
    short = text if len(text) <= 80 else text[:77] + "..."
    return short if short.isprintable() else repr(short)[1:-1]


def shows_secret(override: str) -> bool:
    """Whether an override seems to hold a token or password, so that it must not be repeated."""
    return bool(_SECRET_IN_TEXT.search(override))


def value_at(path: KeyPath, value: Any) -> Any:
    """What stands at `path` in a tree of mappings and lists, or None."""
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def _path_in(value: Any, loc: tuple[int | str, ...], *, missing: bool) -> KeyPath:
    """The part of pydantic's location that stands in the recipe: without the names of union branches."""
    path: list[int | str] = []
    for part in loc:
        keys: Any = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
        if part in keys:
            value = value[part]
            path.append(part)
    return (*path, loc[-1]) if missing and isinstance(loc[-1], str) else tuple(path)


def _fault(path: KeyPath, kind: str, document: Document, schema: dict[str, Any]) -> LorasftError:
    where, name = _place(path, document), _dotted(path)
    value = value_at(path, document.value)
    if kind == "extra_forbidden":
        return _unknown_key(path, value, where, schema)
    if path == ("data", "train") and value in (None, []):
        return RecipeError("no data to train on", where=where, hint="data.train=FILE")
    if kind == "missing" and value is None:
        return RecipeError(f"{name} is missing", where=where, hint=f"{name}=...")
    if path == ("optimizer", "learning_rate") and kind == "less_than_equal":
        meant = f"{value:e}"[0]
        what = f"optimizer.learning_rate: {value} is far outside 1e-6 ... 1e-2"
        return RecipeError(what, where=where, hint=f"did you mean {meant}e-4?")
    if _names_code(path[-1], value):
        return UnsafeError(f"{name}: a kernel from a repository would be code", where=where, hint=f"{name}: auto")
    node = _schema_at(path, schema)
    expected = _expected(node, schema)
    shown = "a value that is not shown" if _SECRET.search(str(path[-1])) else _shown(value)
    what = f"{name}: expected {expected}, got {shown}"
    default = f"for example {name}={_shown(node['default'])}" if node.get("default") else "lorasft recipes schema"
    return RecipeError(what, where=where, hint=_type_hint(path, value, expected=expected) or default)


def _unknown_key(path: KeyPath, value: Any, where: str, schema: dict[str, Any]) -> LorasftError:
    key, name = str(path[-1]), _dotted(path)
    if _SECRET.search(key):
        what = f"tokens do not belong in recipes: {name}"
        return RecipeError(what, where=where, hint="set HF_TOKEN in the environment, or run `hf auth login`")
    if key == "trust_remote_code":
        return UnsafeError(f"{name}: lorasft runs no code from model repositories", where=where, hint="remove the key")
    if _names_code(key, value):
        return UnsafeError(
            f"{name}: a kernel from a repository would be code", where=where, hint="machine.attention=auto"
        )
    return RecipeError(f"unknown key {name}", where=where, hint=_hint_for(key, path, schema))


def _hint_for(key: str, path: KeyPath, schema: dict[str, Any]) -> str:
    for ours, theirs in PEERS.items():
        if key.lower() in theirs.split():
            return f"here it is {ours}"
    sections = {name: list(_schema_at((name,), schema)["properties"]) for name in schema["properties"]}
    parents = _options(_schema_at(path[:-1], schema), schema)
    siblings = [name for parent in parents for name in parent.get("properties", {})]
    elsewhere = [section for section, keys in sections.items() if key in keys]
    if elsewhere:
        return f"here it is {' or '.join(f'{section}.{key}' for section in elsewhere)}"
    if close := nearest(key, siblings):
        return f"did you mean {close}?"
    return f"known here: {', '.join(siblings)}"


def _names_code(key: str | int, value: Any) -> bool:
    about_kernels = any(word in str(key).lower() for word in ("attn", "attention", "experts_implementation"))
    return about_kernels and isinstance(value, str) and "/" in value


def _type_hint(path: KeyPath, value: Any, *, expected: str) -> str | None:
    if path == ("adapter",):
        return "adapter.rank and adapter.alpha; QLoRA is model.quantization: nf4"
    if "true or false" in expected and str(value).lower() in ("on", "off", "yes", "no", "true", "false"):
        return "true and false are the only truth values"
    if "number" in expected and isinstance(value, str) and isinstance(read_scalar(value), (int, float)):
        return "write the number without quotes"
    return None


def _schema_at(path: KeyPath, schema: dict[str, Any]) -> dict[str, Any]:
    """The part of a JSON schema that describes `path`."""
    node = schema
    for part in path:
        options = [_resolved(option, schema) for option in _options(node, schema)]
        inner = [_inner(option, part) for option in options]
        node = _resolved(next((option for option in inner if option), {}), schema)
    return node


def _inner(node: dict[str, Any], part: str | int) -> dict[str, Any]:
    if isinstance(part, int):
        items: list[dict[str, Any]] = node.get("prefixItems", [])
        return items[part] if part < len(items) else node.get("items", {})
    found = node.get("properties", {}).get(part) or node.get("additionalProperties")
    return found if isinstance(found, dict) else {}


def _options(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The branches of a union, flat."""
    node = _resolved(node, schema)
    if "anyOf" not in node:
        return [node]
    return [option for branch in node["anyOf"] for option in _options(branch, schema)]


def _resolved(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in node:
        return node
    found: dict[str, Any] = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return found


def _expected(node: dict[str, Any], schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    return " or ".join(dict.fromkeys(_words(option, schema) for option in _options(node, schema)))


def _words(node: dict[str, Any], schema: dict[str, Any]) -> str:
    if "const" in node:
        return str(node["const"])
    if "enum" in node:
        return f"one of {', '.join(node['enum'])}"
    if node.get("type") == "array":
        items = node["prefixItems"][0] if "prefixItems" in node else node["items"]
        count = f"{node['maxItems']}, each " if "maxItems" in node else ""
        return f"a list of {count}{'them' if 'anyOf' in items else _expected(items, schema)}"
    if "pattern" in node:
        return "text without a NUL character"
    if node.get("format") == "date":
        return "a date like 2024-07-26"
    if "properties" in node:
        return f"a mapping ({next(iter(node['properties']))}: ...)"
    names = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
    return names.get(node.get("type", ""), "a mapping" if node.get("type") == "object" else "null") + _bounds(node)


def _bounds(node: dict[str, Any]) -> str:
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "greater than",
        "maximum": "at most",
        "exclusiveMaximum": "less than",
    }
    bounds = [f"{word} {node[key]:.10g}" for key, word in words.items() if key in node]
    return f" {' and '.join(bounds)}" if bounds else ""


def _shown(value: Any) -> str:
    """A scalar as it was written; never the content of a mapping or list, which might hold a secret."""
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else f"a list of {len(value)}"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else printable(repr(value))


def _place(path: KeyPath, document: Document) -> str:
    return next(document.places[path[:end]] for end in range(len(path), -1, -1) if path[:end] in document.places)


def _dotted(path: KeyPath) -> str:
    return printable(".".join(str(part) for part in path)) or "the recipe"
