"""What published models take, planned from their configs alone: python scripts/model_sizes.py [--write] [NAME ...]

Prints the line that each shipped recipe has about its sizes (of all recipes, or of those named), and the table of
docs/models.md. --write: into the recipes and the page. The numbers of the configs are in tests/configs.yaml.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import nn

from lorasft.commands.recipes import count_text
from lorasft.model.attention import SEGMENTS
from lorasft.model.base import count_bytes, make_skeleton, read_config
from lorasft.model.loss import Network, read_head
from lorasft.model.tables import keep_on_host
from lorasft.model.weightless import make_weightless
from lorasft.recipe import Recipe
from lorasft.recipe.load import load_recipe, shipped_recipes
from lorasft.training.plan import LIBRARIES, least_bytes

ROOT = Path(__file__).parents[1]
CONFIGS: dict[str, Any] = yaml.safe_load((ROOT / "tests/configs.yaml").read_text(encoding="utf-8"))
PAGE, MARK = ROOT / "docs/models.md", "<!-- from here on written by scripts/model_sizes.py -->\n"
LINE = re.compile(r"^# (NEEDS|[\d.]+[MB] parameters, .*)$", re.MULTILINE)  # of a recipe; NEEDS: not yet known
CARDS = (8, 12, 16, 24, 48)  # GB, as cards are sold: binary ones
DESKTOP = 2**29  # bytes of a card that a desktop takes, beside what a plan sets aside for driver and libraries
TOKENS = 2048  # of the table
CPU = torch.device("cpu")  # whose ways of computing are planned, as `plan` does where there is no card


@dataclass(frozen=True)
class Sizes:
    """Of a model in 4 bit, and of its training in the leanest layout; in bytes."""

    parameters: int  # of the language model, a number
    weights: int  # on the card
    needs: tuple[int, ...]  # memory in which rows of each length asked for are trained

    def card(self, number: int) -> int | None:
        """The smallest card that holds `needs[number]`, in GB."""
        return next((card for card in CARDS if self.needs[number] <= card * 2**30 - DESKTOP), None)


def make_config(base: str) -> Any:
    """The config of the hub id or folder `base`, from the numbers at hand."""
    if base not in CONFIGS:
        return read_config(base)
    numbers = dict(CONFIGS[base])
    if "like" in numbers:
        return make_config(numbers["like"])
    return getattr(transformers, numbers.pop("class"))(**numbers)


def read_recipe(name: str, *overrides: str) -> Recipe:
    """A shipped recipe in bf16, which `dtype: auto` is on a card."""
    return load_recipe(name, ["data.train=rows.jsonl", "model.dtype=bfloat16", *overrides])


def measure(recipe: Recipe, *lengths: int) -> Sizes:
    """Plan `recipe` on the meta device, for rows of each of `lengths` tokens.

    That the fast ways hold, which a run verifies on its loaded model, is taken from tests/test_families.py.
    """
    config = make_config(recipe.model.base)
    model = make_weightless(config, recipe.model, recipe.adapter, CPU)
    base = model.get_base_model()
    keep_on_host(base, CPU, card=CARDS[0] << 30)
    base.set_attn_implementation(SEGMENTS)
    # What a run finds by probes: a module with a convolution mixes neighbours, and is called for each segment.
    mixers = (type(one) for one in base.modules() if any(isinstance(part, nn.Conv1d) for part in one.children()))
    mixer, head = next(mixers, None), read_head(base, CPU)
    network = Network(base, head=head, segments=True, lean=True, mixer=mixer, planned=CPU)
    needs = (LIBRARIES + least_bytes(recipe, network, model, longest=length) for length in lengths)
    weights = sum(size for kind, size in count_bytes(base).items() if kind != "adapter")
    return Sizes(make_skeleton(config).num_parameters(), weights, tuple(needs))


def size_line(sizes: Sizes) -> str:
    """What a recipe says of its sizes."""
    weights, needs = (math.ceil(size / 2**30 * 100) / 100 for size in (sizes.weights, sizes.needs[0]))
    planned = f"needs {needs:.2f} GiB: planned for a card of {sizes.card(0)} GB"
    return f"# {count_text(sizes.parameters)} parameters, {weights:.2f} GiB in 4 bit, {planned}"


def table(measured: dict[str, tuple[str, Sizes]]) -> Iterator[str]:
    """Markdown lines for `measured`: base -> name of its recipe, if it has one, and sizes at TOKENS; by size."""
    yield "\n| model | recipe | parameters | in 4 bit | at 2,048 tokens | smallest card |\n|---|---|---|---|---|---|"
    for base, (name, sizes) in sorted(measured.items(), key=lambda item: item[1][1].weights):
        card = sizes.card(-1)
        gigabytes = (f"{size / 2**30:.2f} GiB" for size in (sizes.weights, sizes.needs[-1]))
        smallest = f"{card} GB" if card else f"above {CARDS[-1]} GB"
        yield f"| `{base}` | {name} | {count_text(sizes.parameters)} | {' | '.join(gigabytes)} | {smallest} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the recipes and docs/models.md")
    parser.add_argument("names", nargs="*", help="of shipped recipes (default: all, and the models without one)")
    given = parser.parse_args()
    measured: dict[str, tuple[str, Sizes]] = {}
    for name in given.names or shipped_recipes():
        recipe, path = read_recipe(name), shipped_recipes()[name]
        sizes = measure(recipe, recipe.data.max_length, TOKENS)
        print(f"{name:28} {size_line(sizes)}", flush=True)
        if recipe.model.base in CONFIGS:
            measured[recipe.model.base] = name, sizes
        if given.write:
            path.write_text(LINE.sub(size_line(sizes), path.read_text(encoding="utf-8")), encoding="utf-8")
    for base in [] if given.names else CONFIGS.keys() - measured.keys():
        measured[base] = "", measure(read_recipe("qwen3-8b", f"model.base={base}"), TOKENS)
    print(*table(measured), sep="\n")
    if given.write and not given.names:
        above = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
        PAGE.write_text(above + MARK + "\n".join(table(measured)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
