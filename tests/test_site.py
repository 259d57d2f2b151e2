"""What stands around the code: the tutorial, which is run; the site's map; the image's file; how to cite."""

from __future__ import annotations

import json
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Command

import lorasft

ROOT = Path(__file__).parents[1]
PAGES = {path.name for path in (ROOT / "docs").glob("*.md")}


def test_the_tutorial_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command) -> None:
    text = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    said = {}
    for kind, block in re.findall(r"^```(sh|python)\n(.*?)^```", text, re.M | re.S):
        if kind == "python":
            exec(block, {})
            continue
        for line in block.splitlines():
            program, *words = shlex.split(line)
            done = cli(*words)
            assert program == "lorasft" and done.code == 0, (line, done.err)
            said[words[0]] = done
    assert list(said) == ["recipes", "preview", "plan", "train", "evaluate", "chat", "merge", "push"]
    assert "it fits" in said["plan"].out and said["chat"].out.startswith("The founder of Falstead")
    base, adapter = (line.split() for line in said["evaluate"].out.splitlines()[2:4])
    assert base[4] == "0.0%" and adapter[0] == "adapter" and float(adapter[4][:-1]) >= 40  # 80 % of 60 rows, here of 12
    assert (
        b"<title>" in Path("runs/facts/report.html").read_bytes() and b"Falstead" in Path("answers.html").read_bytes()
    )
    assert "| supervised tokens |" in said["push"].out and Path("facts/model.safetensors").is_file()


def test_the_site_has_every_page_once_and_fetches_no_fonts() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def names(entries: list[Any]) -> list[str]:
        return [name for one in entries for name in ([one] if isinstance(one, str) else names(*one.values()))]

    listed = names(site["nav"])
    assert sorted(listed) == sorted(PAGES) and listed[0] == "index.md"
    assert site["theme"]["font"] is False and site["plugins"] == ["search"]
    links = set(re.findall(r"\]\(([\w.-]+\.md)\)", (ROOT / "docs/index.md").read_text(encoding="utf-8")))
    assert links == PAGES - {"index.md"}
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(r"^mkdocs-material==", pinned, re.M) and re.search(r"^mkdocs==", pinned, re.M)


def read_dockerfile() -> list[tuple[str, str]]:
    """Its instructions with their arguments, lines continued by a backslash joined, as Docker reads them."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = re.sub(r"\\\n\s*", "", "\n".join(line for line in lines if not line.startswith("#")))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def test_the_image_is_of_what_is_there_and_runs_without_rights() -> None:
    steps = read_dockerfile()
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "VOLUME", "USER", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in steps} == known and steps[0][0] == "FROM"
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-runtime-ubuntu\d\d\.\d\d", steps[0][1])
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    assert "*" in patterns
    copied = [source for name, rest in steps if name == "COPY" for source in rest.split()[:-1]]
    assert sorted(copied) == sorted(sent) and all((ROOT / source).exists() for source in copied)
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for needed in ("README.md", "LICENSE", "recipes", "lorasft"):  # by the build, as pyproject.toml names them
        assert f'"{needed}"' in settings or f"{needed} = " in settings
        assert any(fnmatch(needed, source) for source in copied)
    (installed,) = (rest for name, rest in steps if "pip install" in rest)
    assert "-c constraints.txt" in installed and installed.count("&&") == 2
    users = [rest for name, rest in steps if name == "USER"]
    assert users == ["lorasft"] and [name for name, _ in steps].index("USER") > len(steps) - 5
    assert json.loads(dict(steps)["ENTRYPOINT"]) == ["lorasft"] and isinstance(json.loads(dict(steps)["CMD"]), list)


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= cited.keys()  # those that must be
    assert all({"name"} == one.keys() or "family-names" in one for one in cited["authors"])
    assert cited["version"] == lorasft.__version__ and cited["license"] == "Apache-2.0" and cited["type"] == "software"
