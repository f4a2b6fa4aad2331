"""Lightning attention (Ring and Ling 2.5) on SGLang's own kernels.

As ``mamba2``, with decays that only the layer and the head choose: an operator follows
from a core's length. There is no convolution, SGLang's pool keeps states [dk, dv], and
keys come turned to their positions, so that a core's state is turned by its offset
before it composes (``step.turned``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from sglang.kernels.ops.attention.linear import seg_la
from sglang.srt.layers.attention.linear.lightning_backend import LightningAttentionBackend

from sglang_pic.attention.rope import lightning_rope
from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.linear.capture import CaptureStep
from sglang_pic.linear.packed import first, indptr
from sglang_pic.linear.rows import PicLinearBackend
from sglang_pic.linear.step import LinkStep


class PicLightningBackend(PicLinearBackend, LightningAttentionBackend):
    """SGLang's Lightning backend with linked and compiling rows."""

    scalar_operators = True
    keys_first = True

    def __init__(self, model_runner: Any):
        super().__init__(model_runner)
        layers = self.req_to_token_pool.mamba_map
        self.rope, self.refusal = lightning_rope(model_runner.model, layers)
        if self.linear_backend != "seg_la":
            self.refusal = f"Lightning attention by {self.linear_backend} is not supported"

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        stock = super().forward_extend
        states = self.req_to_token_pool.mamba2_layer_cache(layer.layer_id).temporal
        index = self.req_to_token_pool.mamba_map[layer.layer_id]
        if self._capture_step is not None:
            self._capture(self._capture_step, index, layer, k, v, states)
        step = self._link_step
        if step is None:
            return stock(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        out = v.new_empty(v.shape)
        if self._others is not None:
            own = self._other_tokens
            found = stock(q[own], k[own], v[own], layer, self._others, save_kv_cache)
            out[own] = found.view(-1, *out.shape[1:]).to(out.dtype)
        q, k, v = (x[step.tokens] for x in (q.view(k.shape), k, v))
        out[step.tokens] = self._link(step, index, layer, q, k, v, states)
        return out.view(len(out), -1)

    def _link(
        self,
        step: LinkStep,
        index: int,
        layer: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        states: torch.Tensor,
    ) -> torch.Tensor:
        """Linked rows: q, k, v [t, heads, d] to outputs; ``states`` [slots, heads, dk, dv],
        of the pool."""
        inner = None
        if step.inner_lengths:
            part, count = step.inner, len(step.inner_lengths)
            ends = states.new_zeros((count, *states.shape[1:]), dtype=torch.float32)
            self._walk(layer, k[part], k[part], v[part], ends, step.inner_lengths)
            inner = Pair(self._decay(layer, step.inner_lengths), ends)
        incoming = step.incoming(index, states[step.slots].float(), inner)
        running = incoming.contiguous()
        out = self._walk(layer, q, k, v, running, step.lengths)
        states[step.slots] = running[step.last].to(states.dtype)
        return out

    def _capture(
        self,
        step: CaptureStep,
        index: int,
        layer: Any,
        k: torch.Tensor,
        v: torch.Tensor,
        states: torch.Tensor,
    ) -> None:
        picked = step.tokens[step.picked]
        k, v, dv = k[picked], v[picked], self.shape.dv
        running = step.running[:, index]
        own = states[step.slots[step.from_slot_row]].float()
        running[step.from_slot, :, :dv] = own.mT
        moved = running[:, :, :dv].mT.contiguous()
        self._walk(layer, k, k, v, moved, step.stretch_lengths)
        running[:, :, :dv] = moved.mT
        running[:, :, dv:] *= self._decay(layer, step.stretch_lengths)[..., None, None]

    def _walk(
        self,
        layer: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        states: torch.Tensor,
        lengths: Sequence[int],
    ) -> torch.Tensor:
        """SGLang's kernel over packed sequences: outputs [tokens, heads, dv]; moves
        ``states`` [sequences, heads, dk, dv] on in place."""
        count, bounds = len(lengths), indptr(lengths, v.device)
        meta = seg_la.SegLaMeta(
            batch_size=count,
            max_q_length=None,
            q_offsets=bounds,
            s_offsets=first(count, v.device),
            q_lengths=bounds.diff(),
            s_scales=_begun(count, v.device),
        )
        out: torch.Tensor = seg_la.seg_la_fwd(
            q=q,
            k=k,
            v=v,
            s=states,
            decay_scales=self.tp_slope[layer.layer_id],
            meta=meta,
            softmax_scale=layer.scaling,
        )
        return out

    def _decay(self, layer: Any, lengths: Sequence[int]) -> torch.Tensor:
        """float32 [sequences, heads], operators."""
        slope = self.tp_slope[layer.layer_id].view(1, -1).double()
        return (-indptr(lengths, slope.device).diff()[:, None] * slope).exp().float()


@functools.lru_cache(maxsize=8)
def _begun(count: int, device: torch.device) -> torch.Tensor:
    """As SGLang marks sequences that go on from a state; the same for all layers."""
    return torch.ones(count, dtype=torch.int32, device=device)
