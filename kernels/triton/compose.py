"""The pair of two stretches in a row on a GPU: ``operators.pair.compose`` in one launch.

``(A2 A1, A2 B1 + B2)``: one operator on the columns of both B1 and A1, which lie
in one tensor as in a running state. Products are ``tf32x3``, see ``states.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_pic.kernels.operators import pair
from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.kernels.triton.states import in_columns

BLOCK = 64


def compose(first: Pair, then: Pair) -> Pair:
    """``first``, then ``then``; both of the same leading dimensions.

    Args:
        first, then: float32, ``A`` [..., heads, dk, dk] and ``B`` [..., heads, dk,
            dv], dk and dv powers of two from 16 to 256; scalar and vector
            operators have no products to make and are composed in torch.

    Returns:
        Their pair, views of [..., heads, dv + dk, dk], B over A, both transposed.
    """
    if then.A.dim() < then.B.dim():
        return pair.compose(first, then)
    *leading, dk, dv = then.B.shape
    tensors = [in_columns(t).reshape(-1, *t.shape[-2:]) for t in (first.A, first.B, then.A, then.B)]
    out = then.B.new_empty(*leading, dv + dk, dk)
    rows, columns = min(BLOCK, dk), min(BLOCK, dk, dv)
    _compose_kernel[((dv + dk) // columns, dk // rows, tensors[0].shape[0])](
        *(in_columns(t) for t in tensors),
        out,
        DK=dk,
        DV=dv,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=4,
        num_stages=3,
    )
    running = out.mT
    return Pair(running[..., dv:], running[..., :dv])


@triton.jit
def _compose_kernel(
    first_A,
    first_B,
    then_A,
    then_B,
    out,
    DK: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    n = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * COLUMNS
    of_B = column < DV
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)

    add = then_B + n * (DV * DK) + (column + c)[None, :] * DK + row[:, None]
    acc = tl.load(add, mask=(c < COLUMNS)[None, :] & of_B, other=0.0)
    A1 = first_A + n * (DK * DK) + (column - DV) * DK
    B1 = first_B + n * (DV * DK) + column * DK
    right = tl.where(of_B, B1, A1) + c[None, :] * DK + k[:, None]
    left = then_A + n * (DK * DK) + k[None, :] * DK + row[:, None]
    for start in range(0, DK, ROWS):
        A2 = tl.load(left + start * DK)
        acc = tl.dot(A2, tl.load(right + start), acc=acc, input_precision="tf32x3")
    out += n * ((DV + DK) * DK) + (column + c)[None, :] * DK + row[:, None]
    tl.store(out, acc)
