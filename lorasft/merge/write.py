"""Full weights, shard by shard: a checkpoint's own layout with some tensors changed, one product of matrices at a time.

Only names, dtypes and shapes of the files count, never the modules that transformers makes of them. A tensor that
nothing changes is copied as its bytes are. All that will be written is settled before the first byte.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lorasft.artifact import Artifact
from lorasft.errors import ModelError
from lorasft.files import new_file
from lorasft.merge.changes import Change, read_changes
from lorasft.merge.parameters import ParameterMap
from lorasft.model.packed import StoredWeight, list_stored
from lorasft.tensors import INDEX, SINGLE, TensorFile, TensorSpec, TensorWriter, find_weights, open_tensors
from lorasft.terminal import is_live, say, size_text

Read = Callable[[], Tensor]
Rows = Callable[[int, int], Tensor]  # gives rows `first` to `first + count`, (count, width)
Onto = Literal["original", "dequantized"]  # the weights that an update is added to

_SLICE = 1 << 27  # numbers of a product at a time: 512 MiB
_BLOCK = 1 << 18  # numbers that are cast, added to and rounded at a time: few enough for a core's cache


@dataclass(frozen=True)
class MergePlan:
    """A checkpoint as it is and as it is to be."""

    sources: Sequence[TensorFile]  # as they are
    targets: Sequence[Mapping[str, TensorSpec]]  # the tensors of the same files as they are to be
    changes: Mapping[str, Change]  # what becomes of tensors, by their names in the files
    weights: Mapping[str, StoredWeight]  # all that are read, by their names as they are to be
    places: ParameterMap

    @property
    def size(self) -> int:
        """Bytes of weights."""
        return sum(spec.size for specs in self.targets for spec in specs.values())


def plan_merge(artifact: Artifact) -> MergePlan:
    """What a merge of an adapter into its base will write. Raises ModelError for what does not fit or cannot be."""
    sources = [open_tensors(path) for path in find_weights(artifact.base)]
    weights = list_stored(sources)
    first = {next(iter(weight.parts)): name for name, weight in weights.items()}  # other parts are of no use any more
    targets = [{first[part]: weights[first[part]].spec for part in file.specs if part in first} for file in sources]
    places = ParameterMap({name: spec for specs in targets for name, spec in specs.items()}, base=artifact.base)
    changes = read_changes(artifact, places, lambda name: weights[name].read())
    for specs in targets:
        for name in specs.keys() & changes.keys():
            spec, shape = specs[name], changes[name].shape
            specs[name] = TensorSpec(spec.dtype, shape, math.prod(shape) * spec.torch_dtype.itemsize)
    return MergePlan(sources, targets, changes, weights, places)


def rewrite_config(plan: MergePlan, base_config: Mapping[str, Any]) -> dict[str, Any]:
    """The base's config and index where its tensors get other forms or names; else nothing."""
    specs = plan.places.specs
    resized = [change.shape[0] for name, change in plan.changes.items() if change.shape != specs[name].shape]
    if not resized and not any(weight.convert for weight in plan.weights.values()):
        return {}
    config = copy.deepcopy(dict(base_config))
    config.pop("quantization_config", None)
    if resized:
        config.get("text_config", config)["vocab_size"] = resized[0]
    files = {"config.json": config}
    index = plan.sources[0].path.with_name(INDEX)
    if index.is_file() and plan.sources[0].path.name != SINGLE:
        content = json.loads(index.read_bytes())
        written = zip(plan.sources, plan.targets, strict=True)
        content["weight_map"] = {name: source.path.name for source, target in written for name in target}
        content.setdefault("metadata", {})["total_size"] = plan.size
        files[INDEX] = content
    return files


def write_weights(stage: Path, plan: MergePlan, *, nf4: Mapping[str, Read]) -> tuple[bool, dict[str, str]]:
    """Write the checkpoint of `plan` to the folder `stage`. Returns whether any change survived the rounding, and the
    SHA-256 of each file.

    `nf4`: gives what a 4-bit run had of the tensors that it put into NF4. Raises ModelError when a number leaves its
    dtype's range.
    """
    done, changed = 0, False
    hashes: dict[str, str] = {}
    buffer = torch.empty(max(_slice_rows(change) * change.shape[-1] for change in plan.changes.values()))
    with contextlib.ExitStack() as stack:
        # One thread of torch: blocks are small, and threads that wait for the next keep the writer from its core.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        thread = stack.enter_context(ThreadPoolExecutor(1))
        for source, specs in zip(plan.sources, plan.targets, strict=True):
            path = stage / source.path.name
            with new_file(path) as file:
                writer = TensorWriter(file, specs, source.metadata, thread)
                for name, spec in specs.items():
                    if name in plan.changes or plan.weights[name].convert or name in nf4:
                        change = plan.changes.get(name, Change(spec.shape))
                        weight = _read_weight(plan.weights[name], spec, nf4.get(name))
                        changed |= _merge_tensor(writer, weight, change, name=name, spec=spec, buffer=buffer)
                    else:
                        writer.copy(source, name)
                    done += spec.size
                    if is_live():  # one line that is written over
                        end = "\n" if done == plan.size else ""
                        say(f"{size_text(done)} of {size_text(plan.size)}", end=end)
                hashes[path.name] = writer.finish()
    return changed, hashes


def _slice_rows(change: Change) -> int:
    """Rows of a tensor of which the product is computed at once: all where they are not too many, else a multiple of 64
    or of the rows of a matrix in a stack."""
    rows, unit = math.prod(change.shape[:-1]), change.shape[1] if len(change.shape) == 3 else 64
    return rows if change.needs_all_rows else min(rows, max(1, _SLICE // (change.shape[-1] * unit)) * unit)


def _read_weight(weight: StoredWeight, spec: TensorSpec, nf4: Read | None) -> Rows:
    """What the base has for a tensor that is to be as `spec`."""
    if nf4 or weight.convert:
        numbers = (nf4() if nf4 else weight.read().to(spec.torch_dtype)).reshape(-1, spec.width)
    elif weight.spec.shape != spec.shape:  # with more rows, as `add_rows` has them, unless all are replaced
        numbers = weight.read()
        usual = numbers.mean(dim=0, dtype=torch.float32).to(numbers.dtype)
        numbers = torch.cat([numbers, usual.expand(max(0, spec.rows - len(numbers)), -1)])
    else:
        ((name, file),) = weight.parts.items()
        return partial(file.read, name)
    return lambda first, count: numbers[first : first + count]


def _merge_tensor(
    writer: TensorWriter, weight: Rows, change: Change, *, name: str, spec: TensorSpec, buffer: Tensor
) -> bool:
    """Write one tensor: its change added in fp32, a block of rows at a time, then rounded once. Returns whether
    anything of the change is left."""
    changed = False
    step = _slice_rows(change)
    for first in range(0, spec.rows, step):
        end = min(first + step, spec.rows)
        product = change.product.compute(first, end - first, buffer) if change.product else None
        rows = end - first if change.needs_all_rows else max(1, _BLOCK // spec.width)
        for start in range(first, end, rows):
            before = weight(start, min(rows, end - start))
            total = before.to(torch.float32, copy=True)
            change.apply(total, start, None if product is None else product[start - first :][: len(before)])
            after = total.to(spec.torch_dtype)
            low, high = torch.aminmax(after)  # a third of what isfinite costs; not-a-number shows in both
            if not math.isfinite(low) or not math.isfinite(high):
                raise ModelError(f"{name} leaves the range of {spec.dtype}")
            changed = changed or not torch.equal(before.to(after.dtype), after)
            writer.write(after)
    return changed
