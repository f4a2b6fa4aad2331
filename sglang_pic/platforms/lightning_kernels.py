"""What SGLang lacks to run Lightning attention (Ring and Ling 2.5) on a plain CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang_pic.kernels.operators import lightning
from sglang_pic.kernels.operators.chunks import CHUNK


def seg_la_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    decay_scales: torch.Tensor,
    meta: Any,
    caches: torch.Tensor | None = None,
    cache_indices: torch.Tensor | None = None,
    track_lens: torch.Tensor | None = None,
    track_state_indices: torch.Tensor | None = None,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Outputs [tokens, heads, dv] of packed sequences; moves the states
    ``s[meta.s_offsets]`` [heads, dk, dv] on, from zero where ``meta.s_scales`` is 0.
    Where ``track_lens`` is not 0, a multiple of 64, the state behind so many of a sequence's
    tokens goes to ``s[track_state_indices]``; slots of -1 are nobody's."""
    assert caches is None and meta.mask is None
    lengths = meta.q_offsets.diff()
    slots = meta.s_offsets.long()
    begun = s[slots].float() * (meta.s_scales > 0)[:, None, None, None]
    scale = k.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, end, starts = lightning.chunk(
        q.float() * scale, k.float(), v.float(), -decay_scales.float().view(-1), begun,
        lengths.tolist(),
    )  # fmt: skip
    held = slots >= 0
    s[slots[held]] = end[held].to(s.dtype)
    if track_lens is not None and track_state_indices is not None:
        chunks = (lengths + CHUNK - 1) // CHUNK
        begins = chunks.cumsum(0) - chunks
        rows = ((track_lens > 0) & (track_state_indices >= 0)).nonzero().squeeze(1)
        picked = begins[rows] + track_lens[rows] // CHUNK
        s[track_state_indices[rows].long()] = starts[picked].to(s.dtype)
    return out.to(v.dtype)


def forward_cuda(
    self: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rotary embeddings: the full layers beside Lightning ask for this form by name."""
    assert fused_set_kv_buffer_arg is None
    found: tuple[torch.Tensor, torch.Tensor] = self.forward_native(positions, query, key, offsets)
    return found


KERNELS: dict[str, Callable[..., Any]] = {
    "sglang.kernels.ops.attention.linear.seg_la.seg_la_fwd": seg_la_fwd,
    "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding.forward_cuda": forward_cuda,
}
