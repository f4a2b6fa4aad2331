"""Gated delta nets (Qwen3-Next, Qwen3.5) on SGLang's own kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.kernels.ops.attention.fla import chunk as fla_chunk
from sglang.kernels.ops.attention.linear import fused_gdn_gating as gating
from sglang.srt.layers.attention.linear.gdn_backend import GDNAttnBackend

from sglang_pic.kernels.triton import wy
from sglang_pic.linear.delta import PicDeltaBackend, Rule, widened
from sglang_pic.linear.packed import first, indptr


def _gates(
    layer: Any, a: torch.Tensor, b: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return gating.fused_gdn_gating(layer.A_log, a[tokens], b[tokens], layer.dt_bias)


def _walk(
    layer: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    states: torch.Tensor,
    lengths: Sequence[int],
) -> torch.Tensor:
    """SGLang's chunk kernel over packed sequences."""
    out, _, _ = fla_chunk.chunk_gated_delta_rule(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        initial_state=states,
        initial_state_indices=first(len(lengths), v.device),
        cu_seqlens=indptr(lengths, v.device),
        head_first=False,
        use_qk_l2norm_in_kernel=True,
    )
    return out


def _advance(
    layer: Any,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    running: torch.Tensor,
    lengths: Sequence[int],
) -> None:
    """On a GPU through the chunks' WY factors, elsewhere by the whole chunk kernel."""
    if running.is_cuda:
        _advance_by_factors(k, v, g, beta, running, lengths)
    else:
        _walk(layer, k, k, widened(v, k.shape[-1]), g, beta, running, lengths)


def _advance_by_factors(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    running: torch.Tensor,
    lengths: Sequence[int],
) -> None:
    """``_advance`` by the part of SGLang's chunk kernel that does not depend on the
    state, and ``wy.advance``."""
    bounds = indptr(lengths, v.device)
    chunks = fla_chunk.prepare_chunk_indices(bounds, fla_chunk.CHUNK_SIZE)
    where = {"cu_seqlens": bounds, "chunk_indices": chunks}
    k, v = fla_chunk.l2norm_fwd(k.contiguous()), v.contiguous()
    total = fla_chunk.chunk_local_cumsum(g, chunk_size=fla_chunk.CHUNK_SIZE, **where)
    w, u, _ = fla_chunk.chunk_gated_delta_rule_fwd_intra(
        k=k, v=v, g=total, beta=beta.contiguous(), **where
    )
    wy.advance(running, k[0], w[0], u[0], total[0], bounds)


RULE = Rule(_gates, _walk, _advance)


class PicGDNBackend(PicDeltaBackend, GDNAttnBackend):
    """SGLang's gated-delta-net backend with linked and compiling rows."""

    rule = RULE
    gate_dim = 0
