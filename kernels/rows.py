"""Attention of linked rows straight from SGLang's request-to-token table.

The forms that a GPU runs, as loops in torch: what ``kernels.triton`` must give.
A row's entries are its spans one behind the other, the computed tokens last:

    entry   0 ........ | ........ | ......... | ...........
    span      0            1           2          computed (causal)

Computed tokens have *ranks* 0, 1, 2, ... in logical order. A query of rank c sees a
reused span if ``seer <= c``, and the computed token of rank j if ``j <= c``. Both
are one rule: entry j of a span is seen from rank ``seer + step * j`` on, with step
0 for reused spans and 1 for the computed ones.

Where queries see a window of positions alone, every span is a run of positions too: the
computed tokens are as many spans as they have runs.
"""

from __future__ import annotations

import dataclasses

import torch

from sglang_pic.kernels.attend import attend_dense
from sglang_pic.kernels.rotate import rotate


@dataclasses.dataclass(frozen=True)
class RowTable:
    """Rows whose queries walk their own spans. All tensors are int32, on the device.

    Attributes:
        batch_row: [rows], index into the batch's rows.
        q_start, q_len: [rows], queries among the batch's tokens.
        q_at: [rows], of them among all queries of these rows.
        token: [queries], which of the batch's tokens each is; empty unless keys are cut.
        done: [rows], rank of the first of them.
        span_indptr: [rows + 1], spans of each row.
        span_start, span_len: [spans], row entries.
        span_seer, span_step: [spans], from which rank on they are seen.
        span_at: [spans], position of the first entry; read where there is a window.
        tile_row, tile_first: [tiles], row and first query, within the row, of every
            tile of ``tile`` queries.
        tile: queries of a tile.
    """

    batch_row: torch.Tensor
    q_start: torch.Tensor
    q_len: torch.Tensor
    q_at: torch.Tensor
    token: torch.Tensor
    done: torch.Tensor
    span_indptr: torch.Tensor
    span_start: torch.Tensor
    span_len: torch.Tensor
    span_seer: torch.Tensor
    span_step: torch.Tensor
    span_at: torch.Tensor
    tile_row: torch.Tensor
    tile_first: torch.Tensor
    tile: int


@dataclasses.dataclass(frozen=True)
class PartTable:
    """Spans with all queries that see them. All tensors are int32, on the device.

    Attributes:
        query: [n], token of the batch that each gathered query is.
        qo_indptr: [parts + 1], gathered queries of each part.
        batch_row: [parts], a row of the batch that holds the part's keys.
        kv_start, kv_len: [parts], where in that row.
        item_part, item_first, item_kv: [items], part, first gathered query within the
            part and first key within the part, of every piece of work: ``tile``
            queries over ``chunk`` keys.
        item_out: [items], first partial result of each piece.
        merge_indptr: [queries + 1], ``merge_index``: [partials], the partial results of
            each of ``token``: [queries], tokens of the batch.
        tile, chunk: see above.
    """

    query: torch.Tensor
    qo_indptr: torch.Tensor
    batch_row: torch.Tensor
    kv_start: torch.Tensor
    kv_len: torch.Tensor
    item_part: torch.Tensor
    item_first: torch.Tensor
    item_kv: torch.Tensor
    item_out: torch.Tensor
    merge_indptr: torch.Tensor
    merge_index: torch.Tensor
    token: torch.Tensor
    tile: int
    chunk: int


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
    """Queries of linked rows over all keys they see, into ``out``.

    ``<R(p) q, R(j + s) k> = <R(p - s) q, R(j) k>``: at every span the queries are
    turned back by its offset, the keys stay as they were cached.

    Args:
        query: [tokens, heads, head_dim], rotated to their true positions.
        keys, values: [slots, kv_heads, head_dim], SGLang's buffers of one layer; of latent
            attention the values are the keys' first channels, and the others alone turn.
        req_to_token: int32 [pool, width], slots of every row's entries.
        pool_rows: int [batch], row of ``req_to_token`` of every row of the batch.
        table: which queries, which spans.
        turns: cos, sin float32 [spans, rotary_dim / 2] of a rotation by minus the
            span's offset (``kernels.rotate.angles``); ``None`` without positions.
        out: [tokens, heads, width of a value]; other tokens' rows are left alone.
        scale: multiplies the scores.
        neox: layout of the rotation, as in ``kernels.rotate.rotate``.
        splits: parts into which a GPU cuts each row's entries; changes nothing else.
        window: how many positions before its own a query sees; ``None``: all.
    """
    group = query.shape[1] // values.shape[1]
    turned = first_turned(keys, values)
    columns = (table.batch_row, table.q_start, table.q_len, table.done)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    bounds = table.span_indptr.tolist()
    for row, (batch_row, start, length, done) in enumerate(rows):
        pool_row = int(pool_rows[batch_row])
        rank = done + torch.arange(length, device=query.device)
        at = _positions(table, range(bounds[row], bounds[row + 1]), rank)
        scores, seen = [], []
        for span in range(bounds[row], bounds[row + 1]):
            first, count = int(table.span_start[span]), int(table.span_len[span])
            slots = req_to_token[pool_row, first : first + count].long()
            q = query[start : start + length]
            if turns is not None:
                cos, sin = (t[span].expand(length, -1) for t in turns)
                q = rotate(q, cos, sin, neox=neox, first=turned)
            born = torch.arange(count, device=query.device) * int(table.span_step[span])
            unseen = born + int(table.span_seer[span]) > rank[:, None]
            if window is not None:
                there = int(table.span_at[span]) + torch.arange(count, device=query.device)
                unseen |= there < at[:, None] - window
            wide = keys[slots].to(q.dtype).repeat_interleave(group, 1).float()
            score = torch.einsum("nhd,mhd->hnm", q.float(), wide) * scale
            scores.append(score.masked_fill(unseen, -torch.inf))
            seen.append(slots)
        weights = torch.cat(scores, -1).softmax(-1)
        v = values[torch.cat(seen)].repeat_interleave(group, 1)
        out[start : start + length] = torch.einsum("hnm,mhd->nhd", weights, v.float()).to(out.dtype)


def first_turned(keys: torch.Tensor, values: torch.Tensor) -> int:
    """First of a key's channels that positions turn: in latent attention they come behind
    those that are its value too."""
    return values.shape[-1] if values.shape[-1] < keys.shape[-1] else 0


def _positions(table: RowTable, spans: range, rank: torch.Tensor) -> torch.Tensor:
    """Positions of computed tokens by their ranks."""
    found = torch.zeros_like(rank)
    for span in spans:
        behind = rank - int(table.span_seer[span])
        if int(table.span_step[span]):
            found = torch.where(behind >= 0, int(table.span_at[span]) + behind, found)
    return found


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
    """Every part's queries over its keys, chunk by chunk; no mask.

    Args:
        gathered: [n, heads, head_dim], the queries of ``table.query``, turned to
            where the part's keys are.
        keys, values, req_to_token, pool_rows: as in ``walk_rows``.
        table: which queries, which keys.
        scale: multiplies the scores.

    Returns:
        partial: float32 [partials, heads, width of a value]; lse: float32 [partials,
        heads], natural log; to be merged by ``kernels.merge.merge``.
    """
    heads, width = gathered.shape[1], values.shape[-1]
    group = heads // keys.shape[1]
    count = table.merge_index.numel()
    partial = gathered.new_zeros((count, heads, width), dtype=torch.float32)
    lse = partial.new_zeros(partial.shape[:2])
    items = (table.item_part, table.item_first, table.item_kv, table.item_out)
    for part, first, kv, at in zip(*(t.tolist() for t in items), strict=True):
        q_bounds = table.qo_indptr[part : part + 2].tolist()
        begin = q_bounds[0] + first
        end = min(q_bounds[1], begin + table.tile)
        row = req_to_token[int(pool_rows[int(table.batch_row[part])])]
        start, length = int(table.kv_start[part]), int(table.kv_len[part])
        slots = row[start + kv : start + min(length, kv + table.chunk)].long()
        q = gathered[begin:end].transpose(0, 1)
        k, v = (
            x[slots].to(q.dtype).repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values)
        )
        found, found_lse = attend_dense(q, k, v, scale)
        partial[at : at + end - begin] = found.transpose(0, 1)
        lse[at : at + end - begin] = found_lse.T
    return partial, lse
