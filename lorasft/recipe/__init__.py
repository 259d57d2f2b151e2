"""The recipe: its schema, and how a YAML file with overrides becomes one."""

from lorasft.recipe.load import dump_recipe as dump_recipe
from lorasft.recipe.load import find_shipped as find_shipped
from lorasft.recipe.load import load_recipe as load_recipe
from lorasft.recipe.load import portable_text as portable_text
from lorasft.recipe.load import read_source as read_source
from lorasft.recipe.load import shipped_recipes as shipped_recipes
from lorasft.recipe.schema import AdapterSettings as AdapterSettings
from lorasft.recipe.schema import ChatSettings as ChatSettings
from lorasft.recipe.schema import DataSettings as DataSettings
from lorasft.recipe.schema import DataSource as DataSource
from lorasft.recipe.schema import ModelSettings as ModelSettings
from lorasft.recipe.schema import OptimizerSettings as OptimizerSettings
from lorasft.recipe.schema import Recipe as Recipe
from lorasft.recipe.schema import ScheduleSettings as ScheduleSettings
from lorasft.recipe.schema import mathematics as mathematics
from lorasft.recipe.schema import recipe_schema as recipe_schema
