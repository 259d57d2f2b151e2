"""What a path names is resolved once, and a run that the version before made is still a run."""

from __future__ import annotations

import builtins
import io
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from lorasft.cli import main
from lorasft.errors import CapacityError, DataError, DeviceError, ModelError, UnsafeError, reading
from lorasft.hub import loading

PACKAGE = str(Path(__file__).parents[1] / "lorasft")
PARSED = {"config.json", "adapter_config.json", "recipe.yaml"}
VERSIONS = Path(__file__).parent / "runs"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often lorasft's own code has opened each config to parse it, by path; hashes and copies do not count."""
    found: Counter[str] = Counter()
    plain = io.open

    def watch(file: Any, mode: str = "r", *given: Any, **options: Any) -> Any:
        frame = sys._getframe(1)
        while "/pathlib" in frame.f_code.co_filename and frame.f_back:
            frame = frame.f_back
        ours = frame.f_code.co_filename.startswith(PACKAGE) and not set(mode) & set("wax+")
        above = frame
        while above and above.f_code.co_name != "refresh_report":  # the page tells of files alone
            above = above.f_back
        ours = ours and above is None
        if ours and Path(str(file)).name in PARSED and frame.f_code.co_name not in ("sha256", "fingerprint", "finish"):
            found[str(Path(str(file)).resolve())] += 1
        return plain(file, mode, *given, **options)

    monkeypatch.setattr(builtins, "open", watch)
    monkeypatch.setattr(io, "open", watch)
    return found


def test_configs_and_recipes_are_parsed_once(
    recipe: Callable[..., str], base: Path, tmp_path: Path, parsed: Counter[str]
) -> None:
    """By a start, a merge with its check, a chat, and a start from another adapter."""

    def watched(*words: str) -> Counter[str]:
        parsed.clear()
        assert main(words) == 0
        assert all(count == 1 for count in parsed.values()), (words, parsed)
        return parsed

    run, settings = tmp_path / "run", {"model": {"quantization": "none"}, "train": {"steps": 3}}
    path = recipe(**settings)
    assert path in watched("train", path)
    adapter, base_config = str(run / "adapter/adapter_config.json"), str(base / "config.json")
    assert watched("merge", str(run), "--out", str(tmp_path / "merged")).keys() >= {adapter, base_config}
    assert adapter in watched("chat", str(run), "--prompt", "x", "--max-tokens", "2")
    path = recipe(**settings, run={"output": str(tmp_path / "second")})
    begun = json.loads(Path(path).read_text(encoding="utf-8")) | {"adapter": {"start": str(run)}}
    Path(path).write_text(json.dumps(begun), encoding="utf-8")
    assert watched("train", path).keys() >= {path, adapter}


@pytest.mark.parametrize("version", sorted(path.name for path in VERSIONS.iterdir()))
def test_a_run_of_an_earlier_version_is_read(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    """Its paths are relative to the folder. `expected.json` holds the losses that it gave."""
    shutil.copytree(VERSIONS / version, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    expected = json.loads(Path("expected.json").read_bytes())
    totals = json.loads(cli("evaluate", "run", "--data", "rows.jsonl", "--json").out)
    for name, loss in expected.items():
        assert totals[name]["loss"] == pytest.approx(loss, rel=1e-4)
    assert cli("chat", "run/checkpoints/step-000016", "--prompt", "what is 1 + 1?", "--max-tokens", 4).code == 0
    merged = json.loads(cli("merge", "run", "--out", "merged", "--json").out)
    assert merged["rows"] == "a text of lorasft's own" and merged["updated"] == 7
    loss = json.loads(cli("evaluate", "merged", "--data", "rows.jsonl", "--json").out)["model"]["loss"]
    assert loss == pytest.approx(expected["adapter"], rel=0.02)
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    assert cli("export", "run", "--to", "gguf", "--out", "m.gguf").code == 0
    resumed = cli("train", "run/recipe.yaml", "--resume")
    assert resumed.code in (0, 2, 3, 4) and "Traceback" not in resumed.err


AWAY = type("LocalEntryNotFoundError", (Exception,), {})
PANIC = type("PanicException", (BaseException,), {})
BROKEN: list[tuple[BaseException, type[BaseException], str]] = [
    (ValueError("two\nlines"), ModelError, "cannot load the model: two lines"),
    (PANIC(), ModelError, "cannot load the model: PanicException"),
    (RuntimeError("CUDA out of memory"), CapacityError, "out of memory while loading the model"),
    (RuntimeError("it would be offloaded to the disk"), CapacityError, "cannot be streamed"),
    (ValueError("pass trust_remote_code=True"), UnsafeError, "needs code of its own"),
    (AWAY(), DeviceError, "the hub cannot be reached"),
    (DataError("our own"), DataError, "our own"),
    (KeyboardInterrupt("by hand"), KeyboardInterrupt, "by hand"),
]


@pytest.mark.parametrize(("error", "kind", "said"), BROKEN, ids=[type(error).__name__ for error, *_ in BROKEN])
def test_what_a_library_raises_is_said_in_words(error: BaseException, kind: type[BaseException], said: str) -> None:
    with pytest.raises(kind, match=said), loading("the model", "owner/name", hint="another one"):
        raise error


def test_a_library_that_found_no_file_in_a_folder_says_nothing_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ModelError), loading("the model", str(tmp_path), hint="another one"):
        raise AWAY


def test_a_lack_of_memory_is_not_taken_for_a_damaged_file() -> None:
    with pytest.raises(ModelError, match="cannot read it: 'key'"), reading("cannot read it", where="file"):
        raise KeyError("key")
    with pytest.raises(RuntimeError, match="out of memory"), reading("cannot read it", where="file"):
        raise RuntimeError("CUDA out of memory")
