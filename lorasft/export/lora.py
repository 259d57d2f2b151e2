"""An adapter alone as GGUF: llama.cpp and Ollama put it on a GGUF of its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lorasft.adapter_files import PREFIX, list_adapted, lora_scale, read_adapter_weights
from lorasft.artifact import Artifact
from lorasft.errors import ModelError
from lorasft.export.families import read_gguf_layout
from lorasft.export.gguf import name_tensors, require_gguf, turn_heads, write_fields
from lorasft.files import make_folder, staged_file
from lorasft.terminal import quote


def write_gguf_lora(artifact: Artifact, out: Path) -> dict[str, Any]:
    """Write the adapter of `artifact` to the new file `out`, in fp32, and read back what it does to a vector.

    llama.cpp computes alpha / rank * B A with one alpha (src/llama-adapter.h): what rslora and patterns scale otherwise
    goes into B. Raises ModelError for what it has no place for; then there is no `out`. Returns what was written.
    """
    gguf, folder, config = require_gguf(), artifact.require_adapter(), artifact.adapter_config
    layout = read_gguf_layout(artifact.base)
    artifact.verify()
    weights, find_name, alpha = read_adapter_weights(folder), name_tensors(layout), float(config["lora_alpha"])
    left = {*weights, *filter(None, [config.get("init_lora_weights")])}  # a start that changed the base
    tensors: dict[str, Any] = {}
    probes: dict[str, Any] = {}
    for path in list_adapted(weights, config):
        name, pair = find_name(f"{path}.weight"), {f"{PREFIX}{path}.lora_{part}.weight" for part in "AB"}
        tied_head = layout.config.tie_word_embeddings and name == "output.weight"
        if name is None or tied_head or not pair <= weights.keys():
            continue
        left -= pair
        a, b = (weights[key].float().numpy() for key in sorted(pair))
        factor, turned = lora_scale(config, path)[1], layout.turned(name)
        try:
            scaled = turn_heads(b * np.float32(factor * len(a) / alpha), turned)
            given = np.random.default_rng(0).standard_normal(a.shape[1])
            probes[name] = given, turn_heads(factor * (b @ (a @ given)), turned)
        except (ValueError, IndexError):
            raise ModelError(f"{path} has shapes that do not fit", where=folder, hint="train it again") from None
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": scaled}
    if left:
        what, hint = f"llama.cpp's adapters have no place for {min(left)}", "merge it: lorasft export "
        raise ModelError(what, where=folder, hint=f"{hint}{quote(artifact.name)} --to gguf")
    make_folder(out.absolute().parent)
    with staged_file(out) as stage:
        fields = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha}
        origin = {"general.base_model.count": 1, "general.base_model.0.name": Path(artifact.model.base).name}
        write_fields(stage, layout, fields | origin, tensors)
        read = {tensor.name: tensor.data for tensor in gguf.GGUFReader(stage).tensors}
        for name, (given, wanted) in probes.items():
            a, b = (read[f"{name}.lora_{part}"] for part in "ab")
            off = np.linalg.norm(alpha / len(a) * (b @ (a @ given)) - wanted)
            if not off <= 1e-5 * np.linalg.norm(wanted):
                raise ModelError(f"read back, {name} does not do what the adapter does", where=folder)
    return {"file": str(out), "architecture": layout.family.name, "type": "f32", "size": out.stat().st_size}
