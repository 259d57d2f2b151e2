"""`lorasft doctor`: is this machine fit to train, and what a bug report needs; a line for each check."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shlex
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lorasft import __version__
from lorasft.commands.arguments import add_json, find_device
from lorasft.errors import DeviceError, LorasftError, first_line
from lorasft.files import need_space
from lorasft.hub import hub_error
from lorasft.machine import free_memory
from lorasft.terminal import harmless, redact, size_text

# bitsandbytes before what imports it in its turn, and would let it ask the hub
LIBRARIES = ("torch", "bitsandbytes", "transformers", "peft", "accelerate", "tokenizers", "safetensors")
LEAST_DISK = 2 << 30  # bytes: below this hardly a model fits
DRIVER = Path("/proc/driver/nvidia/version")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--hub", action="store_true", help="ask the hub as well whether it can be reached")
    add_json(parser, "what was found")


def run(hub: bool, as_json: bool) -> None:
    """Print what was found. Raises DeviceError when a check failed."""
    checks: dict[str, Callable[[], str]] = {
        "lorasft": lambda: f"{__version__}, Python {platform.python_version()}, {platform.platform()}",
        **{name: partial(_check_library, name) for name in LIBRARIES},
        "versions": _check_versions,
        "device": _check_device,
        "memory": lambda: f"{size_text(free_memory(find_device()))} free for {find_device()}",
        "NF4": _check_nf4,
        "attention": _check_attention,
        "disk": _check_disk,
        **({"hub": _check_hub} if hub else {}),
    }
    findings: list[dict[str, Any]] = []
    for name, check in checks.items():  # none of which ends the others
        fix = None
        try:
            what = check()
        except LorasftError as error:
            what, fix = " in ".join(filter(None, (error.what, error.where))), error.hint
        except (Exception, SystemExit) as error:  # a library may break in any way, also while it is imported
            what = first_line(error)
            fix = f"pip install -U {name if name in LIBRARIES else ' '.join(LIBRARIES)}"
        findings.append({"name": name, "what": what, "mend": fix})
        if not as_json:
            line = f"FAIL  {name}: {what}\n      fix it: {fix}" if fix else f"ok    {name}: {what}"
            print(redact(harmless(line)), flush=True)
    failed = [one["name"] for one in findings if one["mend"]]
    if as_json:
        print(json.dumps({"ok": not failed, "checks": findings}, indent=1))
    if failed:
        raise DeviceError(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}", hint="see above")


def _check_library(name: str) -> str:
    importlib.import_module("lorasft.model" if name == "bitsandbytes" else name)  # which asks the hub for nothing
    return importlib.metadata.version(name)


def _check_versions() -> str:
    """Raises DeviceError, with the command that fixes them, for libraries that lorasft asks for in other versions."""
    from packaging.requirements import Requirement

    own = next(iter(importlib.metadata.distributions(name="lorasft")), None)  # None: it runs from its sources
    wrong = {}
    for asked in map(Requirement, (own and own.requires) or ()):
        found = next((one.version for one in importlib.metadata.distributions(name=asked.name)), "0")
        meant = not asked.marker or asked.marker.evaluate({"extra": ""})
        if meant and not asked.specifier.contains(found, prereleases=True):
            wrong[f"{asked.name} {found}"] = str(asked)
    if wrong:
        fix = shlex.join(["pip", "install", *wrong.values()])
        raise DeviceError(f"{', '.join(wrong)}; asked for: {', '.join(wrong.values())}", hint=fix)
    return "as lorasft asks for" if own else "not compared: lorasft runs from its sources"


def _check_device() -> str:
    import torch

    from lorasft.model.base import check_device, compute_dtype

    driver = DRIVER.read_text(encoding="utf-8", errors="replace").partition("\n")[0] if DRIVER.is_file() else ""
    if driver and not torch.cuda.is_available():
        what = f"{driver}, which torch {torch.__version__} of CUDA {torch.version.cuda} cannot use"
        raise DeviceError(what, hint="update the driver, or pip install --force-reinstall torch")
    device = find_device()
    dtype = str(compute_dtype("auto", device)).removeprefix("torch.")
    if device.type != "cuda":
        return f"{device.type}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {dtype}"
    check_device(device)
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, sm_{found.major}{found.minor}, CUDA {torch.version.cuda}, {driver}, {dtype}"


def _check_nf4() -> str:
    from lorasft.model.base import nf4_error

    device = find_device()
    error, most = nf4_error(device)
    what = f"a 4-bit linear and its backward on {device} are {error:.1e} from float64 (at most {most:.0e})"
    if not error <= most:  # nor is a NaN
        raise DeviceError(what, hint="pip install -U torch bitsandbytes")
    return what


def _check_attention() -> str:
    from lorasft.model.base import load_base
    from lorasft.model.selfcheck import verify
    from lorasft.recipe.load import load_recipe

    settings = load_recipe("tiny").model.model_copy(update={"quantization": "none"})  # its base is shipped
    network = verify(load_base(settings, find_device()))
    if not (network.segments and network.share and network.head):  # a slower attention is right all the same
        raise DeviceError("; ".join(network.notices), hint="pip install -U torch transformers")
    fine = "packed sequences do not see each other; shared prefixes and the loss are exact"
    return "; ".join([fine, *network.notices])


def _check_disk() -> str:
    from huggingface_hub.constants import HF_HOME

    for folder in (Path.cwd(), Path(HF_HOME)):
        need_space(folder, LEAST_DISK)
    return f"{size_text(LEAST_DISK)} and more are free here and in {HF_HOME}"


def _check_hub() -> str:
    if error := hub_error():
        raise DeviceError(error, hint="curl -I https://huggingface.co  # a proxy? export HTTPS_PROXY=...")
    return "answers"
