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
from pathlib import Path
from typing import Any

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
    """What a check found, in one line; `mend`: the command that mends it, None where nothing is wrong."""

    name: str
    what: str
    mend: str | None = None


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
            _print(finding)
    failed = [finding.name for finding in findings if finding.mend]
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [asdict(finding) for finding in findings]}, indent=1))
    if failed:
        raise DeviceError(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}", hint="see above")


def examine(*, hub: bool) -> Iterator[Finding]:
    """Check after check; none of them ends the others. `hub`: ask the hub as well."""
    yield Finding("lorasft", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    yield from (_check_library(name, floor) for name, floor in FLOORS.items())
    for name, check, mend in (
        ("device", _check_device, "pip install -U torch accelerate"),
        ("memory", _check_memory, "pip install -U psutil torch"),
        ("NF4", _check_nf4, "pip install -U torch bitsandbytes"),
        ("attention", _check_attention, "pip install -U torch transformers"),
    ):
        yield _attempt(name, check, mend)
    for name, folder in _folders().items():
        yield _check_disk(f"disk: {name}", folder)
    if hub:
        yield _check_hub()


def _print(finding: Finding) -> None:
    mark = "FAIL" if finding.mend else "ok"
    print(redact(harmless(f"{mark:4}  {finding.name}: {finding.what}")), flush=True)
    if finding.mend:
        print(f"      mend it: {finding.mend}", flush=True)


def _attempt(name: str, check: Callable[[], Finding], mend: str) -> Finding:
    """The check's finding; what it raises is one: a library may break in any way, also while it is imported."""
    try:
        return check()
    except (Exception, SystemExit) as fault:
        reason = (str(fault).strip() or "without a word").splitlines()[0]
        return Finding(name, f"{type(fault).__name__}: {reason}", mend)


def _check_library(name: str, floor: str) -> Finding:
    mend = f"pip install -U '{name}>={floor}'"
    try:
        version = importlib.metadata.version(name)
        importlib.import_module("lorasft.model" if name == "bitsandbytes" else name)  # which asks the hub for nothing
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", mend)
    except (Exception, SystemExit) as fault:
        return Finding(name, f"{version} cannot be imported: {str(fault).strip().partition(chr(10))[0]}", mend)
    return Finding(name, version, mend if _numbers(version) < _numbers(floor) else None)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:2]]


def _device() -> Any:
    from accelerate import PartialState

    return PartialState().device


def _check_device() -> Finding:
    import torch

    from lorasft.model.base import compute_dtype

    driver = _first_line(DRIVER)
    built = torch.version.cuda or torch.version.hip
    if driver and not built:
        what = f"{driver}, and this torch ({torch.__version__}) is for CPUs only"
        return Finding("device", what, "pip install --force-reinstall torch")
    if driver and not torch.cuda.is_available():
        return Finding(
            "device", f"{driver}, which CUDA {built} cannot use", "update the NVIDIA driver, then nvidia-smi"
        )
    device = _device()
    dtype = str(compute_dtype("auto", device)).removeprefix("torch.")
    if device.type != "cuda":
        return Finding("device", f"{device.type}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {dtype}")
    major, minor = torch.cuda.get_device_capability(device)
    what = (
        f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, CUDA {built}, {driver or 'no driver file'}, {dtype}"
    )
    return Finding(
        "device", what, "a GPU of sm_75 or later, or CUDA_VISIBLE_DEVICES=" if (major, minor) < (7, 5) else None
    )


def _check_memory() -> Finding:
    import psutil  # type: ignore[import-untyped]
    import torch

    memory = psutil.virtual_memory()
    what = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        what += f"; on the GPU {free / 1e9:.1f} of {total / 1e9:.1f} GB"
    return Finding("memory", what)


def _check_nf4() -> Finding:
    from lorasft.model.health import nf4_error, nf4_tolerance

    device = _device()
    error, most = nf4_error(device), nf4_tolerance(device)
    what = f"a 4-bit linear and its backward on {device} are {error:.1e} from float64 (at most {most:.0e})"
    return Finding("NF4", what, None if error <= most else "pip install -U bitsandbytes")


def _check_attention() -> Finding:
    from lorasft.model.health import try_attention

    network = try_attention(_device())
    if network.notices:
        return Finding("attention", "; ".join(network.notices), "pip install -U torch transformers")
    return Finding("attention", "packed sequences do not see each other; shared prefixes and the loss are exact")


def _folders() -> dict[str, Path]:
    cache = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return {"here": Path.cwd(), "hub cache": Path(cache).expanduser(), "temporary": Path(tempfile.gettempdir())}


def _check_disk(name: str, folder: Path) -> Finding:
    present = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(present).free
    what = f"{free / 1e9:.1f} GB free in {folder}"
    mend = {"disk: hub cache": "export HF_HOME=FOLDER", "disk: temporary": "export TMPDIR=FOLDER"}.get(
        name, "cd FOLDER"
    )
    if not os.access(present, os.W_OK):
        return Finding(name, f"{what}, which may not be written", mend)
    return Finding(name, what, f"{mend}, on a disk with more room" if free < LEAST_DISK else None)


def _check_hub() -> Finding:
    from lorasft.hub import hub_fault

    fault = hub_fault()
    if fault:
        return Finding("hub", fault, "curl -I https://huggingface.co  # a proxy? export HTTPS_PROXY=...")
    from huggingface_hub import get_token

    return Finding("hub", f"answers; {'logged in' if get_token() else 'not logged in (gated models: hf auth login)'}")


def _first_line(path: Path) -> str | None:
    try:
        words = path.read_text(encoding="utf-8").partition("\n")[0].split()
    except (OSError, UnicodeDecodeError):
        return None
    version = next((word for word in words if re.fullmatch(r"\d+\.[\d.]+", word)), "of unknown version")
    return f"NVIDIA driver {version}"
