"""States and convolution histories in front of all runs of a link, on a GPU: the
functions of ``operators/states.py`` in one launch each.

States: a program owns some columns of one head's state, keeps them in registers
and takes the pieces of its row one after the other, ``S <- A S + B`` (HYPIC's
composition, arXiv 2607.01299). No operator is multiplied with another, and each
comes from memory once: the programs of a head's other columns find it in the cache.

Products are ``tf32x3``: each float32 in two tf32 parts and three products on
tensor cores, to about 2^-21. One tf32 product would keep 10 bits, and exact
float32 ("ieee") runs outside the tensor cores, at a seventh of their rate.

By arithmetic, not yet measured: at Qwen3-Next's shapes (32 heads of 128, float32)
a core is 2 MiB of A, as much of B, a state behind it to write, and 134 MFLOP. For
20 of them that is 126 MB, 29 us at the 4.3 TB/s of an H200, and 8 TF32 GFLOP, 16 us
at 495 TFLOP/s, in 128 programs for its 132 SMs. The pairs of the 19 runs between
them are 80 MB and 7.6 GFLOP more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.kernels.operators.states import Walk

# Columns of the state a program owns, and rows of it in one tensor: with taller
# ones a product needs more registers than there are.
COLUMNS = 32
ROWS = tl.constexpr(64)
CHANNELS = 128


def states_before(
    cores: Pair, inner: Pair | None, walk: Walk, states: torch.Tensor
) -> torch.Tensor:
    """States in front of all runs.

    Args:
        cores: pairs of the cores, float32, ``A`` [cores, heads(, dk, dk)], ``B``
            [cores, heads, dk, dv]; dk and dv powers of two from 16 to 256.
        inner: pairs of the inner runs, of the same kind, or ``None``.
        walk: the pieces of each row.
        states: float32 [rows, heads, dk, dv], in front of all pieces.

    Returns:
        float32 [runs, heads, dk, dv]. Of all matrices the columns are contiguous,
        as in SGLang's pools; arguments of another layout are copied.
    """
    rows, heads, dk, dv = states.shape
    tensors = [cores.A, cores.B, *((inner.A, inner.B) if inner else (cores.A, cores.B)), states]
    tensors = [in_columns(t) if t.dim() == 4 else t for t in tensors]
    out = states.new_empty(walk.runs, heads, dv, dk)
    # Above 128 two operators no longer fit in shared memory, nor one state in registers.
    columns, stages = (COLUMNS, 5) if dk <= 128 else (COLUMNS // 2, 1)
    columns = min(columns, dv)
    _walk_kernel[(dv // columns, heads, rows)](
        *tensors,
        out,
        walk.bounds,
        walk.source,
        walk.target,
        walk.opening,
        *(stride for t in tensors for stride in t.stride()[:2]),
        HEADS=heads,
        DK=dk,
        DV=dv,
        BLOCK_V=columns,
        MATRIX=cores.A.dim() == cores.B.dim(),
        num_warps=4,
        num_stages=stages,
    )
    return out.mT


def in_columns(x: torch.Tensor) -> torch.Tensor:
    """Matrices [..., rows, columns], each column contiguous and behind the last."""
    return x if x.stride()[-2:] == (1, x.shape[-2]) else x.mT.contiguous().mT


@triton.jit
def _walk_kernel(
    core_A,
    core_B,
    inner_A,
    inner_B,
    states,
    out,
    bounds,
    source,
    target,
    opening,
    core_A_n,
    core_A_head,
    core_B_n,
    core_B_head,
    inner_A_n,
    inner_A_head,
    inner_B_n,
    inner_B_head,
    states_n,
    states_head,
    HEADS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MATRIX: tl.constexpr,
):
    head, row = tl.program_id(1), tl.program_id(2)
    TILE: tl.constexpr = min(DK, ROWS)
    PARTS: tl.constexpr = DK // TILE
    i = tl.arange(0, TILE)
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    at = v[None, :] * DK + i[:, None]
    square = i[None, :] * DK + i[:, None]
    out += head * (DV * DK) + at
    states += row.to(tl.int64) * states_n + head * states_head + at

    state = ()
    for part in tl.static_range(PARTS):
        state += (tl.load(states + part * TILE),)  # type: ignore[assignment]
    run = tl.load(opening + row)
    for part in tl.static_range(PARTS):
        place = out + run.to(tl.int64) * (HEADS * DV * DK) + part * TILE
        tl.store(place, state[part], mask=run >= 0)
    for piece in range(tl.load(bounds + row), tl.load(bounds + row + 1)):
        which = tl.load(source + piece).to(tl.int64)
        run = tl.load(target + piece)
        core = which >= 0
        which = tl.where(core, which, -1 - which)
        A_core = core_A + which * core_A_n + head * core_A_head
        A_inner = inner_A + which * inner_A_n + head * inner_A_head
        A = tl.where(core, A_core, A_inner)
        B_core = core_B + which * core_B_n + head * core_B_head
        B_inner = inner_B + which * inner_B_n + head * inner_B_head
        B = tl.where(core, B_core, B_inner) + at
        before, state = state, ()
        for part in tl.static_range(PARTS):
            after = tl.load(B + part * TILE)
            if MATRIX:
                for k in tl.static_range(PARTS):
                    operator = tl.load(A + square + (k * DK + part) * TILE)
                    after = tl.dot(operator, before[k], acc=after, input_precision="tf32x3")
            else:
                after += tl.load(A) * before[part]
            state += (after,)  # type: ignore[assignment]
            place = out + run.to(tl.int64) * (HEADS * DV * DK) + part * TILE
            tl.store(place, after, mask=run >= 0)


def histories_before(
    before: torch.Tensor,
    conv: torch.Tensor,
    slots: torch.Tensor,
    tails: torch.Tensor,
    inputs: torch.Tensor,
    borrowed: torch.Tensor,
) -> torch.Tensor:
    """Histories of the convolution in front of all runs.

    Args:
        before: int64 [runs, width - 1], places in [rows' slots | cores' tails | borrowed].
        conv: [slots, channels, width - 1], the layer's pool.
        slots: int64 [rows], the rows' slots.
        tails: [cores, channels, width - 1], the layer's.
        inputs: [tokens, channels], the convolution's.
        borrowed: int64 [b], tokens among ``inputs``.

    Returns:
        [runs, channels, width - 1] in the pool's type.
    """
    runs, width = before.shape
    channels = conv.shape[1]
    out = conv.new_empty(runs, channels, width)
    _history_kernel[(triton.cdiv(channels, CHANNELS), runs)](
        out,
        before,
        conv,
        slots,
        tails,
        inputs,
        borrowed,
        slots.numel(),
        tails.shape[0],
        channels,
        *conv.stride(),
        *tails.stride(),
        *inputs.stride(),
        WIDTH=width,
        PADDED=triton.next_power_of_2(width),
        BLOCK_C=CHANNELS,
    )
    return out


@triton.jit
def _history_kernel(
    out,
    before,
    conv,
    slots,
    tails,
    inputs,
    borrowed,
    rows,
    cores,
    channels,
    conv_n,
    conv_channel,
    conv_w,
    tails_n,
    tails_channel,
    tails_w,
    inputs_n,
    inputs_channel,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    run = tl.program_id(1)
    w = tl.arange(0, PADDED)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    place = tl.load(before + run * WIDTH + w, mask=w < WIDTH, other=0)
    which, column = place // WIDTH, place % WIDTH
    in_slot = which < rows
    in_tail = (which >= rows) & (which < rows + cores)
    in_input = which >= rows + cores
    slot = tl.load(slots + which, mask=in_slot, other=0)
    token = tl.load(borrowed + place - (rows + cores) * WIDTH, mask=in_input, other=0)

    inside = ((w < WIDTH)[None, :]) & (c < channels)[:, None]
    own = conv + slot * conv_n + column * conv_w
    own = tl.load(own[None, :] + c[:, None] * conv_channel, mask=inside & in_slot[None, :], other=0)
    kept = tails + (which - rows) * tails_n + column * tails_w
    kept = kept[None, :] + c[:, None] * tails_channel
    kept = tl.load(kept, mask=inside & in_tail[None, :], other=0).to(own.dtype)
    live = inputs + token[None, :] * inputs_n + c[:, None] * inputs_channel
    live = tl.load(live, mask=inside & in_input[None, :], other=0).to(own.dtype)
    found = tl.where(in_slot[None, :], own, tl.where(in_tail[None, :], kept, live))
    out += run.to(tl.int64) * channels * WIDTH + c[:, None] * WIDTH + w[None, :]
    tl.store(out, found, mask=inside)
