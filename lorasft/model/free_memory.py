"""How many bytes are free."""

from __future__ import annotations

import torch

from lorasft.machine import machine_memory


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on `device`, what its allocator holds unused among them."""
    if device.type != "cuda":
        return machine_memory()
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return min(free, allowed) + reserved - torch.cuda.memory_allocated(device)
