"""What the shipped recipes and docs/models.md say of sizes, against plans from the published configs."""

from __future__ import annotations

import re
from typing import Any

import pytest
from model_sizes import CARDS, CONFIGS, DESKTOP, PAGE, Sizes, measure, read_recipe, table

from lorasft.commands.recipes import read_sizes

RECIPES: dict[str, Any] = {row["name"]: row for row in read_sizes()}
# The others are planned by `pytest -m slow tests/test_sizes.py`, in some minutes.
GATE = ("gpt2", "gpt-oss-20b", "ministral-3-8b", "qwen3-30b-a3b")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in GATE else pytest.mark.slow) for name in RECIPES]
)
def test_a_recipe_fits_the_card_that_it_names(name: str) -> None:
    """At its max_length, planned from the numbers of the published config, with room for a desktop."""
    recipe, said = read_recipe(name), RECIPES[name]
    sizes = measure(recipe, recipe.data.max_length)
    assert sizes.needs[0] <= said["card"] * 2**30 - DESKTOP
    found = [sizes.parameters, sizes.weights, sizes.needs[0]]
    assert found == pytest.approx([said[key] for key in ("parameters", "weights", "needs")], rel=0.01, abs=2**24)


def test_the_card_is_the_smallest_that_holds_what_is_needed() -> None:
    assert len(RECIPES) == 51
    for row in RECIPES.values():
        assert row["card"] == Sizes(0, 0, (row["needs"],)).card(0), row


def test_the_page_has_every_model() -> None:
    rows = re.findall(r"^\| `(.*?)` \| (.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    recipes = {row["base"]: name for name, row in RECIPES.items() if name != "tiny"}
    assert dict(rows) == dict.fromkeys(CONFIGS, "") | recipes


def test_rows_of_the_page_are_by_size_and_name_the_smallest_card() -> None:
    small, large = Sizes(7_000_000_000, 4 << 30, (6 << 30,)), Sizes(10**12, 500 << 30, (600 << 30,))
    rows = list(table({"b": ("", large), "a": ("seven", small)}))[1:]
    assert rows[0] == "| `a` | seven | 7B | 4.00 GiB | 6.00 GiB | 8 GB |" and f"above {CARDS[-1]} GB" in rows[1]
