"""The recipe: its schema, and how a YAML file with overrides becomes one."""

from lorasft.recipe.load import dump_recipe, load_recipe, portable_text, read_source, shipped_recipes
from lorasft.recipe.schema import (
    AdapterSettings,
    ChatSettings,
    DataSettings,
    DataSource,
    ModelSettings,
    OptimizerSettings,
    Recipe,
    ScheduleSettings,
    mathematics,
    recipe_schema,
)

__all__ = [
    "AdapterSettings",
    "ChatSettings",
    "DataSettings",
    "DataSource",
    "ModelSettings",
    "OptimizerSettings",
    "Recipe",
    "ScheduleSettings",
    "dump_recipe",
    "load_recipe",
    "mathematics",
    "portable_text",
    "read_source",
    "recipe_schema",
    "shipped_recipes",
]
