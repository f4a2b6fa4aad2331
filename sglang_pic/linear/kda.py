"""Kimi Delta Attention (Kimi Linear) on SGLang's own kernels.

Its chunk kernel takes gates as the projections give them, and SGLang keeps the
convolution's histories [width - 1, channels].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.kernels.ops.attention.fla import kda as fla_kda
from sglang.srt.layers.attention.linear.kda_backend import KDAAttnBackend

from sglang_pic.linear.delta import PicDeltaBackend, Rule, widened
from sglang_pic.linear.packed import first, indptr


def _gates(
    layer: Any, a: torch.Tensor, b: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return a[:, tokens], b[:, tokens]


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
    out: torch.Tensor = fla_kda.chunk_kda(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        initial_state=states,
        initial_state_indices=first(len(lengths), v.device),
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=indptr(lengths, v.device),
        A_log=layer.A_log,
        dt_bias=layer.dt_bias,
        lower_bound=layer.lower_bound,
        beta_is_raw=True,
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
    _walk(layer, k, k, widened(v, k.shape[-1]), g, beta, running, lengths)


class PicKDABackend(PicDeltaBackend, KDAAttnBackend):
    """SGLang's KDA backend with linked and compiling rows."""

    rule = Rule(_gates, _walk, _advance)
    gate_dim = 1
    tokens_first = True
