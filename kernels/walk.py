"""Attention of a row's new tokens over all its keys, in position order (torch).

The form for prefill: keys are rotated to their true positions as they are
read, so one pass needs no partial results and no merge. Queries go in tiles;
each tile reads the keys up to its last query, from the first that a window leaves.
"""

from __future__ import annotations

import dataclasses

import torch

from sglang_pic.kernels.attend import attend_dense, flash_cpu

TILE = 64


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries ``[start, stop)`` see among the keys ``[first, keys)`` those where
    ``mask`` (float32 [stop - start, keys - first]) is 0; elsewhere it is -inf."""

    start: int
    stop: int
    first: int
    keys: int
    mask: torch.Tensor


def make_tiles(visible: torch.Tensor, hidden: torch.Tensor | None = None) -> list[Tile]:
    """Cut queries into tiles.

    Args:
        visible: int64 [n], how many keys, in position order, each query sees;
            ascending, at least 1.
        hidden: int64 [n], how many of these, the first, lie in front of its window;
            ascending, less than ``visible``; none without it.
    """
    hidden = torch.zeros_like(visible) if hidden is None else hidden
    tiles = []
    for start in range(0, visible.numel(), TILE):
        until, since = visible[start : start + TILE, None], hidden[start : start + TILE, None]
        first, keys = int(since[0]), int(until[-1])
        key = torch.arange(first, keys, device=visible.device)
        mask = torch.zeros(len(until), keys - first, device=visible.device)
        mask.masked_fill_((key >= until) | (key < since), -torch.inf)
        tiles.append(Tile(start, start + len(until), first, keys, mask))
    return tiles


def draft_tile(prefix: int, tree: torch.Tensor, window: int | None = None) -> Tile:
    """Drafts behind ``prefix`` keys; ``tree``, bool [n, n], says which draft sees which.

    Args:
        window: how many positions before its own a draft sees; ``None``: all.
    """
    mask = torch.zeros(len(tree), prefix + len(tree), device=tree.device)
    mask[:, prefix:].masked_fill_(~tree, -torch.inf)
    if window is not None:
        # A draft stands behind the row by as many tokens as stand above it.
        own = prefix + tree.sum(-1) - 1
        key = torch.cat([torch.arange(prefix, device=tree.device), own])
        mask.masked_fill_(key < own[:, None] - window, -torch.inf)
    return Tile(0, len(tree), 0, prefix + len(tree), mask)


def walk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tiles: list[Tile] | None,
    *,
    scale: float,
) -> torch.Tensor:
    """Attend tile by tile.

    Args:
        query: [n, heads, head_dim].
        key, value: [m, kv_heads, head_dim], in position order, K at its true
            position; ``heads`` is a multiple of ``kv_heads``.
        tiles: from ``make_tiles``; ``None`` if query i sees keys 0..i, which
            kernels have a faster way for.
        scale: multiplies the scores.

    Returns:
        [n, heads, head_dim] in the dtype of ``query``.
    """
    n, heads, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    # Query heads that share a key head: [kv_heads, group, n, head_dim].
    q = query.view(n, kv_heads, group, dim).permute(1, 2, 0, 3)
    k, v = (
        x.to(query.dtype).transpose(0, 1)[:, None].expand(-1, group, -1, -1) for x in (key, value)
    )
    if tiles is None:
        found = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale
        )
        return found.permute(2, 0, 1, 3).reshape(n, heads, dim)
    out = torch.empty_like(query)
    for tile in tiles:
        part = q[:, :, tile.start : tile.stop]
        keys, values = (x[:, :, tile.first : tile.keys] for x in (k, v))
        mask = tile.mask.to(query.dtype)
        if query.device.type == "cpu":
            found, _ = flash_cpu(part, keys, values, attn_mask=mask[None, None], scale=scale)
        else:
            found, _ = attend_dense(part, keys, values, scale, mask)
        out[tile.start : tile.stop] = found.permute(2, 0, 1, 3).reshape(-1, heads, dim)
    return out
