"""Which form of a kernel runs: torch on a CPU, Triton on a GPU, by the same names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from sglang_pic.kernels import merge, relocate, rotate, rows


@dataclasses.dataclass(frozen=True)
class Kernels:
    """``kernels.rotate.gather_rotate``, ``kernels.rows``, ``kernels.merge`` and
    ``kernels.relocate``, or their Triton forms."""

    gather_rotate: Callable[..., torch.Tensor]
    walk_rows: Callable[..., None]
    attend_parts: Callable[..., Any]
    merge: Callable[..., torch.Tensor]
    relocate: Callable[..., None]


TORCH = Kernels(
    rotate.gather_rotate, rows.walk_rows, rows.attend_parts, merge.merge, relocate.relocate
)


@functools.cache
def triton_kernels() -> Kernels:
    """The Triton forms; interpreted, where ``TRITON_INTERPRET`` is set."""
    from sglang_pic.kernels.triton import merge, parts, relocate, rotate, walk

    return Kernels(
        rotate.gather_rotate, walk.walk_rows, parts.attend_parts, merge.merge, relocate.relocate
    )


@functools.cache
def latent_kernels() -> Kernels:
    """As ``triton_kernels``, of layers with latent attention."""
    from sglang_pic.kernels.triton import latent

    return dataclasses.replace(
        triton_kernels(), walk_rows=latent.walk_rows, attend_parts=latent.attend_parts
    )


def kernels_for(tensor: torch.Tensor) -> Kernels:
    """Those for the device of a tensor."""
    return triton_kernels() if tensor.is_cuda else TORCH
