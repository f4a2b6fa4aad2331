"""Triton form of ``kernels.merge.merge``."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def _merge(
    Partial,
    Lse,
    Indptr,
    Index,
    Out,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    query, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for i in range(tl.load(Indptr + query), tl.load(Indptr + query + 1)):
        at = tl.load(Index + i).to(tl.int64) * HEADS + head
        lse = tl.load(Lse + at)
        x = tl.load(Partial + at * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
        new = tl.maximum(top, lse)
        # A part in which a query sees nothing weighs nothing: its log-sum-exp is -inf.
        safe = tl.where(new == float("-inf"), 0.0, new)
        old_weight, weight = tl.exp(top - safe), tl.exp(lse - safe)
        acc = acc * old_weight + x * weight
        total = total * old_weight + weight
        top = new
    place = (query.to(tl.int64) * HEADS + head) * DIM + d
    tl.store(Out + place, acc / total, mask=d < DIM)


def merge(
    partial: torch.Tensor, lse: torch.Tensor, indptr: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """As ``kernels.merge.merge``; ``partial`` and ``lse`` are contiguous."""
    heads, dim = partial.shape[1:]
    queries = indptr.numel() - 1
    out = partial.new_empty((queries, heads, dim), dtype=torch.float32)
    _merge[(queries, heads)](
        partial,
        lse,
        indptr,
        index,
        out,
        HEADS=heads,
        DIM=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        num_warps=2,
    )
    return out


def merge_cut(partial: torch.Tensor, lse: torch.Tensor, splits: int) -> torch.Tensor:
    """As ``merge``, where every query has ``splits`` partial results that lie together."""
    return merge(partial, lse, *_cut(len(lse) // splits, splits, lse.device))


@functools.lru_cache(maxsize=8)
def _cut(queries: int, splits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the partial results are each query's; the same tensors for all layers."""
    index = torch.arange(queries * splits, device=device)
    return torch.arange(0, queries * splits + 1, splits, device=device), index
