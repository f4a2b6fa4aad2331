"""State space duality (SSD, Mamba-2, arXiv 2405.21060; also Bamba, Granite 4, Nemotron-H).

    S_t = e^{g_t} S_{t-1} + dt_t k_t v_t^T        o_t = S_t^T q_t

In the paper's letters k is B, q is C, v is x and g_t = dt_t A, a decay a head;
B and C are shared by groups of heads. ``recurrent`` is that equation, token by
token; ``chunk`` does chunks of tokens at a time, for sequences of any lengths
packed one behind the other; ``capture`` gives the pairs of stretches of tokens,
with scalar operators. The layer's direct term D x is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_pic.kernels.operators.chunks import capture_diagonal, chunkwise
from sglang_pic.kernels.operators.pair import Pair


def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    dt: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence, token by token: the oracle.

    Args:
        q, k: [tokens, groups, dk], heads a multiple of groups.
        v: [tokens, heads, dv].
        g: [tokens, heads], log decay, at most 0.
        dt: [tokens, heads], step size.
        state: [heads, dk, dv].

    Returns:
        Outputs [tokens, heads, dv] and the end state.
    """
    out = torch.empty_like(v)
    for t in range(v.shape[0]):
        out[t], state = step(q[t], k[t], v[t], g[t], dt[t], state)
    return out, state


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    dt: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token each of many sequences: arguments as in ``recurrent``, the first
    dimension counting sequences and ``state`` [sequences, heads, dk, dv]."""
    heads = v.shape[-2]
    q, k = _each(q, heads), _each(k, heads) * dt[..., None]
    state = state * g.exp()[..., None, None] + k[..., :, None] * v[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2), state


def chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    dt: torch.Tensor,
    state: torch.Tensor,
    lengths: Sequence[int],
    *,
    size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Many sequences at once.

    Args:
        q, k: [tokens, groups, dk], the sequences one behind the other.
        v: [tokens, heads, dv].
        g, dt: [tokens, heads].
        state: [sequences, heads, dk, dv].
        lengths: tokens of each sequence, any of them may be 0.
        size: tokens a chunk, a power of two; by default as the longest
            sequence needs, at most 64.

    Returns:
        Outputs [tokens, heads, dv], end states as ``state``, and the states at
        the start of every chunk, [chunks, heads, dk, dv], sequence by sequence.
    """
    heads = v.shape[1]
    q, k = _each(q, heads), _each(k, heads) * dt[..., None]
    return chunkwise(q, k, v, g, None, state, lengths, size=size)


def capture(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    dt: torch.Tensor,
    lengths: Sequence[int],
    *,
    before: Pair | None = None,
) -> Pair:
    """Pairs of many stretches of tokens.

    Args:
        k, v, g, dt: as in ``chunk``.
        lengths: tokens of each stretch.
        before: pairs of the tokens that precede each stretch in the same core,
            to go on from; without it the stretches begin their cores.

    Returns:
        ``A`` [stretches, heads] and ``B`` [stretches, heads, dk, dv].
    """
    k = _each(k, v.shape[1]) * dt[..., None]
    return capture_diagonal(k, v, g, lengths, before)


def _each(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Groups [..., groups, dk] to heads [..., heads, dk]."""
    return x.repeat_interleave(heads // x.shape[-2], -2)
