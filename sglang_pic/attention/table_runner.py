"""Linked rows by tables: planned once a step, run in every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_pic.attention.kernels import Kernels
from sglang_pic.attention.step import StepRow
from sglang_pic.attention.tables import Shape, SharedParts, TableStep, Walkers, build_tables
from sglang_pic.kernels.rotate import LayerRope, angles


class TableRunner:
    """Runs the kernels of ``kernels.rows`` over a step's tables.

    Args:
        kernels: in torch, or in Triton.
        shape: of layers and device.
        device: of the pool.

    Attributes:
        step: of the pass that was planned last.
    """

    def __init__(self, kernels: Kernels, shape: Shape, device: torch.device | str):
        self._kernels, self._shape, self._device = kernels, shape, device
        self.step: TableStep | None = None
        self._turns: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def plan(self, rows: Sequence[StepRow]) -> None:
        """Prepare one forward pass of these rows, one of them linked at least."""
        grown = self.step.grown(rows, self._shape) if self.step is not None else None
        if grown is None:
            self._turns.clear()
            grown = build_tables(rows, self._shape, self._device)
        self.step = grown

    def run(
        self,
        query: torch.Tensor,
        pool: tuple[torch.Tensor, ...],
        rope: LayerRope | None,
        scale: float,
        out: torch.Tensor,
        window: int | None = None,
    ) -> None:
        """One layer of the planned pass, linked rows alone, into ``out``.

        Args:
            query, out: [tokens, heads, head_dim], the whole batch's; of latent attention
                the second as wide as a value.
            pool: keys, values, req_to_token, pool_rows, as in ``kernels.rows.walk_rows``.
            rope, scale, window: of the layer; the last as in ``kernels.rows.walk_rows``.
        """
        step = self.step
        assert step is not None
        if window is not None:
            assert step.within is not None
            for which, walkers in enumerate((step.within.links, step.within.decodes)):
                if walkers is not None:
                    self._walk(query, pool, walkers, 3 + which, rope, scale, out, window)
            return
        for which, walkers in enumerate((step.links, step.decodes)):
            if walkers is not None:
                self._walk(query, pool, walkers, which, rope, scale, out)
        if step.parts is not None:
            self._decode_parts(query, pool, step.parts, rope, scale, out)

    def _walk(
        self,
        query: torch.Tensor,
        pool: tuple[torch.Tensor, ...],
        walkers: Walkers,
        which: int,
        rope: LayerRope | None,
        scale: float,
        out: torch.Tensor,
        window: int | None = None,
    ) -> None:
        turns = None if rope is None else self._turns_of(rope, which, walkers.offset)
        within = {} if window is None else {"window": window}
        self._kernels.walk_rows(
            query, *pool, walkers.table, turns, out,
            scale=scale, neox=rope is None or rope.neox, splits=walkers.splits, **within,
        )  # fmt: skip

    def _decode_parts(
        self,
        query: torch.Tensor,
        pool: tuple[torch.Tensor, ...],
        parts: SharedParts,
        rope: LayerRope | None,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        table = parts.table
        if rope is None:
            gathered = query[table.query]
        else:
            cos, sin = self._turns_of(rope, 2, parts.offset)
            gathered = self._kernels.gather_rotate(
                query, table.query, cos, sin, neox=rope.neox, first=rope.first
            )
        partial, lse = self._kernels.attend_parts(gathered, *pool, table, scale=scale)
        merged = self._kernels.merge(partial, lse, table.merge_indptr, table.merge_index)
        out[table.token] = merged.to(out.dtype)

    def _turns_of(
        self, rope: LayerRope, which: int, offset: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles back by one of the step's offsets, computed for the first layer that
        asks."""
        key = (id(rope.cos_sin_cache), which)
        if key not in self._turns:
            self._turns[key] = angles(rope.cos_sin_cache, -offset)
        return self._turns[key]
