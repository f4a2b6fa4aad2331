"""Drafts that a forward pass verifies (speculative decoding)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from sglang_pic.kernels.walk import draft_tile, walk


def drafts_of(batch: Any) -> list[torch.Tensor]:
    """Which of its drafts each draft of a row sees: bool [n, n], one a row.

    Args:
        batch: SGLang's ``ForwardBatch`` of drafts to verify, with masks over whole rows.
    """
    n = batch.spec_info.draft_token_num
    found, at = [], 0
    for length in batch.seq_lens.tolist():
        size = n * (length + n)
        found.append(batch.spec_info.custom_mask[at : at + size].view(n, -1)[:, length:])
        at += size
    return found


def attend_drafts(
    query: torch.Tensor,
    out: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    batch: Any,
    rows: Iterable[int],
    scale: float,
    window: int | None,
) -> None:
    """Attention of ordinary rows' drafts, into ``out``.

    Args:
        query, out: [tokens, heads, head_dim], the whole batch's.
        keys, values: of the pool, [slots, kv_heads, head_dim].
        table: SGLang's rows of slots.
        rows: of the batch, which to compute.
        scale, window: of the layer; the last as in ``kernels.walk.draft_tile``.
    """
    trees, lengths = drafts_of(batch), batch.seq_lens.tolist()
    n = batch.spec_info.draft_token_num
    for i in rows:
        slots = table[batch.req_pool_indices[i], : lengths[i] + n].long()
        here = slice(i * n, (i + 1) * n)
        tiles = [draft_tile(lengths[i], trees[i], window)]
        out[here] = walk(query[here], keys[slots], values[slots], tiles, scale=scale)
