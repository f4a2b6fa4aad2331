"""Merge partial attention results by their log-sum-exp."""

from __future__ import annotations

import torch


def merge(
    partial: torch.Tensor, lse: torch.Tensor, indptr: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """Combine ragged partial results into one result a query.

    Args:
        partial: float [n, heads, head_dim], softmax-weighted values of each part.
        lse: float32 [n, heads], natural log-sum-exp of each part's scores; -inf where
            a query saw nothing of a part, whose values are finite then.
        indptr: int [queries + 1], index: int [m], the partial results of each query:
            ``index[indptr[i] : indptr[i + 1]]``, in one of which at least it saw a key.

    Returns:
        float32 [queries, heads, head_dim].
    """
    queries = indptr.numel() - 1
    owner = torch.repeat_interleave(
        torch.arange(queries, device=lse.device), indptr.diff().long(), output_size=index.numel()
    )
    partial, lse = partial[index.long()].float(), lse[index.long()]
    top = lse.new_full((queries, lse.shape[1]), -torch.inf)
    top = top.scatter_reduce(0, owner[:, None].expand_as(lse), lse, "amax")
    weight = torch.exp(lse - top[owner])
    total = torch.zeros_like(top).index_add_(0, owner, weight)
    out = partial.new_zeros((queries, *partial.shape[1:]))
    out.index_add_(0, owner, partial * weight[..., None])
    return out / total[..., None]
