"""Attention of some queries over some keys, with its log-sum-exp (torch).

The form for decode: one part for each distinct span, its keys read once for
all requests, partial results merged afterwards.
"""

from __future__ import annotations

import torch

flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query sees every key.

    Args:
        query: [n, heads, head_dim].
        key, value: [m, kv_heads, head_dim]; ``heads`` is a multiple of ``kv_heads``.
        scale: multiplies the scores.

    Returns:
        out: float32 [n, heads, head_dim]; lse: float32 [n, heads], natural log.
    """
    n, heads, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    # Query heads that share a key head become rows of one problem.
    q = query.view(n, kv_heads, group, dim).transpose(0, 1).reshape(kv_heads, n * group, dim)
    k, v = key.to(query.dtype).transpose(0, 1), value.to(query.dtype).transpose(0, 1)
    if query.device.type == "cpu":
        out, lse = flash_cpu(q[None], k[None], v[None], scale=scale)
        out, lse = out[0].float(), lse[0].float()
    else:
        out, lse = attend_dense(q, k, v, scale)
    out = out.view(kv_heads, n, group, dim).transpose(0, 1).reshape(n, heads, dim)
    return out, lse.reshape(kv_heads, n, group).transpose(0, 1).reshape(n, heads)


def attend_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, on any device and over any leading dimensions.

    Args:
        q: [..., n, head_dim]; k, v: [..., m, head_dim].
        mask: [n, m], added to the scores, or ``None``.

    Returns:
        out [..., n, head_dim] and natural log-sum-exp [..., n]; computed in
        float32, or in float64 if that is what comes in.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, dim=-1)
    return torch.exp(scores - lse[..., None]) @ v.to(wide), lse
