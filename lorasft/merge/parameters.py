"""Where the parameters of the model lie in a checkpoint's files.

Most checkpoints name their tensors as the model does. Where they do not (experts stored one by one, multimodal
prefixes, old names), transformers' own rules for loading say what becomes of each tensor; no weight is needed for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from lorasft.errors import ModelError
from lorasft.tensors import TensorSpec


class ParameterMap:
    def __init__(self, specs: Mapping[str, TensorSpec], *, base: Path) -> None:
        """`specs`: of all tensors in the files; `base`: their folder, whose config says which model it is."""
        self.specs, self.base = specs, base

    def find(self, parameter: str) -> str:
        """The tensor of a parameter by its path in the model. Raises ModelError when the files have none like it."""
        # A checkpoint may have been saved from the backbone (GPT-2's is), without the first part of the name.
        for name in (parameter, parameter.partition(".")[2]):
            if name in self.specs:
                return name
        stored = self.find_experts(parameter)
        if list(map(len, stored)) != [1]:
            raise ModelError(f"the base has no tensor for {parameter}", hint="is it the right base?")
        return stored[0][0]

    def find_experts(self, parameter: str) -> list[list[str]]:
        """The tensors that loading stacks into a parameter: for each matrix of the stack those that are joined to it.

        One list with one tensor for a parameter that is stored as it is, none for what the files do not have.
        Raises ModelError for what is put together in any other way.
        """
        return [list(parts) for parts in zip(*self._sources.get(parameter, []), strict=True)]

    @cached_property
    def unread(self) -> set[str]:
        """The tensors that loading leaves out: those of towers, and what the model has nothing like (Qwen3.5's mtp)."""
        read = [parts for name in self.parameters for parts in self._sources.get(name, [])]
        return self.specs.keys() - {name for parts in read for name in parts}

    @cached_property
    def tied(self) -> bool:
        """Whether the embedding and the head are one tensor."""
        return len({id(self.parameters[path]) for path in self.embeddings}) < len(self.embeddings)

    @cached_property
    def stored_embeddings(self) -> tuple[str, ...]:
        """The embedding and the head as far as the files have them: where they are tied, some have both."""
        return tuple(path for path in self.embeddings if path in self.specs or path in self._sources)

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the model, without numbers, by their paths in it; of a module in its own order."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    @cached_property
    def embeddings(self) -> tuple[str, ...]:
        """The weights of the input embedding and of the head by their paths in the model."""
        modules = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        paths = {id(module): path for path, module in self.model.named_modules()}
        return tuple(f"{paths[id(module)]}.weight" for module in modules if module is not None)

    @cached_property
    def model(self) -> Any:
        """The model without its weights."""
        from lorasft.model.base import make_skeleton, read_config

        return make_skeleton(read_config(str(self.base)))

    @cached_property
    def _sources(self) -> dict[str, list[list[str]]]:
        """For each parameter its tensors in their order: a list for each pattern of the conversion that takes them."""
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping

        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
        known = ([(loading.MergeModulelist, 0)], [(loading.MergeModulelist, 0), (loading.Concatenate, 1)])
        stacks = [rule for rule in converters if [(type(step), step.dim) for step in rule.operations] in known]
        order = {pattern: place for rule in stacks for place, pattern in enumerate(rule.source_patterns)}
        sources: dict[str, dict[str | None, list[str]]] = {}
        for name in sorted(self.specs, key=loading.dot_natural_key):  # experts in their order
            target, pattern = loading.rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, pattern = name, None
            if pattern is None or pattern in order:
                sources.setdefault(target, {}).setdefault(pattern, []).append(name)
        return {
            target: [found[pattern] for pattern in sorted(found, key=lambda pattern: order.get(pattern or "", 0))]
            for target, found in sources.items()
        }
