"""What the shipped recipes and docs/models.md say of sizes, against plans from the published configs."""

from __future__ import annotations

import re

import pytest
from model_sizes import CONFIGS, DESKTOP, MARK, PAGE, TOKENS, make_config, measure, read_recipe, table

from lorasft.commands.recipes import read_sizes

RECIPES = {row["name"]: row for row in read_sizes()}
# Written by hand from the models' own cards and announcements: billions of parameters of the language model.
PUBLISHED = {"qwen3-8b": 8.19, "qwen3-30b-a3b": 30.5, "gpt-oss-20b": 20.9, "llama-3.1-8b": 8.03, "gemma-3-12b": 11.8}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_the_card_that_it_names(name: str) -> None:
    """At its max_length, planned from the numbers of the published config, with room for a desktop."""
    recipe, said = read_recipe(name), RECIPES[name]
    sizes = measure(recipe, recipe.data.max_length)
    assert sizes.needs[0] <= said["card"] * 2**30 - DESKTOP and sizes.card(0) == said["card"]
    found = sizes.parameters, sizes.weights, sizes.needs[0]
    assert found == pytest.approx([said[key] for key in ("parameters", "weights", "needs")], rel=0.01, abs=2**24)
