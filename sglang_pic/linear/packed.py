"""Sequences packed one behind the other, and the convolution over them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from sglang.kernels.ops.mamba import causal_conv1d_triton as short_conv

from sglang_pic.attention.ship import to_device


def indptr(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """int32 [sequences + 1]: where sequences begin, and where the last one ends.

    The same tensor for the same lengths: all layers of a pass ask for it, and
    SGLang's kernels keep tables for the ones they were given last.
    """
    return _indptr(tuple(lengths), device)


@functools.lru_cache(maxsize=8)
def _indptr(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    bounds[1:] = torch.tensor(lengths).cumsum(0)
    return to_device(bounds, device)


@functools.lru_cache(maxsize=8)
def first(count: int, device: torch.device) -> torch.Tensor:
    """int32 [count]: 0, 1, ..., the same tensor for all layers; not to be written."""
    return torch.arange(count, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=8)
def _all(count: int, device: torch.device) -> torch.Tensor:
    return torch.ones(count, dtype=torch.bool, device=device)


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    history: torch.Tensor,
    lengths: Sequence[int],
) -> torch.Tensor:
    """SGLang's causal convolution over packed sequences.

    Args:
        x: [tokens, channels].
        weight: [channels, width].
        bias: [channels] or ``None``.
        activation: behind it.
        history: [sequences, channels, width - 1], read and moved on in place.
        lengths: tokens of each sequence.

    Returns:
        [tokens, channels].
    """
    count = len(lengths)
    return short_conv.causal_conv1d_fn(
        x.transpose(0, 1),
        weight,
        bias,
        activation=activation,
        conv_states=history,
        has_initial_state=_all(count, x.device),
        cache_indices=first(count, x.device),
        query_start_loc=indptr(lengths, x.device),
        seq_lens_cpu=list(lengths),
    ).transpose(0, 1)
