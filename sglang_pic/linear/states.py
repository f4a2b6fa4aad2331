"""States of compiled segments, of turns and checkpoints, packed and kept beside pages."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from sglang_pic.config import PicConfig
from sglang_pic.forest.kept import Kept
from sglang_pic.forest.nodes import SEGMENT
from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.kernels.operators.storage import PackedPair, copied_in_columns, pack, pack_state
from sglang_pic.linear.shape import WIDEST, LinearShape
from sglang_pic.linear.state import SegmentState


class PackedStates:
    """Packs states as they are kept, and finds them.

    Args:
        config: the server's settings.
        kept: where they are kept.
        by_shape: as of ``SegmentState``.
    """

    def __init__(self, config: PicConfig, kept: Kept, by_shape: LinearShape | None = None):
        self.kept = kept
        self._by_shape = by_shape
        self._dtype = getattr(torch, config.state_dtype)
        self._threshold = config.operator_threshold

    @property
    def itemsize(self) -> int:
        """Bytes of a number, as it counts."""
        return self._dtype.itemsize if self._by_shape is None else WIDEST

    def find(self, name: str, owner: tuple[str, ...]) -> SegmentState | None:
        """States of a segment, if they are this owner's."""
        held: SegmentState | None = self.kept.held(name, owner)
        return held

    def add(
        self,
        name: str,
        owner: tuple[str, ...],
        *,
        core_end: int,
        conv_tail: torch.Tensor,
        end: torch.Tensor,
        pairs: dict[int, Pair],
        cost: float = 0.0,
        uses: int = 1,
        group: str = SEGMENT,
        offer: bool = True,
        is_exact: bool = False,
    ) -> bool:
        """Keep what a compile captured, beside the pairs of other seam widths.

        Args:
            cost: FLOPs that one use of the segment saves.
            uses, group, offer: as of ``Kept.put``.
            is_exact: nothing is narrowed.

        Returns:
            Whether it fits; if not, what was held of this segment stays as it was.
        """
        packed = {
            first: pack(pair, dtype=self._dtype, threshold=self._threshold)
            for first, pair in pairs.items()
        }
        # Copies, all of them: what was captured is a view of a whole step's tensor.
        tail = conv_tail.clone(memory_format=torch.contiguous_format)
        kept = pack_state(end, torch.float32 if is_exact else self._dtype)
        state = self._beside(name, SegmentState(owner, core_end, tail, kept, packed))
        return self.kept.put(name, state, cost=cost, group=group, uses=uses, offer=offer)

    def _beside(self, name: str, state: SegmentState) -> SegmentState:
        """With the pairs of other seam widths that are held."""
        held = self.find(name, state.owner)
        pairs = state.pairs
        if held is not None and held.core_end == state.core_end:
            pairs = {**held.pairs, **pairs}
        return dataclasses.replace(state, pairs=pairs, by_shape=self._by_shape)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All that is kept of a segment, by name, for ``adopt``; empty if nothing is."""
        state: SegmentState | None = self.kept.get(name)
        if state is None:
            return {}
        found = {"conv_tail": state.conv_tail, "end": state.end}
        for first, pair in state.pairs.items():
            found[f"pair.{first}.operator"] = pair.operator
            found[f"pair.{first}.state"] = pair.state
            if pair.kept is not None:
                found[f"pair.{first}.kept"] = pair.kept
        return found

    def adopt(
        self,
        name: str,
        owner: tuple[str, ...],
        core_end: int,
        tensors: dict[str, torch.Tensor],
        *,
        device: Any,
        cost: float,
        uses: int,
        offer: bool,
        evict: bool,
    ) -> bool:
        """Keep copies of what ``tensors`` gave of a segment, as it is, beside the pairs of
        other seam widths.

        Args:
            uses, offer, evict: as of ``Kept.put``.

        Returns:
            Whether it fits.
        """
        heads = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("pair.")})

        def of(name: str, *, matrices: bool = True) -> torch.Tensor:
            if matrices:
                return copied_in_columns(tensors[name].to(device))
            return tensors[name].to(device, copy=True)

        pairs = {}
        for first in heads:
            kept = tensors.get(f"pair.{first}.kept")
            kept = kept.clone() if kept is not None else None
            operator = of(f"pair.{first}.operator", matrices=kept is not None)
            pairs[first] = PackedPair(operator, kept, of(f"pair.{first}.state"))
        state = SegmentState(owner, core_end, of("conv_tail", matrices=False), of("end"), pairs)
        return self.kept.put(
            name,
            self._beside(name, state),
            cost=cost,
            group=SEGMENT,
            uses=uses,
            offer=offer,
            evict=evict,
        )
