"""`lorasft doctor`: is this machine fit to train, and what a bug report needs; a line for each check."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from lorasft import __version__
from lorasft.commands.arguments import add_json
from lorasft.errors import DeviceError
from lorasft.terminal import harmless, redact

FLOORS = {  # as in pyproject.toml
    "torch": "2.10",
    "bitsandbytes": "0.49",  # before what imports it in its turn, and would let it ask the hub
    "transformers": "5.3",
    "peft": "0.18",
    "accelerate": "1.12",
    "tokenizers": "0.22",
    "safetensors": "0.6",
}
LEAST_DISK = 2 << 30  # bytes: below this hardly a model fits
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Finding:
    """What a check found, in one line; `mend`: the command that fixes it, None where nothing is wrong."""

    name: str
    what: str
    mend: str | None = None

    def __str__(self) -> str:
        line = redact(harmless(f"{'FAIL' if self.mend else 'ok':4}  {self.name}: {self.what}"))
        return f"{line}\n      mend it: {self.mend}" if self.mend else line


def add_arguments(parser: ArgumentParser) -> None:
    """What `lorasft doctor` takes."""
    parser.add_argument("--hub", action="store_true", help="ask the hub as well whether it can be reached")
    add_json(parser, "what was found")


def run(hub: bool, as_json: bool) -> None:
    """Print what was found. Raises DeviceError when a check failed."""
    findings = []
    for finding in examine(hub=hub):
        findings.append(finding)
        if not as_json:
            print(finding, flush=True)
    failed = [finding.name for finding in findings if finding.mend]
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [asdict(finding) for finding in findings]}, indent=1))
    if failed:
        raise DeviceError(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}", hint="see above")


def examine(*, hub: bool) -> Iterator[Finding]:
    """Check after check; none of them ends the others. `hub`: ask the hub as well."""
    yield Finding("lorasft", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name, floor in FLOORS.items():
        yield _attempt(name, partial(_check_library, name, floor), f"pip install -U '{name}>={floor}'")
    yield _attempt("device", _check_device, "pip install -U torch accelerate")
    yield _attempt("memory", _check_memory, "pip install -U psutil torch")
    yield _attempt("NF4", _check_nf4, "pip install -U torch bitsandbytes")
    yield _attempt("attention", _check_attention, "pip install -U torch transformers")
    cache = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    yield _check_disk("here", Path.cwd(), "cd FOLDER")
    yield _check_disk("hub cache", Path(cache).expanduser(), "export HF_HOME=FOLDER")
    yield _check_disk("temporary", Path(tempfile.gettempdir()), "export TMPDIR=FOLDER")
    if hub:
        yield _check_hub()


def _attempt(name: str, check: Callable[[], tuple[str, str | None]], mend: str) -> Finding:
    """The check's finding; what it raises is one: a library may break in any way, also while it is imported."""
    try:
        return Finding(name, *check())
    except (Exception, SystemExit) as error:
        return Finding(name, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", mend)


def _check_library(name: str, floor: str) -> tuple[str, str | None]:
    version = importlib.metadata.version(name)
    importlib.import_module("lorasft.model" if name == "bitsandbytes" else name)  # which asks the hub for nothing
    found, least = ([int(part) for part in re.findall(r"\d+", text)[:2]] for text in (version, floor))
    return version, f"pip install -U '{name}>={floor}'" if found < least else None


def _check_device() -> tuple[str, str | None]:
    import torch
    from accelerate import PartialState

    from lorasft.model.base import compute_dtype

    driver = ""
    if DRIVER.is_file():
        version = re.search(r"\s(\d+\.[\d.]+)\s", DRIVER.read_text(encoding="utf-8", errors="replace"))
        driver = f"NVIDIA driver {version[1] if version else 'of unknown version'}"
    built = torch.version.cuda or torch.version.hip
    if driver and not built:
        return f"{driver}, and this torch is for CPUs only", "pip install --force-reinstall torch"
    if driver and not torch.cuda.is_available():
        return f"{driver}, which CUDA {built} cannot use", "update the NVIDIA driver, then nvidia-smi"
    device = PartialState().device
    dtype = str(compute_dtype("auto", device)).removeprefix("torch.")
    if device.type != "cuda":
        return f"{device.type}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {dtype}", None
    major, minor = torch.cuda.get_device_capability(device)
    what = (
        f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, CUDA {built}, {driver or 'no driver file'}, {dtype}"
    )
    return what, "a GPU of sm_75 or later, or CUDA_VISIBLE_DEVICES=" if (major, minor) < (7, 5) else None


def _check_memory() -> tuple[str, str | None]:
    import psutil  # type: ignore[import-untyped]
    import torch

    memory = psutil.virtual_memory()
    what = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        what += f"; on the GPU {free / 1e9:.1f} of {total / 1e9:.1f} GB"
    return what, None


def _check_nf4() -> tuple[str, str | None]:
    from accelerate import PartialState

    from lorasft.model.health import nf4_error, nf4_tolerance

    device = PartialState().device
    error, most = nf4_error(device), nf4_tolerance(device)
    what = f"a 4-bit linear and its backward on {device} are {error:.1e} from float64 (at most {most:.0e})"
    return what, None if error <= most else "pip install -U bitsandbytes"


def _check_attention() -> tuple[str, str | None]:
    from accelerate import PartialState

    from lorasft.model.health import try_attention

    if notices := try_attention(PartialState().device).notices:
        return "; ".join(notices), "pip install -U torch transformers"
    return "packed sequences do not see each other; shared prefixes and the loss are exact", None


def _check_disk(name: str, folder: Path, mend: str) -> Finding:
    present = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(present).free
    writable = os.access(present, os.W_OK)
    what = f"{free / 1e9:.1f} GB free in {folder}{'' if writable else ', which may not be written'}"
    fine = writable and free >= LEAST_DISK
    return Finding(f"disk: {name}", what, None if fine else f"{mend}, on a disk with more room")


def _check_hub() -> Finding:
    from lorasft.hub import hub_error

    if error := hub_error():
        return Finding("hub", error, "curl -I https://huggingface.co  # a proxy? export HTTPS_PROXY=...")
    from huggingface_hub import get_token

    return Finding("hub", f"answers; {'logged in' if get_token() else 'not logged in (gated models: hf auth login)'}")
