"""The quantized loader: a frozen base in NF4 or in its own 16 or 32 bits."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes as bnb
import torch
import transformers
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer
from transformers.utils import cached_file

from lorasft.adapter_files import read_adapter_config
from lorasft.artifact import GENERATION_CONFIG, Artifact, stored_as
from lorasft.errors import DeviceError, ModelError, UnsafeError
from lorasft.hub import is_folder, loading
from lorasft.model.attention import default_attention
from lorasft.model.cache import Keep, find_place, keep_base, read_kept
from lorasft.model.experts import BLOCK, Nf4Quantizer, find_experts, packed_parts
from lorasft.model.linear import quant_state
from lorasft.model.packed import list_stored
from lorasft.model.tables import keep_on_host, vocabulary_tables
from lorasft.model.towers import model_class
from lorasft.recipe import ModelSettings
from lorasft.tensors import find_weights, open_tensors
from lorasft.terminal import say

# Above this share of the linear weights left in 16 bits, a "4-bit" model is one in name only (Llama 4's experts).
_MOST_UNQUANTIZED = 0.15
_loading = partial(loading, "the model", hint="name a model folder or a hub id that can be reached")


def load_base(settings: ModelSettings, device: torch.device, *, streamed: bool = False, keep: Keep = False) -> Any:
    """The base on `device`, frozen, in evaluation mode, under transformers' own attention.

    `streamed`: its weights stay in their files and are read layer by layer, whenever they are computed; not in 4 bit.
    `keep`: what is quantized is kept for the next start, and taken from there where an earlier one kept it.
    Raises ModelError, UnsafeError where remote code would be needed, and DeviceError for a GPU that is too old.
    """
    dtype = compute_dtype(settings.dtype, device)
    check_device(device, dtype)
    config = read_config(settings.base, settings.revision)
    check_files(settings.base)
    scheme = nf4_scheme(dtype, config)
    quantize = settings.quantization == "nf4" and not hasattr(config, "quantization_config")
    stored = _set_compute_dtype(config, scheme)
    stops = make_stops(settings, config)
    tables = keep_on_host(make_skeleton(config, dtype), device) if device.type == "cuda" and not streamed else []
    places = {"": "disk" if streamed else device, **{f"{path}.weight": torch.device("cpu") for path in tables}}
    # Its hooks would bring a table to the card, all of it, for each use. bitsandbytes refuses the word "cpu".
    hooks = patch("transformers.modeling_utils.accelerate_dispatch") if tables else contextlib.nullcontext()
    packing = patch.dict(AUTO_QUANTIZER_MAPPING, {"bitsandbytes_4bit": Nf4Quantizer} if quantize else {})

    def read(source: str | None, *, packed: bool = False, **how: Any) -> Any:
        own = copy.deepcopy(config)  # transformers writes into it
        if packed:
            own.quantization_config = scheme.to_dict()
        with quiet_progress(), _loading(settings.base), hooks, packing:
            model, found = model_class(config).from_pretrained(
                source,
                # As it was read and cleared: what its file says of attention would win over the argument.
                config=own,
                generation_config=stops,
                output_loading_info=True,
                **how,
                dtype=dtype,
                device_map={**places},
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation=default_attention(config),
            )
        if missing := sorted(found["missing_keys"]):  # transformers would continue with random numbers
            what = f"the weights lack {missing[0]} and {len(missing) - 1} others"
            raise ModelError(what, where=settings.base, hint="download the base again; is config.json its own?")
        return model

    place = find_kept(settings, config, device) if keep and quantize else None
    kept = read_kept(place, partial(read, packed=True)) if place else None
    how: dict[str, Any] = {"quantization_config": scheme} if quantize else {}  # None would hide the config's own
    model = read(**_find_source(settings, config), **how) if kept is None else kept
    model.name_or_path = model.config._name_or_path = settings.base
    # What of a base that comes in 4 bit is not in 4 bit transformers leaves as it is.
    for parameter in model.parameters() if stored else ():
        if parameter.dtype in (torch.float16, torch.bfloat16) and not isinstance(parameter, bnb.nn.Params4bit):
            parameter.data = parameter.data.to(dtype)
    patch_linear4bit(model, device)
    keep_on_host(model, torch.device("cpu") if streamed else device)
    model.requires_grad_(False)
    if place and kept is None:
        with quiet_progress():
            keep_base(model, place, wanted=keep)
    return model


def find_kept(settings: ModelSettings, config: Any, device: torch.device) -> Path:
    """Where the base of `config` is kept in 4 bit, or would be, when it is quantized on `device`."""
    commit = getattr(config, "_commit_hash", None)
    folder = Path(cached_file(settings.base, "config.json", revision=commit)).parent
    return find_place(folder, commit, nf4_scheme(compute_dtype(settings.dtype, device), config), device)


def copy_base(base: Any, *, own_rows: bool) -> Any:
    """`base`, which was loaded and nothing else, once more: other modules around the same frozen tensors, so that
    nothing that is put on one reaches the other. `own_rows`: those of embedding and head, which new tokens change."""
    shared: dict[int, Any] = {id(one): one for one in base.parameters()}
    for module in (base.get_input_embeddings(), base.get_output_embeddings()) if own_rows else ():
        shared.pop(id(module.weight), None)
    states = [one.quant_state for one in shared.values() if getattr(one, "quant_state", None) is not None]
    return copy.deepcopy(base, shared | {id(state): state for state in states})


def _find_source(settings: ModelSettings, config: Any) -> dict[str, Any]:
    """What transformers reads a base from: of FP8 and MXFP4 the weights, each dequantized when it is asked for."""
    if not hasattr(config, "stored_as"):
        return {"source": settings.base, "revision": settings.revision}
    say(f"the base comes in {config.stored_as}: it is read in 16 bits, a weight at a time")
    files = [open_tensors(path) for path in find_weights(Artifact(settings.base, settings).base)]
    return {"source": None, "state_dict": list_stored(files)}


def _set_compute_dtype(config: Any, scheme: BitsAndBytesConfig) -> bool:
    """Have a base that comes in 4 bit compute in the dtype of `scheme`, and say so where its config names another.
    Returns whether it comes so."""
    stored = getattr(config, "quantization_config", None) or {}
    key, told = "bnb_4bit_compute_dtype", scheme.to_dict()["bnb_4bit_compute_dtype"]
    if stored and stored.get(key) != told:
        say(f"computing in {told} (model.dtype, --dtype), not in {stored.get(key)}, which the base's config names")
        stored[key] = told
    return bool(stored)


def make_stops(settings: ModelSettings, config: Any) -> GenerationConfig:
    """Of what the generation config of a base says only its stops: transformers would follow beams and penalties."""
    said = read_generation(settings.base, settings.revision) or vars(config)
    return GenerationConfig(eos_token_id=said.get("eos_token_id"))


def read_generation(base: str, revision: str | None) -> dict[str, Any]:
    """What the generation config of a base says, where it has one."""
    quiet = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False)
    with _loading(base):
        path = cached_file(base, GENERATION_CONFIG, revision=revision, **quiet)
        return dict(json.loads(Path(path).read_bytes())) if path else {}


def patch_linear4bit(model: Any, device: torch.device) -> None:
    """Keep bitsandbytes from changing weights that are computed with. Raises ModelError where it computes wrongly."""
    for layer in model.modules():
        sizes = [(2 * codes.shape[2], BLOCK) for codes, *_ in packed_parts(layer).values()]
        if sizes:
            layer.weights.whole = device.type == "cuda"
        if isinstance(layer, bnb.nn.Linear4bit):
            # Else an evaluation repacks the weight in place on AVX512-BF16 CPUs, after which gradients are lost and
            # dequantization is garbage (bitsandbytes 0.50, related: bitsandbytes issue 2078).
            layer.support_avx512bf16_for_cpu = False
            sizes = [(layer.in_features, quant_state(layer).blocksize)]
        for inputs, block in sizes:
            if device.type == "cpu" and inputs % block:
                # bitsandbytes 0.50 restarts its constants in every row there: 25 % off, where NF4 costs 9 %.
                what = f"a matrix of {inputs} inputs cannot be 4-bit on a CPU"
                hint = "--quantization none, or in a recipe model.quantization=none"
                raise ModelError(what, where=model.name_or_path, hint=hint)


def check_files(base: str) -> None:
    """Look at the headers of a local base's weights: whole, and no pickles. Raises ModelError or UnsafeError."""
    if Path(base).is_dir():
        for path in find_weights(Path(base)):
            open_tensors(path)


def nf4_scheme(dtype: torch.dtype, config: Any = None) -> BitsAndBytesConfig:
    """NF4 in groups of 64, scales quantized as well, taken out in `dtype`; but what Mamba reads without a call."""
    kept = ["dt_proj", "lm_head"] if getattr(config, "model_type", None) == "mamba" else None
    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=kept, **how)


def find_quantized(config: Any) -> dict[str, bool]:
    """The language model's weights that `load_base` puts into NF4, by their paths, and whether files have (in, out)."""
    skeleton = make_skeleton(config)
    quantize_skeleton(skeleton, torch.bfloat16)
    found = {}
    for path, module in skeleton.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            found[f"{path}.weight"] = module.source_cls is Conv1D
        found |= {f"{path}.{name}": module.is_transposed for name in packed_parts(module)}
    return found


def quantize_skeleton(skeleton: Any, dtype: torch.dtype) -> None:
    """Put what `load_base` puts into NF4 into the place of the linears and experts of `skeleton`, as shapes."""
    # Of a base that comes in 4 bit the experts are what they are in its files.
    kind = AutoHfQuantizer.from_config if hasattr(skeleton.config, "quantization_config") else Nf4Quantizer
    quantizer = kind(nf4_scheme(dtype, skeleton.config), pre_quantized=kind is Nf4Quantizer)
    quantizer.preprocess_model(skeleton, device_map={"": "cpu"}, dtype=dtype)
    quantizer.postprocess_model(skeleton)


def read_config(base: str, revision: str | None = None) -> Any:
    """The config of a causal language model. Raises ModelError or UnsafeError before any weight is read."""
    folder = Path(base)
    if is_folder(base) and not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            origin = read_adapter_config(folder).get("base_model_name_or_path")
            raise ModelError("this is an adapter, not a base", where=base, hint=f"its base is model.base: {origin}")
        raise ModelError("no config.json: this is no model folder", where=base, hint="name a model folder or a hub id")
    with _loading(base):
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
        fits = not config.is_encoder_decoder and model_class(config)
    if not fits:
        what = f"{config.model_type} is not a causal language model"
        raise ModelError(what, where=base, hint="lorasft trains decoder-only models")
    # What a config says of attention and experts is taken out: a repository there would be fetched, and run.
    for part in filter(None, (config, *(getattr(config, name, None) for name in config.sub_configs))):
        scheme = getattr(part, "quantization_config", None) or {}
        if stored := stored_as(scheme, base):  # for all but its files it is a base in 16 bits
            config.stored_as = stored
            del part.quantization_config
        for key in ("_attn_implementation", "_experts_implementation"):
            if "/" in str(getattr(part, key, None)):
                what = f"the config names a kernel, which would be code: {getattr(part, key)}"
                raise UnsafeError(what, where=base, hint=f"take {key.lstrip('_')} out of config.json")
            setattr(part, key, None)
    return config


def make_skeleton(config: Any, dtype: torch.dtype | None = None) -> Any:
    """The model of `config` without weights: on the meta device."""
    config = copy.deepcopy(config)  # transformers notes the attention in it
    with torch.device("meta"), _loading(config.name_or_path):
        return model_class(config)._from_config(config, dtype=dtype, attn_implementation=default_attention(config))


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of activations: `wanted`; for auto bf16 where the device multiplies it natively, else fp32.
    The capability is tested, not `is_bf16_supported()`, which also answers yes where bf16 is emulated."""
    if wanted != "auto":
        return getattr(torch, wanted)  # type: ignore[no-any-return]
    native = False
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        able = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        # ATen held to AVX2 (ATEN_CPU_CAPABILITY) still asks the CPU, and then fails in attention in bf16.
        native = able and torch.backends.cpu.get_cpu_capability() != "AVX2"
    return torch.bfloat16 if native else torch.float32


def check_device(device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Raise DeviceError for a GPU that torch has no kernels for, or that only emulates a `dtype` to train in: bf16
    below sm_80."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"
    known = (re.findall(r"\d+", arch)[:1] for arch in torch.cuda.get_arch_list())
    least = min((int(number) for found in known for number in found), default=0)
    if 10 * major + minor < least:
        what = f"torch {torch.__version__} has no kernels for {name}, only for sm_{least} and later"
        raise DeviceError(what, hint="a newer GPU, or CUDA_VISIBLE_DEVICES= for the CPU")
    if dtype == torch.bfloat16 and major < 8:
        hint = "model.dtype=float32; a run that began in bfloat16 continues on a GPU of sm_80 or later"
        raise DeviceError(f"{name} does not multiply in bfloat16", where="model.dtype", hint=hint)


def nf4_error(device: torch.device) -> tuple[float, float]:
    """Largest error, relative to the largest value, of a linear in NF4 and of its backward, against float64; and what
    rounding in the device's own precision explains."""
    dtype = compute_dtype("auto", device)
    layer = bnb.nn.Linear4bit(256, 256, bias=False, compute_dtype=dtype, compress_statistics=False, quant_type="nf4")
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (1024, 64), generator=random)  # blocks of numbers that share a scale
    codes[:, 0] = 15  # the largest: NF4 has these numbers
    blocks = bnb.functional.get_4bit_type("nf4", device="cpu")[codes] * (torch.rand(1024, 1, generator=random) + 0.5)
    layer.weight.data = weight = blocks.view(256, 256)
    layer = layer.to(device)
    layer.support_avx512bf16_for_cpu = False  # as in training
    identity = torch.eye(256, dtype=dtype, device=device)
    entered = identity.clone().requires_grad_()
    out = layer(entered)
    found = (out.detach().t(), *torch.autograd.grad(out, entered, identity))
    error = max(float((one.cpu().double() - weight).abs().max() / weight.max()) for one in found)
    return error, 1e-5 if dtype == torch.float32 else 2e-2


def count_bytes(model: Any, *, shard: int = 1) -> dict[str, int]:
    """Where the bytes of a model are, by kind; constants count as 4-bit, what stays on the host not at all. `shard`:
    over how many processes codes, constants, embedding and head lie."""
    tables = {id(one.weight) for one in vocabulary_tables(model)} if shard > 1 else set()
    sizes = dict.fromkeys(("4-bit weights", "16-bit weights", "32-bit weights", "adapter"), 0)
    packed = {id(part) for module in model.modules() for parts in packed_parts(module).values() for part in parts}
    for parameter in (one for one in model.parameters() if not hasattr(one, "on_host")):
        kind = "adapter" if parameter.requires_grad else f"{16 if parameter.element_size() == 2 else 32}-bit weights"
        state = getattr(parameter, "quant_state", None)
        kind = "4-bit weights" if state or id(parameter) in packed else kind
        sizes[kind] += parameter.nbytes // (shard if kind == "4-bit weights" or id(parameter) in tables else 1)
        while state:
            sizes["4-bit weights"] += state.absmax.nbytes // shard + state.code.nbytes
            state = state.state2
    return sizes


def check_mostly_quantized(skeleton: Any) -> None:
    """Raise ModelError for the skeleton of a model most of whose weights would stay in 16 bits, as unknown experts."""
    embeddings = (one for one in skeleton.modules() if isinstance(one, nn.Embedding))
    outside = {id(one.weight) for one in (*embeddings, skeleton.get_output_embeddings())}
    linears = {id(one.weight) for one in skeleton.modules() if isinstance(one, (nn.Linear, Conv1D))}
    linears |= {id(stack) for _, stacks in find_experts(skeleton) for stack in stacks.values()}
    inside = {name: one for name, one in skeleton.named_parameters() if id(one) not in outside}
    loose = {name: one.numel() for name, one in inside.items() if id(one) not in linears}
    share = sum(loose.values()) / max(1, sum(one.numel() for one in inside.values()))
    if share > _MOST_UNQUANTIZED:
        most = max(loose, key=lambda name: loose[name])
        hint = "use model.quantization=none, or a model whose experts are separate linears"
        what = f"{share:.0%} of the weights are not 4-bit, such as {most}"
        raise ModelError(what, where="model.quantization", hint=hint)


@contextlib.contextmanager
def quiet_progress() -> Iterator[None]:
    """transformers draws its own bars on stderr even where there is no terminal, and tables of what it did not find."""
    log = transformers.utils.logging
    with contextlib.ExitStack() as stack:
        stack.callback(log.set_verbosity, log.get_verbosity())
        if log.is_progress_bar_enabled():
            stack.callback(log.enable_progress_bar)
        log.disable_progress_bar()
        log.set_verbosity_error()
        yield
