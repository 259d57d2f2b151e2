"""Scoring and answering: the identity log Pr(y|x) = log Pr([x,y]) - log Pr(x), and what stops an answer."""

from __future__ import annotations

import io
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import Command
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasft.cli import main
from lorasft.data.chat_format import ChatFormat
from lorasft.recipe import ChatSettings
from lorasft.terminal import harmless


def test_the_identity_holds_and_equals_plain_transformers(
    run: Path, rows: Path, base: Path, tmp_path: Path, cli: Command
) -> None:
    """x and [x, y] are scored in separate passes; the oracle is transformers + PEFT, a row at a time."""
    out = tmp_path / "scores.jsonl"
    totals = json.loads(cli("evaluate", run, "--data", rows, "--per-example", out, "--json").out)
    scores = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    conversations = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]
    assert [score["source"]["line"] for score in scores] == list(range(1, len(conversations) + 1))

    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, run / "adapter", torch_device="cpu").eval()
    loss = tokens = 0.0
    for score, messages in zip(scores, conversations, strict=True):
        for name in ("base", "adapter"):
            one = score[name]
            assert one["log_prob_y_given_x"] == pytest.approx(one["log_prob_xy"] - one["log_prob_x"], abs=1e-4)
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        whole = prompt + tokenizer.encode(messages[1]["content"] + "<|end|>", add_special_tokens=False)
        assert score["tokens"] == len(whole) - len(prompt)
        with torch.no_grad():
            log_probs = adapted(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        each = [float(log_probs[place - 1, whole[place]]) for place in range(1, len(whole))]
        assert score["adapter"]["log_prob_xy"] == pytest.approx(sum(each), abs=2e-3)
        assert score["adapter"]["log_prob_y_given_x"] == pytest.approx(sum(each[len(prompt) - 1 :]), abs=2e-3)
        loss -= sum(each[len(prompt) - 1 :])
        tokens += score["tokens"]
    assert totals["adapter"]["loss"] == pytest.approx(loss / tokens, rel=1e-4)
    assert totals["adapter"]["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert totals["adapter"]["tokens"] == tokens and totals["adapter"]["loss"] < totals["base"]["loss"]


def test_the_held_out_loss_of_a_run_is_the_one_of_evaluate(run: Path, tmp_path: Path, cli: Command) -> None:
    """The same rows, the same number, by the two ways through the code."""
    from lorasft.data.prepare import open_prepared

    (folder,) = (run / "tokens").iterdir()
    held_out = open_prepared(folder).held_out
    assert held_out is not None
    places = [held_out.place(example) for example in range(len(held_out))]
    lines = Path(places[0].file).read_text(encoding="utf-8").splitlines()
    data = tmp_path / "held_out.jsonl"
    data.write_text("".join(lines[place.line - 1] + "\n" for place in places), encoding="utf-8")
    totals = json.loads(cli("evaluate", run, "--data", data, "--json").out)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    noted = [line["eval_loss"] for line in metrics if "eval_loss" in line]
    assert totals["base"]["loss"] == pytest.approx(noted[0], rel=1e-4)
    assert totals["adapter"]["loss"] == pytest.approx(noted[-1], rel=1e-4)


def test_chat_answers_as_plain_transformers_does(run: Path, base: Path, cli: Command) -> None:
    question = "what is 3 + 3?"
    said = cli("chat", run, "--prompt", question, "--max-tokens", 12).out
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, run / "adapter", torch_device="cpu").eval()
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    for _ in range(12):
        with torch.no_grad():
            best = int(adapted(ids).logits[0, -1].argmax())
        if best in tokenizer.convert_tokens_to_ids(["<|end|>", "</s>"]):
            break
        ids = torch.cat([ids, torch.tensor([[best]])], dim=1)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert said == harmless(tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)) + "\n"


def test_chat_keeps_the_turns(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[list[str]] = []
    plain = ChatFormat.prompt_ids

    def watch(self: ChatFormat, messages: list[dict[str, str]]) -> list[int]:
        prompts.append([message["role"] for message in messages])
        return plain(self, messages)

    monkeypatch.setattr(ChatFormat, "prompt_ids", watch)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert main(["chat", str(run), "--max-tokens", "4"]) == 0
    assert prompts == [["user"], ["user", "assistant", "user"]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The conversations that `chat` has asked its model, each as the contents of its messages."""
    prompts: list[list[str]] = []
    plain = ChatFormat.prompt_ids

    def watch(self: ChatFormat, messages: list[dict[str, str]]) -> list[int]:
        prompts.append([message["content"] for message in messages])
        return plain(self, messages)

    monkeypatch.setattr(ChatFormat, "prompt_ids", watch)
    return prompts


def test_what_a_chat_obeys(run: Path, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, cli: Command) -> None:
    typed = [
        "/base",
        "one",
        "/base",
        "two",
        "/reset",
        "three",
        "/system Be brief.",
        "four",
        "/reset",
        "/wrong",
        "/etc/x",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*typed, "/system", "six", "/quit", "seven"])))
    done = cli("chat", run, "--max-tokens", "4")
    first, bare = done.out.splitlines()[:2]
    told = ["nothing was asked yet", "as in training", "text: Be brief.", "text: Be brief.", "there is no /wrong. /re"]
    told += ["as in training"]
    _, *said = done.err.splitlines()
    assert done.code == 0 and [word in line for word, line in zip(told, said, strict=True)] == [True] * 6
    briefly = [["Be brief.", "four"], ["Be brief.", "/etc/x"]]
    assert asked == [["one"], ["one"], ["one", first, "two"], ["three"], *briefly, ["six"]]
    base = json.loads((run / "adapter/adapter_config.json").read_bytes())["base_model_name_or_path"]
    assert first != bare == cli("chat", base, "--prompt", "one", "--max-tokens", 4).out.rstrip("\n")


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    run: Path, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    whole = cli("chat", run, "--prompt", "one", "--max-tokens", 40).out
    asked.clear()
    seen: list[str] = []

    def stop(text: str) -> str:
        seen.append(text)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        return harmless(text)

    monkeypatch.setattr("lorasft.commands.chat.harmless", stop)
    stdin = io.StringIO("one\ntwo\n")
    stdin.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", stdin)
    done = cli("chat", run, "--max-tokens", "40")
    part = done.out.splitlines()[0]
    assert done.code == 0 and whole.startswith(part) and len(part) < len(whole) - 1
    assert [len(each) for each in asked] == [1, 3] and str(run / "adapter") in done.err


def test_an_error_does_not_end_a_chat(run: Path, monkeypatch: pytest.MonkeyPatch, cli: Command) -> None:
    for person, code in ((True, 0), (False, 3)):
        stdin = io.StringIO("word " * 200 + "\none\n")
        stdin.isatty = lambda person=person: person  # type: ignore[misc]
        monkeypatch.setattr("sys.stdin", stdin)
        done = cli("chat", run, "--max-tokens", "2")
        assert done.code == code and "128 positions" in done.err and len(done.out.splitlines()) == person


def test_the_likeliest_tokens_alone_are_greedy(run: Path, cli: Command) -> None:
    words = ["chat", run, "--prompt", "what is 3 + 3?", "--max-tokens", 8]
    assert cli(*words, "--temperature", 5, "--top-p", 1e-9).out == cli(*words).out


def test_a_recipe_means_its_base(cli: Command) -> None:
    said = cli("chat", "tiny", "--prompt", "Who was the founder of Falstead?", "--max-tokens", 3)
    assert said.code == 0 and said.out.strip() and "runs/tiny" in said.err


def test_the_end_of_a_turn_is_among_the_stops(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    chat_format = ChatFormat(tokenizer, ChatSettings())
    assert set(tokenizer.convert_tokens_to_ids(["<|end|>", "</s>"])) <= set(chat_format.stop_ids)


def test_an_adapter_that_was_moved_knows_its_base(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command, rows: Path
) -> None:
    """Under a relative name, away from its run: the same numbers, so its base is quantized as in training."""
    wanted = json.loads(cli("evaluate", run, "--data", rows, "--json").out)
    shutil.copytree(run / "adapter", tmp_path / "far/moved")
    monkeypatch.chdir(tmp_path / "far")
    assert json.loads(cli("evaluate", "moved", "--data", rows, "--json").out) == wanted
    assert cli("merge", "moved", "--out", "merged").code == 0


def test_other_columns_are_mapped_or_found(run: Path, tmp_path: Path, cli: Command) -> None:
    data, columns = tmp_path / "other.jsonl", ["--columns", "{prompt: question, completion: reply}"]
    data.write_text('{"question": "what is 1 + 1?", "reply": "2"}\n', encoding="utf-8")
    refused = cli("evaluate", run, "--data", data)
    assert refused.code == 3 and "known format" in refused.err
    assert cli("evaluate", run, "--data", data, *columns).code == 0
    assert cli("evaluate", run, "--data", data, "--columns", "prompt").code == 2
    assert cli("evaluate", run, "--data", data, "--per-example", data / "out.jsonl").code == 2  # in a file
    merge = ["merge", run, "--out", tmp_path / "merged", "--data", data]
    assert cli(*merge).code == 3
    assert json.loads(cli(*merge, *columns, "--json").out)["rows"] == str(data)


@pytest.mark.parametrize(
    "options",
    [
        ["--max-tokens", "0"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--top-p", "0.5"],
        ["--top-p", "1.5", "--temperature", "1"],
    ],
)
def test_numbers_that_make_no_sense_are_usage(options: list[str]) -> None:
    assert main(["chat", "x", *options]) == 2


@pytest.mark.parametrize("name", [None, "nowhere/to/be/found", "."])
def test_what_cannot_answer_is_named(name: str | None, run: Path, tmp_path: Path, cli: Command) -> None:
    """Folders that are nothing, and a prompt that is longer than the model."""
    code, _, said = cli("chat", tmp_path / name if name else run, "--prompt", "word " * 200)
    assert (code, str(tmp_path / name) in said) == (4, True) if name else (code == 3 and "128 positions" in said)
