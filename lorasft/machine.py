"""How much memory this machine and its card have free, without torch."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]


def card_memory() -> int | None:
    """Free bytes of the first NVIDIA card as the driver's library says (NVML); None where there is no card."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    card, found = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free, used
    failed = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(card))
    failed = failed or nvml.nvmlDeviceGetMemoryInfo(card, ctypes.byref(found))
    return None if failed else int(found[1])


def machine_memory() -> int:
    """Bytes that this process can still take of the machine's memory."""
    return min([int(psutil.virtual_memory().available), *cgroup_free(Path("/"))])


def cgroup_free(root: Path) -> Iterator[int]:
    """Bytes left to each control group of Linux (version 2) that this process is in, for those with a limit."""
    groups, mount = root / "proc/self/cgroup", root / "sys/fs/cgroup"
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else []:
        own = mount / line.rpartition(":")[2].strip("/")
        for folder in (own, *own.parents) if line.startswith("0::") else ():
            with contextlib.suppress(OSError):  # a container sees not all of its groups
                limit, used, lines = ((folder / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
                if limit.strip().isdecimal():  # else "max"; cached files give way
                    yield int(limit) - int(used) + int(dict(map(str.split, lines.splitlines()))["inactive_file"])
