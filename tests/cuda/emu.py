"""An emulated CUDA device in host memory: `import emu` before anything asks for CUDA, with its library preloaded.

What it gives, for code that behaves differently on CUDA where there is no GPU:
- tensors that say `cuda:0` and hold real numbers, which the CPU's kernels compute; mixing devices raises, and what is
  read before it is written is NaN;
- an allocator with a total, a limit, peaks, and the real `torch.OutOfMemoryError`; pinned memory that knows itself;
- counts of dispatches (`report`) and of waits of the host for the device (`waits`): numbers that are read, and copies
  that are not between the device and pinned memory;
- FlashAttention over sequences of unequal lengths, with windows and the checks of the real kernels, and bitsandbytes'
  kernels with the checks of their CUDA registrations.
What it is not: real kernels, the caching allocator (fragments, the work space of cuBLAS), Triton, NCCL, speed.

Environment: EMU_LIB the compiled emu.cpp; EMU_TOTAL bytes of memory (24 GiB); EMU_CAP the compute capability (8.9;
below 8.0 neither FlashAttention nor products in bf16).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import lorasft.model  # noqa: F401  with bitsandbytes, whose operations get kernels here

torch._dynamo.config  # noqa: B018  the compiler is imported while torch has no device, whose C++ parts are missing here
TOTAL = int(os.environ.get("EMU_TOTAL", 24 << 30))
CAPABILITY = tuple(int(number) for number in os.environ.get("EMU_CAP", "8.9").split("."))
_lib = ctypes.CDLL(os.environ["EMU_LIB"])
_lib.emu_live.restype = _lib.emu_peak.restype = ctypes.c_int64
_lib.emu_limit.argtypes = [ctypes.c_int64]
_lib.emu_report.restype = ctypes.c_char_p
_lib.emu_bf16(int(CAPABILITY >= (8, 0)))
_synchronized = 0


# ---- what tests ask


def report() -> dict[str, int]:
    """Dispatches since `clear`, by operation; copies by their direction; a kernel that is emulated here is one."""
    return _read(0)


def waits() -> dict[str, int]:
    """How often the host waited for the device since `clear`, by operation."""
    return _read(1) | ({"synchronize": _synchronized} if _synchronized else {})


def clear() -> None:
    """Count from 0 again."""
    global _synchronized
    _synchronized = 0
    _lib.emu_clear()


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """Raise RuntimeError where the host would wait for the device: the traceback says where that is."""
    _lib.emu_allow_waits(0)
    try:
        yield
    finally:
        _lib.emu_allow_waits(1)


def _read(which: int) -> dict[str, int]:
    lines = (line.rpartition("\t") for line in _lib.emu_report(which).decode().splitlines())
    return {name: int(number) for name, _, number in lines}


# ---- torch.cuda


class _Stream:
    """The only stream, which has nothing to wait for."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def synchronize(self) -> None:
        _synchronize()

    def wait_stream(self, other: Any) -> None:
        pass


class _Here:
    """A context that chooses what is chosen already."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class _Share:
    """Which share of the memory this process may take."""

    now = 1.0

    def set(self, share: float, device: Any = None) -> None:
        self.now = share
        _lib.emu_limit(int(share * TOTAL))

    def get(self, device: Any = None) -> float:
        return self.now


def _synchronize(device: Any = None) -> None:
    global _synchronized
    _synchronized += 1


_found_before: dict[str, int] = {}


def _debug_waits(mode: str) -> None:
    """torch.cuda.set_sync_debug_mode: the waits since "warn" are told by "default", all at once."""
    if mode == "warn":
        _found_before.clear()
        _found_before.update(waits())
        return
    for name, count in waits().items():
        for _ in range(count - _found_before.get(name, 0)):
            warnings.warn(f"called a synchronizing CUDA operation: {name}", stacklevel=2)


def _properties(device: Any = None) -> SimpleNamespace:
    major, minor = CAPABILITY
    return SimpleNamespace(name="Emulated", total_memory=TOTAL, major=major, minor=minor, multi_processor_count=128)


def _install_device() -> None:
    """Let torch.cuda and torch.accelerator find one device."""
    share = _Share()
    share.set(1.0)
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,  # also where it is emulated
        "_is_compiled": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_90", "compute_90"],
        "get_device_name": lambda device=None: "Emulated",
        "get_device_properties": _properties,
        "synchronize": _synchronize,
        "set_sync_debug_mode": _debug_waits,
        "memory_allocated": lambda device=None: _lib.emu_live(),
        "max_memory_allocated": lambda device=None: _lib.emu_peak(),
        "memory_reserved": lambda device=None: _lib.emu_live(),
        "max_memory_reserved": lambda device=None: _lib.emu_peak(),
        "reset_peak_memory_stats": lambda device=None: _lib.emu_reset_peak(),
        "mem_get_info": lambda device=None: (TOTAL - _lib.emu_live(), TOTAL),
        "empty_cache": lambda: None,
        "set_per_process_memory_fraction": share.set,
        "get_per_process_memory_fraction": share.get,
        # Its random numbers are the CPU's, whose state is kept beside.
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "device": _Here,
        "device_of": _Here,
        "Stream": _Stream,
        "stream": _Here,
        "current_stream": _Stream,
    }
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
    for name in ("is_available", "device_count"):
        setattr(torch.accelerator, name, functions[name])
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")  # type: ignore
    torch.accelerator.current_device_index = lambda: 0  # type: ignore


# ---- kernels


@contextlib.contextmanager
def _kernel(name: str) -> Iterator[None]:
    """One dispatch, whatever emulates it."""
    _lib.emu_add(name.encode())
    _lib.emu_count(0)
    try:
        yield
    finally:
        _lib.emu_count(1)


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(what)


def _dequantize(
    codes: Tensor, scales: Tensor, block: int, kind: str, shape: Any, dtype: torch.dtype, out: Tensor
) -> None:
    """bitsandbytes' dequantize_4bit.out."""
    _need(out.shape == tuple(shape), f"Expected out.shape == {shape}, got {out.shape}")
    _need(out.dtype == dtype, f"Expected out.dtype == {dtype}, got {out.dtype}")
    _need(codes.device == scales.device == out.device, "the tensors are on several devices")
    _need(scales.dtype == torch.float32 and scales.is_contiguous() and out.is_contiguous(), "scales or out")
    with _kernel("bitsandbytes::dequantize_4bit.out"):
        out.copy_(torch.ops.bitsandbytes.dequantize_4bit.default(codes, scales, block, kind, shape, dtype))


def _check_flash(q: Tensor, k: Tensor, v: Tensor, cq: Tensor, ck: Tensor) -> None:
    _need(CAPABILITY >= (8, 0), "FlashAttention only supports Ampere GPUs or newer.")
    _need(q.dtype in (torch.bfloat16, torch.float16), "FlashAttention only support fp16 and bf16 data type")
    _need(q.dtype == k.dtype == v.dtype, "query and key must have the same dtype")
    _need(all(one.is_cuda for one in (q, k, v, cq, ck)), "all tensors must be on CUDA")
    _need(cq.dtype == ck.dtype == torch.int32, "cu_seqlens_q must have dtype int32")
    _need(cq.is_contiguous() and ck.is_contiguous(), "cu_seqlens_q must be contiguous")
    size = q.shape[-1]
    _need(size == k.shape[-1] == v.shape[-1], "query, key and value must have the same head size")
    _need(size <= 256 and size % 8 == 0, "head_size must be a multiple of 8, at most 256")
    _need(q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    _need(q.shape[1] % k.shape[1] == 0, "Number of heads in key/value must divide number of heads in query")


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, left: int | None, right: int | None) -> Tensor:
    """The scaled products of one sequence, (heads, queries, keys), -inf outside the window, from the bottom right."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    ahead = torch.arange(len(k)) - torch.arange(len(q)).unsqueeze(1) - (len(k) - len(q))
    right = 0 if causal else right
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if right is not None and right >= 0:
        hidden |= ahead > right
    if left is not None and left >= 0:
        hidden |= ahead < -left
    return scores.masked_fill(hidden, float("-inf"))


def _sequences(q: Tensor, k: Tensor, v: Tensor, cq: Tensor, ck: Tensor, mq: int, mk: int) -> Iterator[tuple[Any, ...]]:
    """Of each sequence where it is among the queries and among the keys, and its q, k, v in fp32, k and v repeated."""
    group = q.shape[1] // k.shape[1]
    queries, keys = cq.tolist(), ck.tolist()
    for begin, end, first, last in zip(queries, queries[1:], keys, keys[1:], strict=False):
        _need(end - begin <= mq and last - first <= mk, "a sequence is longer than max_q or max_k")
        where, what = slice(begin, end), slice(first, last)
        repeated = (one[what].float().repeat_interleave(group, 1) for one in (k, v))
        yield where, what, q[where].float(), *repeated


def _drop(weights: Tensor, dropout: float, seed: int) -> Tensor:
    """What the weights of one sequence are multiplied with: 0 where they drop out; the same for the same `seed`."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(weights.shape, generator=draw) >= dropout).float() / (1 - dropout)


def _flash(
    q: Tensor,  # (queries, heads, size)
    k: Tensor,  # (keys, key heads, size)
    v: Tensor,
    cq: Tensor,
    ck: Tensor,
    mq: int,
    mk: int,
    dropout: float,
    causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **_: Any,
) -> tuple[Tensor, ...]:
    """aten::_flash_attention_forward: (queries, heads, size), the log of the softmax's denominator (heads, queries)."""
    _check_flash(q, k, v, cq, ck)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with _kernel("aten::_flash_attention_forward"):
        rows, logs = torch.empty(q.shape), torch.empty(q.shape[1], len(q))
        cpu = [one.cpu() for one in (q, k, v, cq, ck)]
        seed = int(torch.randint(1 << 40, ())) if dropout else 0
        for where, _, qs, ks, vs in _sequences(*cpu, mq, mk):
            scores = _scores(qs, ks, scale, causal, window_size_left, window_size_right)
            logs[:, where] = scores.logsumexp(-1)
            weights = scores.softmax(-1)
            rows[where] = torch.einsum("hqk,khd->qhd", weights * _drop(weights, dropout, seed + where.start), vs)
        state = torch.tensor([seed, 0]).to("cuda")
        none = torch.zeros(1, device="cuda")
        return rows.to(q.dtype).to("cuda"), logs.to("cuda"), state, none, none[:0]


def _flash_back(
    upstream: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log: Tensor,
    cq: Tensor,
    ck: Tensor,
    mq: int,
    mk: int,
    dropout: float,
    causal: bool,
    seed: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    """aten::_flash_attention_backward: the gradients of q, k, v."""
    _check_flash(q, k, v, cq, ck)
    _need(upstream.stride(-1) == 1, "dout tensor must have contiguous last dimension")
    _need(log.shape == (q.shape[1], len(q)) and log.dtype == torch.float32, "softmax_lse has another shape or dtype")
    small = CAPABILITY in ((8, 6), (8, 9)) or CAPABILITY >= (12, 0)
    _need(not (small and 192 < q.shape[-1] <= 224), "FlashAttention backward for head dim > 192 requires A100 or H100")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with _kernel("aten::_flash_attention_backward"):
        grad_q, grad_k, grad_v = torch.zeros(q.shape), torch.zeros(k.shape), torch.zeros(v.shape)
        given, rows, logs, group = upstream.cpu().float(), out.cpu().float(), log.cpu(), q.shape[1] // k.shape[1]
        cpu, seed = [one.cpu() for one in (q, k, v, cq, ck)], seed.cpu()
        for where, what, qs, ks, vs in _sequences(*cpu, mq, mk):
            scores = _scores(qs, ks, scale, causal, window_size_left, window_size_right)
            weights = (scores - logs[:, where].unsqueeze(-1)).exp()
            kept = _drop(weights, dropout, int(seed[0]) + where.start)
            grad_weights = torch.einsum("qhd,khd->hqk", given[where], vs) * kept
            grad_scores = weights * (grad_weights - (given[where] * rows[where]).sum(-1).t().unsqueeze(-1)) * scale
            grad_q[where] = torch.einsum("hqk,khd->qhd", grad_scores, ks)
            grad_k[what] = torch.einsum("hqk,qhd->khd", grad_scores, qs).unflatten(1, (-1, group)).sum(2)
            grad_v[what] = torch.einsum("hqk,qhd->khd", weights * kept, given[where]).unflatten(1, (-1, group)).sum(2)
        return tuple(one.to(q.dtype).to("cuda") for one in (grad_q, grad_k, grad_v))


def _histc(row: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """aten::histc, which counts whole numbers on CUDA only."""
    with _kernel("aten::histc"):
        return torch.histc(row.cpu().float(), bins, min, max).to(row.dtype).to("cuda")


def _norm(x: Tensor, shape: Any, weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    """aten::_fused_rms_norm over the last dimension: y like x, 1 / the root of the mean square (..., 1) fp32."""
    _need(weight is None or weight.dtype == x.dtype, f"expected scalar type {x.dtype} but found another")
    with _kernel("aten::_fused_rms_norm"):
        rows = x.cpu().float()
        inverse = (rows.square().mean(-1, keepdim=True) + eps).rsqrt()
        y = rows * inverse if weight is None else rows * inverse * weight.cpu().float()
        return y.to(x.dtype).to("cuda"), inverse.to("cuda")


def _norm_back(
    upstream: Tensor, x: Tensor, shape: Any, inverse: Tensor, weight: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor | None]:
    """aten::_fused_rms_norm_backward: the gradient of x."""
    _need(upstream.dtype == x.dtype and (weight is None or weight.dtype == x.dtype), "the tensors have several dtypes")
    _need(inverse.dtype == torch.float32 and wanted == [True, False], "rstd, or a gradient that is not emulated")
    with _kernel("aten::_fused_rms_norm_backward"):
        rows, given, inverse = (one.cpu().float() for one in (x, upstream, inverse))
        given = given if weight is None else given * weight.cpu().float()
        rows = rows * inverse
        slope = (given - rows * (given * rows).mean(-1, keepdim=True)) * inverse
        return slope.to(x.dtype).to("cuda"), None


def _grouped_mm(
    rows: Tensor, experts: Tensor, offs: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """aten::_grouped_mm, of which only bf16 has a kernel: else torch reads how many rows each expert has."""
    for one in (rows, experts):
        _need(max(one.stride()[-2:]) * one.itemsize % 16 == 0, "strides should be multiple of 16 bytes")
    ends = offs.cpu() if rows.dtype != torch.bfloat16 else None
    with _kernel("aten::_grouped_mm"):
        ends = offs.cpu() if ends is None else ends
        return torch._grouped_mm(rows.cpu(), experts.cpu(), offs=ends, out_dtype=out_dtype).to("cuda")


def _install_kernels() -> tuple[Any, ...]:
    """Register what is emulated here; the result has to live on."""
    aten, own = torch.library.Library("aten", "IMPL"), torch.library.Library("bitsandbytes", "IMPL")
    own.impl("dequantize_4bit.out", _dequantize, "CUDA")
    aten.impl("histc", _histc, "CUDA")
    aten.impl("_grouped_mm", _grouped_mm, "CUDA")
    aten.impl("_flash_attention_forward", _flash, "CUDA")
    aten.impl("_flash_attention_backward", _flash_back, "CUDA")
    aten.impl("_fused_rms_norm", _norm, "CUDA")
    aten.impl("_fused_rms_norm_backward", _norm_back, "CUDA")
    return aten, own


_install_device()
LIBRARIES = _install_kernels()
