"""What SGLang's host tier (HiCache) lacks on a plain CPU.

It registers its memory with CUDA and copies with kernels that it has for GPUs alone; the
rest of it asks torch for streams and events, of which ``torch.cpu`` has idle ones. So what
is copied here is there at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sglang_pic.sglang_contract import check_value

# Memory to leave free beside a host pool. SGLang's own is 10 GiB, as hosts of GPUs have it.
RESERVE = 1 << 30


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy rows between pools, each [slots, heads, dim]; int64 indices of whole pages."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def allocate(
    dims: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    pin_memory: bool,
    allocator: Any,
    registration_granularity_bytes: int | None = None,
) -> torch.Tensor:
    """SGLang's memory for a host pool, registered with nobody."""
    memory: torch.Tensor = allocator.allocate(dims, dtype=dtype, device=device)
    return memory


def bind() -> None:
    """Name the copy in the modules of the pools, which leave it out on a CPU, and say how
    those beside a CPU's pool allocate.

    Raises:
        PicConfigError: this SGLang's are of another shape.
    """
    from sglang.srt.mem_cache.pool_host import base, common, mha, mla

    check_value(base, "HICACHE_HOST_MEMORY_RESERVE_BYTES", int)
    check_value(common, "ALLOC_MEMORY_FUNCS", dict)
    for module in (mha, mla):
        if not hasattr(module, "transfer_kv_direct"):
            module.transfer_kv_direct = transfer_kv_direct
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = RESERVE
    common.ALLOC_MEMORY_FUNCS["cpu"] = allocate
