"""
A device that is none: tensors say that they lie on `other:0`, their numbers lie in the CPU's memory, and an operator that
meets both kinds fails, as it does on a GPU; so does float64, which Apple's GPUs do not have. What runs here has no tensor on
the wrong device, and calls no kernel for CPUs.

It changes PyTorch for the whole process, so it is for a program of its own: `tests/on_other_device.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "other"
DEVICE = torch.device("privateuseone", 0)
WAITS = ("aten::_local_scalar_dense", "aten::nonzero")  # the result is needed before anything else can be started
MOVES = ("aten::_to_copy", "aten::copy_")  # what may meet tensors of both devices
strict = False  # whether scalars of the CPU are refused as well, as those of one GPU are on another


class OtherTensor(Tensor):
    """`inner`, on the other device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OtherTensor:
        strides = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        if inner.dtype is torch.float64:
            raise TypeError(f"{NAME} has no float64")
        made = Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=DEVICE, **strides)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})

    # What PyTorch does in C++ below the dispatcher

    def tolist(self) -> list:
        if _counted is not None:
            _counted["waited for"] += 1
        return self.inner.tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})

    def __getitem__(self, index: Any) -> Tensor:
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(OtherTensor(torch.tensor(x)) if isinstance(x, list) else x for x in parts))


def elsewhere(x: Any) -> Any:
    """A tensor on the other device; a module whose parameters and buffers are moved there, in place; anything else as it is."""
    if isinstance(x, nn.Module):
        moved: dict[int, nn.Parameter] = {}  # shared ones stay shared
        for module in x.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    new = nn.Parameter(OtherTensor(p.detach().clone()), requires_grad=p.requires_grad)
                    module._parameters[name] = moved.setdefault(id(p), new)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else OtherTensor(buffer.clone())
        return x
    return OtherTensor(x.detach().clone()) if isinstance(x, Tensor) else x


_counted: Counter | None = None


@contextmanager
def counting() -> Iterator[Counter]:
    """How many operators are started inside the block, but for views, and how many results are waited for."""
    global _counted
    _counted = Counter()
    try:
        yield _counted
    finally:
        _counted = None


def begin() -> None:
    """From here on `device="other"` exists."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.as_tensor, torch.tensor = _made_elsewhere(torch.as_tensor), _made_elsewhere(torch.tensor)
    generator = torch.Generator
    torch.Generator = lambda device="cpu": generator()  # numbers are drawn in the CPU's memory
    _Mode().__enter__()


def _run(operator, args: tuple, kwargs: dict) -> Any:
    if _counted is not None and not operator.is_view:
        _counted["waited for" if operator.name() in WAITS else "started"] += 1
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, OtherTensor)]
    name, device = operator.name(), kwargs.get("device")
    if not ours and (device is None or not _is_other(device)):
        return operator(*args, **kwargs)
    for x in tensors if ours and not name.startswith(MOVES) else ():
        if (strict or x.ndim > 0) and not isinstance(x, OtherTensor):
            raise RuntimeError(f"{name} meets tensors on {NAME} and on {x.device} {tuple(x.shape)}")
    output = operator(*tree_map(_here, args), **tree_map(_here, kwargs))
    if not (
        _is_other(device)
        if device is not None
        else isinstance(args[0], OtherTensor) or not name.startswith("aten::copy_")
    ):
        return output
    known = {id(x.inner): x for x in ours}  # what was changed in place stays the tensor that it was

    def there(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else OtherTensor(x)

    return tree_map(there, output)


def _here(x: Any) -> Any:
    if isinstance(x, OtherTensor):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) and _is_other(x) else x


def _is_other(device: Any) -> bool:
    return torch.device(device).type == NAME


class _Mode(TorchDispatchMode):
    """Tensors that are made from nothing."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


def _made_elsewhere(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor and torch.as_tensor, which move what they made below the dispatcher."""

    def make(data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
        if isinstance(data, OtherTensor):
            return data.to(data.device if device is None else device, options.get("dtype") or data.dtype)
        if device is None or not _is_other(device):
            return function(data, *args, device=device, **options)
        return OtherTensor(function(data, *args, **options).detach())

    return make


class _Backend:
    """What PyTorch asks of a device."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    device_count = staticmethod(lambda: 1)
    synchronize = staticmethod(lambda: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])
