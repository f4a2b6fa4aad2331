"""Triton form of ``kernels.rotate.gather_rotate``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def rotate_partner(d, HALF: tl.constexpr, NEOX: tl.constexpr):
    """Of every channel: the one it is rotated with, its sign, and its angle's index.
    Channels at or behind 2 * HALF are not rotated."""
    if NEOX:
        partner = tl.where(d < HALF, d + HALF, d - HALF)
        sign = tl.where(d < HALF, -1.0, 1.0)
        angle = d % HALF
    else:
        partner = d ^ 1
        sign = tl.where(d % 2 == 0, -1.0, 1.0)
        angle = d // 2
    turned = d < 2 * HALF
    return tl.where(turned, partner, d), sign, tl.where(turned, angle, 0), turned


@triton.jit
def _gather_rotate(
    Query,
    Index,
    Cos,
    Sin,
    Out,
    count,
    stride_n,
    stride_h,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
    NEOX: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
):
    # Rows of [count * HEADS, DIM].
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n, head = row // HEADS, row % HEADS
    d = tl.arange(0, BLOCK_D)
    partner, sign, angle, turned = rotate_partner(d - FIRST, HALF, NEOX)
    if FIRST > 0:
        turned = turned & (d >= FIRST)
        partner = tl.where(turned, partner + FIRST, d)
        angle = tl.where(turned, angle, 0)
    here = n < count
    mask = here[:, None] & (d < DIM)[None, :]
    token = tl.load(Index + n, mask=here, other=0).to(tl.int64)
    base = Query + (token * stride_n + head * stride_h)[:, None]
    x = tl.load(base + d[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(base + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    place = n[:, None] * HALF + angle[None, :]
    cos = tl.load(Cos + place, mask=mask & turned[None, :], other=1.0)
    sin = tl.load(Sin + place, mask=mask & turned[None, :], other=0.0)
    out = x * cos + sign[None, :] * y * sin
    tl.store(Out + row[:, None] * DIM + d[None, :], out.to(Out.dtype.element_ty), mask=mask)


def gather_rotate(
    query: torch.Tensor, index: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *,
    neox: bool, first: int = 0,
) -> torch.Tensor:  # fmt: skip
    """As ``kernels.rotate.gather_rotate``; the last dimension of ``query`` is contiguous."""
    count, (_, heads, dim) = index.numel(), query.shape
    out = query.new_empty((count, heads, dim))
    block_d = triton.next_power_of_2(dim)
    rows = max(1, min(8, 2048 // block_d))
    _gather_rotate[(triton.cdiv(count * heads, rows),)](
        query,
        index,
        cos,
        sin,
        out,
        count,
        query.stride(0),
        query.stride(1),
        HEADS=heads,
        DIM=dim,
        BLOCK_D=block_d,
        HALF=cos.shape[-1],
        NEOX=neox,
        FIRST=first,
        ROWS=rows,
        num_warps=4,
    )
    return out
