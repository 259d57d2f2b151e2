"""How much memory a device has free."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]

if TYPE_CHECKING:
    import torch


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on `device`, what its allocator holds unused among them."""
    if device.type != "cuda":
        return min([int(psutil.virtual_memory().available), *cgroup_free(Path("/"))])
    import torch

    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return min(free, allowed) + reserved - torch.cuda.memory_allocated(device)


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
