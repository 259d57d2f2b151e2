"""The base in 4 bit, with adapters."""

import gc
import importlib
import logging
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

# On a CPU oneDNN compiles its kernels for each shape and keeps a thousand of them in each of two caches, which grow by
# tens of megabytes a step (pytorch/pytorch#27971). A micro-batch needs about 40, and `pair_losses` rounds its sizes up,
# so that they come again.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
os.environ.setdefault("LRU_CACHE_CAPACITY", "512")


class _Compiler(ModuleType):
    """Stands for torch._dynamo, whose import takes seconds, while it is asked for no more than to leave functions as
    they are, which torch and transformers ask for many. For anything else it gives way to the real one."""

    __path__ = [f"{torch.__path__[0]}/_dynamo"]  # noqa: RUF012  as of any module
    disable: Any = staticmethod(lambda function=None, *_, **__: function or _Compiler.disable)
    allow_in_graph = assume_constant_result = graph_break = exec_module = disable

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("find_distributions", "invalidate_caches"):  # asked of all, not of this
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        """Before a part the real whole is imported, but for the part that transformers wants, which needs no other."""
        if name.startswith("torch._dynamo.") and not name.endswith("._trace_wrapped_higher_order_op"):
            return ModuleSpec(name, self) if sys.modules.get(self.__name__) is self else None  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> Any:
        self.optimize  # noqa: B018  gives way
        return importlib.import_module(spec.name)


if "torch._dynamo" not in sys.modules:
    sys.modules["torch._dynamo"] = stand_in = _Compiler("torch._dynamo")
    sys.meta_path.insert(0, stand_in)
# On a CPU with AVX512-BF16, importing bitsandbytes 0.50 asks the hub for a kernel and warns when it gets none. The
# kernel is for inference only, and nothing here dials out unasked: the package that would fetch it is hidden meanwhile.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
gc.disable()  # the libraries make a million objects, which it would look through again and again, also later
# bitsandbytes has torch compile the kernels for devices without its own, which are not used here.
with patch("torch.compile", lambda function, **_: function):
    import bitsandbytes  # noqa: F401
import peft  # noqa: E402, F401

gc.freeze()
gc.enable()
if sys.modules["kernels"] is None:
    del sys.modules["kernels"]

from lorasft.model.quantizer import install_quantizer  # noqa: E402

QUANTIZER = install_quantizer()  # in its place as long as this module lives
