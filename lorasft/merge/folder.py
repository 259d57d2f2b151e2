"""A merge from an adapter to a folder that deploys: weights, config, tokenizer, template, and what was measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasft import __version__
from lorasft.adapter_files import WEIGHTS
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
from lorasft.merge.config import read_config
from lorasft.merge.plan import Plan, plan_merge
from lorasft.merge.source import Choice, Onto, Source
from lorasft.merge.stream import Progress, write_weights
from lorasft.recipe import DataSource
from lorasft.tensors import INDEX, fingerprint

if TYPE_CHECKING:
    from lorasft.merge.blocks import Rows, Stored
    from lorasft.merge.check import Judge

RECORD = "merge.json"
_SIDECARS = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_GENERATION = "generation_config.json"


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
    source: Source,
    out: Path,
    *,
    onto: Onto | Literal["auto"] = "auto",
    quantize: bool = False,
    check: bool = True,
    data: DataSource | None = None,
    on_progress: Progress | None = None,
) -> Merged:
    """Write the base of `source` with its adapter folded in to the new folder `out`.

    `onto`: which weights the update is added to: the base's own, the ones that NF4 made of them, or what the answers
    to held-out rows (or to `data`) speak for. `quantize`: write a checkpoint in NF4 instead of full weights.
    Raises ModelError before anything is written when the adapter does not
    fit, CapacityError when `out` has no room; a merge that fails, its check included, leaves nothing under `out`.
    """
    refuse_existing(out)
    refuse_overlap(out, source.base, source.adapter, *([source.run] if source.run else []))
    if data is not None and not check:
        raise RecipeError("--data has no use with --no-check", where=data.path, hint="leave one of the two out")
    _refuse_second_merge(source)
    config = read_config(source.base)
    plan = plan_merge(source.base, source.adapter, config=config)
    _refuse_other_grid(plan, onto, quantize=quantize)
    need_space(out, plan.size * (2 if quantize else 1))
    judge = _ask(source, data, config=config) if check else None
    choice = _choose("dequantized" if plan.packed else onto, judge, quantize=quantize)
    grid = _find_grid(source, plan) if not plan.packed and (check or choice.onto == "dequantized") else {}
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
            raise ModelError(what, where=str(source.adapter))
        _copy_sidecars(source.base, source.adapter, weights, rewritten=plan.files)
        if judge:
            judge.verify(weights, choice.onto)
        changed_codes = _quantize(weights, stage, source, plan, judge) if quantize else None
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
        record = _make_record(source, merged) | {"result": result}
        write_file(stage / RECORD, json.dumps(record, indent=1).encode())
        write_file(stage / "README.md", make_card(source, record).encode())
    return merged


# Models and quantizers take seconds and hundreds of megabytes to import: only where they are needed.


def _ask(source: Source, data: DataSource | None, *, config: Mapping[str, Any]) -> Judge:
    from lorasft.merge.check import make_judge

    return make_judge(source, data, config=config)


def _find_grid(source: Source, plan: Plan) -> Mapping[str, Callable[[Stored], Rows]]:
    import lorasft.model  # noqa: F401  # imports bitsandbytes, which grid needs, without asking the hub
    from lorasft.merge.grid import find_grid

    return find_grid(source, plan.shards)


def _quantize(weights: Path, stage: Path, source: Source, plan: Plan, judge: Judge | None) -> float:
    """Turn the full weights into a 4-bit checkpoint in `stage`, with everything that stands beside them."""
    import lorasft.model  # noqa: F401  # see above
    from lorasft.merge.grid import find_quantized_tensors
    from lorasft.merge.requantize import write_quantized

    share = write_quantized(weights, stage, base=plan.shards, tensors=find_quantized_tensors(source, plan.shards))
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


def _make_record(source: Source, merged: Merged) -> dict[str, Any]:
    """What merge.json keeps of where the merge came from and how it was made."""
    return {
        "lorasft": __version__,
        "base": {
            "name": source.base_name,
            "commit": source.commit,
            "fingerprint": fingerprint(source.base),
            "trained_on": source.trained_on,
        },
        "adapter": sha256(source.adapter / WEIGHTS),
        **{name: value for name, value in asdict(merged).items() if name != "folder"},
    }


def _refuse_second_merge(source: Source) -> None:
    """Raise ModelError when the base is itself a merge of this very adapter."""
    path = source.base / RECORD
    if path.is_file() and json.loads(path.read_bytes()).get("adapter") == sha256(source.adapter / WEIGHTS):
        raise ModelError("this adapter is merged into this base already", where=str(path), hint="use the base as it is")


def _copy_sidecars(base: Path, adapter: Path, stage: Path, *, rewritten: Mapping[str, bytes]) -> None:
    """Config, tokenizer and generation config as the base has them, unless `rewritten`; the template of training."""
    changed = {"chat_template.jinja"} if (adapter / "chat_template.jinja").is_file() else set()
    if _stops(adapter) - _stops(base):  # training found that generation would run past the end of a turn
        changed.add(_GENERATION)
    for path in sorted(_sidecars(base)):
        if path.name in rewritten:
            write_file(stage / path.name, rewritten[path.name])
        elif path.name not in changed:
            shutil.copyfile(path, stage / path.name)
    for name in sorted(changed):
        shutil.copyfile(adapter / name, stage / name)


def _stops(folder: Path) -> set[int]:
    """The tokens that end generation, by the folder's generation config."""
    path = folder / _GENERATION
    stops = json.loads(path.read_bytes()).get("eos_token_id") if path.is_file() else None
    return set(stops if isinstance(stops, list) else [] if stops is None else [stops])


def _sidecars(base: Path) -> Iterator[Path]:
    """What stands beside the weights, but for the records of an earlier merge."""
    records = {RECORD, MANIFEST}
    return (p for p in base.iterdir() if p.is_file() and p.suffix in _SIDECARS and p.name not in records)
