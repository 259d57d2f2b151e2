"""A merge that is killed, or meets a full disk, at each of its file operations: whole or not there at all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from faults.trial import Fault, fail_at, in_fork, kill_at, no_fault, with_fault
from lorasft.artifact import find_artifact
from lorasft.errors import CapacityError, ModelError
from lorasft.files import sha256, verify_folder
from lorasft.merge.merge import merge
from lorasft.model.adapter import attach_adapter, trainable, write_adapter
from lorasft.model.base import load_base
from lorasft.recipe import AdapterSettings, ModelSettings
from lorasft.train.run_folder import compare


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    settings = ModelSettings(base=str(base))
    model = attach_adapter(load_base(settings, torch.device("cpu")), AdapterSettings(rank=2), seed=0)
    for name, parameter in trainable(model).items():
        parameter.data += 0.1 * ("lora_B" in name)
    write_adapter(model, folder, base=settings)
    return folder


def merge_into(base: Path, adapter: Path, out: Path, fault: Fault = no_fault) -> int:
    """Merge while the disk has a fault; how many effects on it there were."""
    with with_fault(fault) as trace, contextlib.suppress(CapacityError, OSError):
        merge(find_artifact(str(adapter), base=str(base)), out, check=False)
    return int(trace.effects)


@pytest.mark.parametrize("fault", [partial(kill_at, moment="before"), partial(fail_at)], ids=["killed", "full disk"])
def test_a_merge_that_ends_at_any_file_operation(
    fault: partial[Fault], base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Under the final name is a whole merge or nothing; the next one succeeds and clears what was left."""
    effects = merge_into(base, adapter, tmp_path / "whole")
    assert effects > 15, "the merge has fewer file operations than it is known to have"
    for number in range(1, effects + 1):
        out = tmp_path / f"out{number}"
        code = in_fork(lambda: merge_into(base, adapter, out, fault(number)))  # noqa: B023
        assert code == (-signal.SIGKILL if fault.func is kill_at else 0)
        if code == 0:
            assert not list(tmp_path.glob(".stage-*"))
        if not out.exists():
            merge_into(base, adapter, out)
        verify_folder(out)
        assert not list(tmp_path.glob(".stage-*"))


def test_a_merge_killed_at_any_moment(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Not only between its file operations: 50 kills, spread over the time that a merge takes."""
    started = time.monotonic()
    merge_into(base, adapter, tmp_path / "whole")
    seconds = time.monotonic() - started
    wanted = sha256(tmp_path / "whole/model.safetensors")
    for trial in range(50):
        out = tmp_path / f"out{trial}"
        child = os.fork()
        if child == 0:
            merge_into(base, adapter, out)
            os._exit(0)
        time.sleep(seconds * (trial + 0.5) / 50)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not out.exists():
            merge_into(base, adapter, out)
        verify_folder(out)
        assert sha256(out / "model.safetensors") == wanted and not list(tmp_path.glob(".stage-*"))


def test_a_manifest_that_names_nothing_is_none(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ModelError, match="names no file"):
        verify_folder(tmp_path)


@pytest.mark.parametrize("name", ["x" * 10_000, "a\0b", "../elsewhere", "/etc/passwd", "gone"])
def test_a_manifest_with_a_strange_name_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({name: {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(ModelError) as caught:
        verify_folder(tmp_path)
    assert len(caught.value.what) < 200


def test_a_changed_value_is_shown_where_it_differs() -> None:
    old, new = ({"data.train": f"[{{'path': '{'/long' * 20}/{name}.jsonl', 'weight': 1}}]"} for name in ("one", "two"))
    assert "one.jsonl" in compare(old, new) and "two.jsonl" in compare(old, new)
    assert len(compare(old, new)) < 180 and compare({"a": 1}, {"a": 2}) == "  a: 1 -> 2"
