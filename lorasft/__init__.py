"""lorasft: 4-bit base, LoRA adapters, masked-label SFT, and a merge back into full weights."""

import os
import sys

from lorasft.commands.chat import load as load
from lorasft.commands.train import train as train

__version__ = "0.1.0"

# Micro-batches differ in length, and torch's allocator for GPUs keeps memory in pieces that the next one does not fit
# into, unless pieces may grow (only on Linux). Read when torch first takes memory of a GPU; what a person set stays.
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
