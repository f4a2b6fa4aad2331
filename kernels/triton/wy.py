"""Pairs of the gated delta rule from its chunks' WY factors on a GPU:
``operators.wy.advance`` in one launch.

SGLang's chunk kernels make the factors W and U of a core's chunks and walk a
state through them. Running them a second time for the operator, with values
[v | 0] on the state [0 | I], solves the triangular systems of all chunks again,
writes every chunk's state and outputs nobody reads, and rounds the operator to
the keys' type at every chunk. From the factors it is, a chunk,

    X <- -W A        A <- e^{G_n} A + sum_t e^{G_n - G_t} k_t x_t^T

(arXiv 2406.06484, 2412.06464; ``operators/wy.py``), with some columns of A in a
program's registers, in float32. B is the same with U added to X. A product takes
the factor as it is and the float32 side in two parts of the factor's type (2^-17
for bfloat16, 2^-22 for float16), or for float32 factors as ``tf32x3``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_pic.kernels.operators.chunks import CHUNK

COLUMNS = 32


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
        running: float32 contiguous [stretches, heads, dv + n, dk], n at most dk:
            states over operators, both transposed; dk a power of two from 16 to
            128, dv and n multiples of 32, or powers of two from 16.
        k: float [tokens, key heads, dk], l2-normalised.
        w, u: as ``k``, [tokens, heads, dk] and [tokens, heads, dv], as
            SGLang's ``recompute_w_u_fwd`` makes them.
        g: float32 [tokens, heads], log decay since the chunk's start, as its
            ``chunk_local_cumsum`` makes it.
        bounds: int [stretches + 1], where stretches begin, and the last one ends.
    """
    count, heads, rows, dk = running.shape
    dv = u.shape[-1]
    columns = min(COLUMNS, dv, rows - dv) if rows > dv else min(COLUMNS, dv)
    _advance_kernel[(rows // columns, heads, count)](
        running,
        k.contiguous(),
        w.contiguous(),
        u.contiguous(),
        g.contiguous(),
        bounds,
        rows,
        HEADS=heads,
        KEY_HEADS=k.shape[1],
        DK=dk,
        DV=dv,
        CHUNK=CHUNK,
        COLUMNS=columns,
        num_warps=4,
        num_stages=2,
    )


@triton.jit
def _advance_kernel(
    running,
    k,
    w,
    u,
    g,
    bounds,
    rows,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    head, stretch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * COLUMNS
    first, last = tl.load(bounds + stretch), tl.load(bounds + stretch + 1)
    i, c, t = tl.arange(0, DK), tl.arange(0, COLUMNS), tl.arange(0, CHUNK)
    running += (stretch * HEADS + head) * rows * DK + (column + c)[None, :] * DK + i[:, None]
    state = tl.load(running)
    k += (head // (HEADS // KEY_HEADS)) * DK
    for start in range(first, last, CHUNK):
        # 64 bits: their products with heads and dimensions are more than 32 hold.
        token = (start + t).to(tl.int64)
        live = token < last
        places = (token * HEADS + head)[:, None]
        W = tl.load(w + places * DK + i[None, :], mask=live[:, None], other=0.0)
        U = u + places * DV + (column + c)[None, :]
        U = tl.load(U, mask=live[:, None] & (column < DV), other=0.0)
        K = k + token[None, :] * (KEY_HEADS * DK) + i[:, None]
        K = tl.load(K, mask=live[None, :], other=0.0)
        G = tl.load(g + token * HEADS + head, mask=live, other=0.0)
        G_end = tl.load(g + (tl.minimum(start + CHUNK, last) - 1) * HEADS + head)
        written = U.to(tl.float32) + _product(-W, state, tl.zeros([CHUNK, COLUMNS], tl.float32))
        written *= tl.where(live, tl.exp(G_end - G), 0.0)[:, None]
        state = _product(K, written, state * tl.exp(G_end))
    tl.store(running, state)


@triton.jit
def _product(x, y, acc):
    """``acc + x y`` for a float32 y, taken in two parts of x's type if that is narrower."""
    if x.dtype == tl.float32:
        return tl.dot(x, y, acc=acc, input_precision="tf32x3")
    high = y.to(x.dtype)
    low = (y - high.to(tl.float32)).to(x.dtype)
    return tl.dot(x, high, acc=tl.dot(x, low, acc=acc))
