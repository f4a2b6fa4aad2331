"""Triton forms of ``kernels.rows`` for latent attention (MLA).

A token is one row ``[latent | rotary slice]`` of the pool, the key of all heads, and the
latent is its value: a row is read once, into two tiles, as neither all of it nor a tile
of all of it is a power of two wide. Scores are the sum of two products. Of a query the
slice alone is turned, so the rest is read once a program.

All heads share a key, and a tile takes ``MOST_ROWS`` rows of them at most: where a token
has more heads, several programs take it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sglang_pic.kernels.rows import PartTable, RowTable
from sglang_pic.kernels.triton.merge import merge_cut
from sglang_pic.kernels.triton.walk import LOG2E, entries_seen, natural_lse

# Rows of a tile: float32 sums of 512 numbers each are half of a multiprocessor's registers.
MOST_ROWS = 64


def head_tiles(heads: int) -> int:
    """How many programs share the heads of one token."""
    return triton.cdiv(heads, MOST_ROWS)


@triton.jit
def _slice(HALF: tl.constexpr, BLOCK_H: tl.constexpr, NEOX: tl.constexpr):
    """Channels of the rotary slice in the order of a tile of them, and which are there."""
    s = tl.arange(0, 2 * BLOCK_H)
    if NEOX:
        return s // BLOCK_H * HALF + s % BLOCK_H, s % BLOCK_H < HALF
    return s, s < 2 * HALF


@triton.jit
def _turned(Slice, Cos, Sin, here, HALF: tl.constexpr, BLOCK_H: tl.constexpr, NEOX: tl.constexpr):
    """A tile of queries' rotary slices, turned by one span's angles, in the order of
    ``_slice``; ``Slice`` is where each begins. By halves: no channel is read twice, and no
    list of partners stays in registers through the loop over keys."""
    h = tl.arange(0, BLOCK_H)
    mask = here[:, None] & (h < HALF)[None, :]
    first, second = (h, HALF + h) if NEOX else (2 * h, 2 * h + 1)
    a = tl.load(Slice[:, None] + first[None, :], mask=mask, other=0.0)
    b = tl.load(Slice[:, None] + second[None, :], mask=mask, other=0.0)
    cos = tl.load(Cos + h, mask=h < HALF, other=1.0)[None, :]
    sin = tl.load(Sin + h, mask=h < HALF, other=0.0)[None, :]
    x, y = a.to(tl.float32), b.to(tl.float32)
    both = tl.join((x * cos - y * sin).to(a.dtype), (y * cos + x * sin).to(a.dtype))
    if NEOX:
        both = tl.permute(both, (0, 2, 1))
    return tl.reshape(both, (a.shape[0], 2 * BLOCK_H))


@triton.jit
def _attended(
    q, q_slice, Rows, slot, held, sees, c, s, in_latent, in_slice, top, total, acc, scale, k_n
):
    """Sums of a tile of queries over some rows more; ``sees``: [1 or queries, rows]."""
    row_at = Rows + (slot * k_n)[:, None]
    latent = tl.load(row_at + c[None, :], mask=held[:, None] & in_latent[None, :], other=0.0)
    latent = latent.to(q.dtype)
    turned = tl.load(row_at + s[None, :], mask=held[:, None] & in_slice[None, :], other=0.0)
    score = tl.dot(q, tl.trans(latent), input_precision="ieee")
    score = tl.dot(q_slice, tl.trans(turned.to(q.dtype)), score, input_precision="ieee")
    score = tl.where(sees, score * (scale * LOG2E), float("-inf"))
    new = tl.maximum(top, tl.max(score, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    weight = tl.exp2(score - safe[:, None])
    shrink = tl.exp2(top - safe)
    acc = tl.dot(weight.to(q.dtype), latent, acc * shrink[:, None], input_precision="ieee")
    total = total * shrink + tl.sum(weight, 1)
    return new, total, acc


@triton.jit
def _walk_latent(
    Query, Rows, Slots, PoolRows,
    BatchRow, QStart, QLen, QAt, Done, SpanIndptr, SpanStart, SpanLen, SpanSeer, SpanStep,
    TileRow, TileFirst, Cos, Sin, Out, Partial, Lse,
    scale, q_n, q_h, k_n, slots_n, o_n, o_h,
    GROUP: tl.constexpr, HEADS: tl.constexpr, LATENT: tl.constexpr, BLOCK_L: tl.constexpr,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, NEOX: tl.constexpr, ROTATED: tl.constexpr,
    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    tile, split, splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    row = tl.load(TileRow + tile)
    first = tl.load(TileFirst + tile)
    length = tl.load(QLen + row)
    if first >= length:
        return
    m = tl.arange(0, BLOCK_M)
    query = first + m // GROUP
    head = tl.program_id(1) * GROUP + m % GROUP
    here = (query < length) & (m < TILE * GROUP) & (head < HEADS)
    rank = tl.load(Done + row) + query
    token = (tl.load(QStart + row) + query).to(tl.int64)
    c = tl.arange(0, BLOCK_L)
    in_latent = c < LATENT
    mask = here[:, None] & in_latent[None, :]
    q_at = Query + token * q_n + head * q_h
    q = tl.load(q_at[:, None] + c[None, :], mask=mask, other=0.0)
    s, in_slice = _slice(HALF, BLOCK_H, NEOX)
    pool_row = tl.load(PoolRows + tl.load(BatchRow + row)).to(tl.int64)
    slots = Slots + pool_row * slots_n

    span_from, span_to = tl.load(SpanIndptr + row), tl.load(SpanIndptr + row + 1)
    entries = tl.load(SpanStart + span_to - 1) + tl.load(SpanLen + span_to - 1)
    per_split = tl.cdiv(tl.cdiv(entries, splits), BLOCK_N) * BLOCK_N
    lowest, highest = split * per_split, (split + 1) * per_split
    last = tl.max(tl.where(here, rank, 0))

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    for span in range(span_from, span_to):
        start, seer, step, begin, end = entries_seen(
            span, lowest, highest, last, SpanStart, SpanLen, SpanSeer, SpanStep
        )
        if begin < end:
            if ROTATED:
                q_slice = _turned(
                    q_at + LATENT, Cos + span * HALF, Sin + span * HALF, here, HALF, BLOCK_H, NEOX
                )
            else:
                slice_mask = here[:, None] & in_slice[None, :]
                q_slice = tl.load(q_at[:, None] + (LATENT + s)[None, :], mask=slice_mask, other=0.0)
            for at in range(begin, end, BLOCK_N):
                entry = at + tl.arange(0, BLOCK_N)
                held = entry < end
                slot = tl.load(slots + entry, mask=held, other=0).to(tl.int64)
                born = seer + step * (entry - start)
                sees = held[None, :] & (born[None, :] <= rank[:, None])
                top, total, acc = _attended(
                    q, q_slice, Rows, slot, held, sees, c, LATENT + s, in_latent, in_slice,
                    top, total, acc, scale, k_n,
                )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if not CUT:
        out_at = Out + (token * o_n + head * o_h)[:, None] + c[None, :]
        tl.store(out_at, acc.to(Out.dtype.element_ty), mask=mask)
    else:
        at = (tl.load(QAt + row) + query) * splits + split
        place = at.to(tl.int64) * HEADS + head
        tl.store(Partial + place[:, None] * LATENT + c[None, :], acc, mask=mask)
        tl.store(Lse + place, natural_lse(top, total), mask=here)


@triton.jit
def _attend_latent(
    Query, Rows, Slots, PoolRows,
    QoIndptr, BatchRow, KvStart, KvLen, ItemPart, ItemFirst, ItemKv, ItemOut, Partial, Lse,
    scale, chunk, q_n, q_h, k_n, slots_n,
    GROUP: tl.constexpr, HEADS: tl.constexpr, LATENT: tl.constexpr, BLOCK_L: tl.constexpr,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    part = tl.load(ItemPart + item)
    if part < 0:
        return
    first, out_at = tl.load(ItemFirst + item), tl.load(ItemOut + item)
    q_from, q_to = tl.load(QoIndptr + part), tl.load(QoIndptr + part + 1)
    m = tl.arange(0, BLOCK_M)
    inside = m // GROUP
    query = q_from + first + inside
    head = tl.program_id(1) * GROUP + m % GROUP
    here = (query < q_to) & (m < TILE * GROUP) & (head < HEADS)
    c = tl.arange(0, BLOCK_L)
    in_latent = c < LATENT
    s, in_slice = _slice(HALF, BLOCK_H, False)
    mask = here[:, None] & in_latent[None, :]
    q_at = Query + (query.to(tl.int64) * q_n + head * q_h)[:, None]
    q = tl.load(q_at + c[None, :], mask=mask, other=0.0)
    q_slice = tl.load(
        q_at + (LATENT + s)[None, :], mask=here[:, None] & in_slice[None, :], other=0.0
    )
    pool_row = tl.load(PoolRows + tl.load(BatchRow + part)).to(tl.int64)
    slots = Slots + pool_row * slots_n + tl.load(KvStart + part)
    begin = tl.load(ItemKv + item)
    end = tl.minimum(begin + chunk, tl.load(KvLen + part))

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    for at in range(begin, end, BLOCK_N):
        entry = at + tl.arange(0, BLOCK_N)
        held = entry < end
        slot = tl.load(slots + entry, mask=held, other=0).to(tl.int64)
        top, total, acc = _attended(
            q, q_slice, Rows, slot, held, held[None, :], c, LATENT + s, in_latent, in_slice,
            top, total, acc, scale, k_n,
        )  # fmt: skip
    place = (out_at + inside).to(tl.int64) * HEADS + head
    tl.store(Partial + place[:, None] * LATENT + c[None, :], acc / total[:, None], mask=mask)
    tl.store(Lse + place, top / LOG2E + tl.log(total), mask=here)


def _sizes(query: torch.Tensor, values: torch.Tensor, tile: int) -> dict[str, Any]:
    """What both kernels take as constants."""
    heads, dim = query.shape[1:]
    latent = values.shape[-1]
    half, group = (dim - latent) // 2, triton.cdiv(heads, head_tiles(heads))
    block_m = max(16, triton.next_power_of_2(tile * group))
    return {
        "GROUP": group, "HEADS": heads, "TILE": tile, "LATENT": latent, "HALF": half,
        "BLOCK_L": max(16, triton.next_power_of_2(latent)),
        "BLOCK_H": max(8, triton.next_power_of_2(half)),
        # Tiles of 64 rows, two of rows of the pool, fit a block's shared memory.
        "BLOCK_M": block_m, "BLOCK_N": 32 if query.element_size() == 2 else 16,
        # With two stages ptxas spills 500 bytes in the loop over keys, with three none.
        "num_warps": 8 if block_m > 16 else 4, "num_stages": 3,
    }  # fmt: skip


def walk_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    req_to_token: torch.Tensor,
    pool_rows: torch.Tensor,
    table: RowTable,
    turns: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor,
    *,
    scale: float,
    neox: bool = True,
    splits: int = 1,
) -> None:
    """As ``kernels.triton.walk.walk_rows``, without windows; all of the slice is turned."""
    cos, sin = turns if turns is not None else (query, query)
    assert turns is None or 2 * cos.shape[-1] == query.shape[-1] - out.shape[-1]
    queries, (heads, latent) = table.token.numel(), out.shape[1:]
    partial = lse = query
    if splits > 1:
        partial = query.new_empty((queries * splits, heads, latent), dtype=torch.float32)
        lse = partial.new_empty((queries * splits, heads))
    _walk_latent[(table.tile_row.numel(), head_tiles(heads), splits)](
        query, keys, req_to_token, pool_rows,
        table.batch_row, table.q_start, table.q_len, table.q_at, table.done,
        table.span_indptr, table.span_start, table.span_len, table.span_seer, table.span_step,
        table.tile_row, table.tile_first, cos, sin, out, partial, lse,
        scale, *query.stride()[:2], keys.stride(0), req_to_token.stride(0), *out.stride()[:2],
        NEOX=neox and turns is not None, ROTATED=turns is not None,
        CUT=splits > 1, **_sizes(query, values, table.tile),
    )  # fmt: skip
    if splits > 1:
        out[table.token] = merge_cut(partial, lse, splits).to(out.dtype)


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
    heads, latent = gathered.shape[1], values.shape[-1]
    partials = table.merge_index.numel()
    partial = gathered.new_empty((partials, heads, latent), dtype=torch.float32)
    lse = partial.new_empty((partials, heads))
    _attend_latent[(table.item_part.numel(), head_tiles(heads))](
        gathered, keys, req_to_token, pool_rows,
        table.qo_indptr, table.batch_row, table.kv_start, table.kv_len,
        table.item_part, table.item_first, table.item_kv, table.item_out, partial, lse,
        scale, table.chunk, *gathered.stride()[:2], keys.stride(0), req_to_token.stride(0),
        **_sizes(gathered, values, table.tile),
    )  # fmt: skip
    return partial, lse
