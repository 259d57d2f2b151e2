"""A merge that is killed, or meets a full disk, at each of its file operations: whole or not there at all."""

from __future__ import annotations

import contextlib
import errno
import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from faults.trial import Fault, fail_at, in_fork, kill_at, no_fault, with_fault
from lorasft.artifact import find_artifact
from lorasft.errors import CapacityError, ModelError, RecipeError
from lorasft.files import replace_file, sha256, verify_folder
from lorasft.merge.merge import merge
from lorasft.model.adapter import attach_adapter, trainable, write_adapter
from lorasft.model.base import load_base
from lorasft.recipe import AdapterSettings, ModelSettings


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


FAULTS: dict[str, Callable[[int], Fault]] = {
    "killed before": partial(kill_at, moment="before"),
    "killed in the middle": partial(kill_at, moment="half"),
    "full disk": fail_at,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "killed before" else ()) for name in FAULTS]
)
def test_a_merge_that_ends_at_any_file_operation(name: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    """Under the final name is a whole merge or nothing; the next one succeeds and clears what was left."""
    effects = merge_into(base, adapter, tmp_path / "whole")
    wanted = sha256(tmp_path / "whole/model.safetensors")
    assert effects > 15, "the merge has fewer file operations than it is known to have"
    for number in range(1, effects + 1):
        out = tmp_path / f"out{number}"
        code = in_fork(lambda: merge_into(base, adapter, out, FAULTS[name](number)))  # noqa: B023
        assert code == (0 if name == "full disk" else -signal.SIGKILL)
        if code == 0:
            assert not list(tmp_path.glob(".stage-*"))
        if not out.exists():
            merge_into(base, adapter, out)
        verify_folder(out)
        assert sha256(out / "model.safetensors") == wanted and not list(tmp_path.glob(".stage-*"))


@pytest.mark.parametrize("name", [None, "x" * 10_000, "a\0b", "../elsewhere", "/etc/passwd", "gone"])
def test_a_manifest_that_names_nothing_or_strange_things_is_refused(name: str | None, tmp_path: Path) -> None:
    entries = {} if name is None else {name: {"bytes": 1, "sha256": "0"}}
    (tmp_path / "manifest.json").write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(ModelError, match="names no file" if name is None else "manifest.json") as caught:
        verify_folder(tmp_path)
    assert len(caught.value.what) < 200


WRONG_PLACE = ("EEXIST", "ENOENT", "ENOTDIR", "EISDIR", "EACCES", "EPERM", "EROFS", "ELOOP", "ENAMETOOLONG")


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG", "EIO", "ENOMEM", "EMFILE", "EBUSY", *WRONG_PLACE])
def test_a_write_that_fails_is_a_lack_of_room_but_in_a_wrong_place(name: str, tmp_path: Path) -> None:
    fault = fail_at(1, reason=getattr(errno, name))
    with with_fault(fault), pytest.raises(RecipeError if name in WRONG_PLACE else CapacityError):
        replace_file(tmp_path / "file", b"")
