"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692): a decay for each channel.

    S_t = (I - b_t k_t k_t^T) diag(e^{g_t}) S_{t-1} + b_t k_t v_t^T        o_t = S_t^T q_t

It decays before it erases, and with a decay for each channel the two do not
commute. ``recurrent`` is that equation, token by token; ``chunk`` is its WY form
for sequences of any lengths packed one behind the other; ``capture`` gives the
pairs of stretches of tokens, with matrix operators.

In all functions keys are l2-normalised and queries scaled by the caller.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_pic.kernels.operators.chunks import capture_matrix, chunkwise
from sglang_pic.kernels.operators.pair import Pair


def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence, token by token: the oracle.

    Args:
        q, k: [tokens, heads, dk].
        v: [tokens, heads, dv].
        g: [tokens, heads, dk], log decay, at most 0.
        beta: [tokens, heads], write strength, in [0, 1].
        state: [heads, dk, dv].

    Returns:
        Outputs [tokens, heads, dv] and the end state.
    """
    out = torch.empty_like(v)
    for t in range(v.shape[0]):
        out[t], state = step(q[t], k[t], v[t], g[t], beta[t], state)
    return out, state


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token each of many sequences: arguments as in ``recurrent``, the first
    dimension counting sequences and ``state`` [sequences, heads, dk, dv]."""
    state = state * g.exp()[..., None]
    seen = (k[..., None, :] @ state).squeeze(-2)
    state = state + k[..., :, None] * (beta[..., None] * (v - seen))[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2), state


def chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    lengths: Sequence[int],
    *,
    size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Many sequences at once.

    Args:
        q, k: [tokens, heads, dk], the sequences one behind the other.
        v: [tokens, heads, dv].
        g: [tokens, heads, dk].
        beta: [tokens, heads].
        state: [sequences, heads, dk, dv].
        lengths: tokens of each sequence, any of them may be 0.
        size: tokens a chunk, a power of two; by default as the longest
            sequence needs, at most 64.

    Returns:
        Outputs [tokens, heads, dv], end states as ``state``, and the states at
        the start of every chunk, [chunks, heads, dk, dv], sequence by sequence.
    """
    return chunkwise(q, k, v, g, beta, state, lengths, size=size)


def capture(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    lengths: Sequence[int],
    *,
    before: Pair | None = None,
) -> Pair:
    """Pairs of many stretches of tokens.

    Args:
        k, v, g, beta: as in ``chunk``.
        lengths: tokens of each stretch.
        before: pairs of the tokens that precede each stretch in the same core,
            to go on from; without it the stretches begin their cores.

    Returns:
        ``A`` [stretches, heads, dk, dk] and ``B`` [stretches, heads, dk, dv].
    """
    return capture_matrix(k, v, g, beta, lengths, before)
