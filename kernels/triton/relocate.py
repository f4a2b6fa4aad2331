"""Triton form of ``kernels.relocate.relocate``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_pic.kernels.triton.rotate import rotate_partner


@triton.jit
def _relocate(
    Keys, Values, Source, Target, Cos, Sin, count, k_n, k_h, v_n, v_h,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr, HALF: tl.constexpr, NEOX: tl.constexpr, ROPE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    # Rows of [count * HEADS, DIM].
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n, head = row // HEADS, row % HEADS
    here = n < count
    d = tl.arange(0, BLOCK_D)
    mask = here[:, None] & (d < DIM)[None, :]
    source = tl.load(Source + n, mask=here, other=0).to(tl.int64)
    target = tl.load(Target + n, mask=here, other=0).to(tl.int64)
    from_ = (source * k_n + head * k_h)[:, None]
    k = tl.load(Keys + from_ + d[None, :], mask=mask, other=0.0)
    if ROPE:
        partner, sign, angle, turned = rotate_partner(d, HALF, NEOX)
        other = tl.load(Keys + from_ + partner[None, :], mask=mask, other=0.0)
        place, some = n[:, None] * HALF + angle[None, :], mask & turned[None, :]
        cos = tl.load(Cos + place, mask=some, other=1.0)
        sin = tl.load(Sin + place, mask=some, other=0.0) * sign[None, :]
        k = (k.to(tl.float32) * cos + other.to(tl.float32) * sin).to(k.dtype)
    tl.store(Keys + (target * k_n + head * k_h)[:, None] + d[None, :], k, mask=mask)
    if VALUE_DIM != DIM:
        d = tl.arange(0, BLOCK_V)
        mask = here[:, None] & (d < VALUE_DIM)[None, :]
    v = tl.load(Values + (source * v_n + head * v_h)[:, None] + d[None, :], mask=mask, other=0.0)
    tl.store(Values + (target * v_n + head * v_h)[:, None] + d[None, :], v, mask=mask)


def relocate(
    keys: torch.Tensor,
    values: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    turns: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    neox: bool = True,
) -> None:
    """As ``kernels.relocate.relocate``; the last dimension of both buffers is contiguous."""
    count, (_, heads, dim) = source.numel(), keys.shape
    cos, sin = turns if turns is not None else (keys, keys)
    rows = 8
    _relocate[(triton.cdiv(count * heads, rows),)](
        keys, values, source, target, cos, sin, count,
        *keys.stride()[:2], *values.stride()[:2],
        HEADS=heads, DIM=dim, BLOCK_D=triton.next_power_of_2(dim),
        VALUE_DIM=values.shape[-1], BLOCK_V=triton.next_power_of_2(values.shape[-1]),
        HALF=cos.shape[-1] if turns is not None else 1, NEOX=neox, ROPE=turns is not None,
        ROWS=rows, num_warps=4,
    )  # fmt: skip
