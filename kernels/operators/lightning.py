"""Lightning attention and RetNet (arXiv 2401.04658, 2307.08621): a constant decay a head.

    S_t = e^{g} S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

``recurrent`` is that equation, token by token; ``chunk`` does chunks of tokens at
a time, for sequences of any lengths packed one behind the other; ``capture``
gives the pairs of stretches of tokens, whose operators, scalars, follow from the
lengths alone: e^{g n}.

In all functions queries are scaled by the caller.
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
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence, token by token: the oracle.

    Args:
        q, k: [tokens, heads, dk].
        v: [tokens, heads, dv].
        g: [heads], log decay, at most 0.
        state: [heads, dk, dv].

    Returns:
        Outputs [tokens, heads, dv] and the end state.
    """
    out = torch.empty_like(v)
    for t in range(v.shape[0]):
        out[t], state = step(q[t], k[t], v[t], g, state)
    return out, state


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token each of many sequences: q, k, v and g as in ``recurrent``, the
    first dimension counting sequences, and ``state`` [sequences, heads, dk, dv]."""
    state = state * g.exp()[:, None, None] + k[..., :, None] * v[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2), state


def chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    lengths: Sequence[int],
    *,
    size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Many sequences at once.

    Args:
        q, k: [tokens, heads, dk], the sequences one behind the other.
        v: [tokens, heads, dv].
        g: [heads].
        state: [sequences, heads, dk, dv].
        lengths: tokens of each sequence, any of them may be 0.
        size: tokens a chunk, a power of two; by default as the longest
            sequence needs, at most 64.

    Returns:
        Outputs [tokens, heads, dv], end states as ``state``, and the states at
        the start of every chunk, [chunks, heads, dk, dv], sequence by sequence.
    """
    return chunkwise(q, k, v, _every(g, v), None, state, lengths, size=size)


def capture(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    lengths: Sequence[int],
    *,
    before: Pair | None = None,
) -> Pair:
    """Pairs of many stretches of tokens.

    Args:
        k, v, g: as in ``chunk``.
        lengths: tokens of each stretch.
        before: pairs of the tokens that precede each stretch in the same core,
            to go on from; without it the stretches begin their cores.

    Returns:
        ``A`` [stretches, heads] and ``B`` [stretches, heads, dk, dv].
    """
    return capture_diagonal(k, v, _every(g, v), lengths, before)


def _every(g: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The heads' decay [heads] for every token of v, [tokens, heads]."""
    return g.expand(v.shape[0], -1)
