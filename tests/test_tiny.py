"""The proof of life: the shipped base learns to answer about facts that stand only in what it was pre-trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasft.cli import main
from lorasft.recipe.load import shipped_recipes

FOLDER = shipped_recipes()["tiny"].parent


def read_rows(name: str) -> list[list[dict[str, Any]]]:
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def exact_match(model: Path, template: Path, rows: list[list[dict[str, Any]]]) -> float:
    """The share of greedy answers that equal the reference, by plain transformers on left-padded prompts."""
    tokenizer = AutoTokenizer.from_pretrained(template, padding_side="left", pad_token="</s>")
    causal = AutoModelForCausalLM.from_pretrained(model)
    prompts = [tokenizer.apply_chat_template(row[:1], tokenize=False, add_generation_prompt=True) for row in rows]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        output = causal.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(answer.strip() == row[1]["content"] for answer, row in zip(answers, rows, strict=True)) / len(rows)


def test_tiny_learns_to_answer(tmp_path: Path) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert main(["train", "tiny", f"run.output={run}"]) == 0
    assert main(["merge", str(run), "--out", str(merged)]) == 0
    held_out = read_rows("heldout.jsonl")
    before = exact_match(FOLDER / "base", run / "adapter", held_out)
    after = exact_match(merged, merged, held_out)
    print(f"exact match on {len(held_out)} held-out questions: {before:.1%} -> {after:.1%}")
    assert len(held_out) >= 200 and before < 0.05 and after > 0.9


def test_tiny_is_as_small_as_it_says() -> None:
    files = [path for path in (FOLDER / "base").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    causal = AutoModelForCausalLM.from_pretrained(FOLDER / "base")
    assert 1e6 <= sum(parameter.numel() for parameter in causal.parameters()) <= 3e6
    assert causal.dtype == torch.bfloat16
    assert len(shipped_recipes()["tiny"].read_text(encoding="utf-8").splitlines()) <= 25


def test_held_out_questions_are_answered_nowhere_in_the_training_rows() -> None:
    taught = {row[1]["content"] for row in read_rows("train.jsonl")}
    asked = {row[1]["content"] for row in read_rows("heldout.jsonl")}
    assert not taught & asked and len(asked) == len(read_rows("heldout.jsonl"))
