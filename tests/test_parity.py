"""Parity with a server, counted from the finished ids and labels: it holds, and mutants break it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_chat import conversation, make_encoder

from lorasft.data.labels import Labeler, parity_breaks
from lorasft.data.prepare import prepare
from lorasft.data.store import UNSUPERVISED, Tokens
from lorasft.errors import DataError, ModelError
from lorasft.recipe import ChatSettings, DataSettings

THREE = conversation("a", "A", "b", "B", "c", "C")


def one_earlier(tokens: Tokens) -> Tokens:
    """Labels begin one token too early."""
    learned = tokens.labels != UNSUPERVISED
    learned |= np.append(learned[1:], False)
    return Tokens(tokens.ids, np.where(learned, tokens.ids, UNSUPERVISED).astype(np.int32))


def other_context(tokens: Tokens) -> Tokens:
    """One id of the context is another."""
    ids = tokens.ids.copy()
    ids[2] += 1
    return Tokens(ids, np.where(tokens.labels == UNSUPERVISED, UNSUPERVISED, ids).astype(np.int32))


def bos_twice(tokens: Tokens) -> Tokens:
    return Tokens(np.append(tokens.ids[:1], tokens.ids), np.append(UNSUPERVISED, tokens.labels).astype(np.int32))


@pytest.mark.parametrize("mutant", [one_earlier, other_context, bos_twice])
def test_mutants_break_parity(tiny: Any, mutant: Callable[[Tokens], Tokens], monkeypatch: pytest.MonkeyPatch) -> None:
    sound = make_encoder(tiny)
    assert sound.encode(THREE) and (sound.report.answers, sound.report.parity_breaks) == (3, 0)
    learn = Labeler._supervise_answers
    monkeypatch.setattr(Labeler, "_supervise_answers", lambda *args: mutant(learn(*args)))
    broken = make_encoder(tiny)
    with pytest.raises(DataError, match="3 of 3 answers do not follow"):
        broken.encode(THREE)
    assert (broken.report.parity_breaks, broken.report.bad_rows, broken.report.answers) == (1, 1, 0)


def test_broken_parity_is_a_bad_row_and_too_many_of_them_a_bad_template(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    data = DataSettings(train=(str(rows),), eval=None)
    learn = Labeler._supervise_answers
    monkeypatch.setattr(Labeler, "_supervise_answers", lambda *args: one_earlier(learn(*args)))
    with pytest.raises(DataError, match="1 of 1 answers do not follow") as fault:
        prepare(data, ChatSettings(), tokenizer=tiny, folder=tmp_path / "tokens")
    assert fault.value.exit_code == 3
    row = '{"messages": [{"role": "user", "content": "q%s"}, {"role": "assistant", "content": "a"}%s]}\n'
    again = ', {"role": "assistant", "content": "again"}'
    rows.write_text("".join(row % (n, again * (n == 7)) for n in range(40)))
    monkeypatch.undo()
    monkeypatch.setattr(
        Labeler, "_supervise_answers", lambda *args: one_earlier(learn(*args)) if len(args[3]) > 1 else learn(*args)
    )
    made = prepare(
        data.model_copy(update={"on_bad_row": "drop"}), ChatSettings(), tokenizer=tiny, folder=tmp_path / "t"
    )
    assert (len(made.train), made.report.parity_breaks, made.report.answers) == (39, 1, 39)
    assert made.report.dropped == [f"{rows}:8: 2 of 2 answers do not follow what a server would feed"]
    strict = data.model_copy(update={"on_bad_row": "drop", "max_dropped": 0.02})
    with pytest.raises(ModelError, match="1 of 40 rows otherwise than a server would"):
        prepare(strict, ChatSettings(), tokenizer=tiny, folder=tmp_path / "t")


def test_an_earlier_prompt_inside_a_sequence_is_checked() -> None:
    ids = np.arange(10, dtype=np.int32)
    labels = np.full(10, UNSUPERVISED, dtype=np.int32)
    labels[[3, 7, 8]] = ids[[3, 7, 8]]
    prompts = [[0, 1, 2], [0, 1, 2, 3, 4, 5, 6]]
    assert parity_breaks(Tokens(ids, labels), prompts) == 0
    assert parity_breaks(Tokens(ids, labels), [[0, 1, 9], prompts[1]]) == 1
    assert parity_breaks(Tokens(ids, labels), [prompts[0], prompts[1] + [7]]) == 1
    assert parity_breaks(Tokens(ids, labels), [prompts[0], prompts[0]]) == 1


@pytest.mark.parametrize(("policy", "counts"), [("drop", (1, 0)), ("truncate", (0, 1))])
def test_what_over_long_rows_lose_is_counted(tiny: Any, policy: str, counts: tuple[int, int]) -> None:
    encoder = make_encoder(tiny, max_length=10, overlong=policy)
    encoder.encode(conversation("hi", "the cat sat on the mat " * 9))
    assert (encoder.report.over_long_examples, encoder.report.truncated_examples) == counts
