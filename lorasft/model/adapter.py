"""LoRA attached, saved and read in PEFT's own format; what is trainable."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorasft import adapter_files
from lorasft.artifact import Artifact
from lorasft.data.tokenizer import needed_rows
from lorasft.errors import CapacityError, ModelError, RecipeError, reading
from lorasft.files import write_file
from lorasft.machine import free_memory
from lorasft.model.base import compute_dtype, load_base, make_skeleton, read_config
from lorasft.model.linear import use_lean_linears
from lorasft.recipe import AdapterSettings, ModelSettings
from lorasft.terminal import size_text

# Linears whose weights a Mamba block, or its fused kernel, reads without calling them: PEFT refuses the first.
_FUSED = {
    "out_proj": {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"},
    "dt_proj": {"falcon_mamba", "jamba", "mamba"},
}
_HINT = "use the base that it was trained on, or merge with --no-check; for a new one other adapter.targets"
_peft_errors = partial(reading, "PEFT cannot make this adapter", hint=_HINT)


def attach_adapter(base: Any, settings: AdapterSettings, *, seed: int, new_rows: Mapping[int, Any] = {}) -> Any:
    """A new LoRA adapter on `base`, fp32 and trainable, everything else frozen. Returns the PEFT model. `new_rows`: of
    new tokens, see `add_rows`. Raises RecipeError where PEFT cannot train or load them."""
    targets = all_linears(base) if settings.targets == "all-linear" else list(settings.targets)
    tokens, named = add_rows(base, new_rows) if new_rows else {}, [*targets, *settings.modules_to_save]
    unfit = {
        "the head has a bias": getattr(base.get_output_embeddings(), "bias", None) is not None,
        "layers have embeddings of their own": getattr(base.config.get_text_config(), "hidden_size_per_layer_input", 0),
        "embedding or head train as a whole": any(f".{path}".endswith(f".{name}") for path in tokens for name in named),
    }
    for what in (what for what, found in unfit.items() if tokens and found):
        raise RecipeError(f"no new tokens where {what}", where="model.new_tokens", hint="leave it out")
    torch.manual_seed(seed)  # A starts random
    return _wrap(
        base,
        where="adapter.targets",
        r=settings.rank,
        lora_alpha=settings.alpha,  # PEFT scales by any number
        lora_dropout=settings.dropout,
        target_modules=targets,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        modules_to_save=list(settings.modules_to_save) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),  # GPT-2, unless quantized
        trainable_token_indices=tokens or None,
    )


def add_rows(base: Any, new_rows: Mapping[int, Any]) -> dict[str, list[int]]:
    """Give embedding and head of `base` rows for new tokens: each the mean of the rows `new_rows[token]`, or of all, as
    are those that only make a round number. Returns PEFT's trainable_token_indices."""
    before = len(base.get_input_embeddings().weight)
    if (rows := needed_rows(before, new_rows)) > before:
        base.resize_token_embeddings(rows, mean_resizing=False)
    modules = base.get_input_embeddings(), base.get_output_embeddings()
    for weight in {id(module.weight): module.weight.data for module in modules}.values():
        weight[before:] = usual = weight[:before].mean(dim=0, dtype=torch.float32)
        for token, ids in new_rows.items():
            weight[token] = weight[ids].mean(dim=0, dtype=torch.float32) if ids else usual
    return {path: list(new_rows) for path, module in base.named_modules() if module in modules}


def load_adapter(base: Any, artifact: Artifact, *, trainable: bool = False) -> Any:
    """The adapter of `artifact` on `base`. Raises ModelError unless its tensors are those that its config implies."""
    folder, fields = artifact.require_adapter(), dict(artifact.adapter_config)
    weights = adapter_files.read_adapter_weights(folder)
    experts = [path for path in fields["target_modules"] if adapter_files.adapts_experts({"target_modules": [path]})]
    if adapter_files.adapts_experts(fields) and any(hasattr(module, "packed") for module in base.modules()):
        what = "it adapts experts, which is not possible where they are in 4 bit"
        raise ModelError(what, where=folder, hint="--quantization none, or in a recipe model.quantization=none")
    with _peft_errors(where=folder / adapter_files.CONFIG):  # of an earlier transformers
        weights = convert_peft_adapter_state_dict_for_transformers(base, LoraConfig(), weights)
    others = [name for name in weights if ".lora_A." not in name and ".lora_B." not in name]
    others += [key for key in ("target_parameters", "init_lora_weights") if fields.get(key)]
    if others and any(parameter.is_meta for parameter in base.parameters()):  # streamed: for A and B of linears alone
        what = f"the base does not fit into memory, and {others[0]} does not work with one that is streamed"
        raise ModelError(what, where=folder, hint="merge with --no-check")
    weights = adapter_files.subtract_start(weights, fields, folder, lambda path: base.get_submodule(path).weight)
    # PEFT adds whole embeddings where they are adapted, and where the vocabulary was resized: so is `base` then.
    embeddings = [base.get_input_embeddings(), base.get_output_embeddings()]
    paths = [f"{adapter_files.PREFIX}{path}" for path, module in base.named_modules() if module in embeddings]
    whole = {f"{path}{end}" for path in paths for end in (".weight", ".base_layer.weight")} & weights.keys()
    heights = {size for name in whole for size in weights[name].shape[:1]}
    rows, given = len(base.get_input_embeddings().weight), fields.get("trainable_token_indices") or ()
    for height in heights - {rows}:
        base.resize_token_embeddings(height, mean_resizing=False)
    new = {one for ids in (given.values() if isinstance(given, dict) else [given]) for one in ids if one >= rows}
    if new and not heights:
        add_rows(base, dict.fromkeys(new))
    fields["target_modules"] = experts + adapter_files.list_adapted(weights, fields)
    other = {"peft_type", "base_model_name_or_path", "revision", "init_lora_weights"}  # `base` is what it is put on
    known = fields.keys() - other - (set() if trainable else {"lora_dropout"})  # which PEFT refuses for experts
    model = _wrap(base, where=folder / adapter_files.CONFIG, **{key: fields[key] for key in known})
    give_weights(model, weights, where=folder, whole=whole)
    kinds = ("lora_", "modules_to_save", "trainable_tokens") if trainable else ()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(kind in name for kind in kinds))
    return model


def load_artifact(artifact: Artifact, device: torch.device, *, streamed: bool | Literal["auto"] = False) -> Any:
    """The base, as a PEFT model when there is an adapter, in evaluation mode.

    `streamed`: weights stay in their files and are read a layer at a time, whenever it is computed; `auto`: where they
    do not fit. Raises CapacityError for others that do not.
    """
    model, size, free = artifact.model, 0, free_memory(device)
    config = read_config(model.base, model.revision)
    if model.quantization == "none" and not hasattr(config, "quantization_config"):
        size = make_skeleton(config).num_parameters() * compute_dtype(model.dtype, device).itemsize
    streamed = size > 0.8 * free if streamed == "auto" else streamed
    if size > free and not streamed:
        hint = "--quantization nf4" if "init_lora_weights" not in artifact.adapter_config else "free memory"
        what = f"the base takes {size_text(size)} when it is not in 4 bit, and {size_text(free)} are free"
        raise CapacityError(what, where=artifact.model.base, hint=hint)
    keep = artifact.recipe.machine.cache_base if artifact.recipe else "auto"
    base = load_base(artifact.model, device, streamed=streamed, keep=keep)
    return (load_adapter(base, artifact) if artifact.adapter else base).eval()


def all_linears(base: Any) -> list[str]:
    """What `all-linear` means: every linear of the language model but its head, and nothing else.

    Short names where they say exactly that, else full paths: of a model that has towers, short names also stand for
    linears of these, and they stand for fused experts too where a model has them.
    """
    head = base.get_output_embeddings()
    paths = sorted(path for path in _find_linears(base) if base.get_submodule(path) is not head)
    names = sorted({path.rpartition(".")[2] for path in paths})
    same = {path for path, _ in base.named_modules() if path.rpartition(".")[2] in names}
    fused = any(parameter.dim() > 2 for parameter in base.parameters())
    return names if same == set(paths) and not fused and not getattr(base, "left_out", []) else paths


def _find_linears(base: Any) -> set[str]:
    """The linears of the language model that can be adapted, its head among them, by their paths in `base`."""
    refused = {name for name, families in _FUSED.items() if base.config.model_type in families}
    language = {*base.get_decoder().modules(), base.get_output_embeddings()}
    # A router that is a linear may give more than one (Llama 4).
    kinds = (nn.Linear.forward, Conv1D.forward, Linear4bit.forward)
    found = [path for path, one in base.named_modules() if one in language and type(one).forward in kinds]
    config = LoraConfig(target_modules=[path for path in found if path.rpartition(".")[2] not in refused])
    # In the place of shared experts' linears (DeepSeek, GLM, Qwen2-MoE) PEFT adapts the stacks of a like name.
    convert_peft_config_for_transformers(config, base, None)
    return set(config.target_modules or ())


def give_weights(model: Any, weights: dict[str, Tensor], *, where: object, whole: Collection[str] = ()) -> None:
    """Put adapter tensors, and `whole` ones of the base, into `model`, exactly. Raises ModelError naming what is
    missing, surplus or misshapen."""
    own = {name: tensor for name, tensor in model.state_dict().items() if name in whole} | adapter_weights(model)
    known, given = ({name: list(tensor.shape) for name, tensor in side.items()} for side in (own, weights))
    for name in sorted(known.keys() | given.keys()):
        if known.get(name) != given.get(name):
            what = f"it does not fit the base: {name} is {given.get(name, 'missing')}, not {known.get(name, 'known')}"
            raise ModelError(what, where=where, hint="use the base that it was trained on, or merge with --no-check")
    if any(tensor.is_meta for tensor in own.values()):  # PEFT made A and B without numbers, as the base is streamed
        named = {name.replace(".weight", ".default.weight"): tensor.float() for name, tensor in weights.items()}
        model.load_state_dict(named, strict=False, assign=True)
    else:
        set_peft_model_state_dict(model, weights)


def adapter_weights(model: Any) -> dict[str, Tensor]:
    """What is saved: the adapter's tensors under PEFT's names, fp32."""
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def write_adapter(model: Any, folder: Path, *, base: ModelSettings) -> None:
    """Write a plain PEFT adapter into the existing `folder`: loads in PEFT, vLLM and TRL without lorasft."""
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base.base, "revision": base.revision, "inference_mode": True}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_weights(model).items()}
    if getattr(model.get_base_model(), "left_out", []):  # PEFT made names of the paths that mean the towers as well
        config["target_modules"] = adapter_files.list_adapted(weights, config)
    text = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # target_modules is a set
    write_file(folder / adapter_files.CONFIG, text)
    write_file(folder / adapter_files.WEIGHTS, save(weights, metadata={"format": "pt"}))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_targets(base: Any, settings: AdapterSettings) -> None:
    """Raise RecipeError for a target that is not a linear, a module to save that does not exist, or a tied head.
    `base` may be a skeleton without weights. A tied head or embedding that is trained would leave its twin behind."""
    if not settings.targets:
        raise RecipeError("no targets: nothing would train", where="adapter.targets", hint="use all-linear")
    modules = dict(base.named_modules())
    embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
    tied = embeddings[0].weight is getattr(embeddings[1], "weight", None)
    targets = () if settings.targets == "all-linear" else settings.targets
    wanted = [("adapter.targets", name, _find_linears(base)) for name in targets]
    wanted += [("adapter.modules_to_save", name, set(modules)) for name in settings.modules_to_save]
    for key, name, fitting in wanted:
        found = {path for path in modules if path == name or path.endswith(f".{name}")}
        if not found or found - fitting:
            known = sorted({path.rpartition(".")[2] for path in fitting if path and not path[-1].isdigit()})
            what = f"{len(found - fitting)} of {len(found)} called {name} are not linears of the language model"
            what = f"{what} that can be adapted" if found else f"no module is called {name}"
            hint = f"all-linear, full paths, or names: {', '.join(known)}"
        elif tied and any(modules[path] in embeddings for path in found):
            what = f"{name} is tied to its twin, which would not be trained along"
            hint = "leave it out, or use a base that is not tied"
        else:
            continue
        raise RecipeError(f"{key}: {what}", where=key, hint=hint)


def _wrap(base: Any, *, where: object, **settings: Any) -> Any:
    """The PEFT model of `base` with LoRA by PEFT's `settings`. Raises ModelError where PEFT cannot make it."""
    with warnings.catch_warnings(), _peft_errors(where=where):
        # peft 0.21 asks transformers by a name that it gave up (peft/peft_model.py).
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    use_lean_linears(model.get_base_model())
    return model
