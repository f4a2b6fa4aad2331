"""Torch forms of the Triton kernels that SGLang's Mamba-2 layers call.

As in ``linear_kernels``: each function takes the place of the one whose path
``KERNELS`` names. The convolution is the same as there, but the module of the
mixer imports it for known accelerators only; ``bind`` gives it the names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sglang.kernels.ops.mamba import causal_conv1d_triton as short_conv

from sglang_pic.kernels.operators import ssd
from sglang_pic.kernels.operators.chunks import CHUNK


def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    chunk_offsets: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    out: torch.Tensor | None = None,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    return_intermediate_states: bool = False,
    state_dtype: torch.dtype | None = None,
    return_track_states: bool = False,
    track_seq_idx: torch.Tensor | None = None,
    track_end_locs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Packed sequences, x [1, tokens, heads, dv], B and C [1, tokens, groups, dk]; writes ``out``.

    Returns:
        States [1, chunks, heads, dv, dk] at the tokens 0, ``chunk_size``, ... of
        the batch, where that is also a multiple of ``chunk_size`` in its sequence
        and zero elsewhere (SGLang reads no others); end states [sequences, heads,
        dv, dk]; states [1, n, heads, dv, dk] in front of ``track_end_locs``.
    """
    assert z is None and cu_seqlens is not None and out is not None
    assert return_varlen_states and return_track_states and not return_final_states
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    heads, dv, dk = x.shape[2], x.shape[3], B.shape[3]
    step = dt[0].float() if dt_bias is None else dt[0].float() + dt_bias.float()
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
    if initial_states is None:
        initial_states = x.new_zeros((len(lengths), heads, dv, dk), dtype=torch.float32)
    size = min(CHUNK, chunk_size, max(8, 1 << (max(lengths) - 1).bit_length()))
    y, end, starts = ssd.chunk(
        C[0].float(),
        B[0].float(),
        x[0].float(),
        step * A.float(),
        step,
        initial_states.float().transpose(-1, -2),
        lengths,
        size=size,
    )
    if D is not None:
        y = y + D.float().reshape(heads, -1) * x[0].float()
    out.copy_(y[None])
    dtype = state_dtype or C.dtype
    end, starts = (states.transpose(-1, -2).to(dtype) for states in (end, starts))
    table = _Starts(starts, bounds, size)
    tracked = None
    if track_end_locs is not None and track_end_locs.numel():
        assert track_seq_idx is not None
        tracked = table.at(track_seq_idx.cpu(), track_end_locs.cpu())[None]
    return table.grid(chunk_size)[None], end, tracked


class _Starts:
    """States at the chunk starts of every sequence, by place in the batch.

    Args:
        states: [chunks, heads, dv, dk], sequence by sequence.
        bounds: where sequences begin and end, in tokens.
        size: tokens a chunk.
    """

    def __init__(self, states: torch.Tensor, bounds: list[int], size: int):
        self._states = states
        self._size = size
        self._bounds = torch.tensor(bounds)
        chunks = (self._bounds.diff() + size - 1) // size
        self._first = chunks.cumsum(0) - chunks

    def at(self, sequence: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """In front of tokens ``place``, multiples of ``size`` in their ``sequence``."""
        chunk = (place - self._bounds[sequence]) // self._size
        return self._states[(self._first[sequence] + chunk).to(self._states.device)]

    def grid(self, step: int) -> torch.Tensor:
        """In front of the batch's tokens 0, ``step``, ...; zero where sequences
        are not aligned to it."""
        place = torch.arange(0, int(self._bounds[-1]), step)
        sequence = torch.searchsorted(self._bounds, place, right=True) - 1
        aligned = (place - self._bounds[sequence]) % step == 0
        found = self._states.new_zeros((len(place), *self._states.shape[1:]))
        found[aligned.to(found.device)] = self.at(sequence[aligned], place[aligned])
        return found


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
    pad_slot_id: int = -1,
    out: torch.Tensor | None = None,
    disable_state_update: bool = False,
    **_: Any,
) -> None:
    """One token each: x, dt [batch, heads, dv], A [heads, dv, dk], B and C
    [batch, groups, dk]; reads and writes ``state[state_batch_indices]``
    [heads, dv, dk], writes ``out``."""
    assert z is None and x.dim() == 3 and not disable_state_update
    assert state_batch_indices is not None and out is not None
    slots = state_batch_indices.long()
    x, step = x.float(), dt.float()
    step = step if dt_bias is None else step + dt_bias.float()
    step = F.softplus(step) if dt_softplus else step
    group = x.shape[1] // B.shape[1]
    key, query = (t.float().repeat_interleave(group, 1)[:, :, None] for t in (B, C))
    after = state[slots].float() * (step[..., None] * A.float()).exp() + (step * x)[..., None] * key
    state[slots] = after.to(state.dtype)
    y = (after * query).sum(-1)
    out.copy_(y if D is None else y + D.float() * x)


def track_layer_states(
    conv_states: torch.Tensor,
    ssm_states: torch.Tensor,
    cache_indices: torch.Tensor,
    mamba_track_mask: torch.Tensor,
    mamba_track_indices: torch.Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """Copy one layer's decode states [slots, ...] to their track slots."""
    rows = mamba_track_mask[:batch_size].nonzero().squeeze(1)
    source, target = cache_indices[rows].long(), mamba_track_indices[rows].long()
    for pool in (conv_states, ssm_states):
        pool[target] = pool[source]


def bind() -> None:
    """Name the convolution in the mixer's module, which leaves it out on a CPU.

    To be called before hooks are applied, which then reach these names as well.
    """
    from sglang.srt.layers.attention.mamba import mamba

    for name in ("causal_conv1d_fn", "causal_conv1d_update"):
        for alias in (name, f"{name}_triton"):
            if not hasattr(mamba, alias):
                setattr(mamba, alias, getattr(short_conv, name))


_OPS = "sglang.kernels.ops.mamba."
KERNELS: dict[str, Callable[..., Any]] = {
    _OPS + "triton_ops.ssd_combined.mamba_chunk_scan_combined": mamba_chunk_scan_combined,
    _OPS + "triton_ops.mamba_ssm.selective_state_update": selective_state_update,
    _OPS + "mamba_state_scatter_triton.track_mamba_states_if_needed": track_layer_states,
}
