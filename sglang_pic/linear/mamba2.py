"""Mamba-2 (Granite 4, Nemotron-H, Falcon-H1) on SGLang's own kernels.

As ``gdn``, with scalar operators: a core's A is the exponential of its log
decays' sum, its B the chunk kernel's end state from zero. Linked rows and
captures call the mixer's parts, since its own forward pass begins each row at
its slot and keeps what the convolution read to itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sglang.kernels.ops.mamba.triton_ops import ssd_combined
from sglang.srt.layers.attention.hybrid_linear_attn_backend import Mamba2AttnBackend
from sglang.srt.layers.attention.mamba.mamba2_metadata import Mamba2Metadata

from sglang_pic.attention.ship import ship
from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.linear.capture import CaptureStep
from sglang_pic.linear.packed import convolve, indptr
from sglang_pic.linear.rows import PicLinearBackend
from sglang_pic.linear.step import LinkStep


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Packed sequences, as SGLang's chunk scan wants them described.

    Attributes:
        cu_seqlens: int32 [sequences + 1].
        seq_idx: int32 [1, tokens], sequence of each token.
        chunk_indices, chunk_offsets: int32, see ``Mamba2Metadata``.
        chunk_size: tokens a chunk.
    """

    cu_seqlens: torch.Tensor
    seq_idx: torch.Tensor
    chunk_indices: torch.Tensor
    chunk_offsets: torch.Tensor
    chunk_size: int

    @classmethod
    def of(cls, lengths: Sequence[int], chunk_size: int, device: torch.device) -> Sequences:
        bounds = indptr(lengths, torch.device("cpu"))
        owner = torch.arange(len(lengths), dtype=torch.int32)
        indices, offsets = Mamba2Metadata._query_start_loc_to_chunk_indices_offsets(
            bounds, chunk_size, int(bounds[-1])
        )
        return cls(
            **ship(
                {
                    "cu_seqlens": bounds,
                    "seq_idx": owner.repeat_interleave(bounds.diff())[None],
                    "chunk_indices": indices,
                    "chunk_offsets": offsets,
                },
                device,
            ),
            chunk_size=chunk_size,
        )


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a mixer's scan reads: ``x`` [tokens, heads, dv], ``dt`` [tokens, heads]
    before its bias, ``B`` and ``C`` [tokens, groups, dk]."""

    x: torch.Tensor
    dt: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor

    def at(self, tokens: torch.Tensor) -> Inputs:
        return Inputs(self.x[tokens], self.dt[tokens], self.B[tokens], self.C[tokens])


class PicMamba2Backend(PicLinearBackend, Mamba2AttnBackend):
    """SGLang's Mamba-2 backend with linked and compiling rows."""

    scalar_operators = True

    # Of the batch's link step and capture step.
    _runs: Sequences
    _inner: Sequences | None
    _stretches: Sequences

    def _arrange(self, batch: Any) -> None:
        super()._arrange(batch)
        step, capture = self._link_step, self._capture_step
        if step is not None:
            self._runs = self._sequences(step.lengths)
            self._inner = self._sequences(step.inner_lengths) if step.inner_lengths else None
        if capture is not None:
            self._stretches = self._sequences(capture.stretch_lengths)

    def _sequences(self, lengths: Sequence[int]) -> Sequences:
        return Sequences.of(lengths, self.mamba_chunk_size, self.device)

    def forward(
        self,
        mixer: Any,
        hidden_states: torch.Tensor,
        output: torch.Tensor | None,
        layer_id: int,
        forward_batch: Any,
        mup_vector: torch.Tensor | None = None,
        use_triton_causal_conv: bool = False,
    ) -> torch.Tensor:
        stock = super().forward
        how = (mup_vector, use_triton_causal_conv)
        if self._capture_step is not None:
            self._capture(self._capture_step, mixer, hidden_states, layer_id, mup_vector)
        step = self._link_step
        if step is None:
            return stock(mixer, hidden_states, output, layer_id, forward_batch, *how)
        out = torch.empty_like(hidden_states) if output is None else output
        if self._others is not None:
            own = self._other_tokens
            out[own] = stock(mixer, hidden_states[own], None, layer_id, self._others, *how)
        out[step.tokens] = self._link(step, mixer, hidden_states[step.tokens], layer_id, mup_vector)
        return out

    def _link(
        self,
        step: LinkStep,
        mixer: Any,
        hidden_states: torch.Tensor,
        layer_id: int,
        mup_vector: torch.Tensor | None,
    ) -> torch.Tensor:
        """Linked rows: ``hidden_states`` [t, hidden] to the mixer's output."""
        index = self.req_to_token_pool.mamba_map[layer_id]
        cache = self.req_to_token_pool.mamba2_layer_cache(layer_id)
        conv, states = cache.conv[0], cache.temporal
        gate, mixed, dt = _project(mixer, hidden_states, mup_vector)
        history = step.history(index, conv, mixed)
        inputs = _convolve(mixer, mixed, dt, history, step.lengths)
        conv[step.slots] = history[step.last]
        inner = None
        if self._inner is not None:
            part = inputs.at(step.inner)
            blank = states.new_zeros((len(step.inner_lengths), *states.shape[1:])).float()
            _, end = _scan(mixer, part, blank, self._inner)
            inner = Pair(_decay(mixer, part.dt, self._inner), end.transpose(-1, -2))
        incoming = step.incoming(index, states[step.slots].float().transpose(-1, -2), inner)
        out, end = _scan(mixer, inputs, incoming.transpose(-1, -2).contiguous(), self._runs)
        states[step.slots] = end[step.last].to(states.dtype)
        return mixer.out_proj(mixer.norm(out.flatten(1), gate))[0]

    def _capture(
        self,
        step: CaptureStep,
        mixer: Any,
        hidden_states: torch.Tensor,
        layer_id: int,
        mup_vector: torch.Tensor | None,
    ) -> None:
        index = self.req_to_token_pool.mamba_map[layer_id]
        cache = self.req_to_token_pool.mamba2_layer_cache(layer_id)
        _, mixed, dt = _project(mixer, hidden_states[step.tokens], mup_vector)
        history = cache.conv[0][step.slots]
        step.keep_tails(index, history, mixed)
        part = _convolve(mixer, mixed, dt, history, step.lengths).at(step.picked)
        running = step.running[:, index]
        own = cache.temporal[step.slots[step.from_slot_row]].float()
        running[step.from_slot, :, : self.shape.dv] = own
        begun = running[:, :, : self.shape.dv].contiguous()
        running[:, :, : self.shape.dv] = _scan(mixer, part, begun, self._stretches)[1]
        running[:, :, self.shape.dv :] *= _decay(mixer, part.dt, self._stretches)[..., None, None]


def _project(
    mixer: Any, hidden_states: torch.Tensor, mup_vector: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate [tokens, heads * dv], convolution inputs [tokens, channels], dt [tokens, heads]."""
    projected, _ = mixer.in_proj(hidden_states)
    if mup_vector is not None:
        projected = projected * mup_vector
    sizes = (mixer.intermediate_size, mixer.conv_dim, mixer.num_heads)
    gate, mixed, dt = projected.split([size // mixer.tp_size for size in sizes], -1)
    return gate, mixed, dt


def _convolve(
    mixer: Any,
    mixed: torch.Tensor,
    dt: torch.Tensor,
    history: torch.Tensor,
    lengths: Sequence[int],
) -> Inputs:
    """Behind the convolution; ``history`` [sequences, channels, width - 1] is read
    and moved on in place."""
    weight, bias = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
    mixed = convolve(mixed, weight, bias, mixer.activation, history, lengths)
    groups = mixer.groups_ssm_state_size // mixer.tp_size
    x, key, query = mixed.split([mixer.intermediate_size // mixer.tp_size, groups, groups], -1)
    return Inputs(
        x.unflatten(-1, (-1, mixer.head_dim)),
        dt,
        key.unflatten(-1, (-1, mixer.ssm_state_size)),
        query.unflatten(-1, (-1, mixer.ssm_state_size)),
    )


def _scan(
    mixer: Any, inputs: Inputs, states: torch.Tensor, sequences: Sequences
) -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang's chunk kernel over packed sequences.

    Args:
        states: float32 [sequences, heads, dv, dk], in front of them.

    Returns:
        Outputs [tokens, heads, dv], and the states behind the sequences.
    """
    out = torch.empty_like(inputs.x)
    _, end, _ = ssd_combined.mamba_chunk_scan_combined(
        inputs.x[None],
        inputs.dt[None],
        mixer.A,
        inputs.B[None],
        inputs.C[None],
        chunk_size=sequences.chunk_size,
        D=mixer.D,
        dt_bias=mixer.dt_bias,
        initial_states=states,
        seq_idx=sequences.seq_idx,
        chunk_indices=sequences.chunk_indices,
        chunk_offsets=sequences.chunk_offsets,
        cu_seqlens=sequences.cu_seqlens,
        dt_softplus=True,
        out=out[None],
        return_varlen_states=True,
        return_track_states=True,
        state_dtype=torch.float32,
    )
    return out, end


def _decay(mixer: Any, dt: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """float32 [sequences, heads], operators: ``exp`` of the sums of log decays."""
    log = F.softplus(dt.float() + mixer.dt_bias.float()) * mixer.A.float()
    total = log.new_zeros((len(sequences.cu_seqlens) - 1, log.shape[1]), dtype=torch.float64)
    total.index_add_(0, sequences.seq_idx[0], log.double())
    return total.exp().float()
