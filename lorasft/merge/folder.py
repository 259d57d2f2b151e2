"""A merge from an adapter to a folder that deploys: weights, config, tokenizer, template, and what was measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasft import __version__
from lorasft.adapter_config import WEIGHTS
from lorasft.artifact import GENERATION_CONFIG, MERGE_RECORD, Artifact, read_stops
from lorasft.errors import ModelError, RecipeError
from lorasft.files import (
    MANIFEST,
    make_folder,
    need_space,
    refuse_existing,
    refuse_overlap,
    sha256,
    staged_folder,
    write_file,
)
from lorasft.merge.card import make_card
from lorasft.merge.plan import Choice, Onto, Plan, plan_merge
from lorasft.merge.stream import Progress, write_weights
from lorasft.recipe import DataSource
from lorasft.tensors import INDEX

if TYPE_CHECKING:
    from lorasft.merge.blocks import Rows, Stored
    from lorasft.merge.check import Judge

_SIDECARS = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


@dataclass(frozen=True)
class Merged:
    """What a merge did, and what was measured."""

    folder: Path
    onto: str  # original | dequantized: the weights that the update was added to
    why: str
    updated: int  # tensors that the adapter changes
    unchanged: int  # of these, how many the rounding left as they were
    copied: int  # tensors copied as they are
    size: int  # bytes of weights
    quantization: dict[str, float] = field(default_factory=dict)  # tensor -> |error of NF4| / |update|
    rows: str = ""  # what the answers were compared on
    table: dict[str, dict[str, float]] = field(default_factory=dict)  # model -> kl, same_choice, nll
    changed_codes: float | None = None  # with `quantize`: the share of 4-bit codes that the merge changed


def merge(
    artifact: Artifact,
    out: Path,
    *,
    onto: Onto | Literal["auto"] = "auto",
    quantize: bool = False,
    check: bool = True,
    data: DataSource | None = None,
    force_base: bool = False,
    on_progress: Progress | None = None,
) -> Merged:
    """Write the base of `artifact` with its adapter folded in to the new folder `out`.

    `onto`: which weights the update is added to: the base's own, the ones that NF4 made of them, or what the answers
    to held-out rows (or to `data`) speak for. `quantize`: write a checkpoint in NF4 instead of full weights.
    `force_base`: take a base that is not the one of training. Raises ModelError before anything is written when the
    adapter does not fit, CapacityError when `out` has no room; a merge that fails, its check included, leaves nothing
    under `out`.
    """
    refuse_existing(out)
    artifact.verify(force_base=force_base)
    adapter = artifact.require_adapter()
    refuse_overlap(out, artifact.base, adapter, *([artifact.run] if artifact.run else []))
    if data is not None and not check:
        raise RecipeError("--data has no use with --no-check", where=data.path, hint="leave one of the two out")
    _refuse_second_merge(artifact)
    plan = plan_merge(artifact)
    _refuse_other_grid(plan, onto, quantize=quantize)
    need_space(out, plan.size * (2 if quantize else 1))
    judge = _ask(artifact, data) if check else None
    choice = _choose("dequantized" if plan.packed else onto, judge, quantize=quantize)
    grid = _find_grid(artifact, plan) if not plan.packed and (check or choice.onto == "dequantized") else {}
    hashes: dict[str, str] = {}
    with staged_folder(out, hashes=hashes) as stage:
        weights = stage / "16-bit" if quantize else stage
        make_folder(weights)
        onto_grid = choice.onto == "dequantized"
        written, found = write_weights(weights, plan, grid=grid, onto_grid=onto_grid, on_progress=on_progress)
        if not quantize:
            hashes.update(found)
        if not any(written[name].changed for name in plan.changes):
            what = "no weight changed: the adapter is empty, or too small for the base's dtype"
            raise ModelError(what, where=str(adapter))
        _copy_sidecars(artifact.base, adapter, weights, rewritten=plan.files)
        if judge:
            judge.verify(weights, choice.onto)
        changed_codes = _quantize(weights, stage, artifact, plan, judge) if quantize else None
        merged = Merged(
            folder=out,
            onto=choice.onto,
            why=choice.why,
            updated=len(plan.changes),
            unchanged=sum(not written[name].changed for name in plan.changes),
            copied=sum(len(shard.entries) for shard in plan.targets) - len(written),
            size=sum(file.stat().st_size for file in stage.glob("*.safetensors")),
            quantization={name: w.quantization / w.update for name, w in written.items() if name in grid and w.update},
            rows=judge.origin if judge else "",
            table={name: asdict(distance) for name, distance in judge.table.items()} if judge else {},
            changed_codes=changed_codes,
        )
        result = {path.name: hashes.get(path.name) or sha256(path) for path in sorted(stage.glob("*.safetensors"))}
        record = _make_record(artifact, merged) | {"result": result}
        write_file(stage / MERGE_RECORD, json.dumps(record, indent=1).encode())
        write_file(stage / "README.md", make_card(artifact, record).encode())
    return merged


# Models and quantizers take seconds and hundreds of megabytes to import: only where they are needed.


def _ask(artifact: Artifact, data: DataSource | None) -> Judge:
    from lorasft.merge.check import make_judge

    return make_judge(artifact, data)


def _find_grid(artifact: Artifact, plan: Plan) -> Mapping[str, Callable[[Stored], Rows]]:
    import lorasft.model  # noqa: F401  # imports bitsandbytes, which grid needs, without asking the hub
    from lorasft.merge.grid import find_grid

    return find_grid(artifact, plan.shards)


def _quantize(weights: Path, stage: Path, artifact: Artifact, plan: Plan, judge: Judge | None) -> float:
    """Turn the full weights into a 4-bit checkpoint in `stage`, with everything that stands beside them."""
    import lorasft.model  # noqa: F401  # see above
    from lorasft.merge.grid import find_quantized_tensors
    from lorasft.merge.requantize import write_quantized

    share = write_quantized(weights, stage, base=plan.shards, tensors=find_quantized_tensors(artifact, plan.shards))
    for path in _sidecars(weights):
        if not (stage / path.name).exists() and path.name != INDEX:
            shutil.copyfile(path, stage / path.name)
    shutil.rmtree(weights)
    if judge:
        judge.note("merged, in 4 bit", stage)
    return share


def _refuse_other_grid(plan: Plan, onto: Onto | Literal["auto"], *, quantize: bool) -> None:
    """A base that is stored in 4 bit has no original to add to, and an update to it falls back onto its steps."""
    if plan.packed and (onto == "original" or quantize):
        what = "--quantize" if quantize else "--onto original"
        raise ModelError(f"the base is stored in 4 bit: no {what}", hint="--base with the 16-bit original")


def _choose(onto: Onto | Literal["auto"], judge: Judge | None, *, quantize: bool) -> Choice:
    if onto != "auto":
        return Choice(onto, "as asked")
    if quantize:  # measured: of an update to weights that are on the grid already, most snaps back to it
        return Choice("original", "weights that come from NF4 would fall back onto its steps")
    return judge.choose() if judge else Choice("original", "nothing was measured")


def _make_record(artifact: Artifact, merged: Merged) -> dict[str, Any]:
    """What merge.json keeps of where the merge came from and how it was made."""
    trained = artifact.provenance
    return {
        "lorasft": __version__,
        "base": {
            "name": artifact.model.base,
            "commit": trained and trained.commit,
            "fingerprint": artifact.base_fingerprint,
            "trained_on": trained and trained.fingerprint,
        },
        "adapter": sha256(artifact.require_adapter() / WEIGHTS),
        **{name: value for name, value in asdict(merged).items() if name != "folder"},
    }


def _refuse_second_merge(artifact: Artifact) -> None:
    """Raise ModelError when the base is itself a merge of this very adapter."""
    path = artifact.base / MERGE_RECORD
    if path.is_file() and json.loads(path.read_bytes()).get("adapter") == sha256(artifact.require_adapter() / WEIGHTS):
        raise ModelError("this adapter is merged into this base already", where=str(path), hint="use the base as it is")


def _copy_sidecars(base: Path, adapter: Path, stage: Path, *, rewritten: Mapping[str, bytes]) -> None:
    """Config, tokenizer and generation config as the base has them, unless `rewritten`; the template of training."""
    changed = {"chat_template.jinja"} if (adapter / "chat_template.jinja").is_file() else set()
    if set(read_stops(adapter)) - set(read_stops(base)):  # the base would run on past the end of a turn
        changed.add(GENERATION_CONFIG)
    for path in sorted(_sidecars(base)):
        if path.name in rewritten:
            write_file(stage / path.name, rewritten[path.name])
        elif path.name not in changed:
            shutil.copyfile(path, stage / path.name)
    for name in sorted(changed):
        shutil.copyfile(adapter / name, stage / name)


def _sidecars(base: Path) -> Iterator[Path]:
    """What stands beside the weights, but for the records of an earlier merge."""
    records = {MERGE_RECORD, MANIFEST}
    return (p for p in base.iterdir() if p.is_file() and p.suffix in _SIDECARS and p.name not in records)
