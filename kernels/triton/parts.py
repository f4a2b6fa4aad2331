"""Triton form of ``kernels.rows.attend_parts``: keys read once for all who see them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_pic.kernels.rows import PartTable
from sglang_pic.kernels.triton.walk import LOG2E, warps_of


@triton.jit
def _attend_parts(
    Query, Keys, Values, Slots, PoolRows,
    QoIndptr, BatchRow, KvStart, KvLen, ItemPart, ItemFirst, ItemKv, ItemOut, Partial, Lse,
    scale, chunk, q_n, q_h, k_n, k_h, v_n, v_h, slots_n,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    item, kv_head = tl.program_id(0), tl.program_id(1)
    part = tl.load(ItemPart + item)
    if part < 0:
        return
    first, out_at = tl.load(ItemFirst + item), tl.load(ItemOut + item)
    q_from, q_to = tl.load(QoIndptr + part), tl.load(QoIndptr + part + 1)
    m = tl.arange(0, BLOCK_M)
    inside = m // GROUP
    query = q_from + first + inside
    head = kv_head * GROUP + m % GROUP
    here = (query < q_to) & (m < TILE * GROUP)
    d = tl.arange(0, BLOCK_D)
    in_head = d < DIM
    mask = here[:, None] & in_head[None, :]
    q_at = Query + (query.to(tl.int64) * q_n + head * q_h)[:, None] + d[None, :]
    q = tl.load(q_at, mask=mask, other=0.0)
    pool_row = tl.load(PoolRows + tl.load(BatchRow + part)).to(tl.int64)
    slots = Slots + pool_row * slots_n + tl.load(KvStart + part)
    begin = tl.load(ItemKv + item)
    end = tl.minimum(begin + chunk, tl.load(KvLen + part))

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in range(begin, end, BLOCK_N):
        entry = at + tl.arange(0, BLOCK_N)
        held = entry < end
        slot = tl.load(slots + entry, mask=held, other=0).to(tl.int64)
        kv_mask = held[:, None] & in_head[None, :]
        key_at = Keys + (slot * k_n + kv_head * k_h)[:, None] + d[None, :]
        k = tl.load(key_at, mask=kv_mask, other=0.0).to(q.dtype)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        score = tl.where(held[None, :], score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new[:, None])
        shrink = tl.exp2(top - new)
        value_at = Values + (slot * v_n + kv_head * v_h)[:, None] + d[None, :]
        v = tl.load(value_at, mask=kv_mask, other=0.0).to(q.dtype)
        acc = tl.dot(weight.to(q.dtype), v, acc * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(weight, 1)
        top = new
    place = (out_at + inside).to(tl.int64) * HEADS + head
    tl.store(Partial + place[:, None] * DIM + d[None, :], acc / total[:, None], mask=mask)
    tl.store(Lse + place, top / LOG2E + tl.log(total), mask=here)


def attend_parts(
    gathered: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    req_to_token: torch.Tensor,
    pool_rows: torch.Tensor,
    table: PartTable,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``kernels.rows.attend_parts``; an item of part -1 is no work."""
    heads, dim = gathered.shape[1:]
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    partials = table.merge_index.numel()
    partial = gathered.new_empty((partials, heads, dim), dtype=torch.float32)
    lse = partial.new_empty((partials, heads))
    block_m = max(16, triton.next_power_of_2(table.tile * group))
    _attend_parts[(table.item_part.numel(), kv_heads)](
        gathered, keys, values, req_to_token, pool_rows,
        table.qo_indptr, table.batch_row, table.kv_start, table.kv_len,
        table.item_part, table.item_first, table.item_kv, table.item_out, partial, lse,
        scale, table.chunk, *gathered.stride()[:2], *keys.stride()[:2], *values.stride()[:2],
        req_to_token.stride(0),
        GROUP=group, HEADS=heads, DIM=dim, BLOCK_D=triton.next_power_of_2(dim),
        TILE=table.tile, BLOCK_M=block_m, BLOCK_N=64,
        num_warps=warps_of(block_m, dim), num_stages=2,
    )  # fmt: skip
    return partial, lse
