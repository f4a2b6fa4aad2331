"""Merge partial attention results by their log-sum-exp."""

from __future__ import annotations

import torch


def merge(
    partial: torch.Tensor, lse: torch.Tensor, query: torch.Tensor, n_queries: int
) -> torch.Tensor:
    """Combine ragged partial results into one result a query.

    Args:
        partial: float32 [n, heads, head_dim], softmax-weighted values of each part.
        lse: float32 [n, heads], natural log-sum-exp of each part's scores.
        query: int64 [n], which query each partial belongs to.
        n_queries: number of queries; each has at least one partial.

    Returns:
        float32 [n_queries, heads, head_dim].
    """
    index = query[:, None].expand_as(lse)
    top = lse.new_full((n_queries, lse.shape[1]), -torch.inf)
    top = top.scatter_reduce(0, index, lse, "amax")
    weight = torch.exp(lse - top[query])
    total = torch.zeros_like(top).index_add_(0, query, weight)
    out = partial.new_zeros((n_queries, *partial.shape[1:]))
    out.index_add_(0, query, partial * weight[..., None])
    return out / total[..., None]
