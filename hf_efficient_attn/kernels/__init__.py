"""
Kernels for the CPU in C, for arithmetic that PyTorch's own operators spread over too many passes through memory.

They are optional: each stands beside the same arithmetic in PyTorch, is compiled by the system's C compiler when it is
first needed (a second, once; kept in the user's cache), and where there is no compiler PyTorch does the work.
HF_EFFICIENT_ATTN_KERNELS=0 turns them off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared")
LANES, WIDEST = 16, 256  # floats of a kernel's vector; the largest head that it has room for
_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


def load(name: str) -> ctypes.CDLL | None:
    """
    The library made of `<name>.c` beside this file, or None where kernels are off or cannot be compiled, and while
    `torch.export` writes down PyTorch's operators for another device.
    """
    off = _held_off or torch.compiler.is_exporting() or os.environ.get("HF_EFFICIENT_ATTN_KERNELS") == "0"
    return None if off else _compiled(name)


def serving(name: str, query: torch.Tensor) -> ctypes.CDLL | None:
    """
    The library, where it can serve queries like these, (..., D): on a CPU, in float32 or a half precision (see `readable`),
    and D a number of whole vectors.
    """
    fits = query.shape[-1] % LANES == 0 and query.shape[-1] <= WIDEST and query.numel() > 0
    plain = query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return load(name) if fits and plain else None


_held_off: list[None] = []


@contextmanager
def off() -> Iterator[None]:
    """Inside the block PyTorch does all the work, where its operators are to be seen."""
    _held_off.append(None)
    try:
        yield
    finally:
        _held_off.pop()


@cache
def _compiled(name: str) -> ctypes.CDLL | None:
    source = Path(__file__).with_name(f"{name}.c")
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or ctypes.sizeof(_LONG) != 8:
        return None
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256("\0".join([*texts, *FLAGS, compiler, _processor()]).encode()).hexdigest()[:16]
    cached = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hf_efficient_attn" / f"{name}-{key}.so"
    try:
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cached.parent) as folder:  # complete before it has its name
                fresh = Path(folder) / cached.name
                subprocess.run([compiler, *FLAGS, "-o", fresh, source], check=True, capture_output=True, timeout=120)
                fresh.replace(cached)
        return ctypes.CDLL(str(cached))
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    """What decides which instructions `-march=native` may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    return platform.machine() + next((x for x in lines if x.startswith(("flags", "Features"))), platform.processor())


def call(function: Any, *arguments: torch.Tensor | int | float | None) -> None:
    """
    Calls a kernel with tensors as pointers to their first entry; other Python threads run meanwhile.

    Raises:
        TypeError: numbers in another precision than float32, which the kernel would take for twice or half as many.
    """
    given = []
    for x in arguments:
        if isinstance(x, torch.Tensor):
            if x.is_floating_point() and x.dtype is not torch.float32:
                raise TypeError(f"a kernel was given {x.dtype}; it reads float32.")
            given.append(_POINTER(x.data_ptr()))
        else:
            given.append(_POINTER(None) if x is None else _LONG(x) if isinstance(x, int) else _FLOAT(x))
    function(*given)


def in_parallel(job: Callable[[Any], None], items: Iterable[Any]) -> None:
    """job(item) for all items, on as many threads as PyTorch uses, in the modes of this one."""
    threads, graded, inferring = torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def elsewhere(item: Any) -> None:
        with torch.inference_mode(inferring), torch.set_grad_enabled(graded):
            job(item)

    if threads == 1:
        for item in items:
            job(item)
    else:
        list(_pool(threads).map(elsewhere, items))


def for_each_head(job: Callable[[int, int], None], batch: int, heads: int) -> None:
    """job(b, h) for every head of every row, as `in_parallel`."""
    in_parallel(lambda i: job(*divmod(i, heads)), range(batch * heads))


def readable(x: torch.Tensor) -> torch.Tensor:
    """x as kernels read it: in float32, its last axis contiguous; strides of the others are handed over."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


@contextmanager
def writable(*results: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """The results as kernels write them: those in half precision begin as float32 copies, and get what is there afterwards."""
    wide = [x.float() for x in results]
    yield wide
    for x, y in zip(results, wide, strict=True):
        if x is not y:
            x.copy_(y)


def heads_of(x: torch.Tensor, b: int, g: int, groups: int) -> torch.Tensor:
    """Of x (B, X, ...) row b and those of its X heads that belong to key/value head g of `groups`: a view."""
    each = x.shape[1] // groups
    return x[b, g * each : (g + 1) * each]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="hf_efficient_attn")
