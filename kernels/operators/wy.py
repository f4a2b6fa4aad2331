"""Pairs of the gated delta rule from its chunks' WY factors, in torch.

With G_t the log decay since a chunk's start, a chunk writes ``w_t = u_t - W_t S``
where (``chunks``; arXiv 2406.06484; with decay 2412.06464, section 3.3)

    (I + L) U = diag(b) V,    (I + L) W = diag(b e^G) K,
    L_tj = b_t e^{G_t - G_j} k_t^T k_j for j < t,

so that the state behind it is ``e^{G_n} S + sum_t e^{G_n - G_t} k_t w_t^T``. The
factors do not depend on S: SGLang's chunk kernels make them anyway, and from the
same factors the operator follows as well, from S = I with U = 0.
``triton/wy.py`` has ``advance`` for a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from sglang_pic.kernels.operators.chunks import CHUNK


def factors(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    lengths: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors of packed stretches of tokens.

    Args:
        k: [tokens, key heads, dk], l2-normalised.
        v: [tokens, heads, dv], heads a multiple of key heads.
        g: [tokens, heads], log decay of each token.
        beta: [tokens, heads].
        lengths: tokens of each stretch.

    Returns:
        W [tokens, heads, dk], U [tokens, heads, dv] and G [tokens, heads].
    """
    k = k.repeat_interleave(v.shape[1] // k.shape[1], 1)
    total, right = torch.empty_like(g), torch.cat([v, k], -1) * beta[..., None]
    solved = torch.empty_like(right)
    for here in _chunks(lengths):
        G = g[here].double().cumsum(0)
        decay = (G[:, None] - G[None]).to(g.dtype).exp()
        inner = torch.einsum("thd,jhd,tjh,th->htj", k[here], k[here], decay, beta[here])
        total[here] = G.to(g.dtype)
        right[here][..., v.shape[-1] :] *= total[here].exp()[..., None]
        solved[here] = torch.linalg.solve_triangular(
            inner, right[here].transpose(0, 1), upper=False, unitriangular=True
        ).transpose(0, 1)
    return solved[..., v.shape[-1] :], solved[..., : v.shape[-1]], total


def advance(
    running: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor,
    g: torch.Tensor,
    bounds: torch.Tensor,
) -> None:
    """Move running states on over packed stretches of tokens, in place.

    Args:
        running: float32 [stretches, heads, dv + n, dk], n at most dk: states over
            operators, both transposed, [0 | I] where a stretch begins a core.
        k: [tokens, key heads, dk].
        w, u, g: W, U and G of ``factors``.
        bounds: int [stretches + 1], where stretches begin, and the last one ends.
    """
    dv = u.shape[-1]
    k = k.repeat_interleave(u.shape[1] // k.shape[1], 1)
    spans = itertools.pairwise(bounds.tolist())
    for state, (first, last) in zip(running, spans, strict=True):
        for here in _chunks([last - first], first):
            K, W, U, G = (x[here].float().transpose(0, 1) for x in (k, w, u, g))
            written = -W @ state.mT
            written[..., :dv] += U
            until_end = (G[:, -1:] - G).exp()[..., None]
            state *= G[:, -1, None, None].exp()
            state += written.mT @ (K * until_end)


def _chunks(lengths: Sequence[int], start: int = 0) -> list[slice]:
    """Tokens of every chunk, stretch by stretch."""
    bounds = [start, *(start + end for end in itertools.accumulate(lengths))]
    return [
        slice(first, min(first + CHUNK, last))
        for begin, last in itertools.pairwise(bounds)
        for first in range(begin, last, CHUNK)
    ]
