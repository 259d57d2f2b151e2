"""What the README and the pages of docs/ tell a reader to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import recipe_reference

from lorasft.cli import read_command_line
from lorasft.recipe import Recipe
from lorasft.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_python_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    exec(code, space := {})  # type: ignore[var-annotated]
    assert len(space["run"].history) == 11 and (tmp_path / "runs/tiny/adapter").is_dir() and space["model"]


def test_the_recipe_on_one_page_states_the_defaults(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", REFERENCE, re.S)
    path = tmp_path / "support.yaml"
    path.write_text(text, encoding="utf-8")
    shown = load_recipe(str(path)).model_dump()
    plain = tmp_path / "plain" / "support.yaml"
    plain.parent.mkdir()
    plain.write_text("model: {base: Qwen/Qwen3-8B}\ndata: {train: support.jsonl}", encoding="utf-8")
    assert shown == load_recipe(str(plain)).model_dump()
    keys = {f"{section}.{key}" for section, keys in shown.items() for key in keys}
    assert keys == {f"{s}.{k}" for s, f in Recipe.model_fields.items() for k in f.annotation.model_fields}  # type: ignore[union-attr]


def test_the_reference_of_the_recipe_is_that_of_its_schema() -> None:
    assert recipe_reference.page() == REFERENCE, "python scripts/recipe_reference.py --write"


LINES = [line for page in PAGES for line in re.findall(r"^lorasft (.+?)(?: +#.*)?$", page.read_text("utf-8"), re.M)]


@pytest.mark.parametrize("line", dict.fromkeys(LINES))
def test_the_command_lines_parse(line: str) -> None:
    read_command_line(shlex.split(line))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link
