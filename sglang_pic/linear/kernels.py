"""Which form of a link's kernels runs: torch on a CPU, Triton on a GPU, by the same names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch

from sglang_pic.kernels.operators import states


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The functions of ``kernels.operators.states``, or their Triton forms."""

    states_before: Callable[..., torch.Tensor]
    histories_before: Callable[..., torch.Tensor]


TORCH = Kernels(states.states_before, states.histories_before)


@functools.cache
def triton_kernels() -> Kernels:
    """The Triton forms; interpreted, where ``TRITON_INTERPRET`` is set."""
    from sglang_pic.kernels.triton import states

    return Kernels(states.states_before, states.histories_before)


def kernels_for(tensor: torch.Tensor) -> Kernels:
    """Those for the device of a tensor."""
    return triton_kernels() if tensor.is_cuda else TORCH
