"""How many bytes are free, and whether an error says that none are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on `device`, what its allocator holds unused among them."""
    if device.type != "cuda":
        return min([int(psutil.virtual_memory().available), *cgroup_free(Path("/"))])
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return min(free, allowed) + reserved - torch.cuda.memory_allocated(device)


def cgroup_free(root: Path) -> Iterator[int]:
    """Bytes left to each control group of Linux that this process is in, for those with a limit; versions 1 and 2."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.is_file() else []:
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        own = mount / name.strip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(mount):
                yield from _one_cgroup_free(folder, version=1 if controllers else 2)


def _one_cgroup_free(folder: Path, *, version: int) -> Iterator[int]:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    with contextlib.suppress(OSError):  # a container sees not all of its groups
        limit, used = ((folder / name).read_text(encoding="utf-8").strip() for name in names)
        counts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        if limit.isdecimal():  # version 2 says "max"; cached files give way
            cached = int(counts.get("total_inactive_file" if version == 1 else "inactive_file", 0))
            yield int(limit) - int(used) + cached


def out_of_memory(fault: BaseException) -> bool:
    """Whether an error means that memory ran out: CUDA has a class for it, the CPU's allocator and oneDNN a message."""
    signs = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "could not create a memory object")
    if str(fault).strip() in ("could not create a primitive", "could not execute a primitive"):
        return isinstance(fault, RuntimeError)
    return isinstance(fault, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(fault, RuntimeError) and any(sign in str(fault) for sign in signs)
    )
