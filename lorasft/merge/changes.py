"""Which tensors of the base's files an adapter changes, and how; refused by name before anything is written.

What it does to one tensor is fp32 all the way, rounded once. Where PEFT multiplies matrices, the same product: it is
computed for all rows at once, because its last bit depends on the shape; what is done with it goes by rows, which
changes no bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lorasft.adapter_files import PREFIX, lora_scale, read_adapter_weights, subtract_start
from lorasft.artifact import Artifact
from lorasft.data.tokenizer import needed_rows
from lorasft.errors import ModelError, reading
from lorasft.merge.parameters import ParameterMap

_CONV1D_MODELS = {"gpt2", "openai-gpt"}  # their checkpoints store linears (in, out)
_A, _B, _BIAS, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
_EMBEDDING_A, _EMBEDDING_B, _TOKENS = "lora_embedding_A", "lora_embedding_B", "token_adapter.trainable_tokens_delta"
_PARTS = (_A, _B, _BIAS, _MAGNITUDE, _EMBEDDING_A, _EMBEDDING_B, _TOKENS)
_ANOTHER = "--base with what it was trained on, or fetch it again"
_PART = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _PARTS))})")


@dataclass(frozen=True)
class LoraProduct:
    """scaling * B A; of every expert where the matrices of a layer's experts are stored as one tensor."""

    up: Tensor  # B: (rows, rank) or (experts, rows, rank), fp32
    down: Tensor  # A: (rank, columns) or (experts, rank, columns), fp32
    scaling: float
    transposed: bool = False  # the weight is stored (in, out), as GPT-2's Conv1D and embeddings are: up is A', down B'

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, as it is stored."""
        return *self.up.shape[:-1], self.down.shape[-1]

    def compute(self, first: int, count: int, buffer: Tensor) -> Tensor:
        """B A for rows `first` to `first + count` of the weight: (count, columns) fp32, in the memory of `buffer`."""
        buffer = buffer[: count * self.shape[-1]]
        if self.up.dim() == 3:
            part = slice(first // self.shape[1], (first + count) // self.shape[1])
            torch.bmm(self.up[part], self.down[part], out=buffer.view(-1, *self.shape[1:]))
            return buffer.view(count, -1)
        out = buffer.view(-1, count).T if self.transposed else buffer.view(count, -1)  # in the order that PEFT has it
        return torch.mm(self.up[first : first + count], self.down, out=out)


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor, as a matrix: what follows, one after the other. All tensors are in fp32."""

    shape: tuple[int, ...]  # of what comes out; the same goes in, unless it is replaced
    replacement: Tensor | None = None  # was trained as a whole
    product: LoraProduct | None = None  # is added
    magnitude: Tensor | None = None  # (out,): of the rows or columns that come of it (DoRA, arXiv:2402.09353)
    bias: Tensor | None = None  # is added
    token_rows: Mapping[int, Tensor] = field(default_factory=dict)  # token -> (hidden,): trained rows of an embedding

    @property
    def needs_all_rows(self) -> bool:
        """Whether a norm runs along the columns."""
        return self.magnitude is not None and self.product is not None and self.product.transposed

    @property
    def parts(self) -> list[Tensor]:
        """What is replaced or added by, whichever way it is stored."""
        if self.product is None:
            return [] if self.replacement is None else [self.replacement]
        return [self.product.up, self.product.down, torch.tensor(self.product.scaling)]

    def apply(self, rows: Tensor, start: int, product: Tensor | None) -> None:
        """Change rows `start`, `start + 1`, ... in place: (rows, columns) fp32. `product`: their B A, used up."""
        if self.replacement is not None:
            rows.copy_(self.replacement.reshape(-1, rows.shape[1])[start : start + len(rows)])
        if self.product and product is not None:
            rows.add_(product.mul_(self.product.scaling))
        if self.needs_all_rows:
            rows.mul_(self.magnitude / torch.linalg.norm(rows, dim=0))
        elif self.magnitude is not None:
            factor = self.magnitude[start : start + len(rows)] / torch.linalg.norm(rows, dim=1)
            rows.mul_(factor.unsqueeze(1))
        if self.bias is not None:  # a vector is one row
            rows.add_(self.bias)
        for token, row in self.token_rows.items():
            if start <= token < start + len(rows):
                rows[token - start] = row


def read_changes(artifact: Artifact, places: ParameterMap, read: Callable[[str], Tensor]) -> dict[str, Change]:
    """What the adapter does to the base's tensors, by their names in the files. `read`: gives one of these.

    Every tensor of it is used exactly once. Raises ModelError, naming it, for anything else.
    """
    reader = AdapterReader(artifact, places, read)
    changes: dict[str, Change] = {}
    # Torch says of shapes that fit nothing no more than the shapes.
    with reading("A and B do not fit the base", where=reader.folder, hint=_ANOTHER):
        for parameter, change in reader.list_untied():
            for name, part in reader.find_tensors(parameter, change):
                first = changes.setdefault(name, part)
                if first is not part:  # a whole embedding may be adapted as well; all else has one change
                    if first.replacement is None or first.product or part.replacement is not None:
                        raise reader.error(f"the adapter changes {name} more than once")
                    changes[name] = replace(part, replacement=first.replacement.view(part.shape))
    if not changes:
        raise reader.error("the adapter has no tensors")
    # Only an embedding and its head may get another height, and then the same.
    resized = {name for name, change in changes.items() if change.shape != places.specs[name].shape}
    embeddings = {places.find(parameter) for parameter in places.stored_embeddings} if resized else set()
    for name, change in changes.items():
        spec = places.specs[name]
        if spec.dtype not in ("BF16", "F16", "F32"):
            raise ModelError(f"{name} is {spec.dtype}", hint="merge into the 16-bit original")
        whole = change.replacement is not None or change.token_rows
        taller = name in embeddings and whole and change.shape[1:] == spec.shape[1:]
        if name in resized and not taller:
            raise reader.error(f"{name} is {spec.shape}, the adapter fits {change.shape}")
    if len({(changes.get(name) or places.specs[name]).shape[0] for name in embeddings}) > 1:
        raise reader.error(f"the adapter gives {', '.join(sorted(resized))} another height alone")
    return changes


class AdapterReader:
    """An adapter's tensors in fp32, by module and part, or by name if they are whole ones; and what they change."""

    def __init__(self, artifact: Artifact, places: ParameterMap, read: Callable[[str], Tensor]) -> None:
        """`read`: gives a tensor of the base by its name in the files. Raises ModelError for broken files."""
        self.folder, self.config, self.places = artifact.require_adapter(), artifact.adapter_config, places
        self.conv1d = artifact.base_config["model_type"] in _CONV1D_MODELS
        self.vocabulary = artifact.vocabulary
        self.modules: dict[str, dict[str, Tensor]] = {}
        self.tensors: dict[str, Tensor] = {}
        weights = read_adapter_weights(self.folder)
        weights = subtract_start(weights, self.config, self.folder, lambda path: read(places.find(f"{path}.weight")))
        for name, tensor in weights.items():
            path = name.removeprefix(PREFIX)
            if match := _PART.fullmatch(path):
                self.modules.setdefault(match[1], {})[match[2]] = tensor.float()
            else:
                self.tensors[path] = tensor
        self.saved, tokens = self.config.get("modules_to_save") or [], self.config.get("trainable_token_indices")
        absent = [name for name in self.saved if not any(f"{name}." in path for path in self.tensors)]
        if absent or (tokens and not any(_TOKENS in parts for parts in self.modules.values())):
            raise self.error(f"the adapter lacks {', '.join(absent) or 'tokens'} that its config says were trained")

    def error(self, what: str, *, hint: str = _ANOTHER) -> ModelError:
        """The error for files that do not fit each other or the base."""
        return ModelError(what, where=self.folder, hint=hint)

    def list_untied(self) -> Iterator[tuple[str, Change]]:
        """The changes by parameter, those of a tied embedding and head as one.

        Raises ModelError where only one of two would change, or each in its own way. PEFT changes both then, or unties
        them in the merged model: neither is what was trained, or what the base is.
        """
        replaced: dict[str, Change] = {}
        added: dict[str, Change] = {}
        for parameter, change in self._list_changes():
            whole = change.replacement is not None
            tall = self.vocabulary in (None, *change.shape) or whole or change.token_rows
            if not (tall and self.places.tied and parameter in self.places.embeddings):  # to ask takes the model
                yield parameter, change
            elif change.token_rows:
                yield from ((twin, change) for twin in self.places.stored_embeddings)
            else:
                (replaced if whole else added)[parameter] = change
        for changes in filter(None, (replaced, added)):
            (parameter, first), *others = changes.items()
            same = all(all(map(torch.equal, first.parts, other.parts)) for _, other in others)
            if len(changes) < len(self.places.embeddings) or not same:
                what = f"{parameter} is tied to its twin, which is {'otherwise' if others else 'not'} trained along"
                raise self.error(what, hint="train both as one (PEFT: ensure_weight_tying), or neither")
            yield from ((twin, first) for twin in self.places.stored_embeddings)

    def find_tensors(self, parameter: str, change: Change) -> Iterator[tuple[str, Change]]:
        """The tensors of the files that a parameter's change concerns, and what becomes of each."""
        product = change.product
        if product is None or product.up.dim() == 2 or len(stored := self.places.find_experts(parameter)) == 1:
            yield self.places.find(parameter), change
            return
        for names, up, down in zip(stored, product.up, product.down, strict=True):
            heights = [self.places.specs[name].shape[0] for name in names]
            for name, part in zip(names, torch.split(up, heights), strict=True):
                one = LoraProduct(part, down, product.scaling)
                yield name, Change(one.shape, product=one)

    def _list_changes(self) -> Iterator[tuple[str, Change]]:
        """What becomes of the model's parameters, by their paths in it: whole tensors first."""
        for name, tensor in self.tensors.items():
            parameter = name.replace(".base_layer.", ".")
            saved = any(f"{given}." in parameter for given in self.saved)  # the end of a module's name, as PEFT has it
            bias = parameter.endswith(".bias") and self.config.get("bias", "none") != "none"
            if not (saved or bias or parameter in self.places.embeddings):  # which PEFT adds, resized or adapted
                raise self.error(f"nothing in the adapter's config explains {name}")
            yield parameter, Change(tuple(tensor.shape), replacement=tensor)
        wrapped = self._find_wrapped() if self.config.get("target_parameters") else {}
        for module, parts in self.modules.items():
            yield from self._read_module(module, parts, wrapped.get(module))

    def _read_module(
        self, module: str, parts: Mapping[str, Tensor], wrapped: str | None
    ) -> Iterator[tuple[str, Change]]:
        """What its parts do to a module, or to the parameter `wrapped`."""
        weight, names, dora = f"{module}.weight", parts.keys(), bool(self.config.get("use_dora"))
        linear = {_A, _B, _MAGNITUDE} if dora else {_A, _B}
        if wrapped and names == linear:
            yield wrapped, self._read_wrapped(wrapped, parts[_A], parts[_B])
        elif names - {_BIAS} == linear:
            change = self._multiply(module, parts[_B], parts[_A], transposed=self.conv1d)
            yield weight, replace(change, magnitude=parts.get(_MAGNITUDE))
            if _BIAS in parts:
                bias = parts[_BIAS] * lora_scale(self.config, module)[1]
                yield f"{module}.bias", Change(tuple(bias.shape), bias=bias)
        elif names == {_EMBEDDING_A, _EMBEDDING_B}:
            yield weight, self._multiply(module, parts[_EMBEDDING_B], parts[_EMBEDDING_A], transposed=True)
        elif names == {_TOKENS}:
            yield weight, self._read_tokens(module, parts[_TOKENS])
        else:
            wanted = f"{', '.join(sorted(linear))}{' with use_dora' * dora}"
            raise self.error(f"{wrapped or module} has {', '.join(names)}: LoRA makes {wanted}")

    def _multiply(self, path: str, up: Tensor, down: Tensor, *, transposed: bool) -> Change:
        """B A is added to a module or parameter, with its factor. Raises ModelError unless it has the config's rank."""
        rank, scaling = lora_scale(self.config, path)
        if up.dim() != down.dim() or not up.shape[-1] == down.shape[-2] == rank:
            made = f"{path} has B of {tuple(up.shape)} and A of {tuple(down.shape)}"
            raise self.error(f"{made}, the config says rank {rank}")
        product = LoraProduct(down.T, up.T, scaling, True) if transposed else LoraProduct(up, down, scaling)
        return Change(product.shape, product=product)

    def _read_tokens(self, module: str, values: Tensor) -> Change:
        given = self.config.get("trainable_token_indices") or []
        if isinstance(given, dict):
            given = next((given[name] for name in given if module.endswith(name)), [])
        shape = self.places.specs[self.places.find(f"{module}.weight")].shape
        if values.shape != (len(given), shape[-1]):
            raise self.error(f"{module} has {len(values)} trained tokens, which the config does not name")
        return Change((needed_rows(shape[0], given), shape[1]), token_rows=dict(zip(given, values, strict=True)))

    def _find_wrapped(self) -> dict[str, str]:
        """Modules of the adapter -> the parameter that they change, where the config's target_parameters name it.

        PEFT wraps a module once for each of its targeted parameters, in their own order, the last one outside.
        """
        wrapped: dict[str, str] = {}
        targets = self.config["target_parameters"]
        for module in {name.replace(".base_layer", "") for name in self.modules}:
            paths = [path for path in self.places.parameters if path.rpartition(".")[0] == module]
            named = [path for path in paths if any(path == to or path.endswith(f".{to}") for to in targets)]
            wrapped |= {f"{module}{'.base_layer' * depth}": path for depth, path in enumerate(reversed(named))}
        return wrapped

    def _read_wrapped(self, parameter: str, down: Tensor, up: Tensor) -> Change:
        """The change of a matrix, or of those of all experts from what PEFT keeps of them (ParamWrapper).

        `down`: (experts * rank, in), expert by expert; `up`: (out, rank * experts), rank by rank.
        """
        shape = self.places.parameters[parameter].shape
        if len(shape) == 2:
            return self._multiply(parameter, up, down, transposed=False)
        experts = shape[0]
        downs = down.view(experts, -1, down.shape[1])
        ups = up.view(len(up), -1, experts).permute(2, 0, 1)
        if getattr(self.places.model.get_submodule(parameter.rpartition(".")[0]), "is_transposed", False):
            ups, downs = downs.mT, ups.mT  # they are stored (in, out)
        return self._multiply(parameter, ups.contiguous(), downs.contiguous(), transposed=False)
