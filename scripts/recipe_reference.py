"""The tables of docs/recipe.md, written from the recipe's schema: python scripts/recipe_reference.py [--write]

Without --write it prints the page as it should be; a test compares.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorasft.recipe import recipe_schema

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
MARK = "<!-- from here on written by scripts/recipe_reference.py -->\n"
TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false", "null": "null"}


def page() -> str:
    """The page: what is above the mark, and a table for each section of a recipe."""
    above = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    return above + MARK + "\n".join(tables(recipe_schema())) + "\n"


def tables(schema: dict[str, Any]) -> Iterator[str]:
    """Markdown lines: the sections in the recipe's order, then what a source of data may say."""
    sections = {name: node["$ref"].rpartition("/")[2] for name, node in schema["properties"].items()}
    for title, name in {**sections, "a source of data.train or data.eval": "DataSource"}.items():
        yield f"\n## {title}\n\n| key | default | values | meaning |\n|---|---|---|---|"
        definition = schema["$defs"][name]
        for key, node in definition["properties"].items():
            default = json.dumps(node["default"]) if "default" in node else "needed"
            yield f"| `{key}` | {default} | {values(node)} | {node.get('description', '')} |"


def values(node: dict[str, Any]) -> str:
    """What a key may be, in words."""
    if "anyOf" in node:
        return ", ".join(dict.fromkeys(values(option) for option in node["anyOf"]))
    if "$ref" in node:
        return "a source"
    if "enum" in node or "const" in node:
        return ", ".join(node.get("enum") or [node["const"]])
    if node["type"] == "array":
        parts = node.get("prefixItems") or [node.get("items", {"type": "string"})]
        return f"list of {', '.join(values(part) for part in parts)}"
    if node["type"] == "object":
        return "mapping"
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    found = [f"{word} {node[bound]:g}" for bound, word in bounds.items() if bound in node]
    return " ".join([TYPES[node["type"]], *found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/recipe.md")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
