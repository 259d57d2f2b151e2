"""The short form of scripts/fuzz.py; docs/fuzz.md has the long one."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/fuzz.py"


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_mutated_inputs_raise_nothing_but_our_errors(fuzz: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--trials", "100", "--seed", "1"]) == 0, capsys.readouterr().err
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(table) == 5 and all(0 < int(row[2]) < 100 for row in table), table  # some get through, most do not


def test_a_case_that_breaks_is_named_and_can_be_had_again(fuzz: ModuleType) -> None:
    def case(draw: random.Random) -> None:
        if draw.random() < 0.1:
            raise KeyError("odd")

    tally = fuzz.run_cases("odd", case, seed=0, first=0, trials=100)
    assert tally.broken and tally.accepted == 100 - len(tally.broken)
    number = int(tally.broken[0].split()[1].rstrip(":"))
    assert fuzz.run_cases("odd", case, seed=0, first=number, trials=1).broken == tally.broken[:1]
