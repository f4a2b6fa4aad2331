"""Gated delta nets (Qwen3-Next, Qwen3.5) on SGLang's own kernels.

A batch splits three ways: rows that compose cores go through ``_link``; all
others go through SGLang's code untouched, as a batch of their own; compiles
are among these, and ``_capture`` reads off their pairs beside it. Per layer
that is a fixed number of kernel calls, whatever the number of requests,
segments and tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from sglang.kernels.ops.attention.fla import chunk as fla_chunk
from sglang.kernels.ops.attention.linear import fused_gdn_gating as gating
from sglang.kernels.ops.mamba import causal_conv1d_triton as short_conv
from sglang.srt.layers.attention.linear.gdn_backend import GDNAttnBackend

from sglang_pic.errors import PicIntegrityError
from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.linear.capture import Capture, CaptureRow, CaptureStep, build_capture
from sglang_pic.linear.step import LinkRow, LinkStep, build_link, has_core
from sglang_pic.link.plan import LinkPlan
from sglang_pic.link.policy import LinkOptions

# Per-row fields of a forward batch that SGLang's linear backend reads, tensors and lists.
_ROW_FIELDS = (
    "req_pool_indices",
    "seq_lens",
    "extend_seq_lens",
    "extend_prefix_lens",
    "mamba_track_indices",
    "mamba_track_mask",
    "mamba_track_seqlens",
)
_ROW_LISTS = (
    "rids",
    "extend_seq_lens_cpu",
    "extend_prefix_lens_cpu",
    "mamba_prefill_track_mask_cpu",
    "mamba_track_seqlens_cpu",
)


class PicGDNBackend(GDNAttnBackend):
    """SGLang's gated-delta-net backend with linked and compiling rows."""

    def __init__(self, model_runner: Any):
        super().__init__(model_runner)
        self._rids: list[str] = []
        self._plans: Sequence[LinkPlan | None] = ()
        self._options: Sequence[LinkOptions | None] = ()
        self._captures: Sequence[Capture | None] = ()
        self._link_step: LinkStep | None = None
        self._capture_step: CaptureStep | None = None
        self._others: Any = None
        self._other_tokens = torch.empty(0, dtype=torch.int64)

    def set_rows(
        self,
        rids: Sequence[str],
        plans: Sequence[LinkPlan | None],
        options: Sequence[LinkOptions | None],
        captures: Sequence[Capture | None],
    ) -> None:
        """Rows of the batch that runs next; called once a forward pass."""
        self._rids, self._plans = list(rids), plans
        self._options, self._captures = options, captures

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self._link_step = self._capture_step = None
        self._others = forward_batch
        special = any(row is not None for row in (*self._plans, *self._captures))
        if special and not forward_batch.forward_mode.is_decode_or_idle():
            if self._rids != forward_batch.rids:
                raise PicIntegrityError("the forward pass is not the one that was planned")
            self._arrange(forward_batch)
        if self._others is not None:
            super().init_forward_metadata(self._others)

    def _arrange(self, batch: Any) -> None:
        """Split the batch's rows."""
        prefixes = [int(n) for n in batch.extend_prefix_lens_cpu]
        extends = [int(n) for n in batch.extend_seq_lens_cpu]
        slots = self.req_to_token_pool.get_mamba_indices(batch.req_pool_indices)
        slots = self._translate_mamba_indices(slots).tolist()
        linked, compiling, others, at = [], [], [], 0
        rows = zip(self._plans, self._options, self._captures, strict=True)
        for i, (plan, options, capture) in enumerate(rows):
            where = (at, prefixes[i], extends[i], slots[i])
            if plan is not None and has_core(plan, prefixes[i], extends[i]):
                assert options is not None
                linked.append(LinkRow(plan, options, *where))
            else:
                others.append((i, torch.arange(at, at + extends[i])))
                if capture is not None:
                    compiling.append(CaptureRow(capture, *where))
            at += extends[i]
        if compiling:
            self._capture_step = build_capture(compiling, self.device)
        if linked:
            self._link_step = build_link(linked, self.device)
            self._others = _rows_of(batch, [i for i, _ in others]) if others else None
            tokens = [tokens for _, tokens in others]
            self._other_tokens = torch.cat(tokens).to(self.device) if tokens else None

    # -- per layer ------------------------------------------------------------

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
        history = conv.new_empty((len(step.lengths), *conv.shape[1:]))
        history[step.from_slot] = conv[step.slots[step.row[step.from_slot]]]
        history[step.after_core] = step.cores.conv_tail[:, index].to(conv.dtype)
        tokens = step.tokens
        q, k, v = _convolve(layer, mixed_qkv[tokens], history, step.lengths)
        conv[step.slots] = history[step.last]
        g, beta = gating.fused_gdn_gating(layer.A_log, a[tokens], b[tokens], layer.dt_bias)
        inner = None
        if step.inner_runs.numel():
            begun = _blank(layer, step.inner_runs.numel(), states.device)
            begun[:, :, layer.head_v_dim :] = torch.eye(layer.head_k_dim, device=states.device)
            inner = _pairs(
                k[:, step.inner],
                v[:, step.inner],
                g[:, step.inner],
                beta[:, step.inner],
                begun,
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
        inputs = torch.cat([history.transpose(1, 2).flatten(0, 1), x.to(history.dtype)])
        step.tails[:, index] = inputs[step.tail_index].transpose(1, 2).float()
        _, k, v = _convolve(layer, x, history, step.lengths)
        tokens = step.tokens[step.picked]
        g, beta = gating.fused_gdn_gating(layer.A_log, a[tokens], b[tokens], layer.dt_bias)
        running = step.running[:, index].contiguous()
        running[step.from_slot, :, : layer.head_v_dim] = states[
            step.slots[step.from_slot_row]
        ].float()
        k, v = k[:, step.picked], v[:, step.picked]
        _walk(k, k, _widened(v, layer.head_k_dim), g, beta, running, step.stretch_lengths)
        step.running[:, index] = running


def _rows_of(batch: Any, rows: list[int]) -> Any:
    """The forward batch with these rows alone, as far as linear layers read it."""
    part = copy.copy(batch)
    index = torch.tensor(rows, device=batch.req_pool_indices.device)
    part.batch_size = len(rows)
    for name in _ROW_FIELDS:
        value = getattr(batch, name)
        setattr(part, name, None if value is None else value[index.to(value.device)])
    for name in _ROW_LISTS:
        value = getattr(batch, name)
        setattr(part, name, None if value is None else [value[i] for i in rows])
    part.extend_start_loc = part.extend_seq_lens.cumsum(0) - part.extend_seq_lens
    return part


def _indptr(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    bounds[1:] = torch.tensor(lengths).cumsum(0)
    return bounds.to(device)


def _convolve(
    layer: Any, x: torch.Tensor, history: torch.Tensor, lengths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [1, tokens, heads, d] behind the convolution; ``history``
    [sequences, channels, width - 1] is read and moved on in place."""
    count = len(lengths)
    mixed = short_conv.causal_conv1d_fn(
        x.transpose(0, 1),
        layer.conv_weights,
        layer.bias,
        activation=layer.activation,
        conv_states=history,
        has_initial_state=torch.ones(count, dtype=torch.bool, device=x.device),
        cache_indices=torch.arange(count, dtype=torch.int32, device=x.device),
        query_start_loc=_indptr(lengths, x.device),
        seq_lens_cpu=list(lengths),
    ).transpose(0, 1)
    q, k, v = mixed.split([layer.q_dim, layer.k_dim, layer.v_dim], -1)
    return (
        q.reshape(1, -1, layer.num_q_heads, layer.head_q_dim),
        k.reshape(1, -1, layer.num_k_heads, layer.head_k_dim),
        v.reshape(1, -1, layer.num_v_heads, layer.head_v_dim),
    )


def _blank(layer: Any, count: int, device: torch.device) -> torch.Tensor:
    """float32 [count, heads, dv + dk, dk], states [B | A] of zero, transposed."""
    rows = layer.head_v_dim + layer.head_k_dim
    return torch.zeros(count, layer.num_v_heads, rows, layer.head_k_dim, device=device)


def _widened(v: torch.Tensor, dk: int) -> torch.Tensor:
    """Values [v | 0]."""
    return torch.cat([v, v.new_zeros((*v.shape[:-1], dk))], -1)


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
    count = len(lengths)
    out, _, _ = fla_chunk.chunk_gated_delta_rule(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        initial_state=states,
        initial_state_indices=torch.arange(count, dtype=torch.int32, device=v.device),
        cu_seqlens=_indptr(lengths, v.device),
        head_first=False,
        use_qk_l2norm_in_kernel=True,
    )
    return out


def _pairs(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    begun: torch.Tensor,
    lengths: Sequence[int],
) -> Pair:
    """Pairs of packed runs: ``A`` [runs, heads, dk, dk], ``B`` [runs, heads, dk, dv]."""
    dv = v.shape[-1]
    _walk(k, k, _widened(v, k.shape[-1]), g, beta, begun, lengths)
    state = begun.transpose(-1, -2)
    return Pair(state[..., dv:], state[..., :dv])
