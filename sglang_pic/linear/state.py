"""What the linear layers keep of a compiled segment, and where.

All layers in one tensor, the family's own order of dimensions: operators
[layers, heads, dk, dk] or, where they are scalars, [layers, heads]; states
[layers, heads, dk, dv], histories of the convolution [layers, channels,
width - 1]. SGLang's pools hold states transposed, [heads, dv, dk].
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from cachetools import LRUCache

from sglang_pic.config import PicConfig
from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.kernels.operators.storage import PackedPair, pack, pack_state

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LinearShape:
    """Sizes of a model's linear layers, and the kind of their operators.

    While a kernel runs over a stretch of tokens, its pair is one *running state*
    in SGLang's layout: [..., heads, dv + n, dk], B over A, both transposed. A
    matrix takes n = dk rows, a scalar one row that repeats it.
    """

    layers: int
    heads: int
    dk: int
    dv: int
    channels: int
    history: int
    scalar: bool

    @classmethod
    def of_pool(cls, mamba_pool: Any, *, scalar: bool) -> LinearShape:
        """Read off SGLang's state pool."""
        conv = mamba_pool.mamba_cache.conv[0]
        layers, _, heads, dv, dk = mamba_pool.mamba_cache.temporal.shape
        return cls(layers, heads, dk, dv, conv.shape[2], conv.shape[3], scalar)

    @property
    def operator(self) -> tuple[int, ...]:
        """Shape of an operator of all layers."""
        return (self.layers, self.heads, *(() if self.scalar else (self.dk, self.dk)))

    def begun(self, count: int, device: torch.device) -> torch.Tensor:
        """float32 [count, heads, dv + n, dk], running states of no tokens."""
        operator = torch.ones(1, self.dk) if self.scalar else torch.eye(self.dk)
        rows = self.dv + len(operator)
        begun = torch.zeros(count, self.heads, rows, self.dk, device=device)
        begun[:, :, self.dv :] = operator.to(device)
        return begun

    def pair(self, running: torch.Tensor) -> Pair:
        """``A`` and ``B`` [..., heads, dk, dv] of a running state."""
        state = running.transpose(-1, -2)
        operator = state[..., 0, self.dv] if self.scalar else state[..., self.dv :]
        return Pair(operator, state[..., : self.dv])


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


@dataclasses.dataclass
class SegmentState:
    """What the linear layers keep of one compiled segment.

    Attributes:
        core_end: where its cores end, in tokens of the segment.
        conv_tail: as in ``CoreState``; the same for every core.
        end: as in ``CoreState``, for links that the segment opens.
        pairs: by the core's first token: a pair holds for one seam width.
    """

    core_end: int
    conv_tail: torch.Tensor
    end: torch.Tensor
    pairs: dict[int, PackedPair]

    @property
    def nbytes(self) -> int:
        plain = (self.conv_tail, self.end)
        return sum(t.numel() * t.element_size() for t in plain) + sum(
            pair.nbytes for pair in self.pairs.values()
        )

    def core(self, first: int, last: int, *, opening: bool) -> CoreState | None:
        """State of the core [first, last), or ``None`` if it is not held."""
        if last != self.core_end:
            return None
        if opening:
            return CoreState(None, self.end, self.conv_tail)
        pair = self.pairs.get(first)
        return CoreState(pair, None, self.conv_tail) if pair is not None else None


class StateStore:
    """States of compiled segments by segment id, within a budget of bytes.

    The least recently used go first. A link holds the states of its segments
    itself, so that nothing in use disappears; the budget counts what the store
    holds.
    """

    def __init__(self, config: PicConfig):
        self._dtype = getattr(torch, config.state_dtype)
        self._threshold = config.operator_threshold
        self._states: LRUCache[str, SegmentState] = LRUCache(
            config.state_mib << 20, getsizeof=lambda state: state.nbytes
        )

    def find(self, segment: str) -> SegmentState | None:
        """States of a segment; marks them as used."""
        return self._states.get(segment)

    def add(
        self,
        segment: str,
        *,
        core_end: int,
        conv_tail: torch.Tensor,
        end: torch.Tensor,
        pairs: dict[int, Pair],
    ) -> None:
        """Keep what a compile captured, beside the pairs of other seam widths."""
        packed = {
            first: pack(pair, dtype=self._dtype, threshold=self._threshold)
            for first, pair in pairs.items()
        }
        held = self._states.pop(segment, None)
        if held is not None and held.core_end == core_end:
            packed = {**held.pairs, **packed}
        # A copy: what was captured is a view of a whole step's tensor.
        state = SegmentState(core_end, conv_tail.clone(), pack_state(end, self._dtype), packed)
        if state.nbytes > self._states.maxsize:
            logger.warning(
                "sglang_pic: a segment's state of %d bytes exceeds --pic-state-mib and is not kept",
                state.nbytes,
            )
            return
        self._states[segment] = state

    def drop(self, segment: str) -> None:
        """Forget a segment, whose pages are gone."""
        self._states.pop(segment, None)

    def clear(self) -> None:
        self._states.clear()

    def bytes_by_segment(self) -> dict[str, int]:
        """Bytes held for each segment."""
        return {name: state.nbytes for name, state in self._states.items()}

    @property
    def nbytes(self) -> int:
        return int(self._states.currsize)

    @property
    def budget(self) -> int:
        """Bytes the store may hold."""
        return int(self._states.maxsize)
