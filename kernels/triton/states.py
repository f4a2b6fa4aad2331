"""States and convolution histories in front of all runs of a link, on a GPU: the
functions of ``operators/states.py`` in one launch each.

States: a program owns some columns of one head's state, keeps them in registers
and takes the pieces of its row one after the other, ``S <- A S + B`` (HYPIC's
composition, arXiv 2607.01299). No operator is multiplied with another, and each
comes from memory once: the programs of a head's other columns find it in the cache.
Those of cores are read where the store keeps them, by their addresses (``Cores``).

Products are ``tf32x3``: each float32 in two tf32 parts and three products on
tensor cores, to about 2^-21. One tf32 product would keep 10 bits, and exact
float32 ("ieee") runs outside the tensor cores, at a seventh of their rate.

By arithmetic, at Qwen3-Next's shapes (32 heads of 128, float32)
a core is 2 MiB of A, as much of B, a state behind it to write, and 134 MFLOP. For
20 of them that is 126 MB, 29 us at the 4.3 TB/s of an H200, and 8 TF32 GFLOP, 16 us
at 495 TFLOP/s, in 128 programs for its 132 SMs. The pairs of the 19 runs between
them are 80 MB and 7.6 GFLOP more. An H100 takes 222 us for all of it: ``docs/gpu.md``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.kernels.operators.states import Cores, Walk

# Columns of the state a program owns, and rows of it in one tensor: with taller
# ones a product needs more registers than there are.
COLUMNS = 32
ROWS = tl.constexpr(64)
CHANNELS = 128


def states_before(
    cores: Cores, layer: int, inner: Pair | None, walk: Walk, states: torch.Tensor
) -> torch.Tensor:
    """States in front of all runs.

    Args:
        cores: the cores, where they are kept; dk and dv powers of two from 16 to 256.
        layer: index among the linear layers.
        inner: pairs of the inner runs, float32, ``A`` [runs, heads(, dk, dk)], ``B``
            [runs, heads, dk, dv], matrices beginning at multiples of 16 bytes, or ``None``.
        walk: the pieces of each row.
        states: float32 [rows, heads, dk, dv], in front of all pieces.

    Returns:
        float32 [runs, heads, dk, dv]. Of all matrices the columns are contiguous,
        as in SGLang's pools; ``inner`` and ``states`` of another layout are copied.
    """
    rows, heads, dk, dv = states.shape
    tensors = [*((inner.A, inner.B) if inner else (states, states)), states]
    tensors = [in_columns(t) if t.dim() == 4 else t for t in tensors]
    out = states.new_empty(walk.runs, heads, dv, dk)
    # Shared memory holds the next two operators; one, if room in both types is needed; above
    # 128 none, nor do registers hold as many columns of a state.
    columns, stages = (COLUMNS, 2 if cores.narrow else 5) if dk <= 128 else (COLUMNS // 2, 1)
    columns = min(columns, dv)
    _walk_kernel[(dv // columns, heads, rows)](
        *tensors,
        cores.places[layer],
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
        MATRIX=cores.matrices,
        NARROW=cores.narrow,
        num_warps=4,
        num_stages=stages,
    )
    return out.mT


def in_columns(x: torch.Tensor) -> torch.Tensor:
    """Matrices [..., rows, columns], each column contiguous and behind the last."""
    return x if x.stride()[-2:] == (1, x.shape[-2]) else x.mT.contiguous().mT


# Not specialised: with or without inner runs it is one kernel, not compiled while requests wait.
@triton.jit(do_not_specialize=["inner_A_n", "inner_A_head", "inner_B_n", "inner_B_head"])
def _walk_kernel(
    inner_A,
    inner_B,
    states,
    places,
    out,
    bounds,
    source,
    target,
    opening,
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
    NARROW: tl.constexpr,
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
        kept = places + which * (2 * HEADS) + head
        kept_A = tl.load(kept, mask=core, other=0)
        kept_B = tl.load(kept + HEADS, mask=core, other=0)
        which = -1 - which
        A = tl.where(core, kept_A, (inner_A + which * inner_A_n + head * inner_A_head).to(tl.int64))
        B = tl.where(core, kept_B, (inner_B + which * inner_B_n + head * inner_B_head).to(tl.int64))
        before, state = state, ()
        for part in tl.static_range(PARTS):
            after = _load(B, at + part * TILE, NARROW)
            if MATRIX:
                for k in tl.static_range(PARTS):
                    operator = _load(A, square + (k * DK + part) * TILE, NARROW)
                    after = tl.dot(operator, before[k], acc=after, input_precision="tf32x3")
            else:
                operator = tl.load(A.to(tl.pointer_type(tl.float32)), mask=A != 0, other=0.0)
                after += operator * before[part]
            state += (after,)  # type: ignore[assignment]
            place = out + run.to(tl.int64) * (HEADS * DV * DK) + part * TILE
            tl.store(place, after, mask=run >= 0)


@triton.jit
def _load(place, at, NARROW: tl.constexpr):
    """Values ``at`` of the matrix in ``place`` (``PackedPair.places``), in float32; 0 of one
    that is not kept. With ``NARROW`` it may be float16, else only float32."""
    if NARROW:
        half = (place & 1) != 0
        place &= -2
        wide = tl.multiple_of(place.to(tl.pointer_type(tl.float32)), 16)
        wide = tl.load(wide + at, mask=(place != 0) & ~half, other=0.0)
        short = tl.multiple_of(place.to(tl.pointer_type(tl.float16)), 16)
        short = tl.load(short + at, mask=half, other=0.0)
        return tl.where(half, short.to(tl.float32), wide)
    # Without the hint a thread would copy four bytes at a time, and not sixteen.
    first = tl.multiple_of(place.to(tl.pointer_type(tl.float32)), 16)
    return tl.load(first + at, mask=place != 0, other=0.0)


def histories_before(
    before: torch.Tensor,
    conv: torch.Tensor,
    slots: torch.Tensor,
    cores: Cores,
    layer: int,
    inputs: torch.Tensor,
    borrowed: torch.Tensor,
) -> torch.Tensor:
    """Histories of the convolution in front of all runs.

    Args:
        before: int64 [runs, width - 1], places in [rows' slots | cores' tails | borrowed].
        conv: [slots, channels, width - 1], the layer's pool.
        slots: int64 [rows], the rows' slots.
        cores: the cores.
        layer: index among the linear layers.
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
        cores.tail_places,
        inputs,
        borrowed,
        slots.numel(),
        len(cores.tails),
        layer * channels * width,
        channels,
        *conv.stride(),
        *inputs.stride(),
        WIDTH=width,
        PADDED=triton.next_power_of_2(width),
        BLOCK_C=CHANNELS,
    )
    return out


@triton.jit(do_not_specialize=["rows", "cores", "layer"])
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
    layer,
    channels,
    conv_n,
    conv_channel,
    conv_w,
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
    tail = tl.load(tails + which - rows, mask=in_tail, other=0)
    tail = tail.to(tl.pointer_type(tl.float32)) + layer + column
    kept = tail[None, :] + c[:, None] * WIDTH
    kept = tl.load(kept, mask=inside & in_tail[None, :], other=0).to(own.dtype)
    live = inputs + token[None, :] * inputs_n + c[:, None] * inputs_channel
    live = tl.load(live, mask=inside & in_input[None, :], other=0).to(own.dtype)
    found = tl.where(in_slot[None, :], own, tl.where(in_tail[None, :], kept, live))
    out += run.to(tl.int64) * channels * WIDTH + c[:, None] * WIDTH + w[None, :]
    tl.store(out, found, mask=inside)
