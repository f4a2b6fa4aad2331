"""The state of a model's linear layers: of a core, of a segment, of what a row goes on from.

Shapes as in ``linear.shape``.
"""

from __future__ import annotations

import dataclasses

import torch

from sglang_pic.kernels.operators.storage import PackedPair
from sglang_pic.linear.shape import WIDEST, LinearShape


@dataclasses.dataclass(frozen=True)
class CoreState:
    """What one core does to the linear layers: ``S <- A S + B``.

    Attributes:
        pair: operator and end state of the core alone; ``None`` for an opening
            core.
        end: float [layers, heads, dk, dv], state at the core's end with all that
            precedes it, for a core that opens the prompt: ``S <- end``.
        conv_tail: float [layers, channels, width - 1], the convolution's inputs
            before the core's end.
    """

    pair: PackedPair | None
    end: torch.Tensor | None
    conv_tail: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Resumed:
    """The state that an ordinary row goes on from, behind so many tokens."""

    state: CoreState
    depth: int


@dataclasses.dataclass
class SegmentState:
    """What the linear layers keep of one compiled segment.

    Attributes:
        owner: whose it is (``forest.keys.owner_of``).
        core_end: where its cores end, in tokens of the segment.
        conv_tail: as in ``CoreState``; the same for every core.
        end: as in ``CoreState``, for links that the segment opens.
        pairs: by the core's first token: a pair holds for one seam width.
        by_shape: of the layers, if it counts by their shape alone, as if nothing were
            narrowed or dropped: on several tensor-parallel ranks each packs the values of
            its own heads, and all must evict alike.
    """

    owner: tuple[str, ...]
    core_end: int
    conv_tail: torch.Tensor
    end: torch.Tensor
    pairs: dict[int, PackedPair]
    by_shape: LinearShape | None = None

    @property
    def nbytes(self) -> int:
        plain = (self.conv_tail, self.end)
        return sum(t.numel() * t.element_size() for t in plain) + sum(
            pair.nbytes for pair in self.pairs.values()
        )

    @property
    def counted(self) -> int:
        """Bytes that it counts for."""
        if self.by_shape is None:
            return self.nbytes
        return self.by_shape.state_nbytes(len(self.pairs), WIDEST)

    def core(self, first: int, last: int, *, opening: bool) -> CoreState | None:
        """State of the core [first, last), or ``None`` if it is not held."""
        if last != self.core_end:
            return None
        if opening:
            return CoreState(None, self.end, self.conv_tail)
        pair = self.pairs.get(first)
        return CoreState(pair, None, self.conv_tail) if pair is not None else None
