"""What a person reads of an evaluation: matches of generated answers, what got worse first, and how sure it is."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from peft import PeftModel
from test_preview import BROWSER, EVIL, browse
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasft.model.scoring import compare_with_base, match


def lines_of(base: list[float], other: list[float], tokens: int = 1, rows: int = 10**6) -> list[dict[str, Any]]:
    pairs = enumerate(zip(base, other, strict=True))
    return [
        {"source": n % rows, "tokens": tokens, "base": {"loss": old}, "adapter": {"loss": new}}
        for n, (old, new) in pairs
    ]


def test_the_interval_is_that_of_all_draws() -> None:
    """Six rows can be drawn in 46,656 ways: of their means 2.5 % lie below the interval, and 2.5 % above."""
    base, adapter, sizes = [3.0, 1.0, 2.0, 5.0, 0.5, 4.0], [2.0, 1.5, 0.7, 1.0, 0.6, 3.9], [1, 7, 2, 3, 5, 4]
    lines = [line | {"tokens": size} for line, size in zip(lines_of(base, adapter), sizes, strict=True)]
    change, low, high = compare_with_base(lines, "adapter")["loss"]
    sums = [(new - old) * n for old, new, n in zip(base, adapter, sizes, strict=True)]
    assert change == pytest.approx(sum(sums) / sum(sizes))
    ways = itertools.product(range(6), repeat=6)
    means = np.array([sum(sums[i] for i in drawn) / sum(sizes[i] for i in drawn) for drawn in ways])
    assert [np.mean(means < low), np.mean(means > high)] == pytest.approx([0.025, 0.025], abs=0.01)
    assert compare_with_base(lines, "adapter")["loss"] == [change, low, high]


def test_the_interval_is_of_pairs_and_of_whole_rows() -> None:
    """What makes rows differ does not widen it, and a row's answers are drawn together."""
    base = [float(n * n) for n in range(20)]
    change, low, high = compare_with_base(lines_of(base, [one - 1 for one in base]), "adapter")["loss"]
    assert change == low == high == -1
    other = [one + (-1) ** n * n for n, one in enumerate(base)]

    def width(lines: list[dict[str, Any]]) -> float:
        _, low, high = compare_with_base(lines, "adapter")["loss"]
        return high - low

    alone = width(lines_of(base, other))
    assert width(lines_of(base * 2, other * 2, rows=20)) == pytest.approx(alone)
    assert width(lines_of(base * 2, other * 2)) == pytest.approx(alone / 2**0.5, rel=0.1)


@pytest.mark.parametrize(("some", "other", "same"), [
    ("The  Edra.", "the edra", True), ('"Paul Pike"', "Paul Pike", True), ("**42**.", "42", True), ("ﬁn", "FIN", True),
    ("-5", "5", False), ("1.5", "15", False), ("C#", "C", False), ("the Edra", "Edra", False), ("...", "?", False),
    ("", "...", False)])  # fmt: skip
def test_what_is_set_aside_by_a_normalised_match(some: str, other: str, same: bool) -> None:
    assert match(some, other)["normalised_match"] is same and not match(some, other)["exact_match"]


def test_answers_are_those_of_plain_transformers(
    run: Path, rows: Path, base: Path, tmp_path: Path, cli: Command
) -> None:
    """One by one, with PEFT; they stand in the file with what got worse first, and the table counts them."""
    out = tmp_path / "answers.jsonl"
    done = cli("evaluate", run, "--data", rows, "--answers", out, "--max-tokens", 12)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert done.code == 0 and sorted(line["source"]["line"] for line in lines) == list(range(1, 27))
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, run / "adapter", torch_device="cpu").eval()
    stops = tokenizer.convert_tokens_to_ids(["<|end|>", "</s>"])
    conversations = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]

    def answer(prompt: list[int]) -> str:
        """By hand: the likeliest token, one after another."""
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                best = int(adapted(torch.tensor([ids])).logits[0, -1].argmax())
            if best in stops:
                break
            ids.append(best)
        return str(tokenizer.decode(ids[len(prompt) :]))

    for line in lines:
        messages = conversations[line["source"]["line"] - 1]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        assert (line["prompt"], line["expected"]) == (tokenizer.decode(prompt), messages[1]["content"])
        assert line["adapter"]["answer"] == answer(prompt)
        with adapted.disable_adapter():
            assert line["base"]["answer"] == answer(prompt)
        for name in ("base", "adapter"):
            assert line[name]["exact_match"] == (line[name]["answer"].strip() == line["expected"].strip())
    harm = [
        (one["base"]["exact_match"] > one["adapter"]["exact_match"], one["adapter"]["loss"] - one["base"]["loss"])
        for one in lines
    ]
    assert harm == sorted(harm, reverse=True)
    totals = json.loads(
        cli("evaluate", run, "--data", rows, "--answers", tmp_path / "b.jsonl", "--max-tokens", 12, "--json").out
    )
    for name in ("exact_match", "normalised_match", "ended"):
        assert totals["adapter"][name] == pytest.approx(np.mean([line["adapter"][name] for line in lines]))
    change, low, high = totals["adapter"]["against_base"]["loss"]
    assert low < change < high
    assert change == pytest.approx(totals["adapter"]["loss"] - totals["base"]["loss"])
    worse = sum(one > (False, 0.0) for one in harm)
    assert f"{worse} of 26 answers got worse by adapter" in done.out and f"{change:+.4f} (95 %: {low:+.4f}" in done.out


def test_several_in_one_table(
    run: Path, rows: Path, base: Path, tmp_path: Path, cli: Command, monkeypatch: Any
) -> None:
    """The base is asked once; what was not asked the same, or has another base, is refused."""
    monkeypatch.chdir(run.parent)
    (tmp_path / "lr=2").symlink_to(run)
    done = cli("evaluate", "run", tmp_path / "lr=2", "--data", rows, "--json")
    totals = json.loads(done.out)
    assert list(totals) == ["base", "run", str(tmp_path / "lr=2")] and totals["run"] == totals[str(tmp_path / "lr=2")]
    assert list(json.loads(cli("evaluate", "run", base, "--data", rows, "--json").out)) == ["base", "run", str(base)]
    other = shutil.copytree(base, tmp_path / "other")
    (other / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}", encoding="utf-8"
    )
    refused = cli("evaluate", "run", other, "--data", rows)
    assert refused.code == 3 and "other prompts" in refused.err
    shutil.copytree(run / "adapter", tmp_path / "apart")
    config = json.loads((tmp_path / "apart/adapter_config.json").read_bytes()) | {"base_model_name_or_path": str(other)}
    (tmp_path / "apart/adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "apart/recipe.yaml").unlink()
    (tmp_path / "apart/manifest.json").unlink()
    refused = cli("evaluate", "run", tmp_path / "apart", "--data", rows)
    assert refused.code == 2 and "different bases" in refused.err


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path")
def test_the_page_of_answers(run: Path, tmp_path: Path, cli: Command) -> None:
    """Text is text, and what is expected is marked."""
    data, page = tmp_path / "evil.jsonl", tmp_path / "answers.html"
    lines = [{"prompt": f"{n} {EVIL[:40]}", "completion": f"no <mark>harm</mark> {n}"} for n in range(3)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert cli("evaluate", run, "--data", data, "--answers", page, "--max-tokens", 4).code == 0
    assert cli("evaluate", run, "--data", data, "--answers", page).code == 2  # nothing is overwritten
    shown = browse(page, tmp_path / "profile")
    assert shown.count("<h2>") == 3 and shown.count("<h3>expected</h3>") == 3 and "<title>lorasft</title>" in shown
    assert "&lt;/script&gt;&lt;img" in shown and "<img" not in shown
    assert "<mark>no &lt;mark&gt;harm&lt;/mark&gt; 0</mark>" in shown
    assert shown.count("<h3>base</h3>") == shown.count("<h3>adapter</h3>") == 3
    assert len(re.findall(r"<h2>\S+:\d, loss: base [\d.]+, adapter [\d.]+</h2>", shown)) == 3
    assert "1-1 of 1" in browse(page, tmp_path / "found", "#harm%3C/mark%3E%202")
