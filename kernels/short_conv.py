"""Causal depthwise convolution in front of a linear layer, with explicit history.

    y_t = activation(bias + sum_j w_j x_{t - width + 1 + j})

What precedes a sequence's first token is its *history*: zeros where a prompt
begins, the last ``width - 1`` inputs of what came before otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def recurrent(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor,
    *,
    silu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence, token by token: the oracle. Arguments and results as in
    ``convolve``, with ``history`` [channels, width - 1]."""
    y = torch.empty_like(x)
    for t in range(x.shape[0]):
        window = torch.cat([history, x[t][:, None]], -1)
        y[t], history = (window * weight).sum(-1), window[:, 1:]
    if bias is not None:
        y = y + bias
    return F.silu(y) if silu else y, history


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    history: torch.Tensor,
    lengths: Sequence[int],
    *,
    silu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve many sequences at once.

    Args:
        x: [tokens, channels], the sequences one behind the other.
        weight: [channels, width].
        bias: [channels] or ``None``.
        history: [sequences, channels, width - 1], oldest first.
        lengths: tokens of each sequence, any of them may be 0.
        silu: whether SiLU follows.

    Returns:
        y [tokens, channels], and the history behind each sequence's end.
    """
    width = weight.shape[1]
    before = width - 1
    length = torch.tensor(lengths, dtype=torch.int64, device=x.device)
    count = torch.arange(len(lengths), device=x.device)
    # Every sequence with its history in front, one behind the other.
    first = length.cumsum(0) - length + count * before
    place = torch.arange(x.shape[0], device=x.device)
    place = place + (torch.repeat_interleave(count, length) + 1) * before
    span = torch.arange(before, device=x.device)
    padded = x.new_empty((x.shape[0] + len(lengths) * before, x.shape[1]))
    padded[place] = x
    padded[first[:, None] + span] = history.transpose(1, 2).to(x.dtype)
    y = padded[place] * weight[:, before]
    for back in range(1, width):
        y = y + padded[place - back] * weight[:, before - back]
    if bias is not None:
        y = y + bias
    after = padded[(first + length)[:, None] + span].transpose(1, 2)
    return F.silu(y) if silu else y, after
