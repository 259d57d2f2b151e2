"""The base in 4 bit, with adapters."""

import logging
import os
import sys
from unittest.mock import patch

# On a CPU oneDNN compiles its kernels for each shape and keeps a thousand of them in each of two caches, which grow by
# tens of megabytes a step (pytorch/pytorch#27971). A micro-batch needs about 40, and `pair_losses` rounds its sizes up,
# so that they come again.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
os.environ.setdefault("LRU_CACHE_CAPACITY", "512")

# On a CPU with AVX512-BF16, importing bitsandbytes 0.50 asks the hub for a kernel and warns when it gets none. The
# kernel is for inference only, and nothing here dials out unasked: the package that would fetch it is hidden meanwhile.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
# It has torch compile the kernels for devices without its own: not used here, and the compiler's import takes a second.
with patch("torch.compile", lambda function, **_: function):
    import bitsandbytes  # noqa: F401

if sys.modules["kernels"] is None:
    del sys.modules["kernels"]

from lorasft.model.quantizer import install_quantizer  # noqa: E402

QUANTIZER = install_quantizer()  # in its place as long as this module lives
