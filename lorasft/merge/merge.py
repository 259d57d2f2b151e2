"""A merge from an adapter to a folder that deploys: weights, config, tokenizer, template, and what was measured."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lorasft import __version__, files
from lorasft.adapter_files import WEIGHTS
from lorasft.artifact import MERGE_RECORD, Artifact
from lorasft.errors import ModelError
from lorasft.merge.sidecars import write_sidecars
from lorasft.merge.write import MergePlan, Onto, plan_merge, rewrite_config, write_weights
from lorasft.model.experts import find_experts
from lorasft.recipe import DataSource
from lorasft.share import REPO, portable, render_card
from lorasft.tensors import INDEX, find_weights, fingerprint, open_tensors


def merge(
    artifact: Artifact,
    out: Path,
    *,
    onto: Onto | Literal["auto"] = "auto",
    quantize: Literal["nf4"] | None = None,
    check: bool = True,
    data: DataSource | None = None,
    force_base: bool = False,
) -> dict[str, Any]:
    """Write the base of `artifact` with its adapter folded in to the new folder `out`.

    `onto`: which weights the update is added to: the base's own, those that NF4 made of them, or what held-out rows (or
    `data`) speak for. `quantize`: write in this. `force_base`: take a base that is not the one of training. Raises
    ModelError before anything is written when the adapter does not fit, CapacityError when `out` has no room; a merge
    that fails leaves nothing under `out`. Returns what merge.json says.
    """
    if onto == "dequantized" and artifact.model.quantization == "none":
        what = "nothing says that it was trained in 4 bit: there are no dequantized weights that it was trained on"
        raise ModelError(what, where=artifact.name, hint="--onto original; or --quantization nf4, if it was")
    artifact.verify(force_base=force_base)
    files.refuse_overlap(out, artifact.base, artifact.run or artifact.require_adapter())
    plan = plan_merge(artifact)
    four_bit = artifact.base_config.get("quantization_config")
    if four_bit and (onto == "original" or quantize):  # it has no original, and an update falls back onto its steps
        raise ModelError("a base stored in 4 bit: no --quantize, no --onto original", hint="--base with the original")
    if quantize and find_experts(plan.places.model):
        raise ModelError("no format of 4 bit has the experts of this base", hint="merge without --quantize")
    files.need_space(out, plan.size * (2 if quantize else 1))
    judge = None
    if check:
        from lorasft.merge.check import MergeCheck  # takes seconds and hundreds of megabytes to import

        judge = MergeCheck(artifact, data)
    chosen, why = "dequantized" if four_bit else onto, "as asked"
    if chosen == "auto" and quantize:  # measured: of an update to weights on the grid already, most snaps back to it
        chosen, why = "original", "weights that come from NF4 would fall back onto its steps"
    elif chosen == "auto":
        chosen, why = judge.choose() if judge else ("original", "nothing was measured")
    hashes: dict[str, str] = {}
    with files.staged_folder(out, hashes=hashes) as stage:
        weights = stage / "16-bit" if quantize else stage
        found = _write_full(weights, artifact, plan, onto=chosen)
        if judge:
            judge.verify(weights, chosen)
        if quantize:
            found = _quantize(weights, stage, plan.places.unread)
            if judge:
                judge.ask(stage, "merged, in 4 bit")
        hashes.update(found)
        done = {
            "onto": chosen,
            "why": why,
            "updated": len(plan.changes),  # tensors that the adapter changes
            "size": sum((stage / name).stat().st_size for name in found),  # bytes of weights
            **(judge.record() if judge else {"rows": "", "table": {}}),
            "result": found,
        }
        return _write_record(stage, artifact, done)


def _write_full(folder: Path, artifact: Artifact, plan: MergePlan, *, onto: Onto) -> dict[str, str]:
    """Full weights and what lies beside them. Returns their hashes. Raises ModelError when rounding left all."""
    files.make_folder(folder)
    nf4: dict[str, Any] = {}  # of a run in 4 bit: the tensors that it had in NF4, in its own dtype
    if onto == "dequantized" and not artifact.base_config.get("quantization_config"):
        from accelerate import PartialState

        from lorasft.model.base import compute_dtype, find_quantized, read_config
        from lorasft.model.packed import read_as_nf4

        dtype = compute_dtype(artifact.provenance.get("dtype", artifact.model.dtype), PartialState().device)
        for path, transposed in find_quantized(read_config(str(artifact.base))).items():
            for names in plan.places.find_experts(path) or [[plan.places.find(path)]]:
                read = partial(read_as_nf4, {name: plan.weights[name] for name in names}, dtype, transposed=transposed)
                nf4 |= {name: partial(read, name) for name in names}
    changed, hashes = write_weights(folder, plan, nf4=nf4)
    if not changed:
        what = "no weight changed: the adapter is empty, or too small for the base's dtype"
        raise ModelError(what, where=artifact.adapter)
    write_sidecars(folder, artifact, rewrite_config(plan, artifact.base_config))
    return hashes


def _write_record(stage: Path, artifact: Artifact, done: dict[str, Any]) -> dict[str, Any]:
    """merge.json, which says where the merge came from and how it was made, and the model card, whose front matter hubs
    read: no row of the data and no path of this machine."""
    trained, given = artifact.provenance, artifact.model.base
    origin = {
        "name": given,
        "commit": trained.get("commit"),
        "fingerprint": fingerprint(artifact.base),
        "trained_on": trained.get("fingerprint"),
    }
    adapter = files.sha256(artifact.require_adapter() / WEIGHTS)
    record = {"lorasft": __version__, "base": origin, "adapter": adapter, **done}
    card = render_card(artifact, REPO, base=portable(given, "base"), merge=record)
    files.write_file(stage / MERGE_RECORD, json.dumps(record, indent=1))
    files.write_file(stage / "README.md", card)
    return record


def _quantize(weights: Path, stage: Path, unread: set[str]) -> dict[str, str]:
    """Turn the full weights, but for what is `unread`, into a 4-bit checkpoint in `stage`, with all that lies beside
    them. Returns its hashes."""
    from lorasft.model.base import load_base, quiet_progress
    from lorasft.recipe import ModelSettings

    model = load_base(ModelSettings(base=str(weights)), torch.device("cpu"))
    sources = map(open_tensors, find_weights(weights))
    whole = model.state_dict() | {name: file.read(name) for file in sources for name in file.specs if name in unread}
    model.state_dict = lambda: whole
    skipped = [*model.hf_quantizer.modules_to_not_convert, *getattr(model, "left_out", [])]
    model.config.quantization_config.llm_int8_skip_modules = skipped
    with quiet_progress():
        model.save_pretrained(stage)
    replaced = shutil.ignore_patterns("*.safetensors", INDEX, "config.json")
    shutil.copytree(weights, stage, ignore=replaced, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for path in stage.glob("*.safetensors"):  # safetensors lets nobody else read them
        shutil.copymode(stage / "config.json", path)
    shutil.rmtree(weights)
    return {path.name: files.sha256(path) for path in sorted(stage.glob("*.safetensors"))}
