"""States and convolution histories in front of all runs of a link, in torch.

What stands in a linked row in position order is *pieces*: cores, whose pairs
were kept, and runs of computed tokens, whose pairs the layer's own kernel has
just made. ``S <- A S + B`` over them gives the state in front of every run
(HYPIC's composition, arXiv 2607.01299). ``triton/states.py`` has the same two
functions for a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

from sglang_pic.kernels.operators.pair import Pair, act


@dataclasses.dataclass(frozen=True)
class Walk:
    """The pieces of all rows, one row behind the other.

    Attributes:
        bounds: int32 [rows + 1], where rows begin among the pieces.
        source: int32 [pieces], a core, counted 0, 1, ..., or an inner run,
            counted -1, -2, ...
        target: int32 [pieces], the run that stands behind the piece; -1 if
            another piece does.
        opening: int32 [rows], the run in front of which no piece stands; -1 if
            a row begins with a core.
        runs: in all rows.
    """

    bounds: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    opening: torch.Tensor
    runs: int


def states_before(
    cores: Pair, inner: Pair | None, walk: Walk, states: torch.Tensor
) -> torch.Tensor:
    """States in front of all runs.

    Args:
        cores: pairs of the cores, ``A`` [cores, heads(, dk(, dk))], ``B`` [cores,
            heads, dk, dv].
        inner: pairs of the inner runs, ``None`` where there is none.
        walk: the pieces of each row.
        states: [rows, heads, dk, dv], in front of all pieces.

    Returns:
        [runs, heads, dk, dv].
    """
    out = states.new_empty((walk.runs, *states.shape[1:]))
    bounds, opening = walk.bounds.tolist(), walk.opening.tolist()
    source, target = walk.source.tolist(), walk.target.tolist()
    for row, (first, last) in enumerate(itertools.pairwise(bounds)):
        state = states[row]
        if opening[row] >= 0:
            out[opening[row]] = state
        for which, run in zip(source[first:last], target[first:last], strict=True):
            pairs, at = (cores, which) if which >= 0 else (inner, -1 - which)
            assert pairs is not None
            state = act(pairs.A[at], state) + pairs.B[at]
            if run >= 0:
                out[run] = state
    return out


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
        before: int64 [runs, width - 1], where each of their entries lies in [the
            rows' slots | the cores' tails | what is borrowed], slots and tails
            having ``width - 1`` places.
        conv: [slots, channels, width - 1], the layer's pool.
        slots: int64 [rows], the rows' slots.
        tails: [cores, channels, width - 1], the layer's.
        inputs: [tokens, channels], the convolution's.
        borrowed: int64 [b], tokens among ``inputs``.

    Returns:
        [runs, channels, width - 1] in the pool's type.
    """
    kept = torch.cat([conv[slots], tails.to(conv.dtype)])
    own = inputs[borrowed].to(conv.dtype)
    found = torch.cat([kept.transpose(1, 2).flatten(0, 1), own])[before]
    return found.transpose(1, 2).contiguous()
