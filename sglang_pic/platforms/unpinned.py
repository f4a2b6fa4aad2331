"""What SGLang asks of torch that only a GPU can give, answered on a CPU.

A CUDA build of torch answers ``torch.cuda`` as the current device's module even
without a driver. SGLang pins memory in places whatever the platform says (a
hybrid's decode, adapters, what is captured of a forward pass); memory that is used
where it lies needs no pinning.

What stands in keeps the interface of what it stands for. Torch itself asks for it:
``torch.compile`` for the function inside a cached one, ``with torch.device(...)``
and ``torch.jit.script`` for the very objects they know as factories.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch.jit import _builtins as scripted
from torch.utils import _device as contexts

# Of torch, by name: all that make a dense tensor and take ``pin_memory``.
FACTORIES = (
    *("arange", "bartlett_window", "blackman_window", "empty", "empty_like", "empty_permuted"),
    *("empty_strided", "eye", "full", "full_like", "hamming_window", "hann_window"),
    *("kaiser_window", "linspace", "logspace", "normal", "ones", "ones_like", "rand", "rand_like"),
    *("randint", "randint_like", "randn", "randn_like", "randperm", "range", "scalar_tensor"),
    *("tensor", "tril_indices", "triu_indices", "zeros", "zeros_like"),
)
# The same of ``torch.Tensor``.
METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")

_Function = TypeVar("_Function", bound=Callable[..., Any])
_device_module = torch.get_device_module


@functools.cache
def get_device_module(device: torch.device | str | None = None) -> ModuleType:
    """``torch.get_device_module``, except that no device means the CPU."""
    return _device_module("cpu" if device is None else device)


# By it torch.compile knows the function that it evaluates while it traces.
get_device_module.__wrapped__ = _device_module.__wrapped__


def pin_memory(self: torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """``torch.Tensor.pin_memory`` where there is nothing to transfer to."""
    return self


def without_pin(stock: _Function) -> _Function:
    """``stock``, deaf to ``pin_memory``."""

    @functools.wraps(stock)
    def made(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return stock(*args, **kwargs)

    return made  # type: ignore[return-value]


def install() -> None:
    """Put the stand-ins in place; a second call changes nothing."""
    if torch.get_device_module is get_device_module:
        return
    torch.get_device_module = get_device_module
    torch.Tensor.pin_memory = functools.wraps(torch.Tensor.pin_memory)(pin_memory)
    # A factory called inside `with torch.device(...)` comes there as torch's own: this
    # set is to be made while it holds those.
    contexts._device_constructors()
    for name in FACTORIES:
        stand_in = without_pin(getattr(torch, name))
        # Where to find it, for pickle; torch's own name a private class.
        stand_in.__module__, stand_in.__qualname__ = "torch", name
        scripted._register_builtin(stand_in, f"aten::{name}")
        setattr(torch, name, stand_in)
    for name in METHODS:
        setattr(torch.Tensor, name, without_pin(getattr(torch.Tensor, name)))
