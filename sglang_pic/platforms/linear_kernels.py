"""Torch forms of the Triton kernels that SGLang's gated delta nets and KDA call.

SGLang has these kernels for GPUs and for AMX only. Each function here takes
the place of the one whose path ``KERNELS`` names, with its signature, layouts
and in-place effects; ``sglang_hooks`` installs them where the plain CPU
platform is active. What they compute is in ``kernels/``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from sglang_pic.kernels.operators import gated_delta, kda
from sglang_pic.kernels.operators.chunks import CHUNK
from sglang_pic.kernels.short_conv import convolve

_SILU = ("silu", "swish", True)


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens_cpu: list[int],
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | None = "silu",
    **_: Any,
) -> torch.Tensor:
    """x [channels, tokens] packed; reads and writes ``conv_states[cache_indices]``, by
    default its first ones, which without ``has_initial_state`` hold no history."""
    lengths = query_start_loc.diff().tolist()
    slots = torch.arange(len(lengths)) if cache_indices is None else cache_indices.long()
    held = torch.zeros(len(lengths)) if has_initial_state is None else has_initial_state
    history = conv_states[slots] * held[:, None, None]
    y, after = convolve(x.T, weight, bias, history, lengths, silu=activation in _SILU)
    conv_states[slots] = after.to(conv_states.dtype)
    return y.T


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | bool | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """x [batch, channels], one token each."""
    assert conv_state_indices is not None
    slots = conv_state_indices.long()
    window = torch.cat([conv_state[slots].to(x.dtype), x[..., None]], -1)
    y = (window * weight).sum(-1)
    if bias is not None:
        y = y + bias
    conv_state[slots] = window[..., 1:].to(conv_state.dtype)
    return F.silu(y) if activation in _SILU else y


def fused_gdn_gating(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log decay (float32) and write strength, both [1, tokens, heads]."""
    g = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float(), beta, threshold)
    return g[None], b.sigmoid()[None]


def _normalised(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, normalise: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[1, tokens, heads, d] to float32 [tokens, value heads, d], q scaled."""
    q, k, v = q[0].float(), k[0].float(), v[0].float()
    if normalise:
        q, k = _normalised(q), _normalised(k)
    group = v.shape[1] // k.shape[1]
    q = q * (k.shape[-1] ** -0.5 if scale is None else scale)
    return q.repeat_interleave(group, 1), k.repeat_interleave(group, 1), v


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_first: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    inplace_update: bool = True,
) -> tuple[torch.Tensor, None, torch.Tensor]:
    """Outputs [1, tokens, heads, dv] and the states at chunk starts
    [1, chunks, heads, dv, dk]; the pool's states are [heads, dv, dk]."""
    assert initial_state is not None and initial_state_indices is not None
    assert cu_seqlens is not None and not head_first
    slots = initial_state_indices.long()
    query, key, value = _prepare(q, k, v, scale, use_qk_l2norm_in_kernel)
    out, end, starts = gated_delta.chunk(
        query,
        key,
        value,
        g[0].float(),
        beta[0].float(),
        initial_state[slots].float().transpose(-1, -2),
        cu_seqlens.diff().tolist(),
    )
    if inplace_update:
        initial_state[slots] = end.transpose(-1, -2).to(initial_state.dtype)
    return out[None].to(v.dtype), None, starts[None].transpose(-1, -2)


def _unpacked(
    mixed_qkv: torch.Tensor, states: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [1, tokens, heads, d] of [tokens, channels]."""
    heads, dv, dk = states.shape[1:]
    keys = (mixed_qkv.shape[-1] - heads * dv) // 2
    q, k, v = mixed_qkv[None].split([keys, keys, heads * dv], -1)
    return q.unflatten(-1, (-1, dk)), k.unflatten(-1, (-1, dk)), v.unflatten(-1, (-1, dv))


def packed_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor,
    out: torch.Tensor,
    ssm_state_indices: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
) -> None:
    """One token of every sequence; writes ``out`` [batch, 1, heads, dv]."""
    q, k, v = _unpacked(mixed_qkv, initial_state)
    g, beta = fused_gdn_gating(A_log, a, b, dt_bias)
    slots = ssm_state_indices.long()
    query, key, value = _prepare(q, k, v, scale, use_qk_l2norm_in_kernel)
    state = initial_state[slots].float().transpose(-1, -2)
    result, end = gated_delta.step(query, key, value, g[0], beta[0].float(), state)
    initial_state[slots] = end.transpose(-1, -2).to(initial_state.dtype)
    out.copy_(result[:, None])


def kda_gates(
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    lower_bound: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log decay [tokens, heads, dk] and write strength [tokens, heads], float32."""
    rate = A_log.float().exp().reshape(-1, 1)
    x = a.float().reshape(len(a), len(rate), -1) + dt_bias.float().view(len(rate), -1)
    g = -rate * F.softplus(x) if lower_bound is None else lower_bound * (rate * x).sigmoid()
    return g, b.float().sigmoid().view(len(a), -1)


def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    output_intermediate_states: bool = False,
    track_state: torch.Tensor | None = None,
    track_chunk_idx: torch.Tensor | None = None,
    beta_is_raw: bool = False,
    **_: Any,
) -> Any:
    """Outputs [1, tokens, heads, dv], with ``output_intermediate_states`` the states at
    chunk starts beside it; ``track_state`` [sequences, heads, dv, dk] takes those of the
    chunks asked for."""
    assert initial_state is not None and initial_state_indices is not None
    assert cu_seqlens is not None and beta_is_raw
    assert A_log is not None and dt_bias is not None
    slots, lengths = initial_state_indices.long(), cu_seqlens.diff()
    query, key, value = _prepare(q, k, v, scale, use_qk_l2norm_in_kernel)
    out, end, starts = kda.chunk(
        query,
        key,
        value,
        *kda_gates(g[0], beta[0], A_log, dt_bias, lower_bound),
        initial_state[slots].float().transpose(-1, -2),
        lengths.tolist(),
    )
    initial_state[slots] = end.transpose(-1, -2).to(initial_state.dtype)
    states = starts.transpose(-1, -2)
    if track_state is not None and track_chunk_idx is not None:
        chunks = (lengths + CHUNK - 1) // CHUNK
        first = chunks.cumsum(0) - chunks
        rows = (track_chunk_idx >= 0).nonzero().squeeze(1)
        track_state[rows] = states[first[rows] + track_chunk_idx[rows]]
    found = out[None].to(v.dtype)
    return (found, states[None]) if output_intermediate_states else found


def kda_packed_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor,
    out: torch.Tensor,
    ssm_state_indices: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    lower_bound: float | None = None,
) -> None:
    """One token of every sequence; writes ``out`` [batch, 1, heads, dv]."""
    q, k, v = _unpacked(mixed_qkv, initial_state)
    slots = ssm_state_indices.long()
    query, key, value = _prepare(q, k, v, scale, use_qk_l2norm_in_kernel)
    gates = kda_gates(a, b, A_log, dt_bias, lower_bound)
    state = initial_state[slots].float().transpose(-1, -2)
    result, end = kda.step(query, key, value, *gates, state)
    initial_state[slots] = end.transpose(-1, -2).to(initial_state.dtype)
    out.copy_(result[:, None])


def _gated_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, activation: str
) -> torch.Tensor:
    normed = F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps)
    return (normed * _opened(gate, activation)).to(x.dtype)


def _opened(gate: torch.Tensor, activation: str) -> torch.Tensor:
    return gate.float().sigmoid() if activation == "sigmoid" else F.silu(gate.float())


def fused_norm_gate(
    x: torch.Tensor,
    g: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "swish",
    residual: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Qwen3-Next's gated RMS norm."""
    assert bias is None and residual is None and not prenorm
    return _gated_norm(x, g, weight, eps, activation)


def layernorm_gated(
    *,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "swish",
) -> torch.Tensor:
    """RMS norm, gated where there is ``z`` (Qwen3.5), of groups of channels (Ling 2.5)."""
    assert is_rms_norm and norm_before_gate and bias is None
    groups = x.unflatten(-1, (-1, group_size or x.shape[-1])).float()
    normed = F.rms_norm(groups, groups.shape[-1:], eps=eps).flatten(-2) * weight.float()
    return (normed if z is None else normed * _opened(z, activation)).to(x.dtype)


def split_interleaved(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Qwen3-Next's projections, interleaved by key head: qkv, z, b, a."""
    tokens, group = mixed_qkvz.shape[0], num_heads_v // num_heads_qk
    parts = mixed_qkvz.view(tokens, num_heads_qk, -1).split(
        [head_qk, head_qk, group * head_v, group * head_v], -1
    )
    q, k, v, z = (part.reshape(tokens, -1) for part in parts)
    b, a = mixed_ba.view(tokens, num_heads_qk, -1).split([group, group], -1)
    return (
        torch.cat([q, k, v], -1),
        z.view(tokens, num_heads_v, head_v),
        b.reshape(tokens, num_heads_v),
        a.reshape(tokens, num_heads_v),
    )


def split_contiguous(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Qwen3.5's projections, one behind the other: qkv, z, b, a."""
    tokens, value = mixed_qkvz.shape[0], num_heads_v * head_v
    qkv, z = mixed_qkvz.split([2 * num_heads_qk * head_qk + value, value], -1)
    b, a = mixed_ba.split([num_heads_v, num_heads_v], -1)
    return (
        qkv.contiguous(),
        z.reshape(tokens, num_heads_v, head_v),
        b.contiguous(),
        a.contiguous(),
    )


def fused_sigmoid_mul(
    attn_output: torch.Tensor, gate: torch.Tensor, inplace: bool = False, quant: bool = False
) -> torch.Tensor:
    """The output gate of full attention."""
    assert not quant
    return attn_output * gate.reshape(attn_output.shape).sigmoid()


def fused_gate_sigmoid_mul_add(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    """Add the shared expert, gated, to the routed experts' output (Qwen3-Next)."""
    gate = (hidden_states @ gate_weight).sigmoid()
    final_hidden_states += gate[:, None] * shared_output


def track_states(
    conv_states_pool: torch.Tensor,
    ssm_states_pool: torch.Tensor,
    cache_indices: torch.Tensor,
    mamba_track_mask: torch.Tensor,
    mamba_track_indices: torch.Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """Copy decode states of all layers [layers, slots, ...] to their track slots."""
    rows = mamba_track_mask[:batch_size].nonzero().squeeze(1)
    source, target = cache_indices[rows].long(), mamba_track_indices[rows].long()
    for pool in (conv_states_pool, ssm_states_pool):
        pool[:, target] = pool[:, source]


_OPS = "sglang.kernels.ops."
KERNELS: dict[str, Callable[..., Any]] = {
    _OPS + "mamba.causal_conv1d_triton.causal_conv1d_fn": causal_conv1d_fn,
    _OPS + "mamba.causal_conv1d_triton.causal_conv1d_update": causal_conv1d_update,
    _OPS + "mamba.mamba_state_scatter_triton.track_mamba_states_all_layers": track_states,
    _OPS + "attention.linear.fused_gdn_gating.fused_gdn_gating": fused_gdn_gating,
    _OPS + "attention.fla.chunk.chunk_gated_delta_rule": chunk_gated_delta_rule,
    _OPS
    + "attention.fla.fused_recurrent."
    + "fused_recurrent_gated_delta_rule_packed_decode": packed_decode,
    _OPS + "attention.fla.kda.chunk_kda": chunk_kda,
    _OPS + "attention.fla.fused_recurrent.fused_recurrent_kda_packed_decode": kda_packed_decode,
    _OPS + "attention.fla.fused_norm_gate.rms_norm_gated": fused_norm_gate,
    _OPS + "attention.fla.layernorm_gated.rms_norm_gated": layernorm_gated,
    _OPS + "attention.triton_gdn_fused_proj.fused_qkvzba_split_reshape_cat": split_interleaved,
    _OPS
    + "attention.triton_gdn_fused_proj."
    + "fused_qkvzba_split_reshape_cat_contiguous": split_contiguous,
    _OPS + "elementwise.elementwise.fused_sigmoid_mul": fused_sigmoid_mul,
    _OPS + "elementwise.elementwise.fused_gate_sigmoid_mul_add": fused_gate_sigmoid_mul_add,
}
