"""Triton form of ``kernels.rows.walk_rows``: one pass over a row's spans.

Each program takes a tile of queries that share a key head and walks the row's spans. It
turns its queries back by each span's offset as it enters it, and keys stay as they were
cached: the loop over keys is that of a plain paged kernel, in registers and shared memory
too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_pic.kernels.rows import RowTable
from sglang_pic.kernels.triton.merge import merge_cut
from sglang_pic.kernels.triton.rotate import rotate_partner

LOG2E = tl.constexpr(1.4426950408889634)


def warps_of(block_m: int, dim: int) -> int:
    """Warps over which a tile's float32 sums fit into registers without spilling."""
    return 4 if block_m * dim <= 64 * 128 else 8


@triton.jit
def _turned(
    Query, Cos, Sin, offset, mask, partner, sign, angle, turned,
    span, d, ROTATED: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A tile of queries, turned back by the offset of a span."""
    q = tl.load(Query + offset[:, None] + d[None, :], mask=mask, other=0.0)
    if ROTATED:
        other = tl.load(Query + offset[:, None] + partner[None, :], mask=mask, other=0.0)
        cos = tl.load(Cos + span * HALF + angle, mask=turned, other=1.0)
        sin = tl.load(Sin + span * HALF + angle, mask=turned, other=0.0) * sign
        q = (q.to(tl.float32) * cos[None, :] + other.to(tl.float32) * sin[None, :]).to(q.dtype)
    return q


@triton.jit
def entries_seen(span, lowest, highest, last, SpanStart, SpanLen, SpanSeer, SpanStep):
    """Where a span starts, from which rank on and in which steps it is seen, and which of its
    entries in ``[lowest, highest)`` a tile sees whose last query is of rank ``last``."""
    start = tl.load(SpanStart + span)
    seer, step = tl.load(SpanSeer + span), tl.load(SpanStep + span)
    begin = tl.maximum(lowest, start)
    end = tl.minimum(highest, start + tl.load(SpanLen + span))
    # Nothing behind the tile's last query is seen by any of it.
    end = tl.where(step == 1, tl.minimum(end, start + last - seer + 1), end)
    end = tl.where(seer <= last, end, begin)
    return start, seer, step, begin, end


@triton.jit
def natural_lse(top, total):
    """Log-sum-exp of scores in base 2 and of their sum; of none, -inf."""
    some = total > 0.0
    return tl.where(some, top / LOG2E + tl.log(tl.where(some, total, 1.0)), float("-inf"))


@triton.jit
def _walk_rows(
    Query, Keys, Values, Slots, PoolRows,
    BatchRow, QStart, QLen, QAt, Done, SpanIndptr, SpanStart, SpanLen, SpanSeer, SpanStep, SpanAt,
    TileRow, TileFirst, Cos, Sin, Out, Partial, Lse,
    scale, window, q_n, q_h, k_n, k_h, v_n, v_h, slots_n, o_n, o_h,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HALF: tl.constexpr, NEOX: tl.constexpr, ROTATED: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CUT: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    row = tl.load(TileRow + tile)
    first = tl.load(TileFirst + tile)
    length = tl.load(QLen + row)
    if first >= length:
        return
    m = tl.arange(0, BLOCK_M)
    query = first + m // GROUP
    head = kv_head * GROUP + m % GROUP
    here = (query < length) & (m < TILE * GROUP)
    rank = tl.load(Done + row) + query
    token = (tl.load(QStart + row) + query).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_head = d < DIM
    mask = here[:, None] & in_head[None, :]
    offset = token * q_n + head * q_h
    partner, sign, angle, turned = rotate_partner(d, HALF, NEOX)
    pool_row = tl.load(PoolRows + tl.load(BatchRow + row)).to(tl.int64)
    slots = Slots + pool_row * slots_n

    span_from, span_to = tl.load(SpanIndptr + row), tl.load(SpanIndptr + row + 1)
    entries = tl.load(SpanStart + span_to - 1) + tl.load(SpanLen + span_to - 1)
    per_split = tl.cdiv(tl.cdiv(entries, splits), BLOCK_N) * BLOCK_N
    lowest, highest = split * per_split, (split + 1) * per_split
    last = tl.max(tl.where(here, rank, 0))
    # The first position that each query sees, and any of the tile's does.
    since = tl.zeros([BLOCK_M], tl.int32)
    if WINDOW:
        for span in range(span_from, span_to):
            behind = rank - tl.load(SpanSeer + span)
            within = (behind >= 0) & (tl.load(SpanStep + span) == 1)
            since = tl.where(within, tl.load(SpanAt + span) + behind - window, since)
    lowest_seen = tl.min(tl.where(here, since, 2147483647))

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for span in range(span_from, span_to):
        start, seer, step, begin, end = entries_seen(
            span, lowest, highest, last, SpanStart, SpanLen, SpanSeer, SpanStep
        )
        # Position of an entry, less the entry.
        place = 0
        if WINDOW:
            place = tl.load(SpanAt + span) - start
            begin = tl.maximum(begin, lowest_seen - place)
        if begin < end:
            q = _turned(
                Query, Cos, Sin, offset, mask, partner, sign, angle, turned, span, d, ROTATED, HALF
            )
            for at in range(begin, end, BLOCK_N):
                entry = at + tl.arange(0, BLOCK_N)
                held = entry < end
                slot = tl.load(slots + entry, mask=held, other=0).to(tl.int64)
                kv_mask = held[:, None] & in_head[None, :]
                key_at = Keys + (slot * k_n + kv_head * k_h)[:, None] + d[None, :]
                k = tl.load(key_at, mask=kv_mask, other=0.0).to(q.dtype)
                score = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
                born = seer + step * (entry - start)
                sees = held[None, :] & (born[None, :] <= rank[:, None])
                if WINDOW and TILE > 1:
                    sees = sees & ((place + entry)[None, :] >= since[:, None])
                score = tl.where(sees, score, float("-inf"))
                new = tl.maximum(top, tl.max(score, 1))
                safe = tl.where(new == float("-inf"), 0.0, new)
                weight = tl.exp2(score - safe[:, None])
                shrink = tl.exp2(top - safe)
                value_at = Values + (slot * v_n + kv_head * v_h)[:, None] + d[None, :]
                v = tl.load(value_at, mask=kv_mask, other=0.0).to(q.dtype)
                acc = acc * shrink[:, None]
                acc = tl.dot(weight.to(q.dtype), v, acc, input_precision="ieee")
                total = total * shrink + tl.sum(weight, 1)
                top = new
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if not CUT:
        out_at = Out + (token * o_n + head * o_h)[:, None] + d[None, :]
        tl.store(out_at, acc.to(Out.dtype.element_ty), mask=mask)
    else:
        # Partial results of a query lie together.
        at = (tl.load(QAt + row) + query) * splits + split
        place = at.to(tl.int64) * HEADS + head
        tl.store(Partial + place[:, None] * DIM + d[None, :], acc, mask=mask)
        tl.store(Lse + place, natural_lse(top, total), mask=here)


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
    window: int | None = None,
) -> None:
    """As ``kernels.rows.walk_rows``. With ``splits`` above 1 the keys of a tile of queries
    go to so many programs, whose results are merged."""
    cos, sin = turns if turns is not None else (query, query)
    half = cos.shape[-1] if turns is not None else 1
    heads, dim = query.shape[1:]
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    queries = table.token.numel()
    partial = lse = query
    if splits > 1:
        partial = query.new_empty((queries * splits, heads, dim), dtype=torch.float32)
        lse = partial.new_empty((queries * splits, heads))
    block_m = max(16, triton.next_power_of_2(table.tile * group))
    _walk_rows[(table.tile_row.numel(), kv_heads, splits)](
        query, keys, values, req_to_token, pool_rows,
        table.batch_row, table.q_start, table.q_len, table.q_at, table.done,
        table.span_indptr, table.span_start, table.span_len, table.span_seer, table.span_step,
        table.span_at, table.tile_row, table.tile_first, cos, sin, out, partial, lse,
        scale, 0 if window is None else window,
        *query.stride()[:2], *keys.stride()[:2], *values.stride()[:2],
        req_to_token.stride(0), *out.stride()[:2],
        GROUP=group, HEADS=heads, DIM=dim, BLOCK_D=triton.next_power_of_2(dim),
        HALF=half, NEOX=neox, ROTATED=turns is not None, TILE=table.tile, BLOCK_M=block_m,
        BLOCK_N=64, CUT=splits > 1, WINDOW=window is not None,
        num_warps=warps_of(block_m, dim), num_stages=2,
    )  # fmt: skip
    if splits > 1:
        out[table.token] = merge_cut(partial, lse, splits).to(out.dtype)
