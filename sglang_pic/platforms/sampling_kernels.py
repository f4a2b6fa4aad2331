"""Torch form of the kernel by which SGLang draws tokens for a ``sampling_seed``.

As in ``linear_kernels``. SGLang has one for a CPU too, in a library that does not load
without a GPU's driver, and a request with a seed would end the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LOW = 0xFFFFFFFF


def _rotated(x: torch.Tensor, by: int) -> torch.Tensor:
    return ((x << by) | (x >> (32 - by))) & _LOW


def _mixed(h: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    # Products keep their low 32 bits whatever overflows.
    k = (_rotated((k * 0xCC9E2D51) & _LOW, 15) * 0x1B873593) & _LOW
    return (_rotated(h ^ k, 13) * 5 + 0xE6546B64) & _LOW


def murmur_hash32(
    seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor
) -> torch.Tensor:
    """MurmurHash3 of (seed, position, column): seed 64 bits [n], positions [n], columns
    [m]; uint32 [n, m]."""
    seed = seed.to(torch.int64)
    h = torch.zeros_like(seed)
    for block in (seed, seed >> 32, positions.to(torch.int64)):
        h = _mixed(h, block & _LOW)
    h = _mixed(h[:, None], col_indices.to(torch.int64)[None] & _LOW) ^ 16
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor) & _LOW
    return (h ^ (h >> 16)).to(torch.uint32)


KERNELS: dict[str, Callable[..., Any]] = {
    "sglang.kernels.ops.sampling.murmur_hash.murmur_hash32": murmur_hash32,
}
