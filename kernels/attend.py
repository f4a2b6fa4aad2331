"""Attention of some queries over some keys, with its log-sum-exp (torch)."""

from __future__ import annotations

import torch

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One part: every query sees every key, or causally the keys up to its own index.

    Args:
        query: [n, heads, head_dim].
        key, value: [m, kv_heads, head_dim]; ``heads`` is a multiple of ``kv_heads``.
        scale: multiplies the scores.
        causal: query i sees keys 0..i; then ``n == m``.

    Returns:
        out: float32 [n, heads, head_dim]; lse: float32 [n, heads], natural log.
    """
    n, heads, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    key, value = key.to(query.dtype), value.to(query.dtype)
    if causal:
        q = query.transpose(0, 1)
        k = key.transpose(0, 1).repeat_interleave(group, dim=0)
        v = value.transpose(0, 1).repeat_interleave(group, dim=0)
    else:
        # Query heads that share a key head become rows of one problem.
        q = query.view(n, kv_heads, group, dim).permute(1, 2, 0, 3)
        q = q.reshape(kv_heads, group * n, dim)
        k, v = key.transpose(0, 1), value.transpose(0, 1)
    if query.device.type == "cpu":
        out, lse = _flash_cpu(q[None], k[None], v[None], is_causal=causal, scale=scale)
        out, lse = out[0].float(), lse[0].float()
    else:
        out, lse = _attend_dense(q, k, v, scale, causal)
    out = out.reshape(heads, n, dim).transpose(0, 1)
    return out, lse.reshape(heads, n).transpose(0, 1)


def _attend_dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.einsum("hnd,hmd->hnm", q.float(), k.float()) * scale
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    return torch.einsum("hnm,hmd->hnd", torch.exp(scores - lse[..., None]), v.float()), lse
