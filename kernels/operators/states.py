"""States and convolution histories in front of all runs of a link, in torch.

What stands in a linked row in position order is *pieces*: cores, whose pairs
were kept (``Cores``), and runs of computed tokens, whose pairs the layer's own kernel has
just made. ``S <- A S + B`` over them gives the state in front of every run
(HYPIC's composition, arXiv 2607.01299). ``triton/states.py`` has the same two
functions for a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import torch

from sglang_pic.kernels.operators.pair import Pair, act
from sglang_pic.kernels.operators.storage import PackedPair


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


def used_here(*tensors: torch.Tensor) -> None:
    """On a GPU: whoever lets go of a tensor, its memory is nobody else's until what is
    queued on this stream has read it, by its address."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


@dataclasses.dataclass(frozen=True)
class Cores:
    """What the cores of all rows do, in all linear layers, where that is kept.

    For torch pairs are unpacked, once. For a GPU nothing is copied: ``places`` and
    ``tail_places`` are bare addresses, made once on the host, and hold as long as the
    tensors do. This object refers to them; whoever runs kernels keeps it until they ran.

    Attributes:
        pairs: of each core, one or more, all of the same kind.
        tails: float32 [layers, channels, width - 1] of each, the convolution's
            inputs before the core's end.
    """

    pairs: Sequence[PackedPair]
    tails: Sequence[torch.Tensor]

    def used_here(self) -> None:
        """``used_here`` of all its tensors."""
        used_here(*(x for pair in self.pairs for x in (pair.operator, pair.state)), *self.tails)

    @functools.cached_property
    def unpacked(self) -> list[Pair]:
        """Of each core ``A`` [layers, heads(, dk(, dk))], ``B`` [layers, heads, dk, dv]."""
        return [pair.unpack() for pair in self.pairs]

    @property
    def matrices(self) -> bool:
        """Whether operators are matrices."""
        return self.pairs[0].kept is not None

    @functools.cached_property
    def narrow(self) -> bool:
        """Whether any matrix is kept in another type than float32."""
        return any(
            x.dtype != torch.float32 for pair in self.pairs for x in (pair.operator, pair.state)
        )

    @functools.cached_property
    def places(self) -> torch.Tensor:
        """int64 [layers, cores, 2, heads], of operators and states (``PackedPair.places``)."""
        found = torch.stack([pair.places() for pair in self.pairs], 1)
        return found.to(self.pairs[0].state.device)

    @functools.cached_property
    def tail_places(self) -> torch.Tensor:
        """int64 [cores], where tails begin."""
        if not all(t.is_contiguous() and t.dtype == torch.float32 for t in self.tails):
            raise ValueError("tails are float32 and contiguous")
        return torch.tensor([t.data_ptr() for t in self.tails], device=self.tails[0].device)


def states_before(
    cores: Cores, layer: int, inner: Pair | None, walk: Walk, states: torch.Tensor
) -> torch.Tensor:
    """States in front of all runs.

    Args:
        cores: the cores.
        layer: index among the linear layers.
        inner: pairs of the inner runs, ``None`` where there is none: ``A`` [runs,
            heads(, dk(, dk))], ``B`` [runs, heads, dk, dv].
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
            pairs, at = (cores.unpacked[which], layer) if which >= 0 else (inner, -1 - which)
            assert pairs is not None
            state = act(pairs.A[at].to(state), state) + pairs.B[at]
            if run >= 0:
                out[run] = state
    return out


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
        before: int64 [runs, width - 1], where each of their entries lies in [the
            rows' slots | the cores' tails | what is borrowed], slots and tails
            having ``width - 1`` places.
        conv: [slots, channels, width - 1], the layer's pool.
        slots: int64 [rows], the rows' slots.
        cores: the cores.
        layer: index among the linear layers.
        inputs: [tokens, channels], the convolution's.
        borrowed: int64 [b], tokens among ``inputs``.

    Returns:
        [runs, channels, width - 1] in the pool's type.
    """
    tails = [tail[layer] for tail in cores.tails]
    kept = torch.cat([conv[slots], torch.stack(tails).to(conv.dtype)])
    own = inputs[borrowed].to(conv.dtype)
    found = torch.cat([kept.transpose(1, 2).flatten(0, 1), own])[before]
    return found.transpose(1, 2).contiguous()
