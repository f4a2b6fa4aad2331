"""Gated delta nets (Qwen3-Next, Qwen3.5) on SGLang's own kernels.

Rows that compose cores go through ``_link``; compiles go through SGLang's code,
and ``_capture`` reads off their pairs beside it. Per layer that is a fixed
number of kernel calls, whatever the number of requests, segments and tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.kernels.ops.attention.fla import chunk as fla_chunk
from sglang.kernels.ops.attention.linear import fused_gdn_gating as gating
from sglang.srt.layers.attention.linear.gdn_backend import GDNAttnBackend

from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.kernels.triton import wy
from sglang_pic.linear.capture import CaptureStep
from sglang_pic.linear.packed import convolve, first, indptr
from sglang_pic.linear.rows import PicLinearBackend
from sglang_pic.linear.state import LinearShape
from sglang_pic.linear.step import LinkStep


class PicGDNBackend(PicLinearBackend, GDNAttnBackend):
    """SGLang's gated-delta-net backend with linked and compiling rows."""

    def forward_extend(
        self,
        layer: Any,
        forward_batch: Any,
        mixed_qkv: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        cache = self.req_to_token_pool.mamba2_layer_cache(layer.layer_id)
        conv, states = cache.conv[0], cache.temporal
        index = self.req_to_token_pool.mamba_map[layer.layer_id]
        if self._capture_step is not None:
            self._capture(self._capture_step, index, layer, mixed_qkv, a, b, conv, states)
        step = self._link_step
        if step is None:
            return super().forward_extend(layer, forward_batch, mixed_qkv, a, b, **kwargs)
        shape = (1, mixed_qkv.shape[0], layer.num_v_heads, layer.head_v_dim)
        out = mixed_qkv.new_empty(shape)
        if self._others is not None:
            own = self._other_tokens
            part = super().forward_extend(layer, self._others, mixed_qkv[own], a[own], b[own])
            out[:, own] = part
        linked = self._link(step, index, layer, mixed_qkv, a, b, conv, states)
        out[:, step.tokens] = linked
        return out

    def _link(
        self,
        step: LinkStep,
        index: int,
        layer: Any,
        mixed_qkv: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        conv: torch.Tensor,
        states: torch.Tensor,
    ) -> torch.Tensor:
        tokens = step.tokens
        x = mixed_qkv[tokens]
        history = step.history(index, conv, x)
        q, k, v = _convolve(layer, x, history, step.lengths)
        conv[step.slots] = history[step.last]
        g, beta = gating.fused_gdn_gating(layer.A_log, a[tokens], b[tokens], layer.dt_bias)
        inner = None
        if step.inner_lengths:
            inner = _pairs(
                step.shape,
                k[:, step.inner],
                v[:, step.inner],
                g[:, step.inner],
                beta[:, step.inner],
                step.inner_lengths,
            )
        slot_states = states[step.slots].float().transpose(-1, -2)
        incoming = step.incoming(index, slot_states, inner)
        running = incoming.transpose(-1, -2).contiguous()
        out = _walk(q, k, v, g, beta, running, step.lengths)
        states[step.slots] = running[step.last].to(states.dtype)
        return out

    def _capture(
        self,
        step: CaptureStep,
        index: int,
        layer: Any,
        mixed_qkv: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        conv: torch.Tensor,
        states: torch.Tensor,
    ) -> None:
        x = mixed_qkv[step.tokens]
        history = conv[step.slots].clone()
        step.keep_tails(index, history, x)
        _, k, v = _convolve(layer, x, history, step.lengths)
        tokens = step.tokens[step.picked]
        g, beta = gating.fused_gdn_gating(layer.A_log, a[tokens], b[tokens], layer.dt_bias)
        running = step.running[:, index].contiguous()
        running[step.from_slot, :, : layer.head_v_dim] = states[
            step.slots[step.from_slot_row]
        ].float()
        k, v = k[:, step.picked], v[:, step.picked]
        _advance(k, v, g, beta, running, step.stretch_lengths)
        step.running[:, index] = running


def _convolve(
    layer: Any, x: torch.Tensor, history: torch.Tensor, lengths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [1, tokens, heads, d] behind the convolution; ``history``
    [sequences, channels, width - 1] is read and moved on in place."""
    mixed = convolve(x, layer.conv_weights, layer.bias, layer.activation, history, lengths)
    q, k, v = mixed.split([layer.q_dim, layer.k_dim, layer.v_dim], -1)
    return (
        q.reshape(1, -1, layer.num_q_heads, layer.head_q_dim),
        k.reshape(1, -1, layer.num_k_heads, layer.head_k_dim),
        v.reshape(1, -1, layer.num_v_heads, layer.head_v_dim),
    )


def _walk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    states: torch.Tensor,
    lengths: Sequence[int],
) -> torch.Tensor:
    """SGLang's chunk kernel over packed sequences; moves ``states`` [sequences,
    heads, values, keys] on in place."""
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


def _pairs(
    shape: LinearShape,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    lengths: Sequence[int],
) -> Pair:
    """Pairs of packed runs: ``A`` [runs, heads, dk, dk], ``B`` [runs, heads, dk, dv]."""
    running = shape.begun(len(lengths), v.device)
    _advance(k, v, g, beta, running, lengths)
    return shape.pair(running)


def _advance(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    running: torch.Tensor,
    lengths: Sequence[int],
) -> None:
    """Move running states [sequences, heads, dv + dk, dk] on over packed sequences, in
    place: on a GPU through the chunks' WY factors, elsewhere by the whole chunk
    kernel, under values [v | 0]."""
    if running.is_cuda:
        _advance_by_factors(k, v, g, beta, running, lengths)
    else:
        widened = torch.cat([v, v.new_zeros((*v.shape[:-1], k.shape[-1]))], -1)
        _walk(k, k, widened, g, beta, running, lengths)


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
